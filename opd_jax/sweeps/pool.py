"""Processes side by side, within a budget: each job is a command in a process group of its own, with a lock that it holds while it lives.

The lock is what makes a killed sweep safe to start again: a worker that outlived it still holds the lock of its run directory, and no
second one is started beside it.
"""

import dataclasses
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from opd_jax.sweeps.slots import Slot
from opd_jax.types import UserError

STDERR_LINES = 8  # that are kept of a process that failed
STDERR_BYTES = 8192  # from the end of stderr, in which they are looked for
GB = 10**9


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    command: tuple[str, ...]
    log: pathlib.Path  # stdout and stderr go to this path with .stdout and .stderr after it
    lock: pathlib.Path
    needs: tuple[str, ...] = ()  # jobs that must have succeeded before


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    exit: int  # its status; of a signal minus its number
    seconds: float = 0.0
    peak_bytes: int = 0  # the most main memory that it had
    stderr: tuple[str, ...] = ()  # the last lines


@dataclasses.dataclass
class Running:
    """A process of ours; or one that outlived a killed sweep (process is None), for whose lock we wait."""

    job: Job
    slot: Slot
    process: subprocess.Popen | None
    began: float
    peak_bytes: int = 0

    def measure(self) -> None:
        """Looks at the memory: when a process has ended, the system tells the larger of its own peak and of ours, who started it."""
        if self.process is not None:
            self.peak_bytes = max(self.peak_bytes, _peak_bytes(self.process.pid))


class Pool:
    """`step()` again and again until `busy` is False; `stop()` asks the processes to save and end, `close()` leaves none behind.

    Memory: a job is started when (running + 1) * estimate fits into `memory_bytes`. The estimate is the largest peak of main memory that
    a process of this pool has had so far, or `peak_bytes` of earlier ones. While nothing is known one job runs alone. 0: no limit.
    """

    def __init__(self, jobs: Sequence[Job], slots: Sequence[Slot], *, memory_bytes: int = 0, peak_bytes: int = 0):
        self.waiting = list(jobs)
        self.running: dict[str, Running] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.stopping = False
        self.size = len(slots)
        self._free = list(slots)
        self._memory, self._peak = memory_bytes, peak_bytes

    @property
    def busy(self) -> bool:
        return bool(self.running or (self.waiting and not self.stopping))

    def step(self) -> list[tuple[Job, Outcome]]:
        """Reaps what has ended and starts what may start. Raises UserError for jobs that do not fit into the memory at all."""
        ended = [(one.job, outcome) for one in list(self.running.values()) if (outcome := self._reap(one))]
        if ended or self.stopping:  # what ended is noted before anything else can go wrong
            return ended
        for job in list(self.waiting):
            if missing := [name for name in job.needs if name in self.outcomes and self.outcomes[name].exit]:
                ended.append((job, Outcome(1, stderr=(f"not started: {missing[0]} failed",))))
                self._finish(job, ended[-1][1])
            elif self._free and all(name in self.outcomes for name in job.needs) and self._fits():
                self._start(job)
        return ended

    def stop(self) -> None:
        """Asks every process to save and end (SIGTERM); nothing is started any more. Leftovers of other sweeps are let be."""
        self.stopping = True
        for name, one in list(self.running.items()):
            if one.process is None:
                del self.running[name]
            else:
                os.kill(one.process.pid, signal.SIGTERM)  # not reaped yet, so that the number is still its own

    def close(self) -> None:
        """Kills what still runs, with all its children."""
        for one in self.running.values():
            if one.process is not None and one.process.returncode is None:
                os.killpg(one.process.pid, signal.SIGKILL)
                one.process.wait()
        self.running.clear()

    def _fits(self) -> bool:
        if not self._memory:
            return True
        estimate = max([self._peak, *(one.peak_bytes for one in self.running.values())])
        if not self.running:
            if estimate > self._memory:
                needed, given = estimate / GB, self._memory / GB
                raise UserError(f"--memory_gb={given:g}: one run needs {needed:.2f} GB, as measured; raise it, or make the runs smaller")
            return True
        return bool(self._peak) and (len(self.running) + 1) * estimate <= self._memory

    def _start(self, job: Job) -> None:
        lock = take_lock(job.lock)
        slot = self._free.pop(0)
        self.waiting.remove(job)
        process = None
        if lock is not None:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{job.log}.stdout", "wb") as out, open(f"{job.log}.stderr", "wb") as err:
                process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env=os.environ | dict(slot.environment),
                    start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which then asks its workers once
                    pass_fds=(lock,),
                )
            os.close(lock)  # the worker holds it now
            if slot.cores:
                os.sched_setaffinity(process.pid, slot.cores)
        self.running[job.name] = Running(job, slot, process, time.monotonic())

    def _reap(self, one: Running) -> Outcome | None:
        """The outcome of a process that has ended. A leftover whose lock is free goes back to the jobs that wait."""
        if one.process is None:
            if (lock := take_lock(one.job.lock)) is not None:
                os.close(lock)
                self._release(one)
                self.waiting.insert(0, one.job)
            return None
        one.measure()
        pid, status, usage = os.wait4(one.process.pid, os.WNOHANG)
        if not pid:
            return None
        one.process.returncode = os.waitstatus_to_exitcode(status)
        peak = one.peak_bytes or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self._peak = max(self._peak, peak)
        outcome = Outcome(one.process.returncode, time.monotonic() - one.began, peak, _last_lines(f"{one.job.log}.stderr"))
        self._release(one)
        self._finish(one.job, outcome)
        return outcome

    def _release(self, one: Running) -> None:
        del self.running[one.job.name]
        self._free.insert(0, one.slot)

    def _finish(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job.name] = outcome
        if job in self.waiting:
            self.waiting.remove(job)


def take_lock(path: pathlib.Path) -> int | None:
    """A descriptor that holds the lock until it and all its copies in other processes are closed; None while another one holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _peak_bytes(pid: int) -> int:
    """The most main memory that a living process has had; 0 where the system does not tell."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _last_lines(path: str) -> tuple[str, ...]:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - STDERR_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return tuple(line for line in lines if line.strip())[-STDERR_LINES:]


def run(pool: Pool, *, on_end: Callable[[Job, Outcome], None], on_wait: Callable[[], None], stop: Callable[[], bool], pause: float) -> None:
    """Runs all jobs, or until stop() says so and the processes have saved. Leaves no process behind, whatever happens."""
    try:
        while pool.busy:
            if stop() and not pool.stopping:
                pool.stop()
            for job, outcome in pool.step():
                on_end(job, outcome)
            on_wait()
            time.sleep(pause if pool.busy else 0)
    finally:
        pool.close()
