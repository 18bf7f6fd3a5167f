"""Exact facts about bias and variance of estimates, on enumerable students in float64.

Orders of variance are those of these instances, not theorems, unless a docstring says so.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import FIXED, discounted, distance, exact, mean_of, trace_of

from opd_jax.analysis import enumeration, values
from opd_jax.numerics.estimators import REGISTRY

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("model", FIXED)
def test_table_of_advantages(model):
    """V = 3, T = 4, 81 completions: trajectory > to-go > to-go + K > Rao-Blackwell + K and Rao-Blackwell > Rao-Blackwell + K > token.

    The order is that of these instances, not a theorem: `test_kl_baseline_may_raise_the_variance` has others.
    """
    model = enumeration.make(model, **FIXED[model])
    assert len(model.tokens_NT) == 81
    own, k = values.log_ratio(model), values.kl(model)
    to_go, rao_blackwell = own + values.later(own), own - values.later(k)
    unbiased = {
        "trajectory": own.sum(axis=1, keepdims=True) + 0 * own,
        "to_go": to_go,
        "to_go + K": to_go + k,
        "rao_blackwell": rao_blackwell,
        "rao_blackwell + K": rao_blackwell + k,
    }
    for advantage in unbiased.values():
        assert distance(mean_of(model, advantage), exact(model)) < 1e-6
    spread = {name: trace_of(model, advantage) for name, advantage in unbiased.items()}
    token = trace_of(model, own)
    assert spread["trajectory"] > spread["to_go"] > spread["to_go + K"] > spread["rao_blackwell + K"] > token
    assert spread["to_go"] > spread["rao_blackwell"] > spread["rao_blackwell + K"]
    # The token's +K leaves its mean alone.
    assert distance(mean_of(model, own + k), mean_of(model, own)) < 1e-12


@pytest.mark.parametrize("model", FIXED)
def test_discounts_trade_bias_for_variance(model):
    """gamma 1, .75, .5, .25, 0: the bias grows from 0 to the token's, the variance falls from to-go's to the token's."""
    model = enumeration.make(model, **FIXED[model])
    own = values.log_ratio(model)
    found = [values.mean_and_trace(model, values.score_gradients(model, discounted(own, g))) for g in (1, 0.75, 0.5, 0.25, 0)]
    bias = [float(np.linalg.norm(mean - exact(model))) for mean, _ in found]
    assert bias == sorted(bias) and bias[0] < 1e-12 and bias[1] > 1e-2
    assert [spread for _, spread in found] == sorted((spread for _, spread in found), reverse=True)
    token_bias = np.linalg.norm(exact(model, "token_reverse_kl") - exact(model))
    assert bias[-1] == pytest.approx(token_bias, rel=1e-9)
    assert found[-1][0] @ exact(model) / np.linalg.norm(found[-1][0]) / np.linalg.norm(exact(model)) > 0.8


def test_kl_baseline_may_raise_the_variance():
    """l_t + K_t has the mean of l_t; in trace it costs on 16 of these 20 and saves on 4. The score-norm optimal b* never costs."""
    ratios = {"kl": [], "optimal": []}
    for seed in range(20):
        model = enumeration.make("tabular", length=4, seed=seed)
        own, k = values.log_ratio(model), values.kl(model)
        plain = trace_of(model, own)
        ratios["kl"].append(trace_of(model, own + k) / plain)
        ratios["optimal"].append(trace_of(model, own - values.optimal_baseline(model, own)) / plain)
    assert sum(ratio > 1 for ratio in ratios["kl"]) == 16
    assert min(ratios["kl"]) < 0.9 and max(ratios["kl"]) > 1.5
    assert max(ratios["optimal"]) < 1
    assert all(best <= kl for best, kl in zip(ratios["optimal"], ratios["kl"], strict=True))


def test_leave_one_out_of_two_rollouts_may_raise_the_variance():
    """V = 3, T = 3: the other rollout is so noisy a baseline that it costs on each of 20 tabular students, a factor of 1.1 to 2.7."""
    ratios = []
    for seed in range(20):
        model = enumeration.make("tabular", length=3, seed=seed)
        plain, baselined = (model.trace_covariance(REGISTRY[name], rollouts=2) for name in ("to_go", "to_go_leave_one_out"))
        ratios.append(float(baselined / plain))
    assert sum(ratio > 1 for ratio in ratios) == 20
    assert 1.1 < min(ratios) < 1.2 and 2.6 < max(ratios) < 2.8


@pytest.mark.parametrize("arguments", [{}, {"stop": 1}, {"features": 2}])
def test_sum_of_exact_kls_estimates_the_sequence_kl_with_less_noise(arguments):
    """sum_t K_t has the mean of -sum_t l_t (the chain rule) and, on these 20 instances, less variance (no theorem: they correlate)."""
    for seed in range(20):
        model = enumeration.make("", length=4, seed=seed, **arguments)
        probability_N = np.asarray(model.probability_N)
        sampled_N, exact_N = -values.log_ratio(model).sum(axis=1), values.kl(model).sum(axis=1)
        mean = probability_N @ sampled_N
        assert mean == pytest.approx(float(model.objective("sequence_reverse_kl", model.theta_FV)), abs=1e-12)
        assert probability_N @ exact_N == pytest.approx(mean, abs=1e-12)
        assert probability_N @ (exact_N - mean) ** 2 < probability_N @ (sampled_N - mean) ** 2


# ---- how large estimates can be, and how their variance grows


def bounds(model):
    """(largest |l_t|, largest |s_t|, T) over all completions."""
    square_NT = np.stack([np.sum(values.score_gradients(model, place) ** 2, axis=1) for place in np.eye(model.tokens_NT.shape[1])])
    return np.abs(values.log_ratio(model)).max(), np.sqrt(square_NT.max()), model.tokens_NT.shape[1]


def estimates(model):
    own = values.log_ratio(model)
    advantage = {"token": own, "to_go": own + values.later(own), "sequence": own.sum(axis=1, keepdims=True) + 0 * own}
    return {name: values.score_gradients(model, a) for name, a in advantage.items()}


LIMIT = {"token": lambda t: t, "to_go": lambda t: t * (t + 1) / 2, "sequence": lambda t: t**2}


@pytest.mark.parametrize("length", range(1, 7))
@pytest.mark.parametrize("features", [None, 3])
def test_bounds_on_estimates_and_variances(features, length):
    """|l| <= Br, |s| <= Bs: |g| <= T Br Bs for the token, T(T+1)/2 to go, T^2 for the trajectory; variances at most their squares."""
    model = enumeration.make("", length=length, features=features, seed=length)
    r, s, _ = bounds(model)
    for name, gradients in estimates(model).items():
        limit = LIMIT[name](length) * r * s
        assert np.linalg.norm(gradients, axis=1).max() <= limit + 1e-12
        assert values.mean_and_trace(model, gradients)[1] <= limit**2
    for gamma in (0.25, 0.5, 0.9):
        advantage = discounted(values.log_ratio(model), gamma)
        reach = r * (1 - gamma ** (length - np.arange(length))) / (1 - gamma)
        assert (np.abs(advantage) <= reach + 1e-12).all()
        assert trace_of(model, advantage) <= (length * r * s / (1 - gamma)) ** 2


@pytest.mark.parametrize("length", range(1, 7))
def test_bounds_are_reached(length):
    """Tokens drawn independently of their prefix: the completion that repeats the rarest token meets each bound, so none can be lower."""
    model = enumeration.make("", vocab=2, length=length)
    alone = jnp.ones((*model.tokens_NT.shape, 1))
    logits_NTV = jnp.broadcast_to(jnp.array([2.0, -2.0]), model.teacher_logits_NTV.shape)
    model = dataclasses.replace(model, theta_FV=jnp.array([[0.5, -0.5]]), features_NTF=alone, teacher_logits_NTV=logits_NTV)
    r, s, _ = bounds(model)
    for name, gradients in estimates(model).items():
        assert np.linalg.norm(gradients, axis=1).max() == pytest.approx(LIMIT[name](length) * r * s, rel=1e-12)


def test_variance_of_to_go_grows_faster_than_that_of_the_token():
    """V = 2, tabular, the mean of to-go / token over five seeds: 2.3, 4.2, 5.4 at T = 2, 4, 6 (7.7 at T = 8, left out for time)."""
    ratios = []
    for length in (2, 4, 6):
        each = []
        for seed in range(5):
            model = enumeration.make("", vocab=2, length=length, seed=seed)
            own = values.log_ratio(model)
            each.append(trace_of(model, own + values.later(own)) / trace_of(model, own))
        ratios.append(np.mean(each))
    assert all(after > 1.2 * before for before, after in itertools.pairwise(ratios))
