"""Text from nothing: every prompt is empty, so that a completion begins right after the beginning-of-sequence token."""

import dataclasses
from collections.abc import Sequence

from opd_jax.data.tasks import Example, Lazy, Verdict

UNLIMITED = 2**24  # rollouts of an unlimited split


@dataclasses.dataclass(frozen=True)
class Unconditional:
    train_size: int  # 0: unlimited; ids differ, so that draws do
    eval_size: int
    name = "unconditional"
    digest = ""
    verifiable = False

    def examples(self, split: str) -> Sequence[Example]:
        return Lazy({"train": self.train_size or UNLIMITED, "eval": self.eval_size}[split], lambda index: Example(id=index, prompt=""))

    def verify(self, example: Example, text: str) -> Verdict:
        """Nothing to verify: any text is as good as another."""
        return Verdict(0.0)
