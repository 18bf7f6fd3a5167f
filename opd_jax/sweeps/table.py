"""What came out of a sweep: mean and interval of each setting over its seeds, and the settings compared two by two."""

import csv
import dataclasses
import io
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from opd_jax import config as config_lib
from opd_jax import metrics
from opd_jax.analysis import stats
from opd_jax.analysis.runs import within
from opd_jax.sweeps.combinators import Point
from opd_jax.sweeps.plan import Plan, Trial, describe
from opd_jax.sweeps.pool import Outcome
from opd_jax.sweeps.status import Folder, write, write_json

NUMBERS = ("n", "mean", "low", "high")
FINEST, LARGE = 7, 1e6  # decimals and size from which on numbers are written with an exponent


@dataclasses.dataclass(frozen=True)
class Result:
    """One run as the table sees it."""

    trial: Trial
    outcome: Outcome | None  # None: not finished
    values: Mapping[str, float]  # the last value of each metric that it wrote; empty unless it is done

    @property
    def done(self) -> bool:
        return self.outcome is not None and not self.outcome.exit


def read(folder: Folder, plan: Plan) -> list[Result]:
    """Raises UserError for a metrics.jsonl that is damaged."""
    return [read_one(folder, trial, plan.metrics) for trial in plan.trials]


def read_one(folder: Folder, trial: Trial, names: Sequence[str]) -> Result:
    """Raises UserError for a metrics.jsonl that is damaged."""
    outcome = folder.outcome(trial)
    if outcome is None or outcome.exit:
        return Result(trial, outcome, {})
    records = metrics.read(folder.run(trial) / "metrics.jsonl")
    last = {name: value for record in records for name, value in record.items()}
    return Result(trial, outcome, {name: last[name] for name in names if name in last})


def rows(plan: Plan, results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row for each setting and metric: the swept fields, `metric`, n, mean, low, high, each seed's value, and what is missing."""
    return [
        _row(plan, setting, name, [r for r in results if r.trial.setting == setting]) for name in plan.metrics for setting in plan.settings
    ]


def _row(plan: Plan, setting: Point, metric: str, results: Sequence[Result]) -> dict[str, Any]:
    fields = config_lib.flatten(results[0].trial.config)
    values = {str(r.trial.seed): r.values[metric] for r in results if metric in r.values}
    mean, low, high, note = _estimate(metric, list(values.values()))
    return {
        **{name: setting.get(name, fields.get(name)) for name in plan.fields},
        "metric": metric,
        **{"n": len(values), "mean": mean, "low": low, "high": high},
        "values": values,
        "without_metric": [r.trial.seed for r in results if r.done and metric not in r.values],
        "failed": [r.trial.seed for r in results if r.outcome is not None and r.outcome.exit],
        "unfinished": [r.trial.seed for r in results if r.outcome is None],
        "note": note,
    }


def _estimate(metric: str, values: Sequence[float]) -> tuple[float | None, float | None, float | None, str]:
    if not values:
        return None, None, None, "no run has this metric"
    if len(values) == 1:
        return values[0], None, None, "one seed: no interval"
    if len(set(values)) == 1:
        return values[0], None, None, "all seeds give the same value: no interval"
    mean, low, high = stats.t_interval(values)
    return float(mean), *(float(end) for end in within(metric, low, high)), ""


def comparisons(plan: Plan, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Every pair of settings, paired by seed: the difference b - a with its interval, p, and p corrected over the pairs of its metric."""
    found = []
    for metric in plan.metrics:
        values = [
            {r.trial.seed: r.values[metric] for r in results if r.trial.setting == setting and metric in r.values}
            for setting in plan.settings
        ]
        pairs = [_compare(metric, plan.settings[i], plan.settings[j], values[i], values[j]) for i, j in _pairs(len(values))]
        tested = [pair for pair in pairs if pair["p"] is not None]
        for pair, corrected in zip(tested, stats.holm([pair["p"] for pair in tested]), strict=True):
            pair["p_holm"] = corrected
        found += pairs
    return found


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))


def _compare(metric: str, a: Point, b: Point, values_a: Mapping[int, float], values_b: Mapping[int, float]) -> dict[str, Any]:
    differences = [values_b[seed] - values_a[seed] for seed in sorted(values_a.keys() & values_b.keys())]
    row = {
        "metric": metric,
        "a": a,
        "b": b,
        "n": len(differences),
        "difference": None,
        "low": None,
        "high": None,
        "p": None,
        "p_holm": None,
    }
    if len(differences) < 2:
        return row | {"difference": differences[0] if differences else None, "note": "fewer than two common seeds: nothing is tested"}
    row["difference"], row["low"], row["high"], row["p"] = stats.paired_bootstrap(differences)
    note = "all differences are the same: no interval" if len(set(differences)) == 1 else ""
    if not note and None in (row["low"], row["high"]):
        note = f"{len(differences)} seeds are too few for an end of the interval"
    return row | {"note": note}


def write_all(folder: Folder, plan: Plan, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Writes table.json, comparisons.json, table.csv and table.html; returns the rows. Raises UserError."""
    found, pairs = rows(plan, results), comparisons(plan, results)
    write_json(folder.root / "table.json", found)
    write_json(folder.root / "comparisons.json", pairs)
    write(folder.root / "table.csv", _csv(plan, found))
    write(folder.root / "table.html", _page(folder, plan, results, found, pairs))
    return found


def _csv(plan: Plan, found: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    columns = [*plan.fields, "metric", *NUMBERS]
    writer.writerow(columns)
    writer.writerows([["" if row[name] is None else row[name] for name in columns] for row in found])
    return out.getvalue()


def cells(plan: Plan, found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text, its header first: a row for each setting, a column for each metric."""
    header = [*(name.lstrip(":") for name in plan.fields), *(f"{name} [95% interval]" for name in plan.metrics), "seeds"]
    lines = []
    for i in range(len(plan.settings)):
        own = found[i :: len(plan.settings)]
        lines.append([*(_short(own[0][name]) for name in plan.fields), *(_measured(row) for row in own), _seed_count(own)])
    return [header, *lines]


def _measured(row: Mapping[str, Any]) -> str:
    if row["mean"] is None:
        return "-"
    return f"{row['mean']:.4g}" if row["low"] is None else interval(row["mean"], row["low"], row["high"])


def interval(middle: float, low: float | None, high: float | None, *, sign: str = "") -> str:
    """`middle [low, high]`, all to the second digit of the width; None is an end at infinity, `sign` what a format has for signs."""
    ends = [end for end in (low, high) if end is not None]
    width = max(ends) - min(ends) if len(ends) == 2 else max((2 * abs(end - middle) for end in ends), default=abs(middle))
    decimals = 1 - math.floor(math.log10(width)) if width > 0 else 4
    style = f"{sign}.{max(decimals, 0)}f" if decimals <= FINEST and max(map(abs, (middle, *ends))) < LARGE else f"{sign}.2e"
    return f"{middle:{style}} [{'-∞' if low is None else format(low, style)}, {'∞' if high is None else format(high, style)}]"


def _seed_count(own: Sequence[Mapping[str, Any]]) -> str:
    row, parts = own[0], [str(max(row["n"] for row in own))]
    parts += [f"{len(row[name])} {name}" for name in ("failed", "unfinished") if row[name]]
    missing = {seed for one in own for seed in one["without_metric"]}
    return ", ".join(parts + ([f"{len(missing)} without a metric"] if missing else []))


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def text(plan: Plan, found: Sequence[Mapping[str, Any]]) -> str:
    """The table for a terminal."""
    table = cells(plan, found)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _page(
    folder: Folder, plan: Plan, results: Sequence[Result], found: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]
) -> str:
    loader = jinja2.FileSystemLoader([str(pathlib.Path(__file__).parent), str(pathlib.Path(stats.__file__).parent)])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    failed = [(r, folder.run(r.trial).relative_to(folder.root)) for r in results if r.outcome is not None and r.outcome.exit]
    return environment.get_template("table.html.jinja").render(
        title=f"Sweep of {plan.base.name}",
        style=markupsafe.Markup(loader.get_source(environment, "report.css")[0]),
        table=cells(plan, found),
        fields=len(plan.fields),
        notes=[f"{describe({k: row[k] for k in plan.fields})}, {row['metric']}: {row['note']}" for row in found if row["note"]],
        pairs=[(describe(p["a"]), describe(p["b"]), p, _difference(p)) for p in pairs],
        metrics=plan.metrics,
        overrides=plan.base.overrides,
        seed_fields=plan.seed_fields,
        done=sum(r.done for r in results),
        total=len(results),
        command=plan.base.command,
        runs=[_run(folder, r) for r in results],
        failed=[(describe(r.trial.setting | {"seed": r.trial.seed}), r.outcome, path) for r, path in failed],
        level=f"{stats.LEVEL:.0%}",
    )


def _run(folder: Folder, result: Result) -> tuple[str, str, str, str]:
    """(what it is of, its state, its folder, its report: a link from the page, empty where there is none)."""
    path = folder.run(result.trial)
    state = "done" if result.done else "not finished" if result.outcome is None else "failed"
    relative = path.relative_to(folder.root).as_posix()
    report = f"{relative}/report.html" if (path / "report.html").is_file() else ""
    return describe(result.trial.setting | {"seed": result.trial.seed}), state, relative, report


def _difference(pair: Mapping[str, Any]) -> str:
    if pair["difference"] is None:
        return "-"
    if pair["p"] is None or "no interval" in pair["note"]:
        return f"{pair['difference']:+.4g}"
    return interval(pair["difference"], pair["low"], pair["high"], sign="+")
