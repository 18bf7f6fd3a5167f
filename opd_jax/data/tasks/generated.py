"""What tasks share that make their examples on the spot: example i is a function of (seed, split, i), and splits never share an input."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from opd_jax.data.tasks import Example, Lazy, Verdict
from opd_jax.types import UserError

UNLIMITED = 2**24  # examples of an unlimited split
EVAL_SHARE = 8  # one input in so many belongs to the held-out split
DIGITS = "0123456789"  # str.isdigit also takes digits of other scripts


@dataclasses.dataclass(frozen=True)
class GeneratedTask:
    """The parts of a task that do not depend on what its examples are; a subclass brings `example(split, index)` and `verify`."""

    level: int  # size of an example; each task says of what
    train_size: int  # prompts to train on; 0: unlimited
    eval_size: int
    seed: int
    digest = ""
    verifiable = True

    def examples(self, split: str) -> Sequence[Example]:
        sizes = {"train": self.train_size or UNLIMITED, "eval": self.eval_size}
        return Lazy(sizes[split], functools.partial(self.example, split))

    def draw(self, split: str, index: int, make: Callable[[np.random.Generator], str]) -> str:
        """The first draw that belongs to this split, which a hash of the text decides."""
        rng = np.random.default_rng([self.seed, index, split == "eval"])
        while True:
            text = make(rng)
            if (zlib.crc32(text.encode()) % EVAL_SHARE == 0) == (split == "eval"):
                return text

    def check_level(self, low: int, high: int, unit: str) -> None:
        """Raises UserError."""
        if not low <= self.level <= high:
            raise UserError(f"config field task.level = {self.level} must be from {low} to {high} {unit} for task.name = {self.name!r}")


def random_digits(rng: np.random.Generator, length: int) -> str:
    return "".join(map(str, rng.integers(0, 10, length)))


def judge_digits(text: str, answer: str, *, unit: str) -> Verdict:
    """Exact match with a string of digits; the feedback names the first character that is no digit, otherwise the first wrong `unit`."""
    if text == answer:
        return Verdict(1.0)
    for i, given in enumerate(text):
        if given not in DIGITS:
            return Verdict(0.0, f"character {i + 1} is {given!r}, it should be a digit", well_formed=False)
    for i, (given, right) in enumerate(zip(text, answer, strict=False)):
        if given != right:
            return Verdict(0.0, f"{unit} {i + 1} is {given!r}, it should be {right!r}")
    return Verdict(0.0, f"{len(text)} {unit}s were given, there should be {len(answer)}", well_formed=bool(text))
