"""Baselines against NumPy loops; which of them keep the expected gradient, by enumeration of all batches of rollouts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.analysis import enumeration
from opd_jax.numerics import baselines, estimators
from opd_jax.numerics.estimators import REGISTRY
from opd_jax.numerics.token_stats import Signal


def loop(advantage_BT, mask_BT, group_B, kind):
    """The definitions, entry by entry, in float64."""
    result = np.zeros(mask_BT.shape)
    for b, t in np.ndindex(*mask_BT.shape):
        if kind == "batch_mean":
            pool = advantage_BT[mask_BT]
        elif kind == "position_mean":
            pool = advantage_BT[mask_BT[:, t], t]
        else:
            pool = [advantage_BT[j, t] for j in range(len(mask_BT)) if j != b and group_B[j] == group_B[b] and mask_BT[j, t]]
        result[b, t] = np.mean(pool) if len(pool) else 0.0
    return result


@pytest.mark.parametrize("kind", baselines.ACROSS_ROWS)
def test_across_rows_equals_a_loop_over_ragged_groups(kind):
    rng = np.random.default_rng(0)
    advantage_BT, mask_BT, group_B = rng.normal(size=(7, 5)), rng.random((7, 5)) < 0.6, np.array([3, 0, 3, 1, 0, 3, 9])
    dirty_BT = np.where(mask_BT, advantage_BT, np.nan)
    found = baselines.across_rows(jnp.asarray(dirty_BT), jnp.asarray(mask_BT), jnp.asarray(group_B), kind=kind)
    np.testing.assert_allclose(found, loop(advantage_BT, mask_BT, group_B, kind), atol=1e-6)


def test_no_gradient_flows_into_a_baseline():
    gradient = jax.grad(lambda a: baselines.across_rows(a, jnp.ones((4, 3)), jnp.zeros(4), kind="leave_one_out").sum())
    assert not np.asarray(gradient(jnp.ones((4, 3)))).any()


def of(model, rollouts, **choices):
    """(expected gradient, trace of the covariance) of the mean over batches of `rollouts`, with a baseline or without."""
    built = estimators.build(Signal("reverse_kl", "sampled"), **{"gamma": 1.0, **choices})
    return np.asarray(model.expected_gradient(built, rollouts=rollouts)), float(model.trace_covariance(built, rollouts=rollouts))


SMALL = {"vocab": 2, "length": 3, "stop": 1, "features": 2, "seed": 3}


@pytest.mark.parametrize("credit", ["token", "to_go", "sequence"])
@pytest.mark.parametrize("baseline", ["kl", "optimal", "leave_one_out"])
def test_baselines_of_the_state_and_of_others_keep_the_expected_gradient(baseline, credit, float64):
    """Ragged lengths; batches of three, because the baseline of one depends on the two others."""
    model = enumeration.make("small", **SMALL)
    expected, plain = of(model, 3, credit=credit)
    found, variance = of(model, 3, credit=credit, baseline=baseline)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert variance != pytest.approx(plain, rel=1e-3)


def test_leave_one_out_of_registry_follows_its_claim_over_all_pairs(float64):
    model = enumeration.make("stop", stop=2, length=3, seed=3)
    for name in ("to_go_leave_one_out", "sequence_leave_one_out"):
        exact = model.exact_gradient(REGISTRY[name].target)
        np.testing.assert_allclose(model.expected_gradient(REGISTRY[name], rollouts=2), exact, atol=1e-10)
        alone = dataclasses.replace(REGISTRY[name], baseline="none")
        np.testing.assert_allclose(model.gradients(REGISTRY[name]), model.gradients(alone), atol=1e-12)


@pytest.mark.parametrize("baseline", ["batch_mean", "position_mean"])
@pytest.mark.parametrize("rollouts", [2, 3])
def test_a_mean_with_the_own_sample_scales_the_expected_gradient_by_1_minus_1_over_n(baseline, rollouts, float64):
    """For sequence credit and one length; elsewhere it is biased in other ways."""
    model = enumeration.make("tabular", vocab=2, length=3, seed=1)
    plain, _ = of(model, rollouts, credit="sequence")
    found, _ = of(model, rollouts, credit="sequence", baseline=baseline)
    np.testing.assert_allclose(found, (1 - 1 / rollouts) * plain, atol=1e-10)
    ragged = enumeration.make("small", **SMALL)
    built = estimators.build(Signal("reverse_kl", "sampled"), "to_go", 1.0, baseline=baseline)
    assert not built.unbiased and "includes the own sample" in built.claim
    error = np.linalg.norm(of(ragged, rollouts, credit="to_go", baseline=baseline)[0] - ragged.exact_gradient(built.target))
    assert error > 1e-2


def test_optimal_baseline_lowers_the_variance_that_the_kl_baseline_may_raise(float64):
    """Trace norms of one rollout, over 20 random tabular students: the proxy is exact there, so it never loses; -K_t sometimes does."""
    ratios = {"kl": [], "optimal": []}
    for seed in range(20):
        model = enumeration.make("tabular", vocab=3, length=1, seed=seed, scale=1.5)
        plain = float(model.trace_covariance(REGISTRY["token"]))
        for baseline, name in (("kl", "token_kl_baseline"), ("optimal", "token_optimal_baseline")):
            ratios[baseline].append(float(model.trace_covariance(REGISTRY[name])) / plain)
    assert max(ratios["optimal"]) <= 1 + 1e-12
    assert max(ratios["kl"]) > 1.0 > min(ratios["kl"])
    assert all(o <= k + 1e-12 for o, k in zip(ratios["optimal"], ratios["kl"], strict=True))
