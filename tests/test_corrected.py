"""Completions that the student begins and the teacher ends: enumerated, cut where they should be, and learnt from behind the cut alone."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import scipy.stats
from test_mixture import case, log_probs, rows_of
from test_sources import SAMPLED, byte_models, made_by, parsed
from test_sources import batch as batch_of_source

from opd_jax import claim, cost, objective, parallel, rollout
from opd_jax import config as config_lib
from opd_jax.batches import BatchMaker
from opd_jax.config import ConfigError
from opd_jax.data.tasks.arithmetic import Arithmetic
from opd_jax.data.tokenizer import byte
from opd_jax.types import Prompts, UserError

KEY, STOP = jax.random.key(3), 1


def corrected(cut, student=None, teacher=None, own=None, theirs=None, **changes):
    one, two, prompts, teacher_prompts = case()
    asked = {"key": KEY, "max_new_tokens": 6, "stop_ids": (STOP, 4)} | changes
    reads = (prompts if own is None else own), (teacher_prompts if theirs is None else theirs)
    return rollout.sample_corrected(*(student or one), reads[0], *(teacher or two), reads[1], cut=cut, **asked)


def parts(found):
    """[(tokens that were kept, tokens that the teacher wrote)] of each row."""
    arrays = (np.asarray(x) for x in (found.tokens_BT, found.mask_BT, found.standing_BT))
    return [(tuple(row[stands & ~mask].tolist()), tuple(row[mask].tolist())) for row, mask, stands in zip(*arrays, strict=True)]


def test_beginnings_and_continuations_come_as_often_as_their_probability_says():
    """All of them, for at most two tokens: the student's law up to a uniform cut, the teacher's from there on, after its own prompt."""
    vocab, count = 4, 6000
    student, teacher = (models.tiny_model(seed, scale=6.0, num_hidden_layers=1, vocab_size=vocab) for seed in (4, 5))
    prompt = lambda tokens: Prompts(
        jnp.broadcast_to(jnp.array([tokens], jnp.int32), (count, len(tokens))),
        jnp.ones((count, len(tokens)), bool),
        jnp.arange(count, dtype=jnp.uint32),
    )
    own, theirs = prompt([2, 3]), prompt([0, 3, 0])
    found = parts(corrected("random", student, teacher, own, theirs, max_new_tokens=2, stop_ids=(STOP,)))
    every = [(STOP,)] + [pair for pair in itertools.product(range(vocab), repeat=2) if pair[0] != STOP]
    padded = jnp.array([(pair * 2)[:2] for pair in every], jnp.int32)
    p, q = (np.exp(log_probs(model, rows_of(read, range(len(every))), padded)) for model, read in ((student, own), (teacher, theirs)))
    whole = {pair: np.prod(row[: len(pair)]) for pair, row in zip(every, q, strict=True)}
    stops = p[0, 0]
    expected = {((), pair): (stops + (1 - stops) / 2) * share for pair, share in whole.items()}
    expected |= {(pair[:1], pair[1:]): p[i, 0] / 2 * q[i, 1] for i, pair in enumerate(every) if len(pair) == 2}
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5) and set(found) <= set(expected)
    likely = [outcome for outcome, share in expected.items() if share * count > 5]
    observed = [sum(outcome not in likely for outcome in found)] + [found.count(outcome) for outcome in likely]
    shares = np.array([1 - sum(expected[outcome] for outcome in likely)] + [expected[outcome] for outcome in likely])
    assert len(likely) > 12
    assert scipy.stats.chisquare(observed[1:], shares[1:] / shares[1:].sum() * sum(observed[1:])).pvalue > 1e-3
    assert abs(observed[0] - count * shares[0]) <= 4 * np.sqrt(count * shares[0]) + 4


@pytest.mark.parametrize("cut", rollout.CUTS)
def test_the_students_beginning_stays_and_the_teacher_takes_over_at_the_cut(cut):
    student, teacher, prompts, teacher_prompts = case()
    asked = {"key": KEY, "max_new_tokens": 6, "stop_ids": (STOP, 4)}
    written = rollout.sample(*student, prompts, **asked)
    found = corrected(cut)
    mask_BT, stands_BT = np.asarray(found.mask_BT), np.asarray(found.standing_BT)
    kept_BT = stands_BT & ~mask_BT
    np.testing.assert_array_equal(np.where(kept_BT, found.tokens_BT, -1), np.where(kept_BT, written.tokens_BT, -1))
    kept_B, length_B = kept_BT.sum(1), np.asarray(written.mask_BT).sum(1)
    assert (kept_B < length_B).all() and len(set(kept_B.tolist())) > 2 and mask_BT.any(1).all()
    theirs = log_probs(teacher, teacher_prompts, found.tokens_BT)
    np.testing.assert_allclose(found.logp_BT, np.where(mask_BT, theirs, 0), atol=1e-4)
    if cut == "worst":
        ratio = log_probs(teacher, teacher_prompts, written.tokens_BT) - log_probs(student, prompts, written.tokens_BT)
        assert kept_B.tolist() == np.where(written.mask_BT, ratio, np.inf).argmin(1).tolist()
    # Draws of its own: the uniforms that chose the student's tokens do not choose the teacher's.
    coupled = rollout.sample(*teacher, teacher_prompts, **asked, given=(written.tokens_BT, jnp.asarray(kept_B, jnp.int32)))
    assert not np.array_equal(coupled.tokens_BT, found.tokens_BT)


def test_a_cut_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="cut = 'best' is not known; valid: random, worst"):
        corrected("best")


@pytest.mark.slow
def test_the_source_of_a_config_reads_its_cut_and_its_step():
    (student, teacher), read = byte_models(), batch_of_source()
    own, theirs = (jax.tree.map(jnp.asarray, prompts) for prompts in (read.prompts, read.teacher_prompts))
    for cut in rollout.CUTS:
        found = made_by(5, source="corrected", cut=cut, temperature=0.9)
        asked = {"key": jax.random.fold_in(jax.random.key(0), 5), "max_new_tokens": 3, "temperature": 0.9, "stop_ids": byte().eos_ids}
        expected = rollout.sample_corrected(*student, own, *teacher, theirs, cut=cut, **asked)
        for ours, theirs_ in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(ours, theirs_)


def test_the_batch_learns_from_the_teachers_tokens_and_judges_the_whole_text():
    settings = config_lib.Config(rollout=config_lib.Rollout(source="corrected", batch_size=4, group_size=1, max_new_tokens=6))
    settings = dataclasses.replace(settings, signal=config_lib.Signal("nll"))
    goal = objective.from_config(settings, has_teacher=True)
    assert not goal.has_teacher  # cross-entropy: the teacher has written and need not score
    task, read = Arithmetic(level=2, train_size=0, eval_size=4, seed=0), batch_of_source()
    read = dataclasses.replace(read, examples=[task.example("train", i) for i in range(4)])
    tokens_BT, mask_BT = np.full((4, 6), ord("7")), np.array([[False, True, True, False, False, False]] * 4)
    texts = [example.solution.encode() for example in read.examples]
    tokens_BT[:, :3] = [[*text, byte().eos_ids[0]] for text in texts]
    present_BT = np.arange(6)[None, :] < np.full((4, 1), 3)
    mesh = parallel.make_mesh()
    found = rollout.from_completions(*(jnp.asarray(x) for x in (tokens_BT, mask_BT, np.ones(4, bool))), jnp.arange(4))
    found = found.replace(present_BT=jnp.asarray(present_BT))
    maker = BatchMaker(settings, goal, task, byte(), None, mesh)
    np.testing.assert_array_equal(maker(read, found).batch.shares[0].context.mask_BT, mask_BT)
    assert maker.judge(read, found).reward_B.tolist() == [1.0] * 4
    assert maker.judge(read, found.replace(present_BT=None)).reward_B.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout__cut": "best"}, "config field rollout.cut = 'best' is not known; valid: random, worst; did you mean"),
        ({"teacher__path": ""}, "teacher.path = '' must name a model, because rollout.source = 'corrected' needs a teacher"),
        (SAMPLED, "rollout.source = 'corrected' must be 'student', because signal.support = 'sampled' needs draws of the student"),
        ({"context__privileged__reads": "solution"}, "rollout.source = 'corrected' lets it write"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message.split("; did")[0])):
        parsed(**{"rollout__source": "corrected"} | changes)


def test_no_ratio_is_known_of_a_completion_with_two_writers_and_a_cut():
    with pytest.raises(ConfigError, match="importance = 'token' needs the law .* rollout.source = 'corrected' does not give"):
        objective.from_config(parsed(rollout__source="corrected", estimator__importance="token"), has_teacher=True)


def test_the_claim_says_whose_prefixes_they_are():
    config = parsed(rollout__source="corrected", rollout__cut="worst", loss__normaliser="sequence_sum")
    said = claim.of_run(objective.from_config(config, has_teacher=True), config)
    assert said == (
        "Unbiased for the token-level reverse KL with prefixes held fixed, but for: prefixes are the student's up to a cut before the "
        "student's worst token, which its draws decide, then the teacher's (rollout.source=corrected, cut=worst)"
    )


def test_the_work_of_a_correction_is_that_of_two_writers():
    tokens = {"prompt": 10, "teacher_prompt": 30, "completion": 50}
    assert cost.account("corrected", 7, 7, 11).work(**tokens) == (2 * 7 * 60 + 2 * 11 * 80 + 6 * 7 * 60, 50, 0)
    student = cost.account("student", 7, 7, None)
    assert student.work(**tokens, drawn=20) == (2 * 7 * 60 + 6 * 7 * 60, 20, 0)  # the others were observed: read, not sampled
