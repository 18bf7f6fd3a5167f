"""Behaviour corrections against NumPy loops, and by enumeration under another law: which of them keep the expected gradient."""

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.analysis import enumeration
from opd_jax.numerics import estimators, importance
from opd_jax.numerics.token_stats import Signal

SAMPLED, FULL = Signal("reverse_kl", "sampled"), Signal("reverse_kl")


def loop(log_rho_BT, kind, clip):
    local, score = np.ones(log_rho_BT.shape), np.ones(log_rho_BT.shape)
    for b, t in np.ndindex(*log_rho_BT.shape):
        rho = np.exp(log_rho_BT[b])
        own = {"token": rho[t], "clip": min(rho[t], clip), "drop": rho[t] if 1 / clip <= rho[t] <= clip else 0.0}
        local[b, t] = {"none": 1.0, "sequence": np.prod(rho), "cumulative": np.prod(rho[:t])}.get(kind, own.get(kind))
        score[b, t] = {"none": 1.0, "sequence": np.prod(rho), "cumulative": np.prod(rho[: t + 1])}.get(kind, own.get(kind))
    return local, score


@pytest.mark.parametrize("kind", importance.CORRECTIONS)
def test_weights_equal_a_loop(kind):
    rng = np.random.default_rng(0)
    logp_BT, behaviour_BT, mask_BT = rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), rng.random((4, 6)) < 0.7
    dirty_BT = np.where(mask_BT, behaviour_BT, np.nan)
    log_rho_BT = importance.ratios(jnp.asarray(logp_BT), jnp.asarray(dirty_BT), jnp.asarray(mask_BT))
    np.testing.assert_allclose(log_rho_BT, np.where(mask_BT, logp_BT - behaviour_BT, 0), atol=1e-6)
    found = importance.weights(log_rho_BT, correction=kind, clip=1.5)
    for weights_BT, expected_BT in zip(found, loop(np.asarray(log_rho_BT, np.float64), kind, 1.5), strict=True):
        np.testing.assert_allclose(weights_BT, expected_BT, rtol=1e-5)


def test_a_weight_is_never_infinite():
    weights_BT, _ = importance.weights(jnp.full((1, 9), 50.0), correction="sequence", clip=2.0)
    assert float(weights_BT[0, 0]) == pytest.approx(np.exp(importance.MAX_LOG_WEIGHT), rel=1e-5)


@pytest.mark.parametrize(
    "arguments, words", [({"correction": "tis"}, "importance = 'tis' is not known; valid: none"), ({"clip": 0.5}, "clip = 0.5 must be at")]
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        importance.weights(jnp.zeros((1, 2)), **{"correction": "clip", "clip": 2.0, **arguments})


def model_and_laws():
    """Ragged completions whose second token the environment writes."""
    model = enumeration.make("off-policy", vocab=3, length=4, stop=2, features=3, observed=(1,), seed=4)
    rng = np.random.default_rng(9)
    older = model.theta_FV + 0.3 * jnp.asarray(rng.normal(size=model.theta_FV.shape))
    return model, {"older": model.law(model.logits(older)), "hot": model.law(temperature=1.7)}


ESTIMATORS = {
    "token": (SAMPLED, "token", {}),
    "to_go": (SAMPLED, "to_go", {}),
    "to_go, exact future, kl baseline": (SAMPLED, "to_go", {"exact_future": True, "baseline": "kl"}),
    "discounted": (SAMPLED, "discounted", {}),
    "token_full": (FULL, "token", {}),
    "local_to_go": (FULL, "to_go", {}),
    "forward_kl": (Signal("forward_kl"), "token", {}),
    "forward_kl, sampled": (Signal("forward_kl", "sampled"), "token", {}),
    "top-k with the token": (Signal("reverse_kl", "topk_teacher+token", tail="bucket", k=1), "token", {}),
    "to_go, optimal baseline": (SAMPLED, "to_go", {"baseline": "optimal"}),
    "discounted futures": (FULL, "discounted", {}),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sequence_and_cumulative_ratios_give_the_on_policy_gradient(name, float64):
    model, laws = model_and_laws()
    signal, credit, choices = ESTIMATORS[name]
    on_policy = np.asarray(model.expected_gradient(estimators.build(signal, credit, 0.7, **choices)))
    for correction in importance.CORRECTIONS if name in ("to_go", "token_full") else ("none", "sequence", "cumulative"):
        built = estimators.build(signal, credit, 0.7, importance=correction, clip=1.2, **choices)
        for law in laws.values():
            error = np.abs(np.asarray(model.expected_gradient(built, law=law)) - on_policy).max()
            assert (error < 1e-10) == (correction in ("sequence", "cumulative")), correction


@pytest.mark.parametrize("signal", [SAMPLED, FULL], ids=["sampled", "full"])
def test_a_baseline_of_other_rollouts_keeps_the_corrected_gradient(signal, float64):
    """Pairs of rollouts of the hot law."""
    model = enumeration.make("small", vocab=2, length=3, stop=1, features=2, seed=3)
    on_policy = model.expected_gradient(estimators.build(signal, "to_go", 1.0))
    for correction in ("sequence", "cumulative"):
        built = estimators.build(signal, "to_go", 1.0, importance=correction, baseline="leave_one_out")
        found = model.expected_gradient(built, law=model.law(temperature=1.7), rollouts=2)
        np.testing.assert_allclose(found, on_policy, atol=1e-10)


def test_sequence_credit_is_corrected_by_the_ratio_of_the_sequence(float64):
    model, laws = model_and_laws()
    on_policy = model.expected_gradient(estimators.build(SAMPLED, "sequence", 1.0))
    built = estimators.build(SAMPLED, "sequence", 1.0, importance="sequence")
    np.testing.assert_allclose(model.expected_gradient(built, law=laws["hot"]), on_policy, atol=1e-10)
    with pytest.raises(ValueError, match="importance = 'cumulative' does not go with estimator.credit = 'sequence'"):
        estimators.build(SAMPLED, "sequence", 1.0, importance="cumulative")


def test_cumulative_ratios_have_less_variance_than_those_of_the_sequence(float64):
    model, laws = model_and_laws()
    variance = {
        kind: float(model.trace_covariance(estimators.build(SAMPLED, "token", 1.0, importance=kind), law=laws["hot"]))
        for kind in ("sequence", "cumulative")
    }
    assert variance["cumulative"] < variance["sequence"]


def test_a_truncated_law_stays_biased_whatever_the_ratio(float64):
    """top-p draws nothing outside its nucleus, so no weight can bring it back; the ratios remove most of the error."""
    model, _ = model_and_laws()
    law = model.law(top_p=0.8)
    on_policy = np.asarray(model.expected_gradient(estimators.build(SAMPLED, "token", 1.0)))
    error = {}
    for correction in ("none", "cumulative", "sequence"):
        built = estimators.build(SAMPLED, "token", 1.0, importance=correction)
        error[correction] = np.linalg.norm(np.asarray(model.expected_gradient(built, law=law)) - on_policy)
    assert 1e-3 < error["cumulative"] < error["none"] and error["sequence"] > 1e-3
