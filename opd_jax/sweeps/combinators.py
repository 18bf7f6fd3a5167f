"""Lists of points, and what is made of them: small pure functions. A point is {field: value}.

A field is one of opd_jax/config/fields.py ("estimator.gamma"), or, with a colon before it, an argument of the config file (":role", what
one writes after the colon of --config=FILE.py:role=sft).

>>> product(over("estimator.gamma", 0.5, 0.9), over("rollout.temperature", 1.0))
[{'estimator.gamma': 0.5, 'rollout.temperature': 1.0}, {'estimator.gamma': 0.9, 'rollout.temperature': 1.0}]
>>> zip(over("rollout.max_new_tokens", 16, 32), over("rollout.batch_size", 64, 32))
[{'rollout.max_new_tokens': 16, 'rollout.batch_size': 64}, {'rollout.max_new_tokens': 32, 'rollout.batch_size': 32}]
>>> chain(over("signal.support", "full"), over("signal.support", "sampled"))
[{'signal.support': 'full'}, {'signal.support': 'sampled'}]
>>> seeds(2, first=5)
[{':seed': 5}, {':seed': 6}]
"""

import builtins
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from opd_jax.config import ConfigError

Point = dict[str, Any]
REPLICATES = (":seed", "seed")  # what repeats a point: the argument `seed` of the config file, or the field alone


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What `get_sweep(arg)` of a file in configs/sweeps/ gives."""

    points: Sequence[Point]
    seeds: int = 1  # runs of each point, unless the points name seeds themselves
    metrics: tuple[str, ...] = ()  # names in metrics.jsonl, whose last value counts


def over(field: str, *values: Any) -> list[Point]:
    """One point for each value of a field."""
    return [{field: value} for value in values]


def product(*lists: Sequence[Point]) -> list[Point]:
    """Every combination of one point of each list; the last list varies fastest. Raises ConfigError for a field that is in two of them."""
    return [_joined(points) for points in itertools.product(*lists)]


def zip(*lists: Sequence[Point]) -> list[Point]:
    """The first points of all lists together, the second ones, ... Raises ConfigError for lists of different lengths."""
    if len({len(points) for points in lists}) > 1:
        raise ConfigError(f"sweep: zip needs lists of one length, it got {', '.join(str(len(points)) for points in lists)} points")
    return [_joined(points) for points in builtins.zip(*lists, strict=True)]


def chain(*lists: Sequence[Point]) -> list[Point]:
    """All points, one list after the other."""
    return list(itertools.chain(*lists))


def seeds(count: int, *, first: int = 0, field: str = ":seed") -> list[Point]:
    """`count` seeds from `first` on, for a product with other points.

    `:seed` is the argument of the config file, which sets what the file makes depend on it; `seed` is the field alone.
    """
    if count < 1:
        raise ConfigError(f"sweep: {count} seeds; give at least 1")
    return over(field, *range(first, first + count))


def _joined(points: Sequence[Point]) -> Point:
    joined: Point = {}
    for point in points:
        if twice := joined.keys() & point.keys():
            raise ConfigError(f"sweep: {sorted(twice)[0]} is swept twice; name a field in one list")
        joined |= point
    return joined
