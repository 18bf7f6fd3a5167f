"""Files that somebody else wrote: regular files only, read up to a limit, parsed and never evaluated; each mistake is one UserError."""

import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

from opd_jax.types import UserError

MAX_JSON_BYTES = 64 * 2**20  # of a JSON file; the largest tokenizers have about 35 MB
MAX_LINES_BYTES = 4 * 2**30  # of a file of lines
MAX_LINE_BYTES = 16 * 2**20  # of one of its lines
_BOM = b"\xef\xbb\xbf"


def reason(error: BaseException) -> str:
    """What an error of the system or of a library says, short enough to be quoted."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, KeyError):  # which says no more than the name
        text = f"there is no {error}"
    elif isinstance(error, UnicodeDecodeError):
        text = f"it is not UTF-8 at byte {error.start}"
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + "..."


def shown(value: Any) -> str:
    """A value for a message, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def check_regular(path: str | os.PathLike, *, where: str, remedy: str, limit: int) -> None:
    """Refuses what is not a file of at most `limit` bytes, links followed: reading a pipe or a device may never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"{where}: cannot be read ({reason(error)}); {remedy}") from None
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"{where}: cannot be read (Is a directory); {remedy}")
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{where}: cannot be read (a pipe or a device, not a file); {remedy}")
    if found.st_size > limit:
        raise UserError(f"{where}: has {found.st_size} bytes, at most {limit} are read; {remedy}")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def _integer(text: str) -> int:
    if len(text) > 1000:  # the time of int() grows with the square
        raise ValueError(f"an integer has {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(parse_constant=_no_number, parse_float=_finite, parse_int=_integer)


def parse_json(text: str | bytes) -> Any:
    """json.loads that raises nothing but ValueError, and does so for NaN, infinities, huge integers and deep nesting as well."""
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | os.PathLike, *, remedy: str) -> dict[str, Any]:
    """The object of a JSON file in UTF-8. Raises UserError that names the file."""
    check_regular(path, where=str(path), remedy=remedy, limit=MAX_JSON_BYTES)
    try:
        content = pathlib.Path(path).read_bytes()
        if content.startswith(_BOM):  # other readers of the file would stumble over it
            raise ValueError("it begins with a byte-order mark")
        value = parse_json(content)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not a {type(value).__name__}; {remedy}")
    return value


def read_lines(path: str | os.PathLike, *, where: str, remedy: str, digest: Any = None) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line break) of each line of a UTF-8 file, one in memory at a time; `digest` is fed all bytes.

    Lines end at "\\n" alone, so that other separators may stand in JSON. Raises UserError.
    """
    check_regular(path, where=where, remedy=remedy, limit=MAX_LINES_BYTES)
    try:
        with open(path, "rb") as file:
            offset, number = 0, 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if digest is not None:
                    digest.update(line)
                yield number, _text_of(line, offset, f"{where}, line {number}", where)
                offset += len(line)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({reason(error)}); {remedy}") from None


def _text_of(line: bytes, offset: int, line_where: str, where: str) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{line_where}: has more than {MAX_LINE_BYTES} bytes; shorten the line")
    if b"\0" in line:
        raise UserError(f"{where}: holds a zero at byte {offset + line.index(0)}, as UTF-16 does; convert the file to UTF-8")
    skipped = len(_BOM) if offset == 0 and line.startswith(_BOM) else 0
    try:
        return line[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 at byte {offset + skipped + error.start}; convert the file") from None
