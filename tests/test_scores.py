"""Scores against enumeration and by hand; intervals against the test that they invert, and how often they cover."""

import itertools
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from opd_jax import scores
from opd_jax.types import UserError


@pytest.mark.parametrize(("samples", "successes", "k"), [(4, 0, 2), (4, 1, 1), (5, 2, 3), (6, 6, 6), (6, 3, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(samples, successes, k):
    outcomes = [1] * successes + [0] * (samples - successes)
    expected = np.mean([any(chosen) for chosen in itertools.combinations(outcomes, k)])
    assert scores.pass_at_k(samples, successes, k) == pytest.approx(expected)
    rewards_PK = np.array([outcomes, [0] * samples, [0.99] * samples])  # a reward below 1 is no success
    np.testing.assert_allclose(scores.pass_rates(rewards_PK, k), [expected, 0, 0])


def vote(chosen):
    """By hand: the share that the accepted answer has of the most frequent ones."""
    counts = Counter(c for c in chosen if c != scores.SILENT)
    best = [answer for answer, count in counts.items() if count == max(counts.values())]
    return (scores.ACCEPTED in best) / max(1, len(best))


@pytest.mark.parametrize(
    "votes", [(0, 1, 2, 3), (0, 0, 1, 1, 2), (0, 0, 0, 1, 1, -1, 2), (-1, -1, 0, 1, 1, 1), (-1,) * 4, (1, 1, 2), (0,) * 5]
)
def test_maj_at_k_is_the_mean_over_all_subsets(votes):
    for k in range(1, len(votes) + 1):
        expected = np.mean([vote(chosen) for chosen in itertools.combinations(votes, k)])
        assert scores.maj_at_k(votes, k) == pytest.approx(expected, abs=1e-12), k
    assert scores.maj_at_k(votes, 1) == pytest.approx(np.mean(np.array(votes) == scores.ACCEPTED))


def test_a_large_vote_is_exact_and_cheap():
    """A binomial tail where there are two answers only: of 60 votes, 33 right, k = 21 is odd and has no ties."""
    votes = [scores.ACCEPTED] * 33 + [1] * 27
    assert scores.maj_at_k(votes, 21) == pytest.approx(scipy.stats.hypergeom(60, 33, 21).sf(10), rel=1e-12)
    assert 0 < scores.maj_at_k([0] * 3 + list(range(1, 62)), 32) < 1


def test_ballots_count_equal_answers_and_what_is_accepted_as_one():
    answers = [["3", "3.0", "7", None, "7"], ["1", "1", "2", "2", None]]
    rewards = [[1, 1, 0, 0, 0.9], [0, 0, 0, 0, 1]]  # 0.9 is not accepted; the last one is accepted although it gives no answer
    votes_PK = scores.ballots(answers, np.array(rewards))
    np.testing.assert_array_equal(votes_PK[0], [0, 0, votes_PK[0, 4], -1, votes_PK[0, 2]])
    assert votes_PK[0, 2] > 0 and len(set(votes_PK[1].tolist())) == 3 and votes_PK[1, 4] == 0
    np.testing.assert_allclose(scores.maj_rates(votes_PK, 5), [0.5, 0.0])


def test_discovery_is_in_the_order_of_attempts_and_pass_at_k_over_all_orders():
    rewards_PA = np.array([[0, 0, 1, 0], [1, np.nan, np.nan, np.nan], [0, 0, 0, 0]])
    np.testing.assert_array_equal(scores.discovery_at_k(rewards_PA), [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    for outcomes in ([0, 0, 1, 1, 0], [1, 0, 0, 0, 0]):
        curves = scores.discovery_at_k(np.array(list(itertools.permutations(outcomes)), float))
        expected = [scores.pass_rates(np.array([outcomes]), k)[0] for k in range(1, 6)]
        np.testing.assert_allclose(curves.mean(0), expected)
    with pytest.raises(UserError, match=r"rewards_A\[1, 1\] is NaN"):
        scores.discovery_at_k(np.array([[0, 1], [0, np.nan]]))


def test_two_level_resamples_vary_as_is_said():
    """The variance of the mean's resamples, which a normal interval's width gives, against the formula with the data's own variances."""
    rng = np.random.default_rng(1)
    P, K = 400, 3
    data_PK = rng.normal(size=(P, 1)) + 2 * rng.normal(size=(P, K))
    low, high = scores.two_level_bootstrap(data_PK)[1:]
    between = data_PK.mean(1).var() / P  # v_b + v_w / K, over P
    within = data_PK.var(1).mean() / K / P  # (1 - 1/K) v_w / K, over P: the data's own variance has divisor K
    expected = 2 * 1.959964 * np.sqrt(between + within)
    assert (high - low) == pytest.approx(expected, rel=0.06)  # 2000 resamples: 3 standard errors of a width are 6%


@pytest.mark.parametrize(("spread", "nominal"), [(0.0, 0.95), (1.0, None)])
def test_two_level_interval_covers(spread, nominal):
    """n = 200 studies of 30 problems with 4 samples: nominal where samples agree, more where they differ; 3 standard errors are 4.6%."""
    rng, hits = np.random.default_rng(0), 0
    for study in range(200):
        data_PK = rng.normal(size=(30, 1)) + spread * rng.normal(size=(30, 4))
        value, low, high = scores.two_level_bootstrap(data_PK, resamples=200, seed=study)
        assert value == pytest.approx(data_PK.mean())
        hits += low <= 0 <= high
    assert abs(hits / 200 - nominal) < 0.046 if nominal else hits / 200 > 0.95 - 0.046


def test_bootstrap_takes_any_score_of_problems():
    votes_PK = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 2, -1]])
    value, low, high = scores.two_level_bootstrap(votes_PK, lambda rows_PK: scores.maj_rates(rows_PK, 3), resamples=300)
    assert value == pytest.approx(scores.maj_rates(votes_PK, 3).mean()) and 0 <= low < value < high <= 1
    assert scores.two_level_bootstrap(np.ones((5, 2))) == (1.0, 1.0, 1.0)


def made_study(rng, problems, recovered=0.6, gap=0.4):
    """(s, s_ref, s_T) per problem, with difficulties that all three share."""
    hard = rng.normal(scale=0.3, size=problems)
    noise = lambda: rng.normal(scale=0.4, size=problems)
    return hard + recovered * gap + noise(), hard + noise(), hard + gap + noise()


def test_ends_of_the_recovery_are_where_a_t_test_begins_to_reject():
    s, s_ref, s_T = made_study(np.random.default_rng(0), 80)
    value, low, high = scores.teacher_recovery(s, s_ref, s_T)
    assert value == pytest.approx((s.mean() - s_ref.mean()) / (s_T.mean() - s_ref.mean())) and low < value < high
    for end in (low, high):
        assert scipy.stats.ttest_1samp((s - s_ref) - end * (s_T - s_ref), 0).pvalue == pytest.approx(0.05, abs=1e-9)


def test_recovery_covers():
    """n = 400 studies: 3 standard errors of 0.95 are 3.3%."""
    rng = np.random.default_rng(0)
    found = [scores.teacher_recovery(*made_study(rng, 60)) for _ in range(400)]
    assert all(found)
    assert abs(np.mean([one.low <= 0.6 <= one.high for one in found]) - 0.95) < 0.033


def test_recovery_is_none_where_the_teacher_is_not_resolved_or_worse():
    rng = np.random.default_rng(0)
    s, s_ref, s_T = made_study(rng, 40, gap=0.02)
    assert scipy.stats.ttest_rel(s_T, s_ref).pvalue > 0.05 and scores.teacher_recovery(s, s_ref, s_T) is None
    s, s_ref, s_T = made_study(rng, 200)
    assert scores.teacher_recovery(s, s_T, s_ref) is None  # clearly worse
    assert scores.teacher_recovery(s_T, s_ref, s_T) == pytest.approx((1, 1, 1)) and scores.teacher_recovery(
        s_ref, s_ref, s_T
    ) == pytest.approx((0, 0, 0))
    assert scores.teacher_recovery(s, s_ref, s_ref) is None
    for wrong in ((s, s_ref, s_T[:-1]), (s[:1], s_ref[:1], s_T[:1]), (s[None], s_ref[None], s_T[None])):
        with pytest.raises(UserError, match="one score per problem"):
            scores.teacher_recovery(*wrong)


def test_forgetting_and_backward_transfer_by_hand():
    R = [[0.5, 0.1, 0.0], [0.7, 0.8, 0.2], [0.4, 0.9, 0.6]]
    # task 0: best before the last 0.7, last 0.4; task 1: best before the last 0.8, last 0.9
    assert scores.forgetting(R) == pytest.approx((0.3 - 0.1) / 2)
    assert scores.backward_transfer(R) == pytest.approx((-0.1 + 0.1) / 2)
    assert scores.backward_transfer([[1.0, 0.0], [0.25, 1.0]]) == -0.75 and scores.forgetting([[1.0, 0.0], [0.25, 1.0]]) == 0.75
    np.testing.assert_allclose(scores.normalised([0.2, 0.5, 0.8], 0.2, 0.8), [0, 0.5, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.pass_rates(np.ones((2, 3)), 4), "k = 4 must be from 1 to 3"),
        (lambda: scores.maj_at_k([0, 1], 0), "k = 0 must be from 1 to 2"),
        (lambda: scores.forgetting([[1.0, 2.0]]), r"shape \(1, 2\)"),
        (lambda: scores.backward_transfer([[1.0]]), "two at least"),
        (lambda: scores.normalised([1.0], 0.5, 0.5), "base = best = 0.5"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
