"""How the time of a step grows with batch, length, vocabulary, width and devices: a process for each point, a power law for each curve."""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence

from opd_jax.bench import rounds, shapes
from opd_jax.bench.worker import Order
from opd_jax.types import UserError

PHASES = ("generate", "update")  # a step is both, one after the other
NAMES = {
    "batch_size": "rollouts in a batch",
    "new_tokens": "tokens of a completion",
    "vocab": "tokens of the vocabulary",
    "width": "width of the models",
    "devices": "virtual devices on this machine",
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Median seconds of `generate`, `update` and `step` at each value, and the exponents of the power laws that fit them best."""

    field: str
    dtype: str
    values: list[int]
    seconds: dict[str, list[float]]
    exponents: dict[str, tuple[float, float]]  # (exponent, its standard error; 0 of two points)


def check(shape: str) -> None:
    """Refuses a shape without curves. Raises UserError."""
    if shape not in shapes.CURVES:
        raise UserError(f"--curves: there are none of --shape={shape}; valid: {', '.join(shapes.CURVES)}")


def measure(shape: str, dtype: str, folder: pathlib.Path, *, repeats: int, say: Callable[[str], None]) -> tuple[list[Curve], list[str]]:
    """(the curves, why points are missing). A point that `folder` has is not measured again."""
    found, failures = [], []
    for field, values in shapes.CURVES[shape].items():
        points = {}
        for value in values:
            order = Order("opd_jax", shape, _changes(shape, field, value), dtype)
            seconds = _point(order, folder, repeats, say, failures)
            if seconds is not None:
                points[value] = seconds
        if len(points) > 1:
            found.append(_curve(field, dtype, points))
    return found, failures


def _changes(shape: str, field: str, value: int) -> dict[str, int]:
    """{} for the value that the shape has: its point is one for all curves."""
    return {} if shapes.make(shape, {field: value}) == shapes.make(shape) else {field: value}


def _point(order: Order, folder: pathlib.Path, repeats: int, say: Callable[[str], None], failures: list[str]) -> dict[str, float] | None:
    name = "_".join([order.shape, order.dtype, *(f"{field}_{value}" for field, value in order.changes.items())])
    path = folder / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    say(f"point {name}")
    measured = rounds.measure([order], folder, rounds=repeats, phases=PHASES, say=lambda text: None)
    failures += measured.failures
    samples = measured.samples.get((order.kind, order.dtype))
    if samples is None:
        return None
    seconds = {phase: statistics.median(x for one in samples[phase] for x in one) for phase in PHASES}
    path.write_text(json.dumps(seconds) + "\n")
    return seconds


def _curve(field: str, dtype: str, points: dict[int, dict[str, float]]) -> Curve:
    seconds = {phase: [point[phase] for point in points.values()] for phase in PHASES}
    seconds["step"] = [sum(point.values()) for point in points.values()]
    values = list(points)
    return Curve(field, dtype, values, seconds, {name: exponent(values, each) for name, each in seconds.items()})


def exponent(values: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(slope of log seconds over log values by least squares, its standard error: 0 of two points)."""
    x, y = [math.log(value) for value in values], [math.log(second) for second in seconds]
    slope, intercept = statistics.linear_regression(x, y)
    if len(x) == 2:
        return slope, 0.0
    residual = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True)) / (len(x) - 2)
    mean = statistics.fmean(x)
    return slope, math.sqrt(residual / sum((a - mean) ** 2 for a in x))


def lines(found: list[Curve]) -> list[str]:
    """A curve in a line."""
    told = []
    for curve in found:
        each = ", ".join(f"{value}: {1e3 * second:.0f} ms" for value, second in zip(curve.values, curve.seconds["step"], strict=True))
        powers = ", ".join(f"{name} {power:.2f} ± {error:.2f}" for name, (power, error) in curve.exponents.items())
        told.append(f"step by {NAMES[curve.field]} ({curve.dtype}): {each}; grows with the power of {powers}")
    return told
