"""Wrong and hostile files, made by hand, and the meter that holds their refusal to bounded time and memory."""

import contextlib
import faulthandler
import hashlib
import json
import os
import pathlib
import resource
import shutil
import signal
import stat
import struct
from collections.abc import Callable, Iterator

import numpy as np
import safetensors.numpy

Damage = Callable[[pathlib.Path], object]  # of a folder that holds model/, run/ and data.jsonl
SECONDS = 30
MEGABYTES = 500


# ---- the meter


@contextlib.contextmanager
def bounded(seconds: int = SECONDS, megabytes: int = MEGABYTES) -> Iterator[None]:
    """Fails what takes more time or more memory, a hang too; one that no signal can end kills the process with a stack trace."""

    def stop(signum, frame):
        raise AssertionError(f"not done after {seconds} s")

    before = _resident(reset=True)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, previous)
    grown = (_resident() - before) / 1024
    assert grown < megabytes, f"memory grew by {grown:.0f} MB"


def _resident(*, reset: bool = False) -> int:
    """Peak of the resident memory since the last reset, native allocations included, in KB."""
    try:
        if reset:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:  # no such kernel: the peak of the process, which grows where it is exceeded
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def contents(folder: pathlib.Path) -> dict[str, str]:
    """Every path below a folder with what it holds."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: pathlib.Path) -> str:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return f"link to {os.readlink(path)}"
    if not stat.S_ISREG(found.st_mode):
        return f"mode {found.st_mode}"
    with path.open("rb") as file:
        return f"{found.st_size} bytes {hashlib.blake2b(file.read(2**27)).hexdigest()}"


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: a disk that is full, as far as a test without privileges can make one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- damage


def also(*steps: Damage) -> Damage:
    return lambda room: [step(room) for step in steps]


def nothing(room: pathlib.Path) -> None:
    pass


def text(name: str, content: str | bytes) -> Damage:
    return lambda room: (room / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def put_before(name: str, content: str) -> Damage:
    return lambda room: (room / name).write_text(content + (room / name).read_text())


def cut(name: str, size: int) -> Damage:
    """Shortens a file, or makes it longer with a hole."""
    return lambda room: os.truncate(room / name, size)


def remove(name: str) -> Damage:
    return lambda room: shutil.rmtree(room / name) if (room / name).is_dir() else (room / name).unlink(missing_ok=True)


def rename(name: str, other: str) -> Damage:
    return lambda room: (room / name).rename(room / other)


def folder(name: str) -> Damage:
    return also(remove(name), lambda room: (room / name).mkdir())


def pipe(name: str) -> Damage:
    return also(remove(name), lambda room: os.mkfifo(room / name))


def link(name: str, target: str) -> Damage:
    return also(remove(name), lambda room: (room / name).symlink_to(target))


def fields(name: str, **changes) -> Damage:
    return lambda room: (room / name).write_text(json.dumps(json.loads((room / name).read_text()) | changes))


def swap(name: str, old: str, new: str) -> Damage:
    def change(room):
        before = (room / name).read_text()
        assert old in before, (name, old)
        (room / name).write_text(before.replace(old, new, 1))

    return change


# ---- safetensors

WEIGHTS = "model/model.safetensors"
INDEX = "model/model.safetensors.index.json"


def entry(begin: int, end: int, shape=(4,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def weights(header: dict | str | bytes, data: bytes = b"", length: int | None = None) -> Damage:
    """A weights file of this header; `length` is what it claims."""
    header = json.dumps(header) if isinstance(header, dict) else header
    header = header.encode() if isinstance(header, str) else header
    return text(WEIGHTS, struct.pack("<Q", len(header) if length is None else length) + header + data)


def tensors(change: Callable[[dict], object]) -> Damage:
    def rewrite(room):
        held = safetensors.numpy.load_file(room / WEIGHTS)
        change(held)
        safetensors.numpy.save_file(held, room / WEIGHTS)

    return rewrite


def value(name: str, number: float) -> Damage:
    """Writes one number into the middle of a tensor."""
    return tensors(lambda held: np.put(held[name], held[name].size // 2, number))


def index(content: object) -> Damage:
    """The weights under the name a.safetensors, and an index with this content."""
    return also(rename(WEIGHTS, "model/a.safetensors"), text(INDEX, json.dumps(content)))


def split_weights(room: pathlib.Path, *, both: str = "") -> None:
    """The weights in two files with an index; tensor `both` lies in each."""
    held = safetensors.numpy.load_file(room / WEIGHTS)
    (room / WEIGHTS).unlink()
    names = sorted(held)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: held[name] for name in {*part, *filter(None, [both])}}, room / "model" / file)
    (room / INDEX).write_text(json.dumps({"weight_map": {name: file for file, part in parts.items() for name in part}}))
