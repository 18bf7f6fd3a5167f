"""Text from nothing: every prompt is empty, so that a completion begins right after the beginning-of-sequence token."""

import dataclasses
from collections.abc import Sequence

from opd_jax.data.tasks import Example, Verdict

UNLIMITED = 2**24  # rollouts of an unlimited split


@dataclasses.dataclass(frozen=True)
class Unconditional:
    train_size: int  # 0: unlimited; ids differ, so that draws do
    eval_size: int
    name = "unconditional"
    digest = ""
    verifiable = False

    def examples(self, split: str) -> Sequence[Example]:
        return _Empty({"train": self.train_size or UNLIMITED, "eval": self.eval_size}[split])

    def verify(self, example: Example, text: str) -> Verdict:
        """Nothing to verify: any text is as good as another."""
        return Verdict(0.0)


@dataclasses.dataclass(frozen=True)
class _Empty(Sequence):
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return Example(id=index, prompt="")
