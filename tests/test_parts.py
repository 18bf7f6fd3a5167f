"""The loss as a sum of parts, each with its mask, weight and normaliser; the reward's part against NumPy and PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import context_of
from test_bank import batch_of, case, config_of, goal_of, gradient, same

from opd_jax import config as config_lib
from opd_jax import objective, teachers
from opd_jax.numerics import estimators
from opd_jax.numerics.estimators import Context, loss_B
from opd_jax.numerics.estimators.rewarded import build
from opd_jax.numerics.token_stats import DenseHead, Signal, Target, token_stats
from opd_jax.types import UserError

REWARD = config_lib.Reward(weight=0.5)


def one_teacher():
    (params, config), _ = case()[1]
    return teachers.single(config), {"teacher": params}


def rewarded_context():
    """Advantages of the rollouts, on part of the tokens."""
    rollout = case()[4]
    context, rng = context_of(rollout), np.random.default_rng(3)
    mask_BT = context.mask_BT & jnp.asarray(rng.random(context.mask_BT.shape) < 0.7)
    advantage_BT = jnp.asarray(np.repeat(rng.normal(size=(len(mask_BT), 1)), mask_BT.shape[1], axis=1), jnp.float32)
    return dataclasses.replace(context, mask_BT=mask_BT, advantage_BT=advantage_BT)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_gradient_is_the_sum_of_those_of_the_parts(microbatches):
    """Each alone has the normaliser of its own mask; weights are those of the config."""
    normaliser = config_lib.Loss(normaliser="token_mean")
    blocks = {"reward": REWARD, "regulariser": config_lib.Regulariser(entropy=0.1), "loss": dataclasses.replace(normaliser, labels=0.3)}
    whole, only = goal_of(**blocks), {"reward": rewarded_context()}
    bank, frozen = one_teacher()
    assert [part.name for part in whole.parts] == ["distillation", "reward", "labels", "entropy"]
    loss, sums, grads = gradient(whole, bank, frozen, batch_of(whole, contexts=only), microbatches=microbatches)
    losses, gradients = [], []
    for part in whole.parts:
        goal = dataclasses.replace(whole, parts=(part,))
        value, _, grad = gradient(goal, bank, frozen, batch_of(goal, contexts=only))
        losses.append(float(value))
        gradients.append(grad)
        assert float(sums[f"loss_{part.name}"]) == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    assert float(loss) == pytest.approx(sum(losses), rel=1e-5)
    assert same(grads, jax.tree.map(lambda *x: sum(x), *gradients), 1e-5)


def test_a_weight_scales_its_part_alone():
    bank, frozen = one_teacher()
    once, twice = (goal_of(signal=config_lib.Signal(weight=weight)) for weight in (1.0, 2.0))
    a, b = (gradient(goal, bank, frozen, batch_of(goal))[2] for goal in (once, twice))
    assert same(jax.tree.map(lambda x: 2 * x, a), b)


def test_a_masked_rollout_is_as_if_it_were_not_there():
    """In its part: the denominator is that of the others."""
    bank, frozen = one_teacher()
    goal, context = goal_of(), context_of(case()[4])
    kept = np.array([0, 2, 3, 6])
    mask_BT = context.mask_BT & jnp.isin(jnp.arange(8), kept)[:, None]
    masked = gradient(goal, bank, frozen, batch_of(goal, contexts={"distillation": dataclasses.replace(context, mask_BT=mask_BT)}))
    subset = gradient(goal, bank, frozen, batch_of(goal, rows=kept))
    assert float(masked[0]) == pytest.approx(float(subset[0]), rel=1e-5) and same(masked[2], subset[2], 1e-5)


def test_nothing_left_to_learn_from_gives_0():
    bank, frozen = one_teacher()
    goal, context = goal_of(), context_of(case()[4])
    nothing = dataclasses.replace(context, mask_BT=jnp.zeros_like(context.mask_BT))
    loss, sums, grads = gradient(goal, bank, frozen, batch_of(goal, contexts={"distillation": nothing}))
    assert float(loss) == 0.0 and same(grads, jax.tree.map(jnp.zeros_like, grads), 0.0)
    assert float(sums["tokens"]) == float(context.mask_BT.sum()) > 0  # metrics speak of all that was drawn


def test_the_reference_has_a_divergence_of_its_own():
    """With the student as its own reference it is 0; the coefficient is regulariser.kl."""
    (params, config), (_, (other, other_config)), *_ = case()
    goal = goal_of(signal=config_lib.Signal(weight=0.0), regulariser=config_lib.Regulariser(kl=0.2))
    bank = dataclasses.replace(teachers.single(other_config), reference=config)
    loss, _, grads = gradient(goal, bank, {"teacher": other, "reference": params}, batch_of(goal))
    assert abs(float(loss)) < 1e-6 and same(grads, jax.tree.map(jnp.zeros_like, grads), 1e-6)
    bank = dataclasses.replace(teachers.single(other_config), reference=other_config)
    plain = gradient(goal_of(), *one_bank(other_config, other), plain_batch())
    # The reference reads what the student reads, the teacher here too.
    found = gradient(goal, bank, {"teacher": other, "reference": other}, batch_of(goal))
    assert same(found[2], jax.tree.map(lambda x: 0.2 * x, plain[2]), 1e-6)


def test_at_another_temperature_the_reference_is_compared_as_the_student_is():
    (params, config), (_, (other, other_config)), *_ = case()
    warm = config_lib.Loss(student_temperature=2.0, teacher_temperature=2.0)
    goal = goal_of(signal=config_lib.Signal(weight=0.0), regulariser=config_lib.Regulariser(kl=0.2), loss=warm)
    bank = dataclasses.replace(teachers.single(other_config), reference=config)
    loss, sums, grads = gradient(goal, bank, {"teacher": other, "reference": params}, batch_of(goal))
    assert abs(float(loss)) < 1e-6 and same(grads, jax.tree.map(jnp.zeros_like, grads), 1e-6)
    # The metrics speak of the teacher, whichever part comes first.
    plain = gradient(goal_of(), *one_bank(other_config, other), batch_of(goal_of()))[1]
    assert float(sums["kl"]) == pytest.approx(float(plain["kl"]), rel=1e-5) and float(sums["kl"]) > 1


def test_ratios_are_of_every_token_that_was_drawn(float64):
    """A token that is not learnt from is part of the prefix of those that are."""
    rng = np.random.default_rng(4)
    logits, tokens = rng.normal(size=(2, 5, 3)), rng.integers(0, 3, (2, 5))
    drawn, behaviour = jnp.ones((2, 5), bool), jnp.asarray(rng.normal(size=(2, 5)) - 1)
    built = estimators.build(Signal("reverse_kl"), "token", 1.0, importance="cumulative")
    target = Target((DenseHead(jnp.asarray(rng.normal(size=(2, 5, 3)))),))
    stats = token_stats(DenseHead(jnp.asarray(logits)), target, jnp.asarray(tokens), signal=built.signal, needs={"logp", "local"})
    learnt = drawn & (jnp.arange(5) >= 3)[None, :]
    of = lambda context: built.terms(stats, context).w_local_BT
    whole = of(Context(drawn, behaviour_logp_BT=behaviour))
    found = of(Context(learnt, behaviour_logp_BT=behaviour, drawn_BT=drawn))
    np.testing.assert_array_equal(found, whole)
    assert not np.allclose(of(Context(learnt, behaviour_logp_BT=behaviour)), whole)


def one_bank(config, params):
    return teachers.single(config), {"teacher": params}


def plain_batch():
    goal = goal_of()
    batch = batch_of(goal)
    return batch.replace(teacher=batch.student)


def test_no_loss_is_refused():
    with pytest.raises(UserError, match="signal.weight = 0 leaves no loss"):
        objective.from_config(config_of(signal=config_lib.Signal(weight=0.0)), has_teacher=True)


# ---- rewards


def reward_gradient(estimator, logits, tokens, mask, advantage, behaviour):
    context = Context(jnp.asarray(mask), behaviour_logp_BT=jnp.asarray(behaviour), advantage_BT=jnp.asarray(advantage))

    def loss(z):
        stats = token_stats(DenseHead(z), None, jnp.asarray(tokens), signal=estimator.signal, needs={"logp"})
        return loss_B(stats, estimator.terms(stats, context)).sum()

    return jax.grad(loss)(jnp.asarray(logits))


@pytest.mark.parametrize("clip_low, clip_high", [(0.2, 0.2), (0.2, 0.28)])
def test_the_clipped_gradient_is_that_of_the_published_objective(clip_low, clip_high, float64):
    """min(rho A, clip(rho) A), by PyTorch; ratios on both sides of both bounds."""
    rng = np.random.default_rng(0)
    logits, tokens, mask = rng.normal(size=(6, 9, 5)), rng.integers(0, 5, (6, 9)), rng.random((6, 9)) < 0.8
    logp = np.take_along_axis(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), tokens[..., None], -1)[..., 0]
    behaviour, advantage = logp + 0.3 * rng.normal(size=logp.shape), np.repeat(rng.normal(size=(6, 1)), 9, 1)
    z = torch.tensor(logits, requires_grad=True)
    own = torch.log_softmax(z, -1).gather(-1, torch.tensor(tokens)[..., None])[..., 0]
    rho, a = torch.exp(own - torch.tensor(behaviour)), torch.tensor(advantage)
    surrogate = torch.minimum(rho * a, torch.clamp(rho, 1 - clip_low, 1 + clip_high) * a)
    (-(surrogate * torch.tensor(mask)).sum()).backward()
    built = build(clip_low=clip_low, clip_high=clip_high, student_temperature=1.0)
    np.testing.assert_allclose(reward_gradient(built, logits, tokens, mask, advantage, behaviour), z.grad.numpy(), atol=1e-12)
    ratio = np.exp(logp - behaviour)
    assert ((ratio > 1 + clip_high) & (advantage > 0) & mask).any() and ((ratio < 1 - clip_low) & (advantage < 0) & mask).any()


def test_without_clipping_the_gradient_is_reinforce_whatever_the_ratio(float64):
    rng = np.random.default_rng(1)
    logits, tokens, mask = rng.normal(size=(4, 5, 3)), rng.integers(0, 3, (4, 5)), np.ones((4, 5), bool)
    advantage = np.repeat(rng.normal(size=(4, 1)), 5, 1)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -advantage[..., None] * (np.eye(3)[tokens] - p)
    built = build(clip_low=0.0, clip_high=0.0, student_temperature=1.0)
    for shift in (0.0, 1.0):
        np.testing.assert_allclose(reward_gradient(built, logits, tokens, mask, advantage, shift + 0 * advantage), expected, atol=1e-12)


def test_the_expected_gradient_of_a_reward_is_that_of_its_expectation(float64):
    """By all completions of two tokens; a baseline that knows nothing of the completion changes nothing."""
    rng = np.random.default_rng(2)
    table, reward = rng.normal(size=(4, 3)), rng.normal(size=(3, 3))  # logits after: nothing, token 0, 1, 2
    tokens = np.array([(a, b) for a in range(3) for b in range(3)])
    rows = np.stack([np.zeros(9, int), 1 + tokens[:, 0]], 1)

    def probability(x):
        logp = jax.nn.log_softmax(x[rows])
        return jnp.exp(jnp.take_along_axis(logp, jnp.asarray(tokens)[..., None], -1)[..., 0].sum(1))

    exact = jax.grad(lambda x: -jnp.sum(probability(x) * reward.ravel()))(jnp.asarray(table))
    built = build(clip_low=0.0, clip_high=0.0, student_temperature=1.0)
    for baseline in (0.0, 3.0):
        advantage = np.repeat((reward.ravel() - baseline)[:, None], 2, 1)
        of_each = reward_gradient(built, table[rows], tokens, np.ones((9, 2), bool), advantage, np.zeros((9, 2)))
        weighed = np.asarray(probability(jnp.asarray(table)))[:, None, None] * of_each
        found = np.zeros_like(table)
        np.add.at(found, rows, weighed)
        np.testing.assert_allclose(found, exact, atol=1e-12)


@pytest.mark.parametrize("low, high, words", [(0.2, 0.0, "both 0"), (1.0, 0.2, "below 1"), (-0.1, 0.2, "0 (off) or more")])
def test_clips_that_make_no_sense_are_refused(low, high, words):
    with pytest.raises(ValueError) as error:
        build(clip_low=low, clip_high=high, student_temperature=1.0)
    assert words in str(error.value)
