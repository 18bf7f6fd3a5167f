"""From inner products of gradients to variance, bias, signal-to-noise and cosine, each with an interval. NumPy alone, in float64.

A unit is a prompt: its rollouts stand or fall together, units are independent. A stream gives one vector per unit, the mean gradient of
its rollouts under one estimator. What is known of the vectors are inner products, so that everything here is arithmetic on S x S matrices:

    <E x_a, E x_b>  is estimated without bias by the mean of <x_a of one unit, x_b of another> over pairs of different units

so that noise never adds to a norm. Estimators of one target share a control: the target's reference r on the same rollouts less r on draws
of its own has mean 0, and what it explains of an estimator's noise is taken off (a paired comparison where that is all of it).

Letters: P units, S streams (the first E are the estimators), R numbers of a sketch, W resamples, I parts of a gradient.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from opd_jax.analysis.stats import LEVEL

LEAST_UNITS = 8  # a bootstrap over fewer says little
RESAMPLES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Parts:
    """How the squared norm of a gradient adds up over parts, such as parameter groups or positions."""

    names: tuple[str, ...]
    second_PEI: np.ndarray  # mean over a unit's rollouts of <part, whole>
    unit_PEI: np.ndarray  # <mean of the part over a unit's rollouts, mean of the whole>
    mean_EI: np.ndarray  # <mean of the part over all units, mean of the whole>


@dataclasses.dataclass(frozen=True)
class Units:
    """P units of `rollouts` rollouts each."""

    rollouts: int
    mean_gram_SS: np.ndarray  # inner products of the streams' means over units
    gram_PSS: np.ndarray  # inner products of the streams, unit by unit
    sketch_PSR: np.ndarray  # vectors with about these inner products, for resampling
    second_PE: np.ndarray  # mean over a unit's rollouts of the squared norm
    parts: Mapping[str, Parts]


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where the gradient of a target stands among the streams."""

    stream: int  # of the reference, on draws of its own or exact
    shadow: int | None  # of the same estimator on the estimators' rollouts; None: there is none to compare with


@dataclasses.dataclass(frozen=True)
class Value:
    """A number with its interval; `value` None where the sample cannot resolve it."""

    value: float | None
    low: float | None
    high: float | None

    def keys(self, name: str) -> dict[str, float | None]:
        """As the output has it."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def products(mean_gram_SS: np.ndarray, gram_PSS: np.ndarray) -> np.ndarray:
    """Unbiased <E x_a, E x_b>: the sum over pairs of different units over their number."""
    units = len(gram_PSS)
    return (units**2 * mean_gram_SS - gram_PSS.sum(0)) / (units * (units - 1))


def resample(units: int, resamples: int, seed: int) -> np.ndarray:
    """How often each unit is drawn, [W, P]: the same for every condition of as many units, so that conditions are compared in pairs."""
    return np.random.default_rng([seed, units]).multinomial(units, np.full(units, 1 / units), size=resamples)


def resampled_products(units: Units, counts_WP: np.ndarray) -> np.ndarray:
    """`products` of each resample, [W, S, S]; pairs of a unit with its own copy are left out.

    From sketches, moved by the sketches' error at the sample itself, which the resamples share.
    """
    point_SS = products(units.mean_gram_SS, units.gram_PSS)
    pieces = [_sketched_products(units, counts) for counts in np.array_split(counts_WP, -(-len(counts_WP) // RESAMPLES_AT_ONCE))]
    sketched_SS = _sketched_products(units, np.ones((1, len(units.gram_PSS)), int))[0]
    return np.concatenate(pieces) + (point_SS - sketched_SS)


def _sketched_products(units: Units, counts_WP: np.ndarray) -> np.ndarray:
    count, streams, width = units.sketch_PSR.shape
    counts_WP = counts_WP.astype(np.float64)
    total_WSR = (counts_WP @ units.sketch_PSR.reshape(count, -1)).reshape(-1, streams, width)
    same_WSS = (counts_WP**2 @ units.gram_PSS.reshape(count, -1)).reshape(-1, streams, streams)
    pairs_W = counts_WP.sum(1) ** 2 - (counts_WP**2).sum(1)
    return (total_WSR @ total_WSR.swapaxes(1, 2) - same_WSS) / pairs_W[:, None, None]


class Laboratory:
    """The numbers of each estimator of one sample. Indices are those of streams."""

    def __init__(self, units: Units, counts_WP: np.ndarray, *, references: Sequence[Reference] = (), on_policy: bool = True):
        """`references` with a shadow serve as controls where the sampling law is theirs (`on_policy`)."""
        self.units = units
        self._counts_WP = counts_WP
        self._point_SS = products(units.mean_gram_SS, units.gram_PSS)
        self._boot_WSS = resampled_products(units, counts_WP)
        self._noise_SS = units.gram_PSS.mean(0) - units.mean_gram_SS
        self._controls = [r for r in references if r.shadow is not None] if on_policy else []
        self._second_WE = counts_WP @ units.second_PE / len(units.second_PE)

    # ---- spread

    def variances(self) -> np.ndarray:
        """Trace of the covariance of one rollout's gradient, [E]: E |g|^2 - |E g|^2. With one rollout per unit, the divisor n - 1."""
        return self.units.second_PE.mean(0) - np.diag(self._point_SS)[: self.units.second_PE.shape[1]]

    def resampled_variances(self) -> np.ndarray:
        """`variances` of each resample, [W, E]."""
        estimators = self._second_WE.shape[1]
        return self._second_WE - np.diagonal(self._boot_WSS, axis1=1, axis2=2)[:, :estimators]

    def variance(self, e: int) -> Value:
        return _value(self.variances()[e], self.resampled_variances()[:, e])

    def batch_variance(self, e: int) -> Value:
        """Number of rollouts times the variance of their mean: rollouts of one unit may be correlated."""
        own_P = self.units.gram_PSS[:, e, e]
        resampled_W = self._counts_WP @ own_P / len(own_P) - self._boot_WSS[:, e, e]
        point = own_P.mean() - self._point_SS[e, e]
        return _value(self.units.rollouts * point, self.units.rollouts * resampled_W)

    # ---- mean

    def bias(self, e: int, reference: Reference) -> Value:
        """|E g - target|, or None where the interval of its square holds 0."""
        difference_S = self._mean(e, reference) - self._only(reference.stream)
        square = _value(*self._form(difference_S, difference_S))
        return _root(square)

    def snr(self, e: int) -> Value:
        """|E g|^2 over the variance of one rollout, or None where the interval of |E g|^2 holds 0."""
        mean_S = self._mean(e, None)
        point, resampled_W = self._form(mean_S, mean_S)
        found = _quotient(point, resampled_W, self.variances()[e], self.resampled_variances()[:, e])
        if found.value is None:
            return found
        resolved = _value(point, resampled_W).low > 0 and point > 0
        return Value(found.value if resolved else None, max(found.low, 0.0), max(found.high, 0.0))

    def cosine(self, e: int, reference: Reference) -> Value:
        """Of E g and the target, or None where one of the two norms is not resolved."""
        mean_S, target_S = self._mean(e, reference), self._only(reference.stream)
        norms = [self._form(x_S, x_S) for x_S in (mean_S, target_S)]
        resolved = all(point > 0 and _value(point, resampled_W).low > 0 for point, resampled_W in norms)
        inner, inner_W = self._form(mean_S, target_S)
        square, square_W = (a * b for a, b in zip(*norms, strict=True))
        if not resolved:
            return Value(None, -1.0, 1.0)
        # A resample without a positive norm has no direction: it may be any.
        direction_W = np.where((norms[0][1] > 0) & (norms[1][1] > 0), inner_W / np.sqrt(np.maximum(square_W, 1e-300)), np.nan)
        low, high = (_quantiles(np.nan_to_num(direction_W, nan=end))[i] for i, end in enumerate((-1.0, 1.0)))
        return Value(*(float(np.clip(x, -1, 1)) for x in (inner / np.sqrt(square), low, high)))

    def _mean(self, e: int, compared: Reference | None) -> np.ndarray:
        """Weights [S] of the streams whose sum has mean E g and, among these, the least noise.

        A reference that is compared with itself is no control: the comparison would be with nothing.
        """
        controls = [r for r in self._controls if not (compared is not None and r == compared and r.shadow == e)]
        weights_S = self._only(e)
        if not controls:
            return weights_S
        control_KS = np.stack([self._only(r.shadow) - self._only(r.stream) for r in controls])
        spread_KK = control_KS @ self._noise_SS @ control_KS.T
        return weights_S - np.linalg.pinv(spread_KK, rcond=1e-9) @ (control_KS @ self._noise_SS @ weights_S) @ control_KS

    def _only(self, stream: int) -> np.ndarray:
        return np.eye(len(self._point_SS))[stream]

    def _form(self, a_S: np.ndarray, b_S: np.ndarray) -> tuple[float, np.ndarray]:
        """<E a, E b> of two sums of streams: (at the sample, at each resample)."""
        return float(a_S @ self._point_SS @ b_S), np.einsum("s,wst,t->w", a_S, self._boot_WSS, b_S)

    # ---- where the variance comes from

    def shares(self, e: int, parts: Parts) -> dict[str, Value]:
        """{part: its share of the variance}; shares add up to 1. In the intervals the share of |E g|^2 is held at its value."""
        units = len(parts.unit_PEI)
        mean_I = (units**2 * parts.mean_EI[e] - parts.unit_PEI[:, e].sum(0)) / (units * (units - 1))
        point_I = parts.second_PEI[:, e].mean(0) - mean_I
        resampled_WI = self._counts_WP @ parts.second_PEI[:, e] / units - mean_I[None]
        whole, whole_W = point_I.sum(), resampled_WI.sum(1)
        return {name: _quotient(point_I[i], resampled_WI[:, i], whole, whole_W) for i, name in enumerate(parts.names)}


def ratio(first: Laboratory, a: int, second: Laboratory, b: int) -> Value:
    """variance of a / variance of b, on the same resamples."""
    one, other = (first.variances()[a], first.resampled_variances()[:, a]), (second.variances()[b], second.resampled_variances()[:, b])
    return _quotient(*one, *other)


def exponent(laboratories: Sequence[Laboratory], indices: Sequence[int], at: Sequence[float]) -> Value:
    """The slope of log variance in log `at`, by least squares; a resample draws the same units everywhere."""
    log_at = np.log(at) - np.mean(np.log(at))
    slope = lambda variance_CW: log_at @ np.log(np.maximum(variance_CW, 1e-300)) / (log_at @ log_at)
    point = np.array([[lab.variances()[e]] for lab, e in zip(laboratories, indices, strict=True)])
    resampled = np.stack([lab.resampled_variances()[:, e] for lab, e in zip(laboratories, indices, strict=True)])
    return _value(float(slope(point)[0]), slope(resampled))


def _quantiles(values_W: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_W, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _value(point: float, resampled_W: np.ndarray) -> Value:
    return Value(float(point), *_quantiles(resampled_W))


def _quotient(point: float, resampled_W: np.ndarray, by: float, by_W: np.ndarray) -> Value:
    """Nothing at all where the divisor is not positive, in the sample or in a resample."""
    if not (by > 0 and by_W.min() > 0):
        return Value(None, None, None)
    return _value(point / by, resampled_W / by_W)


def _root(square: Value) -> Value:
    """The root of a square that is estimated without bias, and may therefore be negative."""
    low, high = (float(np.sqrt(max(x, 0.0))) for x in (square.low, square.high))
    return Value(float(np.sqrt(square.value)) if square.low > 0 and square.value > 0 else None, low, high)
