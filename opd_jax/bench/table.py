"""Times -> what they mean: rows beside the machine's limits, ratios to peers, as text and Markdown."""

import dataclasses
import statistics
from typing import Any

from opd_jax.bench import work
from opd_jax.bench.rounds import Measured
from opd_jax.bench.shapes import Shape
from opd_jax.bench.work import Limits

COMPARED = {"generate": "generation", "teacher": "teacher's hidden states", "update": "update, teacher included", "step": "whole step"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A phase beside the limits. Times in seconds; shares of what the machine can do."""

    phase: str
    dtype: str
    seconds: float  # median
    low: float  # least and most of all runs
    high: float
    runs: int
    tokens_per_second: float | None
    flops: float
    bytes: float
    matmul_share: float
    bandwidth_share: float
    floor_seconds: float
    floor_share: float  # floor over median
    compile_seconds: float | None
    temp_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as long a peer, or ours with another allocator, takes for the same; medians, and the least and most of the rounds."""

    peer: str
    phase: str
    dtype: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float


def limits(measured: Measured, dtype: str) -> Limits:
    """The best rates of all rounds: below the true limits, if anything."""
    samples, told = measured.samples[("limits", "float32")], measured.told[("limits", "float32")]["work"]
    best = {name: told[name] / min(map(min, rounds)) for name, rounds in samples.items()}
    return Limits(best[f"matmul_{dtype}"], best["stream"])


def rows(shape: Shape, measured: Measured) -> list[Row]:
    """A row for each phase and type that was timed."""
    found = []
    for (kind, dtype), samples in measured.samples.items():
        if kind != "opd_jax":
            continue
        flat = {phase: [second for one in rounds for second in one] for phase, rounds in samples.items()}
        if "generate" in flat and "prefill" in flat:  # decode is what generation takes beside its prefill, run by run
            flat["decode"] = [second - statistics.median(flat["prefill"]) for second in flat["generate"]]
        programs = measured.told[kind, dtype]["programs"]
        found += [_row(shape, p, dtype, flat[p], limits(measured, dtype), programs.get(p)) for p in work.PHASES if p in flat]
    return found


def _row(shape: Shape, phase: str, dtype: str, seconds: list[float], limits: Limits, program: dict | None) -> Row:
    median, needed = statistics.median(seconds), work.work(shape, phase, dtype)
    floor, tokens = work.floor_seconds(shape, phase, dtype, limits), work.tokens(shape, phase)
    return Row(
        phase=phase,
        dtype=dtype,
        seconds=median,
        low=min(seconds),
        high=max(seconds),
        runs=len(seconds),
        tokens_per_second=tokens / median if tokens else None,
        flops=needed.flops,
        bytes=needed.bytes,
        matmul_share=needed.flops / median / limits.flops,
        bandwidth_share=needed.bytes / median / limits.bytes,
        floor_seconds=floor,
        floor_share=floor / median,
        compile_seconds=program["compile_seconds"] if program else None,
        temp_bytes=program["temp_bytes"] if program else None,
    )


def ratios(measured: Measured) -> list[Ratio]:
    """Every other side beside this library, in what both were timed at."""
    found = []
    for (kind, dtype), theirs in measured.samples.items():
        ours = measured.samples.get(("opd_jax", dtype))
        if kind in ("limits", "opd_jax") or ours is None:
            continue
        for phase in COMPARED:
            if phase in ours and phase in theirs:
                by_round = [statistics.median(b) / statistics.median(a) for a, b in zip(ours[phase], theirs[phase], strict=False)]
                middle = [statistics.median(x for one in rounds for x in one) for rounds in (ours[phase], theirs[phase])]
                found.append(Ratio(kind, phase, dtype, *middle, middle[1] / middle[0], min(by_round), max(by_round)))
    return found


# ---- text

_HEAD = ["phase", "operands", "ms", "least to most", "tokens/s", "GFLOP", "matmul peak", "GB", "bandwidth", "floor ms", "of floor"]
_HEAD += ["compile s", "temp MiB"]


def cells(row: Row) -> list[str]:
    """A row as text."""
    dash = lambda value, text: "" if value is None else text.format(value)
    return [
        row.phase,
        row.dtype,
        f"{1e3 * row.seconds:.1f}",
        f"{1e3 * row.low:.1f} to {1e3 * row.high:.1f} ({row.runs})",
        dash(row.tokens_per_second, "{:,.0f}"),
        f"{row.flops / 1e9:.2f}",
        f"{row.matmul_share:.0%}",
        f"{row.bytes / 1e9:.3f}",
        f"{row.bandwidth_share:.0%}",
        f"{1e3 * row.floor_seconds:.1f}",
        f"{row.floor_share:.0%}",
        dash(row.compile_seconds, "{:.1f}"),
        dash(None if row.temp_bytes is None else row.temp_bytes / 2**20, "{:,.1f}"),
    ]


def phases_table(found: list[Row]) -> str:
    return _markdown(_HEAD, [cells(row) for row in found])


def peers_table(found: list[Ratio]) -> str:
    head = ["beside", "what", "operands", "opd_jax ms", "peer ms", "peer / opd_jax", "by round"]
    each = [
        [
            one.peer,
            COMPARED[one.phase],
            one.dtype,
            f"{1e3 * one.ours:.0f}",
            f"{1e3 * one.theirs:.0f}",
            f"{one.ratio:.2f}",
            f"{one.low:.2f} to {one.high:.2f}",
        ]
        for one in found
    ]
    return _markdown(head, each)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    """An aligned Markdown table, which reads well as text, too."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    align = lambda cells: "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
    return "\n".join([align(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(align, lines)])


def memory_lines(measured: Measured, loss: dict[str, Any] | None) -> list[str]:
    """Peaks of the processes, and of the loss at a large vocabulary."""
    lines = []
    for (kind, dtype), told in measured.told.items():
        if "peak_host_bytes" in told:
            device = f", {told['peak_device_bytes'] / 2**20:,.0f} MiB on a device" if "peak_device_bytes" in told else ""
            lines.append(f"peak memory of the process, {kind} {dtype}: {told['peak_host_bytes'] / 2**20:,.0f} MiB{device}")
    if loss:
        lines.append(
            f"loss at {loss['positions']} positions, vocabulary {loss['vocabulary']:,}, width {loss['width']}, float32 operands: "
            f"{loss['temp_bytes'] / 2**20:,.0f} MiB of temporaries for value and gradient, where logits of one model would be "
            f"{loss['logits_bytes'] / 2**20:,.0f} MiB"
        )
    return lines
