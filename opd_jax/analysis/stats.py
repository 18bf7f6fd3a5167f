"""Intervals over independent repetitions, such as seeds."""

from collections.abc import Sequence

import numpy as np
import scipy.stats

LEVEL = 0.95


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) over the first axis of [n, ...]: Student's t at LEVEL, for n >= 2 independent values that are about normal."""
    values = np.asarray(values, np.float64)
    assert len(values) >= 2, "an interval needs two values"
    mean = values.mean(0)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * error
    return mean, mean - half, mean + half
