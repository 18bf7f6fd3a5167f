"""Whether two mathematical expressions are equal, by math-verify (and sympy) in processes of its own with limits of time and memory.

Its own time-outs are signals, which work in the main thread only and cannot interrupt 9^(9^9).
"""

import atexit
import json
import os
import pathlib
import queue
import selectors
import subprocess
import sys
import threading
import time

MAX_CHARACTERS = 2000  # of an expression that is meant to be an answer
WALL_SECONDS = 60.0  # the worker's limit is processor time, so that a busy machine changes no verdict; this is for one that is stuck
START_SECONDS = 300.0  # to import sympy


class Checker:
    """A pool of at most `size` workers, started when needed. Thread-safe."""

    def __init__(self, size: int):
        self._idle: queue.LifoQueue[subprocess.Popen | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)
        atexit.register(self.close)

    def equal(self, reference: str, answer: str) -> bool | None:
        """None where the two cannot be compared, or not within the limits."""
        if max(len(reference), len(answer)) > MAX_CHARACTERS:
            return None
        worker = self._idle.get()
        try:
            if worker is None or worker.poll() is not None:
                worker = _start()
            return _ask(worker, [reference, answer])
        except _Ended:
            worker = _end(worker)
            return None
        except BaseException:  # an answer that nobody waits for must not be taken for that of the next question
            worker = _end(worker)
            raise
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the workers."""
        for _ in range(self._idle.qsize()):
            _end(self._idle.get())
            self._idle.put(None)


class _Ended(Exception):
    """The worker ended, or does not answer."""


def _start() -> subprocess.Popen:
    script = pathlib.Path(__file__).with_name("math_worker.py")
    environment = os.environ | {"PYTHONHASHSEED": "0"}  # sympy's order of operations depends on it
    worker = subprocess.Popen(
        # -P: beside the script lies a math.py that is not the standard library's
        [sys.executable, "-P", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        _read_line(worker, START_SECONDS)
    except _Ended:
        _end(worker)
        raise RuntimeError(f"the process that compares expressions does not start: {sys.executable} {script}") from None
    return worker


def _ask(worker: subprocess.Popen, pair: list[str]) -> bool | None:
    try:
        worker.stdin.write(json.dumps(pair).encode() + b"\n")
        worker.stdin.flush()
    except OSError:
        raise _Ended from None
    return json.loads(_read_line(worker, WALL_SECONDS))


def _read_line(worker: subprocess.Popen, seconds: float) -> bytes:
    deadline, line = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise _Ended
            piece = os.read(worker.stdout.fileno(), 2**12)
            if not piece:
                raise _Ended
            line += piece
    return line


def _end(worker: subprocess.Popen | None) -> None:
    if worker is not None:
        worker.kill()
        worker.wait()
        worker.stdin.close()
        worker.stdout.close()


_lock, _shared = threading.Lock(), []


def shared() -> Checker:
    """The checker of this process, with a worker per processor core."""
    with _lock:
        if not _shared:
            _shared.append(Checker(os.cpu_count() or 1))
    return _shared[0]
