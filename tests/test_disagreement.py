"""How far several teachers are apart: against NumPy on dense laws, exact ends, and which laws of a bank count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from test_bank import batch_of, case, goal_of, members

from opd_jax import config as config_lib
from opd_jax import objective, observed
from opd_jax.models import forward
from opd_jax.numerics.targets import SparseTarget, Target
from opd_jax.numerics.token_stats import DenseHead, Signal, token_stats
from opd_jax.teachers import Bank, Parameters

B, T, V, M = 2, 3, 7, 3


def found(target, *, temperature=1.0, tile=None):
    student, tokens = DenseHead(jnp.zeros((B, T, V))), jnp.zeros((B, T), int)
    signal = Signal("reverse_kl", teacher_temperature=temperature)
    return np.asarray(token_stats(student, target, tokens, signal=signal, needs=("disagreement",), tile=tile).disagreement_BT)


def several(logits, pool="prob", members=None):
    weights = np.random.default_rng(1).dirichlet(np.ones(len(logits)), (B, T)).transpose(2, 0, 1)
    return Target(tuple(DenseHead(jnp.asarray(x)) for x in logits), jnp.asarray(weights), pool, members=members)


def by_numpy(logits):
    """Entropy of the mean law less the mean of the entropies."""
    laws = scipy.special.softmax(logits, axis=-1)
    entropy = lambda p: scipy.special.entr(p).sum(-1)
    return entropy(laws.mean(0)) - entropy(laws).mean(0)


def test_it_is_the_jensen_shannon_divergence_whatever_pool_and_weights(float64):
    logits = 2 * np.random.default_rng(0).normal(size=(M, B, T, V))
    for target in (several(logits), several(logits, "logit")):
        np.testing.assert_allclose(found(target, tile=2), by_numpy(logits), atol=1e-14)
    np.testing.assert_allclose(found(several(logits), temperature=1.7), by_numpy(logits / 1.7), atol=1e-14)
    np.testing.assert_allclose(found(several(logits, members=2)), by_numpy(logits[:2]), atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_laws_agree_exactly_and_disjoint_ones_differ_by_log_m(count):
    law = np.random.default_rng(2).normal(size=(B, T, V)).astype(np.float32) * np.array([[[1], [3], [20]]], np.float32)
    law[..., 2] = -np.inf
    assert not found(several(np.stack([law] * count))).any()
    apart = np.where(np.eye(V)[:count, None, None] > 0, 0.0, -np.inf) + np.zeros((count, B, T, V))
    np.testing.assert_allclose(found(several(apart)), np.log(count), atol=1e-6)


def test_a_cache_knows_one_teacher_alone():
    target = SparseTarget(jnp.zeros((B, T, 1), int), jnp.zeros((B, T, 1)), jnp.full((B, T), -jnp.inf))
    with pytest.raises(ValueError, match="the statistic 'disagreement' needs more than the teacher's top 1"):
        token_stats(
            DenseHead(jnp.zeros((B, T, V))),
            target,
            jnp.zeros((B, T), int),
            signal=Signal("reverse_kl", "topk_teacher", k=1),
            needs=("disagreement",),
        )


def test_the_metric_is_of_the_members_on_the_tokens_of_the_student():
    """Routed, with a reference and a scale: neither the route nor the reference has a say."""
    (own, config), *_ = case()
    frozen, models = members()
    both = config_lib.Teacher(members={name: config_lib.Member(path="p") for name in ("one", "two")})
    goal, alone = goal_of(teacher=both), goal_of()
    assert (goal.several, alone.several) == (True, False) and "disagreement" in goal.shown - alone.shown
    bank = Bank(models, (0.5, 0.5), scale=1.25, reference=config)
    batch = batch_of(goal, route_B=jnp.array((0, 1, 1, 0, 1, 0, 0, 1)))

    @jax.jit
    def look(batch):
        target = bank.target(Parameters({**frozen, "reference": own}, {}, own), batch.teacher, batch.student, batch.route_B)[0]
        head, tokens_BT = forward.hidden(own, config, batch.student), batch.student.completion_BT
        _, sums = objective.loss(goal, head, {"teacher": target, "reference": None}, tokens_BT, batch.mask_BT, batch.shares)
        return observed.metrics(sums), jnp.stack([jnp.einsum("btd,dv->btv", one.hidden_BTD, one.unembed_DV) for one in target.heads])

    metrics, logits = look(batch)
    assert len(logits) == 3
    expected = by_numpy(np.asarray(logits, np.float64)[:2])[np.asarray(batch.mask_BT)].mean()
    assert float(metrics["teacher/disagreement"]) == pytest.approx(expected, rel=1e-5) and expected > 0.05


def test_a_self_teacher_is_one_member():
    """The live student of a trust region is none; nor is the reference."""
    (own, config), *_ = case()
    parameters = Parameters({"teacher": own, "reference": own}, {}, own)
    one = Bank((("teacher", config),), update="trust_region", rate=0.1)
    for bank in (one, dataclasses.replace(one, update="frozen", scale=1.25, reference=config)):
        law = lambda batch, bank=bank: bank.target(parameters, batch.teacher, batch.student, None)[0]
        target = jax.eval_shape(law, batch_of(goal_of()))
        assert len(target.heads) == 2 and target.members == 1
