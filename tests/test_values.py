"""Exact values and baselines: against a recursion over the tree of prefixes, against the estimators, and in their promises of variance."""

import numpy as np
import pytest

from opd_jax.analysis import enumeration, values
from opd_jax.numerics.estimators import REGISTRY

pytestmark = pytest.mark.usefixtures("float64")

MODELS = {
    "tabular": {"length": 4, "seed": 1},
    "shared parameters": {"features": 6, "length": 4, "seed": 2},
    "stop token": {"stop": 2, "length": 4, "seed": 3},
    "stop token that is the padding": {"stop": 0, "features": 3, "length": 4, "seed": 4},
    "observations": {"observed": (0, 2), "length": 4, "seed": 5},
}
TABULAR = [name for name, arguments in MODELS.items() if "features" not in arguments]


def advantages(model):
    """The valid advantages without a baseline, from the noisiest to the least noisy."""
    own, future_kl = values.log_ratio(model), values.later(values.kl(model))
    found = {
        "trajectory": own.sum(axis=1, keepdims=True),
        "to_go": own + values.later(own),
        "rao_blackwell": own - future_kl,
        "action_value": values.action_value(model),
    }
    return {name: np.where(model.mask_NT, advantage_NT, 0) for name, advantage_NT in found.items()}


def baselines(model, advantage_NT):
    rng = np.random.default_rng(0)
    return {
        "none": np.zeros_like(advantage_NT),
        "kl": -values.kl(model),
        "state value": values.state_value(model),
        "mean": values.given_state(model, advantage_NT),
        "any function of the state": values.given_state(model, rng.normal(size=advantage_NT.shape)),
    }


def trace(model, advantage_NT):
    return values.mean_and_trace(model, values.score_gradients(model, advantage_NT))[1]


@pytest.mark.parametrize("name", MODELS)
def test_values_against_a_recursion_over_prefixes(name):
    """V(c) = -K(c) + sum_y pi(y|c) V(c y), Q(c, y) = l(y) + V(c y); an observation has no choice, what stands after a stop is worth 0."""
    model = enumeration.make(name, **MODELS[name])
    tokens, mask, length = np.asarray(model.tokens_NT), np.asarray(model.mask_NT), model.tokens_NT.shape[1]
    p_NTV, q_NTV = np.exp(values.student_logp(model)), np.exp(values.log_softmax(np.asarray(model.teacher_logits_NTV)))

    def value(prefix):
        t, rows = len(prefix), np.flatnonzero((tokens[:, : len(prefix)] == prefix).all(axis=1))
        if t == length:
            return 0.0
        if not mask[rows, t].any():
            return value([*prefix, tokens[rows[0], t]])
        p_V, q_V = p_NTV[rows[0], t], q_NTV[rows[0], t]
        return sum(p * (np.log(q / p) + value([*prefix, y])) for y, (p, q) in enumerate(zip(p_V, q_V, strict=True)))

    state, action, own = values.state_value(model), values.action_value(model), values.log_ratio(model)
    for n, row in enumerate(tokens.tolist()):
        for t in range(length):
            assert state[n, t] == pytest.approx(value(row[:t]) if mask[n, t] else 0, abs=1e-12)
            assert action[n, t] == pytest.approx(own[n, t] + value(row[: t + 1]) if mask[n, t] else 0, abs=1e-12)
    assert float(model.objective("sequence_reverse_kl", model.theta_FV)) == pytest.approx(-value([]), abs=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_advantages_are_unbiased_with_every_baseline_of_the_state(name):
    model = enumeration.make(name, **MODELS[name])
    exact = np.asarray(model.exact_gradient("sequence_reverse_kl"))
    for advantage in advantages(model).values():
        for baseline in [*baselines(model, advantage).values(), values.optimal_baseline(model, advantage)]:
            mean, _ = values.mean_and_trace(model, values.score_gradients(model, advantage - baseline))
            np.testing.assert_allclose(mean, exact, atol=1e-12)


@pytest.mark.parametrize("name", ["shared parameters", "stop token that is the padding", "observations"])
def test_plain_formulas_are_what_the_estimators_compute(name):
    model = enumeration.make(name, **MODELS[name])
    mine = {**advantages(model), "token": values.log_ratio(model)}
    for theirs, ours in (("sequence", "trajectory"), ("to_go",) * 2, ("rao_blackwell_to_go", "rao_blackwell"), ("token",) * 2):
        np.testing.assert_allclose(model.gradients(REGISTRY[theirs]), values.score_gradients(model, mine[ours]), atol=1e-12)
    mean, spread = values.mean_and_trace(model, values.score_gradients(model, mine["to_go"]))
    np.testing.assert_allclose(model.expected_gradient(REGISTRY["to_go"]), mean, atol=1e-12)
    assert float(model.trace_covariance(REGISTRY["to_go"])) == pytest.approx(spread, rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", TABULAR)
def test_optimal_baseline_and_action_value_have_the_least_variance_of_a_tabular_student(name, seed):
    """b* <= any other baseline of the state, Q <= the noisier advantages of the same state with the same baseline, both together <= all."""
    model = enumeration.make(name, **{**MODELS[name], "seed": seed})
    lists = advantages(model)
    q_NT = lists["action_value"]
    least = trace(model, q_NT - values.optimal_baseline(model, q_NT))
    for name, advantage in lists.items():
        best = trace(model, advantage - values.optimal_baseline(model, advantage))
        assert least <= best + 1e-12
        for baseline in baselines(model, advantage).values():
            assert best <= trace(model, advantage - baseline) + 1e-12
            if name != "trajectory":
                assert trace(model, q_NT - baseline) <= trace(model, advantage - baseline) + 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_the_optimal_baseline_takes_the_past_off_by_itself(name):
    """Past log-ratios are a function of the state: with b*, the full trajectory is reward-to-go, rollout by rollout."""
    model = enumeration.make(name, **MODELS[name])
    full, to_go = (advantages(model)[key] for key in ("trajectory", "to_go"))
    assert np.abs(full - to_go).max() > 0.1
    np.testing.assert_allclose(full - values.optimal_baseline(model, full), to_go - values.optimal_baseline(model, to_go), atol=1e-12)


def test_action_value_is_the_conditional_mean_of_every_valid_advantage():
    model = enumeration.make("stop", stop=1, length=4, seed=2)
    for name, advantage in advantages(model).items():
        past = values.log_ratio(model).sum(axis=1, keepdims=True) - (values.log_ratio(model) + values.later(values.log_ratio(model)))
        known = np.where(model.mask_NT, past, 0) if name == "trajectory" else 0
        np.testing.assert_allclose(values.given_action(model, advantage) - known, values.action_value(model), atol=1e-12)
    np.testing.assert_allclose(values.given_state(model, values.action_value(model)), values.state_value(model), atol=1e-12)


def test_later_sums_cross_masked_positions():
    np.testing.assert_array_equal(values.later(np.array([[1.0, 0.0, 2.0, 4.0]])), [[6.0, 6.0, 4.0, 0.0]])
