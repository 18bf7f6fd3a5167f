"""A user's file: one JSON object per line with `prompt`, optionally `answer` (to verify) and `solution` (to learn from)."""

import dataclasses

from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.tasks.lines import FileTask, Line, hold_out
from opd_jax.data.tasks.lines import read as read_lines
from opd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Jsonl(FileTask):
    verifiable: bool = False  # every line has an answer
    name = "jsonl"

    def verify(self, example: Example, text: str) -> Verdict:
        """Exact match with `answer`, up to white space at the ends."""
        if text.strip() == example.answer.strip():
            return Verdict(1.0)
        return Verdict(0.0, f"the answer is {text.strip()[:80]!r}, it should be {example.answer.strip()!r}")

    def vote(self, text: str) -> str | None:
        return text.strip() or None


def read(path: str, *, train_size: int, eval_size: int) -> Jsonl:
    """Reads a file; the last `eval_size` lines, at most half of them, are held out; see lines.hold_out. Raises UserError."""
    lines, digest = read_lines(path, task="jsonl", holds="`prompt`")
    examples = [_example(line, index) for index, line in enumerate(lines)]
    train, held_out = hold_out(path, examples, train_size=train_size, eval_size=eval_size)
    return Jsonl(train, held_out, digest, verifiable=all(example.answer is not None for example in examples))


def _example(line: Line, index: int) -> Example:
    if not isinstance(line.fields.get("prompt"), str):  # which may be empty
        raise UserError(f'{line.where}: has no `prompt` text; write {{"prompt": ...}}, optionally with answer and solution')
    prompt, answer, solution = (line.text(name) for name in ("prompt", "answer", "solution"))
    return Example(id=index, prompt=prompt, solution=solution if solution is not None else answer, answer=answer)
