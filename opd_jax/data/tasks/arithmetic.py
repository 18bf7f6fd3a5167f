"""Running values: "314=" -> s_1 s_2 s_3 with s_i = (3 s_(i-1) + d_i) mod 10. One wrong value spoils all that follow it.

Examples are made on the spot: example i is a function of (seed, split, i).
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import numpy as np

from opd_jax.data.tasks import Example, Lazy, Verdict
from opd_jax.types import UserError

UNLIMITED = 2**24  # examples of an unlimited split
EVAL_SHARE = 8  # one prompt in so many belongs to the held-out split


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    level: int  # digits of a prompt
    train_size: int  # prompts to train on; 0: unlimited
    eval_size: int
    seed: int
    name = "arithmetic"
    digest = ""
    verifiable = True

    def __post_init__(self):
        if not 2 <= self.level <= 100:
            raise UserError(f"config field task.level = {self.level} must be from 2 to 100 digits for task.name = 'arithmetic'")

    def examples(self, split: str) -> Sequence[Example]:
        sizes = {"train": self.train_size or UNLIMITED, "eval": self.eval_size}
        return Lazy(sizes[split], functools.partial(_example, self, split))

    def verify(self, example: Example, text: str) -> Verdict:
        """Exact match; the feedback names the first wrong value."""
        if text == example.answer:
            return Verdict(1.0)
        for i, (given, right) in enumerate(zip(text, example.answer, strict=False)):
            if given != right:
                return Verdict(0.0, f"value {i + 1} is {given!r}, it should be {right!r}")
        return Verdict(0.0, f"{len(text)} values were given, there should be {len(example.answer)}")


def _example(task: Arithmetic, split: str, index: int) -> Example:
    digits = _digits(task, split, index)
    solution = running_values(digits)
    return Example(id=index, prompt=f"{digits}=", solution=solution, answer=solution)


def _digits(task: Arithmetic, split: str, index: int) -> str:
    """The first draw that belongs to this split, which a hash of the digits decides."""
    rng = np.random.default_rng([task.seed, index, split == "eval"])
    while True:
        digits = "".join(map(str, rng.integers(0, 10, task.level)))
        if (zlib.crc32(digits.encode()) % EVAL_SHARE == 0) == (split == "eval"):
            return digits


def running_values(digits: str) -> str:
    """s_i = (3 s_(i-1) + d_i) mod 10 with s_0 = 0, as a string of digits."""
    value, values = 0, []
    for digit in digits:
        value = (3 * value + int(digit)) % 10
        values.append(str(value))
    return "".join(values)
