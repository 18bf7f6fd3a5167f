"""Scores from rewards: avg@k, pass@k, maj@k, discovery@k, recovery of a teacher, forgetting; with intervals. NumPy alone.

Letters: P problems, K samples of each, A attempts in the order in which they were made, N tasks learnt one after the other. A reward of at
least 1 is a success.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import scipy.stats

from opd_jax.types import UserError

LEVEL = 0.95
ACCEPTED, SILENT = 0, -1  # ballots of a completion that the verifier accepts, and of one without an answer; other answers are 1, 2, ...


class Interval(NamedTuple):
    value: float
    low: float
    high: float


def avg_at_k(rewards_PK: np.ndarray) -> np.ndarray:
    """[P] mean reward of each problem's K samples; its mean over problems is avg@k with k = K."""
    return np.asarray(rewards_PK, np.float64).mean(1)


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Unbiased chance that at least one of k samples succeeds, from `samples` >= k draws: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021)."""
    if samples - successes < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - successes + 1, samples + 1)))


def pass_rates(rewards_PK: np.ndarray, k: int) -> np.ndarray:
    """[P] pass_at_k of each problem. Raises UserError for a k that K samples cannot tell of."""
    samples = np.shape(rewards_PK)[1]
    _check_k(k, samples)
    chances = np.array([pass_at_k(samples, successes, k) for successes in range(samples + 1)])
    return chances[(np.asarray(rewards_PK) >= 1).sum(1)]


def ballots(answers_PK: Sequence[Sequence[Hashable | None]], rewards_PK: np.ndarray) -> np.ndarray:
    """[P, K] int32 votes: equal answers of one problem have one number. None is no answer.

    What the verifier accepts is one answer, however it is written, because all of it equals the reference.
    """
    rows = []
    for answers, rewards in zip(answers_PK, rewards_PK, strict=True):
        numbers: dict[Hashable, int] = {}
        row = []
        for answer, reward in zip(answers, rewards, strict=True):
            other = SILENT if answer is None else numbers.setdefault(answer, len(numbers) + 1)
            row.append(ACCEPTED if reward >= 1 else other)
        rows.append(row)
    return np.array(rows, np.int32)


def maj_at_k(votes: Sequence[int], k: int) -> float:
    """Chance that the most frequent answer among k of the n votes (see ballots) is the accepted one (Wang et al. 2022, self-consistency).

    Exact over all C(n, k) subsets. A tie is broken uniformly; samples without an answer do not vote, and if none votes the vote is lost.
    Raises UserError for a k that n samples cannot tell of.
    """
    _check_k(k, len(votes))
    counts = Counter(int(vote) for vote in votes)
    right, silent = counts.pop(ACCEPTED, 0), counts.pop(SILENT, 0)
    return _majority(right, tuple(sorted(counts.values())), silent, k)


def maj_rates(votes_PK: np.ndarray, k: int) -> np.ndarray:
    """[P] maj_at_k of each problem's ballots."""
    return np.array([maj_at_k(votes, k) for votes in votes_PK])


@functools.lru_cache(maxsize=2**16)
def _majority(right: int, wrong: tuple[int, ...], silent: int, k: int) -> float:
    """The sum over subsets, by how many votes the accepted answer gets and how many of the others (none has more) tie with it."""
    won = Fraction(0)
    for most in range(1, min(right, k) + 1):
        room = k - most
        ways = {(0, 0): 1}  # (answers that tie, votes for other answers) -> number of ways to draw them
        for count in wrong:
            longer: defaultdict[tuple[int, int], int] = defaultdict(int)
            for (ties, drawn), number in ways.items():
                for more in range(min(count, most, room - drawn) + 1):
                    longer[ties + (more == most), drawn + more] += number * math.comb(count, more)
            ways = longer
        for (ties, drawn), number in ways.items():
            won += Fraction(math.comb(right, most) * number * math.comb(silent, room - drawn), 1 + ties)
    return float(won / math.comb(right + sum(wrong) + silent, k))


def discovery_at_k(rewards_A: np.ndarray) -> np.ndarray:
    """[..., A]: at k - 1, whether one of the first k attempts succeeded. Its mean over problems and seeds is the curve of discovery@k.

    discovery@k = P(first success within k attempts) is meant for attempts of which each learns from those before it (training at test
    time), which go on until the first success (Huebotter et al., SDPO, arXiv 2601.20802): their order counts. For independent attempts
    of one model it is pass@k, and pass_rates, which averages over all orders, estimates it with less noise.

    `rewards_A` [..., A]; attempts after the first success need not have been made: NaN. Raises UserError for one that is missing before.
    """
    rewards_A = np.asarray(rewards_A, np.float64)
    found_A = np.maximum.accumulate(rewards_A >= 1, axis=-1)
    missing = np.argwhere(np.isnan(rewards_A) & ~found_A)
    if len(missing):
        raise UserError(f"rewards_A{missing[0].tolist()} is NaN, but no attempt before it succeeded; give it, or fewer attempts of each")
    return found_A.astype(np.float64)


def two_level_bootstrap(data_PK: np.ndarray, score: Callable = avg_at_k, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """95% percentile interval of the mean over problems of `score` ([P, K] -> [P]): problems are resampled, then samples within each.

    It is on the safe side. With variance v_b between problems and v_w within, a mean varies by (v_b + v_w / K) / P, its resamples by
    (v_b + v_w / K + (1 - 1/K) v_w / K) / P: problems alone carry the noise of their samples already (Davison and Hinkley 1997, 3.8).
    Of pass@k and maj@k with k = K resamples also tell less well than samples, because they repeat them: let K be several times k.
    """
    data_PK = np.asarray(data_PK)
    problems, samples = data_PK.shape[:2]
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        row_P, column_PK = rng.integers(0, problems, problems), rng.integers(0, samples, (problems, samples))
        means.append(score(data_PK[row_P[:, None], column_PK]).mean())
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(score(data_PK).mean()), float(low), float(high))


def teacher_recovery(scores_P: np.ndarray, reference_P: np.ndarray, teacher_P: np.ndarray) -> Interval | None:
    """(s - s_ref) / (s_T - s_ref) with its 95% interval over problems: 0 at the student before training, 1 at the teacher.

    Each argument is a mean score per problem, on the same problems in one order. The interval is Fieller's (1954), which knows that
    numerator and denominator vary together: the ratios r at which the mean of (s - s_ref) - r (s_T - s_ref) is not significant. None
    where that is no interval, because s_T - s_ref is not resolved from 0, or where the teacher is the worse one. Raises UserError for
    fewer than two problems, or for arrays of different lengths.
    """
    scores_P, reference_P, teacher_P = (np.asarray(values, np.float64) for values in (scores_P, reference_P, teacher_P))
    if not scores_P.shape == reference_P.shape == teacher_P.shape or scores_P.ndim != 1 or len(scores_P) < 2:
        shapes = ", ".join(str(values.shape) for values in (scores_P, reference_P, teacher_P))
        raise UserError(f"teacher_recovery: scores of shapes {shapes}; give one score per problem, for the same two problems or more")
    gained_P, gap_P = scores_P - reference_P, teacher_P - reference_P
    gained, gap = gained_P.mean(), gap_P.mean()
    (v_gained, v_both), (_, v_gap) = scipy.stats.t.ppf((1 + LEVEL) / 2, len(gap_P) - 1) ** 2 * np.cov(gained_P, gap_P) / len(gap_P)
    resolved = gap**2 - v_gap
    if gap <= 0 or resolved <= 0:
        return None
    middle = gained * gap - v_both
    half = math.sqrt(max(0.0, middle**2 - (gained**2 - v_gained) * resolved))
    return Interval(float(gained / gap), float((middle - half) / resolved), float((middle + half) / resolved))


def forgetting(scores_NN: np.ndarray) -> float:
    """Mean over earlier tasks of the best score that was ever reached less the last: 1/(N-1) sum_j (max_(i<N) R_ij - R_Nj).

    `scores_NN[i, j]` is the score on task j after learning tasks 0 ... i. Source: Chaudhry et al. 2018, Riemannian Walk, eq. 3. Raises
    UserError for a matrix that is not square, or of a single task.
    """
    scores_NN = _sequence(scores_NN)
    return float((scores_NN[:-1, :-1].max(0) - scores_NN[-1, :-1]).mean())


def backward_transfer(scores_NN: np.ndarray) -> float:
    """What later tasks did to earlier ones, negative where they are forgotten: 1/(N-1) sum_j (R_Nj - R_jj).

    Source: Lopez-Paz and Ranzato 2017, Gradient Episodic Memory, eq. 3. The matrix and errors are those of `forgetting`.
    """
    scores_NN = _sequence(scores_NN)
    return float((scores_NN[-1] - np.diag(scores_NN))[:-1].mean())


def normalised(scores: np.ndarray, base: float, best: float) -> np.ndarray:
    """(s - base) / (best - base): 0 at the base, 1 at the best, so that tasks can be averaged. Raises UserError where the two are equal."""
    if base == best:
        raise UserError(f"normalised: base = best = {base}; a task on which nothing improves has no scale, leave it out")
    return (np.asarray(scores, np.float64) - base) / (best - base)


def _sequence(scores_NN: np.ndarray) -> np.ndarray:
    scores_NN = np.asarray(scores_NN, np.float64)
    if scores_NN.ndim != 2 or len(set(scores_NN.shape)) != 1 or len(scores_NN) < 2:
        raise UserError(f"scores of shape {scores_NN.shape}; give a square matrix: a row per task learnt, a column per task, two at least")
    return scores_NN


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise UserError(f"k = {k} must be from 1 to {samples}, the number of samples of a problem")
