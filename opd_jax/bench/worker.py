"""One side of the comparison in a process of its own: reads requests on stdin, a JSON object per line, and answers each with one.

    python -m opd_jax.bench.worker '{"kind": "opd_jax", "shape": "prototype", "changes": {}, "dtype": "float32", "folder": ""}'

Requests: {"run": phase, "least_seconds": s} runs a phase, once at least, until the seconds are over, and answers with the seconds of each
run by the name of what was timed; {"describe": true} tells what is known beside times. What libraries print goes to stderr.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Order:
    """What a worker is started with."""

    kind: str  # see KINDS
    shape: str = "tiny"
    changes: dict[str, int] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    folder: str = ""  # of the models in Hugging Face format: student/ and teacher/


class Side:
    """What a worker times."""

    def run(self, phase: str) -> dict[str, float]:
        """Seconds of one run by the name of what was timed."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What is known beside times."""
        return {}

    def serve(self, answer_all: Callable[[], None]) -> None:
        """Answers requests until there are no more."""
        answer_all()


class _Ours(Side):
    """The phases of this library."""

    def __init__(self, order: Order):
        import jax

        from opd_jax import parallel
        from opd_jax.bench import phases, shapes

        self._shape = shapes.make(order.shape, order.changes)
        if self._shape.devices > 1:
            jax.config.update("jax_num_cpu_devices", self._shape.devices)
        self._mesh = parallel.make_mesh(self._shape.devices, devices=jax.devices()[: self._shape.devices])
        self._set_mesh = functools.partial(jax.set_mesh, self._mesh)
        self._clock, self._compilations = phases.clock, phases.Compilations()
        with self._set_mesh():
            self._phases = phases.Phases(self._shape, order.dtype, self._mesh)
        self._first, self._loss = {}, None

    def run(self, phase: str) -> dict[str, float]:
        with self._set_mesh():
            run = self._phases.phase(phase)
            if phase not in self._first:  # what was compiled to prepare it is not its own
                self._compilations.take()
                seconds = self._clock(run)
                self._first[phase] = self._compilations.take() | {"first_seconds": seconds}
            return {phase: self._clock(run)}

    def describe(self) -> dict[str, Any]:
        from opd_jax import machine

        peak = machine.peak_memory(self._mesh)
        with self._set_mesh():
            loss = self._phases.first_loss() if self._loss is None else self._loss
        self._loss = loss
        return {"programs": self._first, "facts": machine.facts(self._mesh), "loss": loss, **peak}


class _Limits(Side):
    def __init__(self, order: Order):
        from opd_jax.bench import limits, phases

        self._limits, self._clock, self._made = limits.Limits(), phases.clock, {}

    def run(self, phase: str) -> dict[str, float]:
        if phase not in self._made:
            self._made[phase] = self._limits.phase(phase)
            self._clock(self._made[phase])
        return {phase: self._clock(self._made[phase])}

    def describe(self) -> dict[str, Any]:
        return {"work": {name: self._limits.work(name) for name in self._made}}


class _Told(Side):
    """What is known without timing anything."""

    def __init__(self, found: dict[str, Any]):
        self._found = found

    def describe(self) -> dict[str, Any]:
        return self._found


def _export(order: Order) -> Side:
    """Writes the models for peers, with the library's own hf.save."""
    from opd_jax.bench import shapes
    from opd_jax.models import hf

    shape, folder = shapes.make(order.shape, order.changes), pathlib.Path(order.folder)
    for name, config, params in zip(("student", "teacher"), (shape.student, shape.teacher), shapes.models(shape), strict=True):
        hf.save(folder / name, params, config)
    return _Told({})


def _loss_memory(order: Order) -> Side:
    from opd_jax.bench import loss_memory

    return _Told(loss_memory.measure())


def _trl(order: Order) -> Side:
    from opd_jax.bench import peers

    return peers.Trl(order)


def _transformers(order: Order) -> Side:
    from opd_jax.bench import peers

    return peers.Generate(order)


KINDS = {
    "limits": _Limits,
    "opd_jax": _Ours,
    "default_malloc": _Ours,  # in a process without the allocator setting
    "trl": _trl,
    "transformers": _transformers,
    "export": _export,
    "loss_memory": _loss_memory,
}


def answer(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """What is said to a request; see the module."""
    if request.get("describe"):
        return side.describe()
    samples, begin = {}, time.perf_counter()
    while not samples or time.perf_counter() - begin < request["least_seconds"]:
        for name, seconds in side.run(request["run"]).items():
            samples.setdefault(name, []).append(seconds)
    return {"samples": samples}


def main(order: Order) -> None:
    """Answers until stdin ends."""
    sys.stdout.flush()
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side = KINDS[order.kind](order)

    def answer_all() -> None:
        print(json.dumps({"ready": True}), file=channel)
        for line in sys.stdin:
            print(json.dumps(answer(side, json.loads(line))), file=channel)

    side.serve(answer_all)


if __name__ == "__main__":
    main(Order(**json.loads(sys.argv[1])))
