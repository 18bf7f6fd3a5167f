"""Configuration, environment and cost of runs in tables: each row a name and one value per run."""

from collections.abc import Callable, Sequence
from typing import Any

from opd_jax import config as config_lib
from opd_jax.analysis.runs import Run

Rows = list[tuple[str, list]]


def config_tables(runs: Sequence[Run]) -> tuple[Rows, Rows, Rows]:
    """Fields that differ between the runs, a value for each; with one value, others that differ from their defaults; the rest."""
    defaults = config_lib.flatten(config_lib.Config())
    between, changed, same = [], [], []
    for name in dict.fromkeys(name for run in runs for name in run.config):
        values = [run.config.get(name) for run in runs]
        if any(value != values[0] for value in values):
            between.append((name, values))
        else:
            (changed if values[0] != defaults.get(name) else same).append((name, values[:1]))
    return between, changed, same


def environment_table(runs: Sequence[Run]) -> Rows:
    """What each run ran on, by the notes of its sessions, and what it cost; a row where some run knows its value."""
    facts: dict[str, Callable[[Run], Any]] = {
        "device": lambda run: f"{(s := run.sessions[-1])['devices']} × {s['device_kind']} ({s['platform']})",
        "host": lambda run: f"{(s := run.sessions[-1])['cpu_count']} cores of {s['cpu']}, {s['system']}",
        "processes": lambda run: run.sessions[-1]["processes"],
        "software": lambda run: f"opd_jax {run.sessions[-1]['opd_jax']}, Python {run.sessions[-1]['python']}",
        "libraries": lambda run: ", ".join(f"{name} {version}" for name, version in run.sessions[-1]["libraries"].items()),
        "sessions": lambda run: "; ".join(f"from update {s['from_step']}: {s['devices']} × {s['device_kind']}" for s in run.sessions),
        "updates": lambda run: f"{run.step:,}",
        "training": lambda run: _duration(run.last("time/total_seconds")),
        "evaluations": lambda run: _duration(sum(r["time/eval_seconds"] for r in run.records if "time/eval_seconds" in r)),
        "completion tokens": lambda run: f"{run.last('rollout/tokens_total'):,}",
        "tokens per second": lambda run: f"{run.last('rollout/tokens_total') / run.last('time/total_seconds'):,.0f}",
        "peak memory of the process": lambda run: _bytes(max(s.get("peak_host_bytes", 0) for s in run.sessions)),
        "peak memory of a device": lambda run: _bytes(max(s.get("peak_device_bytes", 0) for s in run.sessions)),
    }
    rows = [(name, [_or_nothing(fact, run) for run in runs]) for name, fact in facts.items()]
    return [(name, values) for name, values in rows if any(values)]


def _or_nothing(fact: Callable[[Run], Any], run: Run) -> str:
    """Notes of other versions, and runs that have just begun, lack some facts."""
    try:
        return str(fact(run))
    except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, AttributeError):
        return ""


def _duration(seconds: float) -> str:
    if not seconds:
        return ""
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count else ""
