"""All sides at the same work in turns: every round asks each of them once, so that what disturbs the machine disturbs them alike."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from opd_jax.bench.processes import TURN_SECONDS, Worker, WorkerFailed
from opd_jax.bench.worker import Order

TIMED = {
    "limits": ("matmul_float32", "matmul_bfloat16", "stream"),
    "opd_jax": ("prefill", "generate", "teacher", "gradient", "optimizer", "update", "step"),
    "default_malloc": ("generate", "update", "step"),
    "trl": ("step",),  # which tells its parts
    "transformers": ("generate",),
}
LEAST_SECONDS = 0.2  # of a phase in a turn: short ones run several times

Side = tuple[str, str]  # kind and type of the operands


@dataclasses.dataclass
class Measured:
    """What sides said: seconds of every run by round, what else they know, and why some fell silent."""

    samples: dict[Side, dict[str, list[list[float]]]] = dataclasses.field(default_factory=dict)
    told: dict[Side, dict[str, Any]] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)


def measure(
    orders: list[Order], folder: pathlib.Path, *, rounds: int, phases: tuple[str, ...] | None = None, say: Callable[[str], None] = print
) -> Measured:
    """Runs so many rounds after one that is not counted; a side that fails is left out, and named. `phases`: ours, if not all."""
    found, workers = Measured(), {}
    timed = TIMED | ({"opd_jax": phases} if phases else {})
    try:
        for order in orders:
            side = (order.kind, order.dtype)
            say(f"starting {order.kind} {order.dtype}")
            workers[side] = Worker(order, folder / f"{order.kind}_{order.dtype}.log")
            _attempt(found, workers, side, lambda worker: worker.ready())
        for number in range(rounds + 1):
            say(f"round {number} of {rounds}" if number else "compiling")
            for side in list(workers):
                _attempt(found, workers, side, lambda worker: _turn(found, worker, timed[worker.order.kind], counted=number > 0))  # noqa: B023
        for side in list(workers):
            _attempt(found, workers, side, lambda worker: found.told.update({side: worker.ask({"describe": True})}))  # noqa: B023
    finally:
        for worker in workers.values():
            worker.close()
    return found


def tell(order: Order, folder: pathlib.Path) -> dict[str, Any]:
    """What a worker that times nothing has to say. Raises WorkerFailed."""
    with Worker(order, folder / f"{order.kind}_{order.dtype}.log") as worker:
        worker.ready()
        return worker.ask({"describe": True})


def _turn(found: Measured, worker: Worker, phases: tuple[str, ...], *, counted: bool) -> None:
    kept = found.samples.setdefault((worker.order.kind, worker.order.dtype), {})
    for phase in phases:
        request = {"run": phase, "least_seconds": LEAST_SECONDS if counted else 0.0}
        answer = worker.ask(request, TURN_SECONDS) if counted else worker.ask(request)
        if counted:
            for name, seconds in answer["samples"].items():
                kept.setdefault(name, []).append(seconds)


def _attempt(found: Measured, workers: dict[Side, Worker], side: Side, do: Callable[[Worker], None]) -> None:
    """Does something with a worker; one that fails is closed and dropped, with all its times."""
    try:
        do(workers[side])
    except WorkerFailed as error:
        found.failures.append(str(error))
        found.samples.pop(side, None)
        workers.pop(side).close()
