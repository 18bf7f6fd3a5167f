"""A user's file: one JSON object per line with `prompt`, optionally `answer` (to verify) and `solution` (to learn from)."""

import dataclasses
import hashlib
from collections.abc import Sequence

from opd_jax import files
from opd_jax.data.tasks import Example, Verdict
from opd_jax.types import UserError

FIELDS = ("prompt", "answer", "solution")


@dataclasses.dataclass(frozen=True)
class Jsonl:
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    verifiable: bool  # every line has an answer
    digest: str
    name = "jsonl"

    def examples(self, split: str) -> Sequence[Example]:
        return {"train": self.train, "eval": self.held_out}[split]

    def verify(self, example: Example, text: str) -> Verdict:
        """Exact match with `answer`, up to white space at the ends."""
        if text.strip() == example.answer.strip():
            return Verdict(1.0)
        return Verdict(0.0, f"the answer is {text.strip()[:80]!r}, it should be {example.answer.strip()!r}")


def read(path: str, *, train_size: int, eval_size: int) -> Jsonl:
    """Reads a file; the last `eval_size` lines, at most half of them, are held out; `train_size` (0: all) of the others are trained on.

    A prompt that is held out is never trained on, also where it stands on several lines. Raises UserError.
    """
    if not path:
        raise UserError("config field task.path = '' must name a file of lines with `prompt` for task.name = 'jsonl'")
    digest = hashlib.blake2b(digest_size=16)
    lines = files.read_lines(path, where=f"task.path = {path!r}", remedy="give a file of lines with `prompt`", digest=digest)
    filled = ((number, line) for number, line in lines if line.strip())
    examples = [_example(path, number, line, index) for index, (number, line) in enumerate(filled)]
    if not examples:
        raise UserError(f"task.path = {path!r}: has no lines; give a file of lines with `prompt`")
    split = len(examples) - min(eval_size, len(examples) // 2)
    held_out = examples[split:]
    seen = {example.prompt for example in held_out}
    train = [example for example in examples[:split] if example.prompt not in seen]
    if len(train) < train_size:
        raise UserError(
            f"task.path = {path!r}: has {len(examples)} examples, {len(train)} of them to train on; lower task.train_size = {train_size}"
        )
    verifiable = all(example.answer is not None for example in examples)
    return Jsonl(tuple(train[: train_size or None]), tuple(held_out), verifiable, digest.hexdigest())


def _example(path: str, number: int, line: str, index: int) -> Example:
    where = f"task.path = {path!r}, line {number}"
    try:
        fields = files.parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({files.reason(error)}); write one object per line") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise UserError(f'{where}: has no `prompt` text; write {{"prompt": ...}}, optionally with answer and solution')
    for name in FIELDS[1:]:
        value = fields.get(name)
        if value is not None and (not isinstance(value, str | int | float) or isinstance(value, bool)):
            raise UserError(f"{where}: `{name}` is {type(value).__name__}, it must be text or a number")
    answer, solution = (None if fields.get(name) is None else str(fields[name]) for name in FIELDS[1:])
    for name, text in (("prompt", fields["prompt"]), ("answer", answer), ("solution", solution)):
        if text is not None and any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(f"{where}: `{name}` holds half of a surrogate pair, which is no text; write the character itself")
    return Example(id=index, prompt=fields["prompt"], solution=solution if solution is not None else answer, answer=answer)
