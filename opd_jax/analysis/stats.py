"""Intervals and comparisons over independent repetitions, such as seeds."""

import itertools
from collections.abc import Sequence

import numpy as np
import scipy.stats

LEVEL = 0.95
ENUMERATED = 6  # repetitions up to which all resamples are counted (6**6 = 46656); of more, RESAMPLES are drawn
RESAMPLES = 20000


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) over the first axis of [n, ...]: Student's t at LEVEL, for n >= 2 independent values that are about normal."""
    values = np.asarray(values, np.float64)
    assert len(values) >= 2, "an interval needs two values"
    mean = values.mean(0)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error
    return mean, mean - half, mean + half


def paired_bootstrap(differences: Sequence[float] | np.ndarray) -> tuple[float, float | None, float | None, float | None]:
    """(mean, low, high, p) of the mean of paired differences [n]: the bootstrap-t over pairs (Efron and Tibshirani 1993, 12.5 and 16.4).

    t* = (mean* - mean) / se*, over resamples of the pairs with replacement: all n**n of them, or from n = 7 on 20000 drawn with seed 0.
    The interval is mean - se t*, between its 2.5% and 97.5% quantiles; p is the share of |t*| at or above |mean / se|, two-sided. A
    resample of one value has se* = 0 and counts as infinitely far out: p is at least n**(1 - n), and an end is None where a quantile
    is infinite, as it always is up to n = 3. The plain percentile bootstrap would cover about 0.83 in place of 0.95 at n = 5.

    p is None where all differences are the same and not 0: nothing is known of how they vary. If all are 0 it is 1.
    """
    values = np.asarray(differences, np.float64)
    n, mean = len(values), float(values.mean())
    if len(set(values.tolist())) == 1:
        return mean, None, None, 1.0 if mean == 0 else None
    error = _standard_error(values)
    drawn = n > ENUMERATED
    every = itertools.product(range(n), repeat=n)
    rows = np.random.default_rng(0).integers(0, n, (RESAMPLES, n)) if drawn else np.array(list(every))
    resampled = values[rows]
    shift, errors = resampled.mean(1) - mean, _standard_error(resampled)
    single = errors <= 1e-12 * error  # one value, n times over
    t = np.where(single, np.copysign(np.inf, shift), shift / np.where(single, 1.0, errors))
    extreme = np.abs(t) >= abs(mean) / error * (1 - 1e-12)
    p = (extreme.sum() + drawn) / (len(t) + drawn)
    # The quantile's value itself is a resample's: between a number and infinity nothing can be interpolated.
    ends = [mean - error * np.quantile(t, share, method=kind) for share, kind in (((1 + LEVEL) / 2, "higher"), ((1 - LEVEL) / 2, "lower"))]
    low, high = (float(end) if np.isfinite(end) else None for end in ends)
    return mean, low, high, float(p)


def _standard_error(values: np.ndarray) -> np.ndarray:
    return values.std(-1, ddof=1) / np.sqrt(values.shape[-1])


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being many (Holm 1979): below a level with a chance of at most that level that any true null is among them."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.asarray(p_values, np.float64)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.tolist()
