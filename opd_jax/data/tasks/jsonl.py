"""A user's file: one JSON object per line with `prompt`, optionally `answer` (to verify) and `solution` (to learn from)."""

import dataclasses
from collections.abc import Sequence

from opd_jax.data.tasks import Example, Verdict, lines
from opd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Jsonl:
    split: lines.Split
    verifiable: bool  # every line has an answer
    name = "jsonl"

    @property
    def digest(self) -> str:
        return self.split.digest

    def examples(self, split: str) -> Sequence[Example]:
        return self.split.examples(split)

    def verify(self, example: Example, text: str) -> Verdict:
        """Exact match with `answer`, up to white space at the ends."""
        if text.strip() == example.answer.strip():
            return Verdict(1.0)
        return Verdict(0.0, f"the answer is {text.strip()[:80]!r}, it should be {example.answer.strip()!r}")


def read(path: str, *, train_size: int, eval_size: int) -> Jsonl:
    """Reads a file; see lines.read for what is held out. Raises UserError."""
    split = lines.read(path, task="jsonl", holds="`prompt`", make=_example, train_size=train_size, eval_size=eval_size)
    return Jsonl(split, all(example.answer is not None for example in (*split.train, *split.held_out)))


def _example(line: lines.Line, index: int) -> Example:
    prompt = line.fields.get("prompt")
    if not isinstance(prompt, str):
        raise UserError(f'{line.where}: has no `prompt` text; write {{"prompt": ...}}, optionally with answer and solution')
    return Example(id=index, prompt=line.required("prompt"), solution=line.text("solution", "answer"), answer=line.text("answer"))
