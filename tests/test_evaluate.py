"""pass@k against enumeration, intervals, and KLs of an evaluation against a dense recomputation."""

import itertools

import numpy as np
import pytest

from opd_jax import evaluate


@pytest.mark.parametrize(("samples", "successes", "k"), [(4, 0, 2), (4, 1, 1), (5, 2, 3), (6, 6, 6), (6, 3, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(samples, successes, k):
    outcomes = [1] * successes + [0] * (samples - successes)
    expected = np.mean([any(chosen) for chosen in itertools.combinations(outcomes, k)])
    assert evaluate.pass_at_k(samples, successes, k) == pytest.approx(expected)


def test_interval_of_a_mean_covers_at_the_stated_rate():
    """Bootstrap over 60 prompts: 95% nominal; n = 200 repetitions, so 3 standard errors are 4.6%."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        result = evaluate.with_interval("x", rng.normal(size=60))
        hits += result["x_low"] <= 0.0 <= result["x_high"]
    assert abs(hits / 200 - 0.95) < 0.046


def test_interval_of_greedy_accuracy_is_wilsons():
    result = evaluate.proportion("x", np.array([1.0] * 20))
    assert result["x"] == 1.0 and result["x_low"] == pytest.approx(20 / (20 + 1.959964**2), rel=1e-6) and result["x_high"] == 1.0


def test_ratio_is_per_token_not_per_sequence():
    result = evaluate.ratio_with_interval("x", np.array([1.0, 9.0]), np.array([1.0, 3.0]))
    assert result["x"] == pytest.approx(2.5)
    assert result["x_low"] == pytest.approx(1.0) and result["x_high"] == pytest.approx(3.0)
