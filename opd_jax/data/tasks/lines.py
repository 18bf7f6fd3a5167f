"""What all tasks that read a file of lines share: fields with their types, and the split into prompts to train on and held-out ones."""

import contextlib
import dataclasses
import gzip
import hashlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence

from opd_jax import files
from opd_jax.data.tasks import Example
from opd_jax.types import UserError

MAX_UNPACKED_BYTES = 2**30  # of a file that is compressed


@dataclasses.dataclass(frozen=True)
class Line:
    where: str  # file and line, for messages
    fields: dict

    def text(self, name: str) -> str | None:
        """A field as text, None where it is missing or null. Numbers are written as text. Raises UserError for other types."""
        value = self.fields.get(name)
        if value is None:
            return None
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UserError(f"{self.where}: `{name}` is {type(value).__name__}, it must be text or a number")
        if any("\ud800" <= char <= "\udfff" for char in str(value)):
            raise UserError(f"{self.where}: `{name}` holds half of a surrogate pair, which is no text; write the character itself")
        return str(value)

    def required(self, *names: str) -> str:
        """The first of the fields that is there and not empty. Raises UserError."""
        found = next((text for text in map(self.text, names) if text is not None and text.strip()), None)
        if found is None:
            raise UserError(f"{self.where}: has no `{'`, `'.join(names)}` text; write one of them")
        return found


def read(path: str, *, task: str, holds: str) -> tuple[list[Line], str]:
    """(the lines of a JSON-lines file, plain or .gz, a digest of its content); `holds` says what the lines hold. Raises UserError."""
    if not path:
        raise UserError(f"config field task.path = '' must name a file of lines with {holds} for task.name = {task!r}")
    where, remedy = f"task.path = {path!r}", f"give a file of lines with {holds}"
    digest = hashlib.blake2b(digest_size=16)
    with _unpacked(path, where, remedy) as plain:
        numbered = files.read_lines(plain, where=where, remedy=remedy, digest=digest)
        lines = [_line(f"{where}, line {number}", text, holds) for number, text in numbered if text.strip()]
    if not lines:
        raise UserError(f"{where}: has no lines; {remedy}")
    return lines, digest.hexdigest()


@contextlib.contextmanager
def _unpacked(path: str, where: str, remedy: str) -> Iterator[str]:
    if not path.endswith(".gz"):
        yield path
        return
    files.check_regular(path, where=where, remedy=remedy, limit=MAX_UNPACKED_BYTES)
    with tempfile.NamedTemporaryFile() as plain:
        try:
            with gzip.open(path) as packed:
                shutil.copyfileobj(_Bounded(packed), plain)
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise UserError(f"{where}: cannot be unpacked ({files.reason(error)}); {remedy}") from None
        plain.flush()
        yield plain.name


class _Bounded:
    """Stops what a small file may unpack to."""

    def __init__(self, file):
        self._file, self._left = file, MAX_UNPACKED_BYTES

    def read(self, size: int) -> bytes:
        piece = self._file.read(size)
        self._left -= len(piece)
        if self._left < 0:
            raise ValueError(f"it has more than {MAX_UNPACKED_BYTES} bytes")
        return piece


def _line(where: str, text: str, holds: str) -> Line:
    try:
        fields = files.parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({files.reason(error)}); write one object per line") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: has no {holds}, but is a {type(fields).__name__}; write one object per line")
    return Line(where, fields)


@dataclasses.dataclass(frozen=True)
class FileTask:
    """The parts of a task that do not depend on what its lines mean."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    digest: str
    verifiable = True

    def examples(self, split: str) -> Sequence[Example]:
        return {"train": self.train, "eval": self.held_out}[split]


def hold_out(path: str, examples: Sequence[Example], *, train_size: int, eval_size: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(examples to train on, held-out ones): the last `eval_size`, at most half, are held out; `train_size` (0: all) of the others remain.

    A prompt that is held out is never trained on, also where it stands on several lines. Raises UserError.
    """
    split = len(examples) - min(eval_size, len(examples) // 2)
    seen = {example.prompt for example in examples[split:]}
    train = [example for example in examples[:split] if example.prompt not in seen]
    if len(train) < train_size:
        raise UserError(
            f"task.path = {path!r}: has {len(examples)} examples, {len(train)} of them to train on; lower task.train_size = {train_size}"
        )
    return tuple(train[: train_size or None]), tuple(examples[split:])
