"""sample(): the same tokens for any order, split, padding and length; stop tokens; greedy equals transformers. Then the sources."""

import dataclasses

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from opd_jax import config as config_lib
from opd_jax import parallel, rollout, sampler, score
from opd_jax.data import pipeline
from opd_jax.data.tasks import Example
from opd_jax.data.tokenizer import byte
from opd_jax.models import spec, transformer
from opd_jax.types import Prompts, UserError

pytestmark = pytest.mark.slow

KEY = jax.random.key(3)


def rows_of(prompts: Prompts, rows) -> Prompts:
    return jax.tree.map(lambda x: x[np.asarray(rows)], prompts)


def case(rows=6, width=5, **changes):
    params, config = models.tiny_model(scale=6.0, **changes)
    return params, config, models.ragged_prompts(np.random.default_rng(0), rows=rows, width=width)


def sample(params, config, prompts, **changes):
    return rollout.sample(params, config, prompts, **({"key": KEY, "max_new_tokens": 8, "stop_ids": (1, 4)} | changes))


def same(a, b):
    for name in ("tokens_BT", "mask_BT", "id_B", "stopped_B"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("logp_BT", "behaviour_logp_BT"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-5, err_msg=name)


def smallest_margin(params, config, prompts, completions, key=KEY):
    """Smallest distance of a draw's uniform to the boundary of its token, over all drawn tokens: what a reduction order may not exceed."""
    views = jnp.concatenate([prompts.tokens_BS, completions.tokens_BT], axis=1)
    mask_BL = jnp.concatenate([prompts.mask_BS, jnp.ones(completions.tokens_BT.shape, bool)], axis=1)
    logits = transformer.apply(params, config, views, mask_BL=mask_BL)[:, prompts.tokens_BS.shape[1] - 1 : -1]
    cumulative = np.cumsum(np.asarray(jax.nn.softmax(logits, axis=-1), np.float64), axis=-1)
    margins = []
    for t in range(completions.tokens_BT.shape[1]):
        uniform_B = np.asarray(sampler.uniforms(key, prompts.id_B, jnp.int32(t)), np.float64)
        distance_B = np.abs(cumulative[:, t] - uniform_B[:, None]).min(-1)
        margins += distance_B[np.asarray(completions.mask_BT)[:, t]].tolist()
    return min(margins)


def test_order_split_padding_and_length_change_nothing(record_property):
    params, config, prompts = case()
    whole = sample(params, config, prompts)
    margin = smallest_margin(params, config, prompts, whole)
    record_property("smallest margin of a draw", margin)
    assert margin > 1e-5  # otherwise the draws below could differ by rounding alone
    order = [4, 0, 5, 2, 1, 3]
    same(sample(params, config, rows_of(prompts, order)), rows_of(whole, order))
    for part in ([0], [1, 2], [3, 4, 5]):
        same(sample(params, config, rows_of(prompts, part)), rows_of(whole, part))
    wide = Prompts(
        jnp.pad(prompts.tokens_BS, ((0, 0), (7, 0)), constant_values=9), jnp.pad(prompts.mask_BS, ((0, 0), (7, 0))), prompts.id_B
    )
    same(sample(params, config, wide), whole)
    longer = sample(params, config, prompts, max_new_tokens=12)
    np.testing.assert_array_equal(longer.tokens_BT[:, :8], whole.tokens_BT)
    np.testing.assert_array_equal(longer.mask_BT[:, :8], whole.mask_BT)


@pytest.mark.parametrize("shape", models.MESHES)
def test_eight_devices_draw_the_same_tokens(shape):
    params, config, prompts = case(rows=8)
    one = sample(params, config, prompts)
    mesh = parallel.make_mesh(*shape)
    placed = jax.device_put(params, spec.shardings(transformer.param_specs(config), mesh))
    with jax.set_mesh(mesh):
        eight = sample(placed, config, parallel.shard_batch(prompts, mesh))
    same(eight, one)


def test_golden_completions():
    """Weights, prompts and draws are seeded: a change here changes every recorded figure."""
    params, config, prompts = case(rows=3)
    found = sample(params, config, prompts, max_new_tokens=6)
    assert found.tokens_BT.tolist() == [[12, 7, 7, 0, 7, 15], [3, 3, 10, 6, 13, 13], [6, 12, 16, 8, 9, 7]]
    np.testing.assert_allclose(found.logp_BT[0], [-3.3983, -2.3501, -1.8713, -2.9176, -2.1010, -2.7908], atol=1e-3)


def test_the_key_and_the_id_change_the_draw():
    params, config, prompts = case()
    whole = sample(params, config, prompts)
    assert not np.array_equal(sample(params, config, prompts, key=jax.random.key(9)).tokens_BT, whole.tokens_BT)
    assert not np.array_equal(sample(params, config, prompts.replace(id_B=prompts.id_B + 100)).tokens_BT, whole.tokens_BT)


def test_rows_end_at_their_stop_token_and_are_padded_after_it():
    params, config, prompts = case(rows=12)
    found = sample(params, config, prompts, max_new_tokens=10)
    lengths = np.asarray(found.mask_BT).sum(1)
    assert len(set(lengths)) > 2 and not np.asarray(found.stopped_B).all() and np.asarray(found.stopped_B).any()
    for tokens, mask, stopped in zip(*(np.asarray(x) for x in (found.tokens_BT, found.mask_BT, found.stopped_B)), strict=True):
        kept = tokens[mask]
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert stopped == (kept[-1] in (1, 4)) and not np.isin(kept[:-1], (1, 4)).any()
        assert (tokens[~mask] == 0).all()
    assert not np.asarray(found.logp_BT)[~np.asarray(found.mask_BT)].any()


def test_padding_equal_to_the_stop_token_does_not_hide_it():
    params, config, prompts = case(rows=12)
    plain = sample(params, config, prompts)
    padded = sample(params, dataclasses.replace(config, pad_token_id=1), prompts)
    np.testing.assert_array_equal(padded.mask_BT, plain.mask_BT)
    np.testing.assert_array_equal(np.where(plain.mask_BT, padded.tokens_BT, 0), plain.tokens_BT)
    row = int(np.argmax(np.asarray((plain.tokens_BT == 1) & plain.mask_BT).any(1)))
    assert bool(padded.stopped_B[row])


def test_no_stop_ids_means_full_length():
    params, config, prompts = case()
    found = sample(params, config, prompts, stop_ids=())
    assert np.asarray(found.mask_BT).all() and not np.asarray(found.stopped_B).any()


def test_the_loop_ends_when_every_row_has_stopped(monkeypatch):
    """Counts the decode steps that run: one before each draw but the first, which the prompt gives, not as many as were allowed."""
    params, config, prompts = case()
    steps, decode_step = [], transformer.decode_step

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(*args)

    monkeypatch.setattr(transformer, "decode_step", counted)
    found = sample(params, config, prompts, stop_ids=tuple(range(8)), max_new_tokens=41)
    jax.effects_barrier()
    longest = np.asarray(found.mask_BT).sum(1).max()
    assert np.asarray(found.stopped_B).all() and 2 < longest < 41
    assert len(steps) == longest - 1


@pytest.mark.parametrize("law", [{}, {"temperature": 0.7}, {"top_p": 0.8, "min_p": 0.01}, {"top_k": 3}])
def test_sampled_log_probabilities_equal_scored_ones(law):
    params, config, prompts = case()
    found = sample(params, config, prompts, **law)
    scored = score.logprobs(params, config, prompts, found)
    assert float(jnp.abs(scored - found.logp_BT).max()) < 1e-4
    if not law:
        np.testing.assert_allclose(found.behaviour_logp_BT, found.logp_BT, atol=1e-6)
    else:
        assert float(jnp.abs(found.behaviour_logp_BT - found.logp_BT).max()) > 1e-3


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_k": 1}])
def test_greedy_is_the_most_probable_token_each_time(greedy):
    params, config, prompts = case()
    found = sample(params, config, prompts, **greedy)
    tokens = jnp.concatenate([prompts.tokens_BS, found.tokens_BT], axis=1)
    mask_BL = jnp.concatenate([prompts.mask_BS, jnp.ones(found.tokens_BT.shape, bool)], axis=1)
    best = jnp.argmax(transformer.apply(params, config, tokens, mask_BL=mask_BL), axis=-1)[:, prompts.tokens_BS.shape[1] - 1 : -1]
    np.testing.assert_array_equal(np.asarray(best)[np.asarray(found.mask_BT)], np.asarray(found.tokens_BT)[np.asarray(found.mask_BT)])
    assert not np.asarray(found.behaviour_logp_BT).any()


def test_ragged_prompts_of_one_width_compile_once(caplog):
    params, config, _ = case()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for seed in range(4):
            sample(params, config, models.ragged_prompts(np.random.default_rng(seed), rows=6, width=5), key=jax.random.key(seed))
            if seed == 0:
                caplog.clear()
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")] == []


def test_prompts_of_another_width_compile_their_reading_alone(caplog):
    """Caches have few lengths, so that the program that decodes serves prompts of several widths."""
    params, config, _ = case()
    programs = []
    for width in (4, 5, 7):
        with jax.log_compiles(), caplog.at_level("WARNING"):
            sample(params, config, models.ragged_prompts(np.random.default_rng(width), rows=3, width=width), max_new_tokens=7)
        programs.append({r.getMessage().split()[1] for r in caplog.records if r.getMessage().startswith("Compiling")})
        caplog.clear()
    assert "jit(_until)" in programs[0] and "jit(_begin)" in programs[0]
    assert not any("jit(_until)" in found for found in programs[1:]) and all("jit(_begin)" in found for found in programs)


def test_a_cache_that_grows_forgets_nothing():
    """Completions that outgrow their first cache twice: scored by one pass over the whole text."""
    params, config, prompts = case(rows=2, max_position_embeddings=192)
    found = sample(params, config, prompts, max_new_tokens=130, stop_ids=())
    scored = score.logprobs(params, config, prompts, found)
    assert float(jnp.abs(scored - found.logp_BT).max()) < 1e-4


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be at least 1"),
        ({"max_new_tokens": 60}, "a prompt of 5 tokens and max_new_tokens = 60 exceed the model's context of 64 tokens"),
        ({"top_p": 2.0}, "top_p = 2.0"),
    ],
)
def test_refusals(changes, words):
    params, config, prompts = case()
    prompts = prompts.replace(mask_BS=jnp.ones_like(prompts.mask_BS))
    with pytest.raises(UserError, match=words):
        sample(params, config, prompts, **changes)


def test_prompts_padded_on_the_wrong_side_are_refused():
    params, config, prompts = case()
    with pytest.raises(UserError, match="padded on the left"):
        sample(params, config, prompts.replace(mask_BS=prompts.mask_BS.at[0, -1].set(False)))


# ---- beginnings that are given


def beginning(tokens_BT, length_B, ended_B=None):
    return sampler.Given(jnp.asarray(tokens_BT), jnp.asarray(length_B, jnp.int32), ended_B)


def test_a_beginning_that_would_have_been_drawn_changes_nothing_but_the_mask():
    params, config, prompts = case()
    drawn = sample(params, config, prompts)
    lengths = np.asarray(drawn.mask_BT).sum(1)
    for length_B in (np.zeros(6, int), np.minimum([0, 1, 2, 3, 4, 7], lengths - 1)):
        found = sample(params, config, prompts, given=beginning(drawn.tokens_BT, length_B))
        for name in ("tokens_BT", "stopped_B"):
            np.testing.assert_array_equal(getattr(found, name), getattr(drawn, name))
        np.testing.assert_array_equal(found.present_BT, drawn.mask_BT)
        behind_BT = np.arange(8)[None, :] >= length_B[:, None]
        np.testing.assert_array_equal(found.mask_BT, drawn.mask_BT & behind_BT)
        for name in ("logp_BT", "behaviour_logp_BT"):
            np.testing.assert_array_equal(getattr(found, name), np.where(behind_BT, getattr(drawn, name), 0))


def test_what_follows_another_beginning_is_what_a_prompt_that_ends_in_it_gives():
    """The continuation at position t has the uniform of position t, and reads the beginning as it reads a prompt."""
    params, config, prompts = case()
    other_BT = np.random.default_rng(2).integers(5, config.vocab_size, (6, 8)).astype(np.int32)
    found = sample(params, config, prompts, given=beginning(other_BT, [3] * 6))
    np.testing.assert_array_equal(found.tokens_BT[:, :3], other_BT[:, :3])
    longer = Prompts(
        jnp.concatenate([prompts.tokens_BS, other_BT[:, :3]], 1),
        jnp.pad(prompts.mask_BS, ((0, 0), (0, 3)), constant_values=True),
        prompts.id_B,
    )
    views = jnp.concatenate([longer.tokens_BS, found.tokens_BT[:, 3:]], axis=1)
    mask_BL = jnp.pad(longer.mask_BS, ((0, 0), (0, 5)), constant_values=True)
    logits = transformer.apply(params, config, views, mask_BL=mask_BL)[:, longer.tokens_BS.shape[1] - 1 : -1]
    for t in range(5):
        tokens_B, logp_B, _ = sampler.draw(logits[:, t], sampler.uniforms(KEY, prompts.id_B, jnp.int32(t + 3)), sampler.Law())
        drawn_B = np.asarray(found.mask_BT[:, t + 3])
        np.testing.assert_array_equal(np.asarray(tokens_B)[drawn_B], np.asarray(found.tokens_BT[:, t + 3])[drawn_B])
        np.testing.assert_allclose(found.logp_BT[:, t + 3], np.where(drawn_B, logp_B, 0), atol=1e-5)


def test_a_stop_token_of_the_beginning_stops_nothing_and_a_row_that_has_ended_writes_nothing():
    params, config, prompts = case()
    stops_BT = jnp.full((6, 8), 4, jnp.int32)
    found = sample(params, config, prompts, given=beginning(stops_BT, [2] * 6))
    assert np.asarray(found.mask_BT)[:, 2].all() and not np.asarray(found.mask_BT)[:, :2].any()
    ended_B = jnp.arange(6) < 3
    ended = sample(params, config, prompts, given=beginning(stops_BT, [2, 0, 8, 2, 2, 2], ended_B))
    assert np.asarray(ended.present_BT).sum(1)[:3].tolist() == [2, 0, 8] and not np.asarray(ended.mask_BT)[:3].any()
    same(rows_of(ended, [3, 4, 5]), rows_of(found, [3, 4, 5]))
    whole = sample(params, config, prompts, given=beginning(stops_BT, [8] * 6))
    assert np.asarray(whole.present_BT).all() and not np.asarray(whole.stopped_B).any()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_go_on_with_the_same_tokens(shape):
    params, config, prompts = case(rows=8)
    given = beginning(np.full((8, 8), 9, np.int32), np.arange(8) % 4)
    one = sample(params, config, prompts, given=given)
    mesh = parallel.make_mesh(*shape)
    placed = jax.device_put(params, spec.shardings(transformer.param_specs(config), mesh))
    with jax.set_mesh(mesh):
        eight = sample(placed, config, *parallel.shard_batch((prompts,), mesh), given=parallel.shard_batch(given, mesh))
    same(eight, one)
    np.testing.assert_array_equal(eight.present_BT, one.present_BT)


def test_beginnings_that_do_not_fit_are_refused():
    params, config, prompts = case()
    tokens_BT = np.zeros((6, 8), np.int32)
    for given, words in (
        ((tokens_BT[:, :5], np.zeros(6)), r"given has tokens \(6, 5\) and lengths \(6,\); give \(6, 8\)"),
        ((tokens_BT, np.full(6, 9)), "given has lengths from 9 to 9; give 0 to max_new_tokens = 8"),
    ):
        with pytest.raises(UserError, match=words):
            sample(params, config, prompts, given=given)


# ---- sources


def source_case(source, **changes):
    settings = dataclasses.replace(config_lib.Rollout(source=source, batch_size=4, group_size=2, max_new_tokens=6), **changes)
    student = models.tiny_model(seed=1, scale=6.0, vocab_size=259)
    teacher = models.tiny_model(seed=2, scale=6.0, vocab_size=259)
    mesh = parallel.make_mesh()
    made = rollout.make_source(settings, tokenizer=byte(), student=student[1], teacher=teacher[1], seed=0, mesh=mesh)
    examples = [Example(0, "ab=", "cd", "cd"), Example(1, "x=", "a long answer", "y")]
    batch = pipeline.Pipeline(examples, pipeline.Encoder(byte(), 32, "refuse"), prompts_per_step=2, group_size=2, seed=0).batch(0)
    with jax.set_mesh(mesh):
        return made(student[0], teacher[0], batch, 5), student, teacher, batch


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_models_sample_with_the_key_of_the_step(source):
    found, student, teacher, batch = source_case(source, temperature=0.9)
    params, config = student if source == "student" else teacher
    key = jax.random.fold_in(jax.random.key(0), 5)
    expected = rollout.sample(
        params, config, jax.tree.map(jnp.asarray, batch.prompts), key=key, max_new_tokens=6, temperature=0.9, stop_ids=byte().eos_ids
    )
    same(found, expected)
    assert len({tuple(row) for row in np.asarray(found.tokens_BT)}) == 4  # samples of one prompt differ


def test_the_data_set_gives_its_solutions():
    found, _, _, batch = source_case("dataset")
    texts = [byte().decode(np.asarray(t)[np.asarray(m)].tolist()) for t, m in zip(found.tokens_BT, found.mask_BT, strict=True)]
    assert texts == [e.solution[:6] for e in batch.examples for _ in range(2)]
    assert sorted(np.asarray(found.stopped_B).tolist()) == [False, False, True, True]
    assert not np.asarray(found.logp_BT).any()


def test_a_data_set_without_solutions_is_refused():
    made = rollout.make_source(
        config_lib.Rollout(source="dataset"),
        tokenizer=byte(),
        student=models.tiny_config(259),
        teacher=None,
        seed=0,
        mesh=parallel.make_mesh(),
    )
    batch = pipeline.Pipeline([Example(0, "ab")], pipeline.Encoder(byte(), 32, "refuse"), prompts_per_step=1, group_size=1, seed=0).batch(0)
    with pytest.raises(UserError, match="the example with prompt 'ab' has no solution to learn from"):
        made({}, None, batch, 0)
