"""A whole benchmark in order: limits, phases and peers in turns, the loss's memory, curves; bench.json, bench.md and a figure."""

import dataclasses
import datetime
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

from opd_jax.analysis import plots_bench
from opd_jax.bench import curves, rounds, shapes, table
from opd_jax.bench.processes import PEERS, WorkerFailed, allocator
from opd_jax.bench.rounds import Measured
from opd_jax.bench.shapes import Shape
from opd_jax.bench.table import Ratio, Row
from opd_jax.bench.worker import Order

ROUNDS = 7
QUICK_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Result:
    rows: list[Row]
    ratios: list[Ratio]
    key: str  # of the baseline: shape and platform
    failures: list[str]
    text: str  # Markdown


def run(name: str, workdir: pathlib.Path, command: str, *, quick: bool, peers: bool, curved: bool, say: Callable[[str], None]) -> Result:
    """Measures a shape and writes bench.json, bench.md and, of curves, curves.png. Raises UserError; what fails is told in the result."""
    shape = shapes.make(name)
    if curved:
        curves.check(name)
    for folder in (workdir, workdir / "logs", workdir / "points"):
        folder.mkdir(parents=True, exist_ok=True)
    dtypes = shape.dtypes[:1] if quick else shape.dtypes
    measured, loss = _in_turns(shape, dtypes, workdir, quick=quick, peers=peers, say=say), None
    if not quick:
        say("memory of the loss")
        loss = _try(measured, lambda: rounds.tell(Order("loss_memory"), workdir / "logs"))
    found = []
    if curved:
        repeats = 3 if quick else 5
        found, failures = curves.measure(name, dtypes[0], workdir / "points", repeats=repeats, say=say)
        measured.failures += failures
        if found:
            panels = [dataclasses.asdict(curve) | {"title": curves.NAMES[curve.field]} for curve in found]
            plots_bench.scaling(panels, workdir / "curves.png")
    return _written(shape, measured, loss, found, workdir, command)


def _in_turns(shape: Shape, dtypes: tuple[str, ...], workdir: pathlib.Path, *, quick: bool, peers: bool, say) -> Measured:
    folder, failures = workdir / "models", []
    ours = ("opd_jax", "default_malloc") if allocator("opd_jax") and not quick else ("opd_jax",)
    orders = [Order("limits", shape.name), *(Order(kind, shape.name, dtype=dtype) for dtype in dtypes for kind in ours)]
    if peers:
        missing = [package for package in ("torch", "trl", "datasets") if importlib.util.find_spec(package) is None]
        if missing:
            failures.append(f"no peer was timed: {missing[0]} is not installed (pip install -e '.[test]')")
        else:
            say("writing the models for peers")
            try:
                rounds.tell(Order("export", shape.name, folder=str(folder)), workdir / "logs")
                orders += [Order(kind, shape.name, dtype=dtype, folder=str(folder)) for dtype in dtypes for kind in PEERS]
            except WorkerFailed as error:
                failures.append(f"no peer was timed: {error}")
    measured = rounds.measure(orders, workdir / "logs", rounds=QUICK_ROUNDS if quick else ROUNDS, say=say)
    measured.failures[:0] = failures
    return measured


def _try(measured: Measured, ask: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return ask()
    except WorkerFailed as error:
        measured.failures.append(str(error))
        return None


def _written(shape: Shape, measured: Measured, loss, found: list[curves.Curve], workdir: pathlib.Path, command: str) -> Result:
    rows = table.rows(shape, measured) if ("limits", "float32") in measured.told else []
    ratios = table.ratios(measured)
    facts = next((told["facts"] for (kind, _), told in measured.told.items() if kind == "opd_jax"), {})
    peers = next((told["facts"]["libraries"] for (kind, _), told in measured.told.items() if kind in PEERS), {})
    facts = facts | {"libraries": facts.get("libraries", {}) | peers, "allocator": {kind: allocator(kind) for kind in ("opd_jax", "trl")}}
    losses = {f"{kind} {dtype}": told["loss"] for (kind, dtype), told in measured.told.items() if told.get("loss") is not None}
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "shape": shapes.describe(shape),
        "machine": facts,
        "limits": {dtype: table.limits(measured, dtype)._asdict() for dtype in shapes.DTYPES} if rows else {},
        "rows": [dataclasses.asdict(row) for row in rows],
        "ratios": [dataclasses.asdict(ratio) for ratio in ratios],
        "first_losses": losses,
        "loss_memory": loss,
        "memory": {
            f"{kind} {dtype}": told["peak_host_bytes"] for (kind, dtype), told in measured.told.items() if "peak_host_bytes" in told
        },
        "curves": [dataclasses.asdict(curve) for curve in found],
        "failures": measured.failures,
    }
    text = _text(record, rows, ratios, [*table.memory_lines(measured, loss), *curves.lines(found)])
    (workdir / "bench.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (workdir / "bench.md").write_text(text + "\n", encoding="utf-8")
    return Result(rows, ratios, f"{shape.name} {facts.get('platform', 'unknown')}", measured.failures, text)


def _text(record: dict[str, Any], rows: list[Row], ratios: list[Ratio], lines: list[str]) -> str:
    shape, facts = record["shape"], record["machine"]
    student, teacher = (f"{m['family']} {m['num_layers']} x {m['hidden_size']}" for m in (shape["student"], shape["teacher"]))
    libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    rates = [f"{limit['flops'] / 1e9:,.0f} GFLOP/s with {dtype} operands" for dtype, limit in record["limits"].items()]
    streams = [f"{limit['bytes'] / 1e9:,.0f} GB/s of memory" for limit in list(record["limits"].values())[:1]]
    allocators = [" ".join(f"{name}={value}" for name, value in each.items()) or "default" for each in facts["allocator"].values()]
    head = [
        f"{record['date']}, `{record['command']}`",
        f"{facts.get('cpu', '')}, {facts.get('cpu_count', '')} cores, {facts.get('device_kind', '')}; {libraries}",
        f"allocator of ours, but of default_malloc: {allocators[0]}; of peers: {allocators[1]}",
        f"{shape['name']}: student {student}, teacher {teacher}, vocabulary {shape['student']['vocab_size']:,}; "
        f"{shape['batch_size']} rollouts of {shape['prompt']} + {shape['new_tokens']} tokens, {shape['microbatches']} microbatches",
        f"limits: {', '.join(rates + streams)}",
    ]
    sections = ["  \n".join(head)]
    sections += [table.phases_table(rows)] if rows else []
    sections += [table.peers_table(ratios)] if ratios else []
    sections += ["\n".join(f"- {line}" for line in lines)] if lines else []
    sections += ["\n".join(f"- failed: {line}" for line in record["failures"])] if record["failures"] else []
    return "\n\n".join(sections)
