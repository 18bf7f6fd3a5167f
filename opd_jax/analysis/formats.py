"""Numbers as the report writes them."""

import math
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def number(value: float, like: float | None = None) -> str:
    """Two decimals, below 0.1 two digits that are not 0 (of `like`, so that an interval is written as its value is)."""
    size = abs(like or value)
    if 0 < size < 1e-4:
        return f"{value:.2g}"
    return f"{value:.{1 - math.floor(math.log10(size)) if 0 < size < 0.095 else 2}f}"


def estimate(value: tuple[float, float | None, float | None] | None) -> str:
    """`value [low, high]`, the value alone, or nothing."""
    if value is None:
        return ""
    middle, low, high = value
    return number(middle) if low is None else f"{number(middle)} [{number(low, middle)}, {number(high, middle)}]"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
