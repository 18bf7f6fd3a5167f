"""Runs programs that nobody has read, such as those that models write: bounded in time, memory, files and output, without network.

    result = sandbox.run("print(sum(map(int, input().split())))", stdin="1 2 3")
    result.status, result.stdout  # "ok", "6\\n"

Every program gets an interpreter of its own (standard library only, no environment variables, fixed hash seed), an empty working directory
that is removed afterwards, and the limits of `Limits`. What else holds depends on the machine; `capabilities()` says it:

| layer | what it adds | needs |
|---|---|---|
| namespaces | no other process, no network interface; all of it ends with the program | Linux; root, or user namespaces for users |
| private root | sees the interpreter and system libraries, read-only, and its working directory, in memory; nothing else | namespaces |
| user | root becomes a user that owns nothing | root that may change users |
| landlock | in place of a private root: no files but those, in place of the whole tree | Linux 5.13 |
| seccomp | no new processes, programs, sockets or sessions, no shared memory; threads are fine | Linux on x86_64 or aarch64 |

Memory is bounded by the address space of the one process. Outside of it remain: files in a private root (`disk_bytes`), what pipes hold
(half of `open_files`, up to 1 MiB each), and some kilobytes per thread, up to 256 of them where there is a user layer. Without seccomp the
limit is one of what a process maps at a time: System V and POSIX shared memory hold more, and without namespaces they stay when the program
has ended. Without a private root the number of files is not bounded while the program runs, and without Landlock either, it can
leave files where everybody may write; in /dev/shm those are memory.

Where neither namespaces nor seccomp can be had (macOS), a hook in the interpreter refuses sockets and processes. That stops accidents, not
a program that means harm, and the program reads and writes what the user may.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

log = logging.getLogger(__name__)

LAYERS = ("namespaces", "private root", "user", "landlock", "seccomp")
INSIDE = pathlib.Path(__file__).with_name("inside.py")
# A layer counts as active when this runs under it.
_CHECK = "import ctypes, decimal, hashlib, json, math, random, re, tempfile\nwith open('file', 'w') as f: f.write('x')\nprint('fine')"


class SandboxError(RuntimeError):
    """A program could not be started within the layers that hold on this machine; it did not run."""


@dataclasses.dataclass(frozen=True)
class Limits:
    cpu_seconds: int = 5  # of all threads; independent of what else the machine does
    wall_seconds: float = 20.0  # for programs that wait
    memory_bytes: int = 2**30  # of address space; what else there is, see above
    disk_bytes: int = 2**24  # of all files where there is a private root, elsewhere of each
    output_bytes: int = 2**20  # of stdout, and of stderr; a program that writes more is ended
    open_files: int = 64


@dataclasses.dataclass(frozen=True)
class Result:
    status: str  # ok, error (exception, exit status, signal), timeout (CPU or wall clock), output (too much of it)
    stdout: str
    stderr: str
    exit_code: int | None  # 128 + N after signal N; None where a limit of time or output ended it
    seconds: float  # wall clock, start of the interpreter included


def run(
    program: str,
    *,
    then: Sequence[str] = (),
    stdin: str = "",
    limits: Limits = Limits(),  # noqa: B008
    layers: tuple[str, ...] | None = None,
) -> Result:
    """Runs Python text to its end or to a limit. Thread-safe. `layers`: fewer than this machine has, to see what each one does.

    `then`: texts that go on in the same module, each if the ones before came to their end. None of it is in the memory of the process
    before its turn; code that looks for the open file it comes from, and reads that, sees it all the same.
    Raises SandboxError when the sandbox itself cannot be set up. Whatever the program does, it returns, and leaves no process behind.
    """
    layers = active_layers() if layers is None else layers
    if set(layers) - set(LAYERS) or ("private root" in layers and "namespaces" not in layers):
        raise ValueError(f"layers = {layers!r} must be among {', '.join(LAYERS)}; a private root needs namespaces")
    with tempfile.TemporaryDirectory(prefix="sandbox_", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o711)  # the program's user passes through to work/, and cannot list what is beside it
        for name in ("work", "root"):
            os.mkdir(os.path.join(folder, name), 0o700)
        texts = [text.encode("utf-8", "surrogatepass") for text in (program, *then)]
        spec = {"sizes": [len(text) for text in texts], "layers": layers, "limits": dataclasses.asdict(limits)}
        spec |= {"work": os.path.join(folder, "work"), "root": os.path.join(folder, "root")}
        path = pathlib.Path(folder, "spec.json")
        path.write_text(json.dumps(spec))
        with _read_only(folder, stdin.encode("utf-8", "surrogateescape")) as given, _read_only(folder, b"".join(texts)) as code:
            return _start(path, given, code, limits)


@contextlib.contextmanager
def _read_only(folder: str, content: bytes):
    """An open file without a name, which the program cannot fill."""
    path = pathlib.Path(folder, "given")
    path.write_bytes(content)
    with open(path, "rb") as file:
        path.unlink()
        yield file


def _start(spec: pathlib.Path, given, code, limits: Limits) -> Result:
    start = time.monotonic()
    ready_read, ready_write = os.pipe()
    with open(ready_read, "rb") as ready:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", str(INSIDE), str(spec), str(ready_write), str(code.fileno())],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:backslashreplace", "PYTHONDONTWRITEBYTECODE": "1"},
                cwd=spec.parent,
                pass_fds=[ready_write, code.fileno()],
                start_new_session=True,
            )
        finally:
            os.close(ready_write)
        with process:
            try:
                status, outputs = _supervise(process, limits, start + limits.wall_seconds)
            finally:
                _end(process)
        stdout, stderr = (bytes(output[: limits.output_bytes]).decode("utf-8", "replace") for output in outputs)
        if ready.read() != b"ready" and status != "timeout":
            raise SandboxError(f"the sandbox cannot be set up: {stderr.strip().splitlines()[-1:] or process.returncode}")
    code = process.returncode if status in ("ok", "error") else None
    return Result(status, stdout, stderr, code, time.monotonic() - start)


def _supervise(process: subprocess.Popen, limits: Limits, deadline: float) -> tuple[str, list[bytearray]]:
    """(status, [stdout, stderr]), at most a little more than the limit of each."""
    outputs = {process.stdout: bytearray(), process.stderr: bytearray()}
    with selectors.DefaultSelector() as selector:
        for stream in outputs:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                return "timeout", list(outputs.values())
            for key, _ in events:
                piece = os.read(key.fd, 2**16)
                outputs[key.fileobj] += piece
                if not piece:
                    selector.unregister(key.fileobj)
                if len(outputs[key.fileobj]) > limits.output_bytes:
                    return "output", list(outputs.values())
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "timeout", list(outputs.values())
    status = {0: "ok", 128 + signal.SIGXCPU: "timeout"}.get(code, "error")
    return status, list(outputs.values())


def _end(process: subprocess.Popen) -> None:
    """Ends what still runs: the outermost process passes it on, should the program have left its process group."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


@functools.cache
def active_layers() -> tuple[str, ...]:
    """The layers that hold on this machine. Says once where a program could do harm."""
    if sys.platform == "win32":
        raise SandboxError("programs can be run on Linux and macOS only")
    chosen = choose(LAYERS if sys.platform == "linux" else ())
    weak = [f"{name}: {value}" for name, value in _describe(chosen).items() if value.startswith("weak")]
    if weak:
        log.warning("programs run in a sandbox that this machine cannot close fully (%s)", "; ".join(weak))
    return chosen


def choose(candidates: Sequence[str]) -> tuple[str, ...]:
    """Those of the layers that hold, each found by running a program under it and the ones before it."""
    chosen: tuple[str, ...] = ()
    for layer in candidates:
        needless = {"private root": "namespaces" not in chosen, "user": os.geteuid() != 0, "landlock": "private root" in chosen}
        if not needless.get(layer) and _holds((*chosen, layer)):
            chosen = (*chosen, layer)
    return chosen


def _holds(layers: tuple[str, ...]) -> bool:
    try:
        result = run(_CHECK, layers=layers)
    except SandboxError as error:
        log.info("sandbox without %s: %s", layers[-1], error)
        return False
    return result.status == "ok" and result.stdout == "fine\n"


def capabilities() -> dict[str, str]:
    """What is protected on this machine, and by what; values that begin with "weak" can be got around."""
    return _describe(active_layers())


def _describe(layers: tuple[str, ...]) -> dict[str, str]:
    by = lambda *names: next((name for name in names if name in layers), None)
    files = {"private root": "", "landlock": "", "user": "weak: files that everybody may read or write, by "}
    held = by("private root", "landlock", "user")
    return {
        "network": by("namespaces", "seccomp") or "weak: a hook in the interpreter",
        "processes": by("seccomp") or ("weak: limit on processes" if os.geteuid() or "user" in layers else "weak: ended with the program"),
        "signals": by("namespaces", "seccomp", "user") or "weak: those of the same user",
        "files": files[held] + held if held else "weak: those of the same user",
        "memory": by("seccomp") or "weak: limit on the mappings of each process",
        "time, output": "limits",
    }
