"""Workers as child processes: started with one allocator setting for all, asked one at a time, killed when they hang."""

import contextlib
import json
import os
import pathlib
import platform
import queue
import subprocess
import sys
import threading
from typing import Any

from opd_jax.bench.worker import Order

START_SECONDS = 600  # a worker may take to import, and to compile what a first request needs
TURN_SECONDS = 300

# glibc's malloc gives freed memory back to the system and faults it in again in every step; kept, and in huge pages, a step is faster on a
# CPU, of jax and of torch alike. Read by glibc when a process starts, so that it cannot be set from inside.
KEPT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
# XLA allocates in several threads: in arenas of their own large blocks are given back whatever is set, so that there is one alone. Torch is
# slower with that. The Makefile sets these.
ALLOCATOR = KEPT | {"MALLOC_ARENA_MAX": "1"}
PEERS = ("trl", "transformers")


class WorkerFailed(Exception):
    """A worker that ended, or took too long; one line."""


def allocator(kind: str) -> dict[str, str]:
    """The variables that a worker of this kind is started with: what is fastest for it, where glibc reads them."""
    if platform.libc_ver()[0] != "glibc" or kind == "default_malloc":
        return {}
    return KEPT if kind in PEERS else ALLOCATOR


class Worker:
    """A process of opd_jax.bench.worker; what it prints goes to `log`. Use it as a context manager."""

    def __init__(self, order: Order, log: pathlib.Path):
        self.order, self._log = order, log
        others = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
        environment = others | allocator(order.kind) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # processes share an accelerator
        environment |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "opd_jax.bench.worker", json.dumps(vars(order))]
        root = str(pathlib.Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        with open(log, "w") as stream:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stream}
            self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self._lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ready(self) -> None:
        """Waits until it has loaded all it needs. Raises WorkerFailed."""
        self._next(START_SECONDS)

    def ask(self, request: dict[str, Any], seconds: float = START_SECONDS) -> dict[str, Any]:
        """The answer to a request, within so many seconds. Raises WorkerFailed."""
        with contextlib.suppress(OSError):  # it has ended: so says the next line
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._next(seconds)

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise WorkerFailed(f"{self.name} did not answer within {seconds:g} s; {self._log} has what it said") from None
        if line is None:
            self.close()
            raise WorkerFailed(f"{self.name} ended: {self._last_words()}; {self._log} has all it said")
        return json.loads(line)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def name(self) -> str:
        return f"{self.order.kind} {self.order.dtype}"

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"status {self._process.returncode}, without a word"

    def close(self) -> None:
        """Ends it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()
