"""metrics.jsonl and samples.jsonl, and the progress display. GLOSSARY says what each metric means."""

import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from opd_jax import files, processes
from opd_jax.glossary import GLOSSARY as GLOSSARY
from opd_jax.types import UserError


class MetricsWriter:
    """Appends to metrics.jsonl and samples.jsonl of a run directory; every line is flushed when it is written. Of several processes the
    first writes.

    Raises UserError when a file cannot be written. Nothing is written after that, so that no record is missing between others.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._failed: UserError | None = None
        self._metrics = pathlib.Path(workdir) / "metrics.jsonl"
        self._samples = pathlib.Path(workdir) / "samples.jsonl"

    def write(self, record: dict[str, Any]) -> None:
        """One step's object. Raises ValueError for a value that is not finite."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"step {record.get('step')}: metric {name} is {value}")
        self._append(self._metrics, [record])

    def samples(self, records: Iterable[dict[str, Any]]) -> None:
        """The lines of samples.py: step, prompt, completion, token_ids and what the models thought of each token."""
        self._append(self._samples, records)

    def truncate_after(self, step: int) -> None:
        """Cuts both files back to records of at most this step, and drops a torn last line; what stays is kept byte for byte.

        Raises UserError, with both files as they were, for a broken line before the last: what follows it would be lost.
        """
        cuts = {path: _size_until(path, step) for path in (self._metrics, self._samples) if os.path.lexists(path)}
        for path, size in cuts.items():
            if size < path.stat().st_size:
                os.truncate(path, size)

    def has_record(self, step: int) -> bool:
        """Whether a step is on record; all processes must ask."""
        here = any(record["step"] == step for record in read(self._metrics)) if self._metrics.exists() else False
        return processes.share(here)[0]  # the others may read the file when the first has gone on writing

    def _append(self, path: pathlib.Path, records: Iterable[dict[str, Any]]) -> None:
        if not processes.first():
            return
        if self._failed:
            raise self._failed
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            if path.is_file():
                os.truncate(path, size)
            why = files.reason(error)
            self._failed = UserError(f"{path}: cannot be written ({why}); free space, then the same command continues")
            raise self._failed from None


def _size_until(path: pathlib.Path, step: int) -> int:
    """Bytes of the leading lines that are whole and speak of at most this step."""
    size = 0
    for record, line in _records(path):
        if record is None or not line.endswith(b"\n") or record["step"] > step:
            break
        size += len(line)
    return size


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl or samples.jsonl; a torn last line is left out. Raises UserError for a broken line before it."""
    return [record for record, _ in _records(path) if record is not None]


def _records(path: str | os.PathLike) -> list[tuple[dict[str, Any] | None, bytes]]:
    """(object with an integer step, its line) of every line; the object of a last line that is torn is None. Raises UserError."""
    remedy = "restore the file"
    files.check_regular(path, where=str(path), remedy=remedy, limit=files.MAX_LINES_BYTES)
    try:
        lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({files.reason(error)}); {remedy}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        record, problem = _parse(line)
        if problem and number < len(lines):
            raise UserError(f"{path}, line {number}: {problem}; remove the line or {remedy}")
        records.append((record, line))
    return records


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """(the object, "") or (None, what is wrong with the line)."""
    try:
        record = files.parse_json(line)
    except ValueError:
        return None, "is not JSON"
    if not isinstance(record, dict) or isinstance(record.get("step"), bool) or not isinstance(record.get("step"), int):
        return None, "is no object with a `step`"
    return record, ""


class Progress:
    """One line per phase; a live bar on a terminal, a line every few seconds elsewhere; nothing when quiet. To stdout, of process 0."""

    def __init__(self, *, quiet: bool = False, steps: int | None = None):
        self._quiet = quiet or not processes.first()
        self._bar = None
        self._last_line = 0.0
        self.steps = steps

    def phase(self, text: str) -> None:
        """Says what begins now."""
        if not self._quiet:
            print(text, flush=True) if self._bar is None else self._bar.console.print(text, highlight=False, markup=False)

    def begin(self, steps: int, done: int) -> None:
        """Starts the bar of a run of `steps` updates, `done` of which are done."""
        self.steps = steps
        if self._quiet or not sys.stdout.isatty():
            return
        from rich import progress

        columns = (
            "[progress.description]{task.description}",
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        self._bar = progress.Progress(*columns)
        self._task = self._bar.add_task("", total=steps, completed=done)
        self._bar.start()

    def update(self, record: dict[str, Any]) -> None:
        """Shows a step's record."""
        import time

        if self._quiet:
            return
        text = summary(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
        evaluated = any(name.startswith("eval/") for name in record)
        if evaluated or record["step"] == self.steps or (self._bar is None and time.monotonic() - self._last_line > 5.0):
            self._last_line = time.monotonic()
            self.phase(f"step {record['step']}/{self.steps}  {text}")

    def advance(self, done: int, text: str) -> None:
        """Moves the bar of something else than updates."""
        import time

        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif not self._quiet and (done == self.steps or time.monotonic() - self._last_line > 5.0):
            self._last_line = time.monotonic()
            self.phase(f"{done}/{self.steps}  {text}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/reverse_kl": "KL {:.3f}",
    "rollout/reward": "reward {:.2f}",
    "rollout/tokens_per_second": "{:.0f} tokens/s",
    "eval/accuracy": "eval accuracy {:.3f}",
    "eval/sampled_accuracy": "sampled {:.3f}",
    "eval/reverse_kl": "reverse KL {:.3f}",
    "eval/forward_kl": "forward KL {:.3f}",
}


def summary(record: dict[str, Any]) -> str:
    """The few numbers of a record that a person watches."""
    return "  ".join(text.format(record[name]) for name, text in SHOWN.items() if name in record)
