"""The live table of a sweep on a terminal; a line for every run that ends elsewhere."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opd_jax import files
from opd_jax.sweeps.combinators import Point
from opd_jax.sweeps.plan import Plan, Trial, describe
from opd_jax.sweeps.pool import GB, Pool
from opd_jax.sweeps.status import Folder
from opd_jax.sweeps.table import Result

TAIL_BYTES = 1 << 16  # of a metrics.jsonl that is being written, in which the last record is looked for
REFRESH = 1.0  # seconds


class Board:
    """`show()` as often as one likes; `line()` for what should stay on the screen. Quiet: nothing at all."""

    def __init__(self, plan: Plan, folder: Folder, *, quiet: bool = False):
        self._plan, self._folder, self._quiet = plan, folder, quiet
        self._live = None
        self._shown = 0.0

    def start(self) -> None:
        if not self._quiet and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.start()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            print(text, flush=True)

    def show(self, results: Sequence[Result], pool: Pool) -> None:
        if self._live is not None and time.monotonic() - self._shown > REFRESH:
            self._shown = time.monotonic()
            self._live.update(self._table(results, pool), refresh=True)

    def _table(self, results: Sequence[Result], pool: Pool):
        from rich.table import Table

        table = Table(title=summary(results, pool), title_justify="left")
        for name in (*(field.lstrip(":") for field in self._plan.fields), "done", "running", "failed", *self._plan.metrics):
            table.add_column(name)
        for setting in self._plan.settings:
            table.add_row(*self._cells(setting, [r for r in results if r.trial.setting == setting], pool))
        return table

    def _cells(self, setting: Point, results: Sequence[Result], pool: Pool) -> list[str]:
        running = {r.trial.name: last_record(self._folder, r.trial) for r in results if r.trial.name in pool.running}
        steps = [f"{running[r.trial.name].get('step', 0)}/{r.trial.config.steps}" for r in results if r.trial.name in running]
        failed = sum(r.outcome is not None and not r.done for r in results)
        cells = [str(setting.get(name, "")) for name in self._plan.fields]
        cells += [f"{sum(r.done for r in results)}/{len(results)}", ", ".join(steps), str(failed or "")]
        return cells + [so_far(name, results, running.values()) for name in self._plan.metrics]


def so_far(metric: str, results: Sequence[Result], running: Sequence[Mapping[str, Any]]) -> str:
    """The mean over the runs that are done; without any, what a running one wrote last, marked by a tilde."""
    done = [r.values[metric] for r in results if metric in r.values]
    if done:
        return f"{sum(done) / len(done):.4g}"
    now = [record[metric] for record in running if metric in record]
    return f"~{now[0]:.4g}" if now else ""


def summary(results: Sequence[Result], pool: Pool) -> str:
    """How many runs are done, running, failed and waiting, and about how long the rest takes."""
    done, failed = sum(r.done for r in results), sum(r.outcome is not None and not r.done for r in results)
    names = {r.trial.name for r in results}
    running = [name for name in pool.running if name in names]
    others = [name for name in pool.running if name not in names]
    waiting = sum(job.name in names for job in pool.waiting)
    text = f"{done}/{len(results)} done, {len(running)} running, {failed} failed, {waiting} waiting"
    text += f"; making {', '.join(others)}" if others else ""
    left = remaining_seconds(results, pool)
    return text if left is None else f"{text}, about {_duration(left)} left"


def remaining_seconds(results: Sequence[Result], pool: Pool) -> float | None:
    """By the mean time of the runs that are done; None before the first is."""
    times = [r.outcome.seconds for r in results if r.done]
    if not times:
        return None
    mean = sum(times) / len(times)
    begun = sum(max(mean - (time.monotonic() - one.began), 0.0) for one in pool.running.values())
    return (begun + mean * len(pool.waiting)) / pool.size


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def last_record(folder: Folder, trial: Trial) -> dict[str, Any]:
    """What a running run wrote last, its evaluations kept; empty before its first record. A line that is being written is left out."""
    try:
        with open(folder.run(trial) / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for line in lines:
        try:
            record = files.parse_json(line)
        except ValueError:  # the end of a line whose beginning was not read
            continue
        found |= record if isinstance(record, dict) else {}
    return found


def ended(trial: Trial, result: Result) -> str:
    """One line about a run that has ended."""
    name = describe(trial.setting | {"seed": trial.seed})
    if result.done:
        values = "  ".join(f"{metric} {value:.4g}" for metric, value in result.values.items())
        return (
            f"done    {name}  {values or 'none of the metrics'} ({result.outcome.seconds:.0f} s, {result.outcome.peak_bytes / GB:.2f} GB)"
        )
    last = result.outcome.stderr[-1:] or ("nothing on stderr",)
    return f"FAILED  {name}  exit status {result.outcome.exit}: {last[0]}"
