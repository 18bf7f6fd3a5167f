"""Completions that student and teacher write together: the mixture of their laws against NumPy and enumeration, its ends bit for bit."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import scipy.stats
from test_sampler import numpy_law

from opd_jax import parallel, rollout, sampler
from opd_jax.models import transformer
from opd_jax.sampler import Law
from opd_jax.types import Prompts, UserError

KEY = jax.random.key(3)
STOP, LENGTH = 1, 2


# ---- one draw


def draws(count, *, beta, law, shared=5, seed=0):
    """(logits of student and teacher, of other widths, what many draws from them gave)."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=7), rng.normal(size=6)
    id_B = jnp.arange(count, dtype=jnp.uint32)
    uniform_B, writer_B = (sampler.uniforms(jax.random.key(k), id_B, jnp.int32(0)) for k in (1, 2))
    wide = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), (count, len(x))) for x in (student, teacher)]
    return student, teacher, sampler.draw_mixture(*wide, uniform_B, writer_B, jnp.float32(beta), law, shared)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("law", [Law(), Law(temperature=0.7, top_k=3)], ids=["plain", "truncated"])
def test_draws_follow_the_mixture_of_the_two_laws_on_the_tokens_that_both_have(beta, law):
    count = 20_000
    student, teacher, (token_B, logp_B, behaviour_B) = draws(count, beta=beta, law=law)
    mixture = beta * numpy_law(teacher[:5], law) + (1 - beta) * numpy_law(student[:5], law)
    observed = np.bincount(np.asarray(token_B), minlength=5)
    assert len(observed) == 5 and not observed[mixture == 0].any()
    assert scipy.stats.chisquare(observed[mixture > 0], count * mixture[mixture > 0]).pvalue > 1e-3
    np.testing.assert_allclose(behaviour_B, np.log(mixture[token_B]), atol=1e-5)
    whole = np.log(numpy_law(student, Law()))  # the policy of the loss knows its other rows too
    np.testing.assert_allclose(logp_B, whole[token_B], atol=1e-5)


# ---- completions


@functools.cache
def case():
    """(student, teacher, the student's prompts, the teacher's own, of another width); 12 rows."""
    student, teacher = (models.tiny_model(seed, scale=6.0, num_hidden_layers=1) for seed in (1, 2))
    rng = np.random.default_rng(0)
    return student, teacher, models.ragged_prompts(rng, 12, width=5), models.ragged_prompts(rng, 12, width=7)


def mixed(beta, own=None, theirs=None, *, student=None, teacher=None, **changes):
    one, two, prompts, teacher_prompts = case()
    asked = {"key": KEY, "max_new_tokens": 6, "stop_ids": (STOP, 4)} | changes
    reads = (prompts if own is None else own), (teacher_prompts if theirs is None else theirs)
    return rollout.sample_mixture(*(student or one), reads[0], *(teacher or two), reads[1], beta=beta, **asked)


def fields(found, but=()):
    return {name: np.asarray(getattr(found, name)) for name in found.__dataclass_fields__ if name not in but}


def same(a, b, but=()):
    for name, value in fields(a, but).items():
        np.testing.assert_array_equal(value, np.asarray(getattr(b, name)), err_msg=name)


def rows_of(prompts, rows):
    return jax.tree.map(lambda x: x[np.asarray(rows)], prompts)


def log_probs(model, prompts, tokens_BT):
    """[B, T] float64, from one pass without a cache."""
    params, config = model
    tokens = jnp.concatenate([prompts.tokens_BS, tokens_BT], axis=1)
    mask_BL = jnp.concatenate([prompts.mask_BS, jnp.ones(tokens_BT.shape, bool)], axis=1)
    logits = transformer.apply(params, config, tokens, mask_BL=mask_BL)[:, prompts.tokens_BS.shape[1] - 1 : -1]
    logp = np.asarray(logits, np.float64) - np.log(np.exp(np.asarray(logits, np.float64)).sum(-1, keepdims=True))
    return np.take_along_axis(logp, np.asarray(tokens_BT)[:, :, None], axis=-1)[:, :, 0]


@pytest.mark.parametrize("law", [{}, pytest.param({"top_p": 0.8}, marks=pytest.mark.slow)], ids=["plain", "truncated"])
def test_at_its_ends_the_mixture_is_one_model_bit_for_bit(law):
    """Two writers may not cost a bit: the student's draws, and the teacher's after its own prompt, whose log-probs are the behaviour's."""
    student, teacher, prompts, teacher_prompts = case()
    asked = {"key": KEY, "max_new_tokens": 6, "stop_ids": (STOP, 4)} | law
    same(mixed(0.0, **law), rollout.sample(*student, prompts, **asked))
    taught = mixed(1.0, **law)
    same(taught, rollout.sample(*teacher, teacher_prompts, **asked), but=("logp_BT",))
    expected = np.where(taught.mask_BT, log_probs(student, prompts, taught.tokens_BT), 0)
    np.testing.assert_allclose(taught.logp_BT, expected, atol=1e-4)


def test_both_log_probs_are_those_of_a_pass_over_the_whole_text():
    student, teacher, prompts, teacher_prompts = case()
    found = mixed(0.4)
    mask_BT = np.asarray(found.mask_BT)
    own, theirs = log_probs(student, prompts, found.tokens_BT), log_probs(teacher, teacher_prompts, found.tokens_BT)
    np.testing.assert_allclose(found.logp_BT, np.where(mask_BT, own, 0), atol=1e-4)
    mixture = np.log(0.4 * np.exp(theirs) + 0.6 * np.exp(own))
    np.testing.assert_allclose(found.behaviour_logp_BT, np.where(mask_BT, mixture, 0), atol=1e-4)
    assert np.asarray(found.stopped_B).any() and not np.asarray(found.stopped_B).all()
    alone = [mixed(beta).tokens_BT for beta in (0.0, 1.0)]
    assert not any(np.array_equal(found.tokens_BT, tokens) for tokens in alone)


def test_completions_come_as_often_as_their_probability_says():
    """All completions of at most two tokens, enumerated: each token has a writer of its own, and each model has its cache."""
    vocab, count, beta = 4, 6000, 0.35
    student, teacher = (models.tiny_model(seed, scale=6.0, num_hidden_layers=1, vocab_size=vocab) for seed in (4, 5))
    prompt = lambda tokens: Prompts(
        jnp.broadcast_to(jnp.array([tokens], jnp.int32), (count, len(tokens))),
        jnp.ones((count, len(tokens)), bool),
        jnp.arange(count, dtype=jnp.uint32),
    )
    own, theirs = prompt([2, 3]), prompt([0, 3, 0])
    found = mixed(beta, own, theirs, student=student, teacher=teacher, max_new_tokens=LENGTH, stop_ids=(STOP,))
    every = [(STOP,)] + [pair for pair in itertools.product(range(vocab), repeat=2) if pair[0] != STOP]
    padded = jnp.array([(pair * 2)[:2] for pair in every], jnp.int32)
    p, q = (log_probs(model, rows_of(read, range(len(every))), padded) for model, read in ((student, own), (teacher, theirs)))
    token_NT = np.log(beta * np.exp(q) + (1 - beta) * np.exp(p))
    expected = np.exp([row[: len(pair)].sum() for row, pair in zip(token_NT, every, strict=True)])
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    drawn = [tuple(tokens[mask].tolist()) for tokens, mask in zip(np.asarray(found.tokens_BT), np.asarray(found.mask_BT), strict=True)]
    observed = np.array([drawn.count(pair) for pair in every])
    assert observed.sum() == count and expected.min() * count > 5
    assert scipy.stats.chisquare(observed, count * expected / expected.sum()).pvalue > 1e-3
    behaviour = np.asarray(found.behaviour_logp_BT).sum(1)
    np.testing.assert_allclose(behaviour, [np.log(expected[every.index(pair)]) for pair in drawn], atol=2e-5)


def near(a, b):
    same(a, b, but=("logp_BT", "behaviour_logp_BT"))
    for name in ("logp_BT", "behaviour_logp_BT"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_order_split_padding_and_length_change_nothing():
    _, _, own, theirs = case()
    whole = mixed(0.5)
    order = np.random.default_rng(1).permutation(12)
    near(mixed(0.5, rows_of(own, order), rows_of(theirs, order)), rows_of(whole, order))
    wide = lambda read: Prompts(
        jnp.pad(read.tokens_BS, ((0, 0), (3, 0)), constant_values=9), jnp.pad(read.mask_BS, ((0, 0), (3, 0))), read.id_B
    )
    part = [2, 7, 5]
    near(mixed(0.5, wide(rows_of(own, part)), wide(rows_of(theirs, part))), rows_of(whole, part))
    longer = mixed(0.5, max_new_tokens=9)
    np.testing.assert_array_equal(longer.tokens_BT[:, :6], whole.tokens_BT)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_draw_the_same_tokens(shape):
    (params, config), (teacher_params, teacher), own, theirs = case()
    own, theirs = rows_of(own, range(8)), rows_of(theirs, range(8))
    one, mesh = mixed(0.5, own, theirs), parallel.make_mesh(*shape)
    with jax.set_mesh(mesh):
        near(mixed(0.5, *parallel.shard_batch((own, theirs), mesh)), one)


def test_another_beta_compiles_nothing(caplog):
    mixed(0.5)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for beta in (0.0, 0.25, 1.0):
            mixed(beta)
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")] == []


@pytest.mark.slow
def test_tokens_that_the_student_does_not_have_are_not_drawn():
    """A teacher of 19 rows of which 14 are real, a student of 17: only the first 14 are drawn, whoever writes."""
    _, _, own, theirs = case()
    params, config = models.tiny_model(6, scale=6.0, num_hidden_layers=1, vocab_size=19)
    teacher = params, dataclasses.replace(config, valid_vocab_size=14)
    found = mixed(0.5, teacher=teacher, stop_ids=())
    assert int(jnp.max(found.tokens_BT)) < 14
    assert np.isfinite(found.logp_BT).all() and np.isfinite(found.behaviour_logp_BT).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"beta": 1.5}, "beta = 1.5 must be between 0 and 1"),
        ({"beta": float("nan")}, "beta = nan must be between 0 and 1"),
        ({"theirs": slice(3)}, "teacher_prompts has 3 rows and prompts 12; give one for each rollout"),
        ({"max_new_tokens": 58}, "a prompt of 7 tokens and max_new_tokens = 58 exceed the model's context of 64 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be at least 1"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(changes, words):
    changes = {"beta": 0.5} | changes
    rows = changes.pop("theirs", slice(None))
    theirs = jax.tree.map(lambda x: x[rows], case()[3])
    theirs = theirs.replace(mask_BS=jnp.ones_like(theirs.mask_BS))
    with pytest.raises(UserError, match=re.escape(words)):
        mixed(changes.pop("beta"), theirs=theirs, **changes)
