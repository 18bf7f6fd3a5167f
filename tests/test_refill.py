"""Fewer slots than rollouts: the completions of the plain sampler, in fewer decode steps."""

import dataclasses
import functools

import jax
import models
import numpy as np
import pytest
from tables import Bigrams

from opd_jax import config as config_lib
from opd_jax import parallel, rollout, score
from opd_jax.models import transformer

pytestmark = pytest.mark.slow

ROWS, WIDTH, LENGTH = 13, 5, 12
ASKED = {"key": jax.random.key(3), "max_new_tokens": LENGTH, "stop_ids": (1, 4, 9)}


@functools.cache
def case(**changes):
    params, config = models.tiny_model(scale=6.0, **changes)
    prompts = models.ragged_prompts(np.random.default_rng(0), rows=ROWS, width=WIDTH)
    return params, config, prompts, rollout.sample(params, config, prompts, **ASKED)


def same(a, b):
    for name in ("tokens_BT", "mask_BT", "id_B", "stopped_B"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("logp_BT", "behaviour_logp_BT"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("slots", [1, 4, 12])
def test_slots_change_no_completion(slots):
    """In row order, with prompts and completions of all lengths. One slot writes more tokens than its cache has places."""
    params, config, prompts, plain = case()
    lengths = np.asarray(plain.mask_BT).sum(1)
    assert lengths.min() == 1 and lengths.max() == LENGTH and lengths.sum() > 64
    same(rollout.sample(params, config, prompts, **ASKED, slots=slots), plain)
    if slots == 4:  # a mask of 0 and 1 is one, too
        same(rollout.sample(params, config, prompts.replace(mask_BS=prompts.mask_BS.astype(np.int32)), **ASKED, slots=slots), plain)


def test_slots_change_no_completion_of_a_model_with_windows():
    """What a token sees is counted in places of the cache."""
    windowed = {"model_type": "mistral", "sliding_window": 4}
    params, config, prompts, plain = case(**windowed)
    assert config.sliding_window == 4
    same(rollout.sample(params, config, prompts, **ASKED, slots=4), plain)


def test_a_slot_does_not_wait_for_the_others(monkeypatch):
    """Counts the decode steps: as many as four rows need that are never idle while there are prompts."""
    params, config, prompts, plain = case()
    steps, decode_step = [], transformer.decode_step

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(*args)

    monkeypatch.setattr(transformer, "decode_step", counted)
    rollout.sample(params, config, prompts, **ASKED | {"stop_ids": (1, 4, 9, 9)}, slots=4)
    jax.effects_barrier()
    left = [0] * 4
    for length in np.asarray(plain.mask_BT).sum(1):  # each prompt goes to the slot that is free first; its first token needs no step
        left[int(np.argmin(left))] += length - 1
    assert len(steps) == max(left) < -(-ROWS // 4) * (LENGTH - 1)


def test_other_prompts_and_keys_compile_nothing(caplog):
    params, config, *_ = case()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for seed in range(3):
            prompts = models.ragged_prompts(np.random.default_rng(seed), rows=ROWS, width=WIDTH)
            rollout.sample(params, config, prompts, **ASKED | {"key": jax.random.key(seed)}, slots=4)
            if seed == 0:
                caplog.clear()
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")] == []


def test_where_slots_cannot_be_all_rows_are_written_at_once():
    """Models of the user's, beginnings that are given, several devices."""
    params, config, prompts, plain = case()
    logits = jax.random.normal(jax.random.key(0), (17, 17))
    same(rollout.sample(logits, Bigrams(17), prompts, **ASKED, slots=4), rollout.sample(logits, Bigrams(17), prompts, **ASKED))
    given = (plain.tokens_BT, np.ones(ROWS, np.int32))
    found = rollout.sample(params, config, prompts, **ASKED, slots=4, given=given)
    np.testing.assert_array_equal(found.present_BT[:, 0], True)
    rows = jax.tree.map(lambda x: x[:8], prompts)
    mesh = parallel.make_mesh(8, 1, 1)
    with jax.set_mesh(mesh):
        eight = rollout.sample(params, config, parallel.shard_batch(rows, mesh), **ASKED, slots=4)
    same(eight, jax.tree.map(lambda x: x[:8], plain))


def test_long_completions_are_what_scoring_says_of_them():
    """After the cache has moved many times: the log-probs that slots record are those of one pass over the whole text."""
    params, config = models.tiny_model(scale=6.0, max_position_embeddings=256)
    prompts = models.ragged_prompts(np.random.default_rng(0), rows=40, width=9)
    asked = {"key": jax.random.key(3), "max_new_tokens": 128, "stop_ids": (1,)}
    found = rollout.sample(params, config, prompts, **asked, slots=8)
    lengths = np.asarray(found.mask_BT).sum(1)
    assert lengths.max() > 100 and lengths.sum() > 500
    np.testing.assert_allclose(found.logp_BT, score.logprobs(params, config, prompts, found), atol=1e-5)
    same(found, rollout.sample(params, config, prompts, **asked))


@pytest.mark.parametrize(
    "changes, devices, why",
    [
        ({}, 2, "there are 2 devices"),
        ({"batch_size": 4}, 1, "there are no more rollouts (rollout.batch_size = 4)"),
        ({"max_turns": 2}, 1, "completions have several turns (rollout.max_turns = 2)"),
        ({"source": "dagger"}, 1, "rollout.source = 'dagger' writes all rows at once"),
    ],
)
def test_slots_without_effect_are_told(changes, devices, why, caplog):
    mesh = lambda devices: parallel.make_mesh(devices, devices=jax.devices()[:devices])
    asked = dataclasses.replace(config_lib.Rollout(batch_size=8, slots=4), **changes)
    rollout.tell_idle_slots(config_lib.Rollout(batch_size=8, slots=4), mesh(1))
    rollout.tell_idle_slots(dataclasses.replace(asked, slots=0), mesh(devices))
    assert not caplog.messages
    rollout.tell_idle_slots(asked, mesh(devices))
    assert caplog.messages == [f"rollout.slots = 4 has no effect: {why}"]
