"""Files with one JSON object per line -> examples, split into those to train on and those held out."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

from opd_jax import files
from opd_jax.data.tasks import Example
from opd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    digest: str  # of the file

    def examples(self, split: str) -> tuple[Example, ...]:
        return {"train": self.train, "eval": self.held_out}[split]


@dataclasses.dataclass(frozen=True)
class Line:
    """One object of a file, with its place for messages."""

    fields: dict[str, Any]
    where: str

    def text(self, *names: str) -> str | None:
        """The first of these fields that is there, numbers as text; None without any. Raises UserError for what is no text."""
        name = next((name for name in names if self.fields.get(name) is not None), None)
        if name is None:
            return None
        value = self.fields[name]
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UserError(f"{self.where}: `{name}` is {type(value).__name__}, it must be text or a number")
        text = str(value)
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UserError(f"{self.where}: `{name}` holds half of a surrogate pair, which is no text; write the character itself")
        return text

    def required(self, *names: str) -> str:
        """As `text`; raises UserError where there is none."""
        text = self.text(*names)
        if text is None:
            raise UserError(f"{self.where}: has no `{names[0]}`; valid: {', '.join(names)}; add one of them")
        return text


def read(
    path: str, *, task: str, holds: str, make: Callable[[Line, int], Example], train_size: int, eval_size: int, name: str = "lines"
) -> Split:
    """Reads `task.path`; `holds` says what its lines should have.

    The last `eval_size` lines, at most half of them, are held out; `train_size` (0: all) of the others are trained on. A prompt that is
    held out is never trained on, also where it stands on several lines. Raises UserError that names file, line and field.
    """
    what = f"a file of {name} with {holds}"
    if not path:
        raise UserError(f"config field task.path = '' must name {what} for task.name = {task!r}")
    where, digest = f"task.path = {path!r}", hashlib.blake2b(digest_size=16)
    lines = files.read_lines(path, where=where, remedy=f"give {what}", digest=digest)
    filled = ((number, text) for number, text in lines if text.strip())
    examples = [make(_parse(text, f"{where}, line {number}", holds), index) for index, (number, text) in enumerate(filled)]
    if not examples:
        raise UserError(f"{where}: has no lines; give {what}")
    split = len(examples) - min(eval_size, len(examples) // 2)
    held_out = examples[split:]
    seen = {example.prompt for example in held_out}
    train = [example for example in examples[:split] if example.prompt not in seen]
    if len(train) < train_size:
        raise UserError(f"{where}: has {len(examples)} examples, {len(train)} of them to train on; lower task.train_size = {train_size}")
    return Split(tuple(train[: train_size or None]), tuple(held_out), digest.hexdigest())


def _parse(text: str, where: str, holds: str) -> Line:
    try:
        fields = files.parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({files.reason(error)}); write one object per line") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: has no {holds.split()[0]}, but is a {type(fields).__name__}; write one object per line")
    return Line(fields, where)
