"""Weights of tokens: against loops in NumPy, constant under the gradient, the same in microbatches; the second signal and its gate."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import context_of
from test_bank import batch_of, case, config_of, goal_of, gradient, same
from test_parts import one_teacher

from opd_jax import claim, objective, observed
from opd_jax import config as config_lib
from opd_jax.config import ConfigError
from opd_jax.numerics.estimators import build, loss_B
from opd_jax.numerics.estimators.base import Context
from opd_jax.numerics.gates import GATES, Gate
from opd_jax.numerics.token_stats import DenseHead, Signal, Stats, Target, token_stats

B, T, V = 4, 6, 5
WEIGHING = [kind for kind in GATES if kind != "none"]


def statistics(seed=0):
    """(statistics, mask with gaps) with NaN where the mask is 0; the third row has log-ratios of 0 alone, the last no token."""
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) < 0.7
    mask[0, 2], mask[0, 3], mask[3] = False, True, False
    entropy, logp, target_logp = rng.uniform(0, 1.6, (B, T)), -rng.exponential(size=(B, T)), -rng.exponential(size=(B, T))
    target_logp[2] = logp[2]
    junk = lambda x: jnp.asarray(np.where(mask, x, np.nan))
    return Stats(logp_BT=junk(logp), target_logp_BT=junk(target_logp), target_entropy_BT=junk(entropy)), mask


def by_loop(gate, stats, mask):
    weights = np.zeros(mask.shape)
    for b, t in zip(*np.nonzero(mask), strict=True):
        if gate.kind == "importance_decay":
            size = {i: abs(float(stats.target_logp_BT[b, i]) - float(stats.logp_BT[b, i])) for i in np.nonzero(mask[b])[0]}
            total = sum(size.values())
            before = sum(x for i, x in size.items() if i < t)
            weights[b, t] = 1 + gate.gain * (1 - (before / total if total else 0.0))
        else:
            entropy = float(stats.target_entropy_BT[b, t])
            above = entropy > gate.threshold
            weights[b, t] = {"teacher_entropy_above": above, "teacher_entropy_below": not above, "confidence": np.exp(-entropy)}[gate.kind]
    return weights


@pytest.mark.parametrize("kind", WEIGHING)
def test_weights_equal_loops_on_gapped_masks(kind, float64):
    stats, mask = statistics()
    gate = Gate(kind, threshold=0.7, gain=0.4)
    found = np.asarray(gate.weights(stats, jnp.asarray(mask)))
    np.testing.assert_allclose(found, by_loop(gate, stats, mask), atol=1e-14)
    assert not found[~mask].any() and len(np.unique(found[mask])) > 1


def test_the_decay_starts_at_1_plus_gain_and_ends_at_the_share_of_the_last_token(float64):
    """By hand: log-ratios of 1, 3 and 4 nats, signs do not count, a masked one neither."""
    stats = Stats(logp_BT=jnp.array([[-1.0, -9.0, -4.0, -4.0]]), target_logp_BT=jnp.array([[-2.0, -1.0, -1.0, -8.0]]))
    found = Gate("importance_decay", gain=0.5).weights(stats, jnp.array([[1, 0, 1, 1]]))
    np.testing.assert_allclose(found, [[1.5, 0.0, 1 + 0.5 * 7 / 8, 1 + 0.5 * 4 / 8]], atol=1e-15)


def test_a_token_that_the_teacher_rules_out_leaves_numbers():
    stats = Stats(logp_BT=jnp.array([[-1.0, -1.0, -1.0]]), target_logp_BT=jnp.array([[-2.0, -jnp.inf, -3.0]]))
    np.testing.assert_allclose(Gate("importance_decay").weights(stats, jnp.ones((1, 3))), [[1.5, 1.5, 1.0]], atol=1e-5)


def test_a_gate_of_the_entropy_and_its_opposite_share_the_tokens_out():
    stats, mask = statistics(1)
    at = float(stats.target_entropy_BT[tuple(np.argwhere(mask)[0])])  # one token is exactly there
    above, below = (
        np.asarray(Gate(f"teacher_entropy_{side}", threshold=at).weights(stats, jnp.asarray(mask))) for side in ("above", "below")
    )
    np.testing.assert_array_equal(above + below, mask)
    assert below[tuple(np.argwhere(mask)[0])] == 1 and above.any()


# ---- in a loss


def laws(seed=4):
    """Logits of student and teacher, tokens, and a mask with gaps."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, B, T, V))
    return tuple(jnp.asarray(x) for x in (student, teacher, rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.7))


def on_logits(goal):
    """(loss, sums, gradient over the student's logits): the code of an update, without a model."""
    student, teacher, tokens, mask = laws()
    shares = tuple(objective.share(part, Context(mask), T) for part in goal.parts)
    targets = {"teacher": Target((DenseHead(teacher),)), "reference": None}
    loss = lambda z: objective.loss(goal, DenseHead(z), targets, tokens, mask, shares)
    (value, sums), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    return float(value), sums, np.asarray(grad)


def gated(kind, threshold=0.8):
    return goal_of(gate=config_lib.Gate(kind, threshold))


def test_weights_of_1_change_no_bit():
    plain, ones = on_logits(goal_of()), on_logits(gated("teacher_entropy_below", 1e6))
    assert plain[0] == ones[0]
    np.testing.assert_array_equal(plain[2], ones[2])


def test_the_normaliser_counts_the_tokens_of_the_mask(float64):
    """A gate that nothing passes gives 0; the terms of a gate and of its opposite add up to the term without one."""
    above, below = (on_logits(gated(f"teacher_entropy_{side}", 1.2)) for side in ("above", "below"))
    plain, nothing = on_logits(goal_of()), on_logits(gated("teacher_entropy_above", 1e6))
    assert above[0] > 0.01 and below[0] > 0.01 and above[0] + below[0] == pytest.approx(plain[0], rel=1e-6)  # sums are float32
    np.testing.assert_allclose(above[2] + below[2], plain[2], atol=1e-12)
    assert nothing[0] == 0.0 and not nothing[2].any()
    shares = [float(observed.metrics(seen[1])["train/gate_distillation"]) for seen in (above, below, nothing)]
    assert 0 < shares[0] < 1 and shares[0] + shares[1] == pytest.approx(1) and shares[2] == 0
    assert "train/gate_distillation" not in observed.metrics(plain[1])


@pytest.mark.parametrize("kind", WEIGHING)
@pytest.mark.parametrize("support", ["full", "sampled"])
def test_the_gradient_is_that_with_the_weights_as_numbers(kind, support, float64):
    """For a loss of the position and for an advantage: the weighted sum of the gradients of single tokens."""
    student, teacher, tokens, mask = laws()
    estimator, gate = build(Signal("reverse_kl", support), "token", 1.0), Gate(kind, threshold=1.2)
    part = objective.Part("distillation", estimator, normaliser="sequence_sum", gate=gate)
    needs = {"logp", "target_logp", "target_entropy", *estimator.needs}
    of = lambda z: token_stats(DenseHead(z), Target((DenseHead(teacher),)), tokens, signal=estimator.signal, needs=needs)
    weights = by_loop(gate, of(student), np.asarray(mask))
    alone = jax.grad(lambda z: loss_B(of(z), estimator.terms(of(z), Context(mask))).sum())(student)
    found = on_logits(objective.Objective((part,), T, True))[2]
    np.testing.assert_allclose(found, weights[..., None] * alone / B, atol=1e-14)
    assert np.abs(found).max() > 0.01


# ---- the second signal


def test_a_second_signal_adds_its_gated_term(float64):
    """EOPD: reverse KL everywhere, forward KL where the teacher is uncertain; each is as if it were alone."""
    unsure = config_lib.Gate("teacher_entropy_above", threshold=1.2)
    both = goal_of(extra_signal=config_lib.ExtraSignal(weight=0.5, gate=unsure))
    assert [part.name for part in both.parts] == ["distillation", "extra"]
    first, second = on_logits(goal_of()), on_logits(goal_of(signal=config_lib.Signal(weight=0.5, divergence="forward_kl"), gate=unsure))
    loss, sums, grad = on_logits(both)
    assert loss == pytest.approx(first[0] + second[0], rel=1e-6) and float(sums["loss_extra"]) == pytest.approx(second[0], rel=1e-6)
    np.testing.assert_allclose(grad, first[2] + second[2], atol=1e-12)
    assert np.abs(second[2]).max() > 0.01


def test_microbatches_and_masks_with_gaps_change_nothing():
    """With both signals gated, through a model: rows of other microbatches have no part in a row's weights."""
    (bank, frozen), context = one_teacher(), context_of(case()[4])
    gaps = jnp.asarray(np.random.default_rng(5).random(context.mask_BT.shape) < 0.7)
    holed = dataclasses.replace(context, mask_BT=context.mask_BT & gaps)
    goal = goal_of(
        gate=config_lib.Gate("importance_decay"), extra_signal=config_lib.ExtraSignal(weight=0.5, gate=config_lib.Gate("confidence"))
    )
    batch = batch_of(goal, contexts={"distillation": holed, "extra": holed})
    one, four = (gradient(goal, bank, frozen, batch, microbatches=pieces) for pieces in (1, 4))
    assert float(one[0]) == pytest.approx(float(four[0]), rel=1e-5) and same(one[2], four[2], 1e-5)
    for name in ("train/gate_distillation", "train/gate_extra"):
        assert float(observed.metrics(one[1])[name]) == pytest.approx(float(observed.metrics(four[1])[name]), rel=1e-5)


def test_the_fields_of_the_second_signal_arrive():
    extra = {"divergence": "jsd", "support": "topk_teacher", "k": 8, "tail": "bucket", "beta": 0.2, "clip": 0.1}
    goal = goal_of(
        signal=config_lib.Signal(weight=0.0),
        extra_signal=config_lib.ExtraSignal(weight=2.0, **extra, gate=config_lib.Gate("importance_decay", gain=0.3)),
        loss=config_lib.Loss(student_temperature=0.7, normaliser="constant"),
        estimator=config_lib.Estimator(importance="clip", clip=3.0),
    )
    (part,) = goal.parts
    assert part.estimator.signal == Signal("jsd", "topk_teacher", k=8, tail="bucket", beta=0.2, clip=0.1, student_temperature=0.7)
    assert (part.coefficient, part.normaliser, part.gate) == (2.0, "constant", Gate("importance_decay", gain=0.3))
    assert (part.estimator.importance, part.estimator.clip) == ("clip", 3.0)


def claim_of(**blocks):
    config = config_of(loss=config_lib.Loss(normaliser="sequence_sum"), **blocks)
    return claim.of_run(objective.from_config(config, has_teacher=True), config)


def test_a_run_says_what_its_weights_do_to_the_claim():
    unbiased = "Unbiased for the token-level reverse KL with prefixes held fixed"
    assert claim_of() == unbiased
    for kind in WEIGHING:
        said = claim_of(gate=config_lib.Gate(kind))
        assert said == f"{unbiased}, but for: {Gate(kind).words}, which is another objective (gate.kind={kind})"
    extra = config_lib.ExtraSignal(weight=0.5, gate=config_lib.Gate("teacher_entropy_above"))
    assert claim_of(extra_signal=extra) == (
        f"{unbiased}; beside it extra_signal.weight=0.5 of: Unbiased for the token-level forward KL with prefixes held fixed, but for: "
        "tokens count where the teacher's entropy is above 0.8 nats, which is another objective "
        "(extra_signal.gate.kind=teacher_entropy_above)"
    )


@pytest.mark.parametrize(
    "blocks, message",
    [
        ({"gate": {"kind": "entropy"}}, "config field gate.kind = 'entropy' is not known; valid: none, teacher_entropy_above"),
        ({"gate": {"kind": "confidence"}, "signal": {"weight": 0.0}}, "gate.kind = 'confidence' weighs the term that signal.weight = 0"),
        ({"extra_signal": {"gate": config_lib.Gate("confidence")}}, "extra_signal.gate.kind = 'confidence' weighs the term that extra_"),
        ({"extra_signal": {"weight": 1.0, "support": "topk_teacher"}}, "extra_signal.k = 0 must be a whole number of at least 1"),
        ({"extra_signal": {"weight": 1.0, "tail": "buckets"}}, "config field extra_signal.tail = 'buckets' is not known"),
        (
            {"extra_signal": {"weight": 1.0, "support": "sampled", "clip": 0.1}},
            "extra_signal.clip = 0.1 does not go with extra_signal.supp",
        ),
    ],
)
def test_what_does_not_fit_is_refused(blocks, message):
    kinds = {"gate": config_lib.Gate, "signal": config_lib.Signal, "extra_signal": config_lib.ExtraSignal}
    with pytest.raises(ConfigError, match=re.escape(message)):
        objective.from_config(config_of(**{name: kinds[name](**fields) for name, fields in blocks.items()}), has_teacher=True)


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({"signal": {"divergence": "nll"}, "gate": {"kind": "confidence"}}, "because gate.kind = 'confidence' needs a teacher"),
        (
            {"signal": {"divergence": "nll"}, "extra_signal": {"weight": 1.0}},
            "because extra_signal.divergence = 'forward_kl' needs a teacher",
        ),
    ],
)
def test_what_needs_a_teacher_names_the_field(blocks, words):
    kinds = {"gate": config_lib.Gate, "signal": config_lib.Signal, "extra_signal": config_lib.ExtraSignal}
    config = config_of(rollout=config_lib.Rollout(source="dataset"), **{name: kinds[name](**fields) for name, fields in blocks.items()})
    with pytest.raises(ConfigError, match=re.escape(words)):
        objective.from_config(config, has_teacher=False)
    assert objective.from_config(config, has_teacher=True).has_teacher  # it scores, also where the first term needs none


def test_draws_of_the_student_are_asked_for_by_the_second_signal_too():
    c = config_lib.default()
    c.teacher.path, c.rollout.source, c.extra_signal.weight, c.extra_signal.support = "somewhere", "dataset", 1.0, "sampled"
    with pytest.raises(ConfigError, match=re.escape("must be 'student', because extra_signal.support = 'sampled' needs draws")):
        config_lib.parse(c)
    c.extra_signal.weight = 0.0
    config_lib.parse(c)


@pytest.mark.parametrize("fields", [{"threshold": -0.1}, {"gain": float("nan")}, {"threshold": float("inf")}])
def test_values_of_a_gate_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=re.escape(f"gate.{next(iter(fields))} = ")):
        Gate("confidence", **fields)
