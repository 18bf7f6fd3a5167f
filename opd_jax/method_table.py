"""Methods against each other: the sections of configs/sweeps/methods.py as sweeps, then a table each of what their runs say.

Each section is a sweep with its own folder, tables and page; here is what a sweep's last values do not show: how much of the teacher is
recovered, how many attempts a target took, what was forgotten on the way.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax import config as config_lib
from opd_jax import metrics, scores, train
from opd_jax.analysis import stats
from opd_jax.analysis.runs import within
from opd_jax.cli import StopRequest
from opd_jax.config import Config
from opd_jax.data.tasks import names_in
from opd_jax.sweeps import plan, sweep
from opd_jax.sweeps.combinators import Sweep
from opd_jax.sweeps.status import write, write_json
from opd_jax.sweeps.table import Result, interval

FILE = "configs/sweeps/methods.py"
TARGET = 0.5  # sampled accuracy that `attempts` is counted to
QUICK_ROWS = 3  # of each section
Records = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Column:
    title: str
    key: str  # of `measured`
    scale: float = 1.0  # what values are divided by
    certain: bool = False  # the same for all seeds but for lengths: shown without an interval


_ENDS = (Column("accuracy", "accuracy"), Column("sampled accuracy", "sampled_accuracy"))
_COST = (Column("generated tokens, k", "generated_tokens", 1e3, certain=True), Column("TFLOPs", "flops", 1e12, certain=True))
_SHARES = ("learnt", "kept", "old", "teacher")  # accuracies of several skills, or of others than the student
_KLS = (Column("reverse KL", "reverse_kl"), Column("forward KL", "forward_kl"))
_AFTER_AND_BEFORE = (("", ""), (" before", "_before"))
_OLD = (Column("reverse", "accuracy/reverse"), Column("shift", "accuracy/shift"))
COLUMNS = {
    "few": (*_ENDS, *_KLS, Column("teacher recovered", "recovery"), *_COST),
    "unlimited": (*_ENDS, *_KLS, Column("teacher recovered", "recovery"), *_COST),
    "others": (*_ENDS, *_KLS, Column("teacher recovered", "recovery"), *_COST),
    "opsd": (Column("sort", "accuracy/sort"), Column("sort, sampled", "sampled_accuracy/sort"), *_OLD, *_COST),
    "switches": (Column("sort", "accuracy/sort"), Column("sort, sampled", "sampled_accuracy/sort"), *_OLD, *_COST),
    "sdpo": (Column(f"attempts to {TARGET:.0%}, k", "attempts", 1e3), Column("sort, sampled", "sampled_accuracy/sort"), *_OLD, *_COST),
    "sequence": (
        Column("new skills, when learnt", "learnt"),
        Column("new skills, at the end", "kept"),
        Column("forgetting", "forgetting"),
        Column("old skills", "old"),
        *_COST,
    ),
    "scale": (*_ENDS, *_KLS, Column("length", "length")),
    "mismatch": (*_ENDS, Column("length", "length")),
    "merge": (
        Column("sampled", "sampled_accuracy"),
        Column("teachers, sampled", "teacher"),
        *(Column(f"{tag}{when}", f"accuracy{key}/{tag}") for tag in ("reverse", "sort") for when, key in _AFTER_AND_BEFORE),
        *_COST,
    ),
    "recovery": (
        *(Column(f"{tag}{when}", f"accuracy{key}/{tag}") for tag in ("reverse", "shift", "sort") for when, key in _AFTER_AND_BEFORE),
        *_COST,
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One method in one section; `values` by key and seed."""

    section: str
    name: str
    values: Mapping[str, Mapping[int, float]]
    failed: int


def run(
    workdir: pathlib.Path, names: Sequence[str], *, quick: bool, tiny: bool, budget: sweep.Budget, stop: StopRequest | None = None
) -> list[Row]:
    """Makes what is not done yet, section by section; after each one method_table.json and method_table.md hold all that there is.

    Rows of sections that an earlier call made, and that are not among `names`, stay.

    `quick`: the first QUICK_ROWS rows of each section, one seed. Raises UserError, and Interrupted once `stop` is set.
    """
    table = workdir / "method_table.json"
    rows = [row for row in read(table) if row.section not in names] if table.exists() else []
    for name in names:
        base = plan.Base(f"{FILE}:section={name}{',tiny' if tiny else ''}", {})
        asked = plan.read_file(base.name)
        if quick:
            asked = Sweep(asked.points[:QUICK_ROWS], seeds=1, metrics=asked.metrics)
        _, results = sweep.run(base, asked, workdir / name, budget=budget, stop=stop)
        rows += _rows(name, results, workdir / name)
        write_json(table, [_plain(row) for row in rows])
        write(workdir / "method_table.md", markdown(rows))
    return rows


def _rows(section: str, results: Sequence[Result], folder: pathlib.Path) -> list[Row]:
    rows = []
    for name in dict.fromkeys(result.trial.setting[":row"] for result in results):
        own = [result for result in results if result.trial.setting[":row"] == name]
        values: dict[str, dict[int, float]] = {}
        for result in [one for one in own if one.done]:
            records = metrics.read(folder / "runs" / result.trial.name / "metrics.jsonl")
            for key, value in measured(records, result.trial.config).items():
                values.setdefault(key, {})[result.trial.seed] = value
        rows.append(Row(section, name, values, sum(not one.done for one in own)))
    return rows


def measured(records: Records, config: Config) -> dict[str, float]:
    """What a finished run says, by key. `attempts` is infinite where the target was never met."""
    first, last = records[0], {name: value for record in records for name, value in record.items()}
    names = ["accuracy", "sampled_accuracy", "reverse_kl", "forward_kl", "length"]
    names += [name.removeprefix("eval/") for name in last if name.startswith(("eval/accuracy/", "eval/sampled_accuracy/"))]
    found = {name: last[f"eval/{name}"] for name in names if f"eval/{name}" in last}
    found |= {f"accuracy_before/{tag}": value for tag, value in accuracies(records[:1]).items()}
    found["flops"], found["generated_tokens"] = last["cost/flops_total"], last["cost/generated_tokens_total"]
    teacher, before = last.get("eval/teacher_sampled_accuracy"), first.get("eval/sampled_accuracy", 1.0)
    if teacher is not None:
        found["teacher"] = teacher
    if teacher is not None and teacher > before:
        found["recovery"] = (last["eval/sampled_accuracy"] - before) / (teacher - before)
    learnt = config.task.learn
    if learnt and "," not in learnt:
        found["attempts"] = attempts(records, f"eval/sampled_accuracy/{learnt}", config.rollout.batch_size)
    if config.task.name == "skills":
        found |= _of_skills(records, config)
    return found


def attempts(records: Records, name: str, batch_size: int) -> float:
    """Completions that the student had written when an evaluation first reached TARGET."""
    met = [record["step"] for record in records if record.get(name, 0.0) >= TARGET]
    return met[0] * batch_size if met else float("inf")


def _of_skills(records: Records, config: Config) -> dict[str, float]:
    """What a run and those before it did to the skills that were there, and to those that came."""
    stages = [(names_in(config.task.learn), accuracies(records))]
    source, begun = config.student.recipe, accuracies(records[:1])
    while FILE in source:  # the student is that of an earlier stage
        own, workdir = train.locate_recipe(source, config.cache_dir)
        parsed, earlier = config_lib.parse(own), metrics.read(workdir / "metrics.jsonl")
        stages.insert(0, (names_in(parsed.task.learn), accuracies(earlier)))
        source, begun = parsed.student.recipe, accuracies(earlier[:1])
    end = stages[-1][1]
    new = [skill for learnt, _ in stages for skill in learnt]
    old = [skill for skill in end if skill not in new]
    found = {}
    if len(stages) > 1:
        matrix = np.array([[reached[learnt[0]] for learnt, _ in stages] for _, reached in stages])
        found = {"learnt": float(np.diag(matrix).mean()), "kept": float(matrix[-1].mean()), "forgetting": scores.forgetting(matrix)}
        found["backward_transfer"] = scores.backward_transfer(matrix)
    if old:
        found["old"] = float(np.mean([end[skill] for skill in old]))
        found["old_before"] = float(np.mean([begun[skill] for skill in old]))
    return found


def accuracies(records: Records) -> dict[str, float]:
    """Greedy accuracy of each skill at the end of a run."""
    last = {name: value for record in records for name, value in record.items()}
    prefix = "eval/accuracy/"
    return {name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)}


def estimate(column: Column, values: Sequence[float]) -> str:
    """Mean and 95% t-interval over seeds, as text; of values that are not all finite how many are, and the others' mean."""
    values = [value / column.scale for value in values]
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return "never" if values else "-"
    if len(finite) < len(values):
        return f"{np.mean(finite):.3g} in {len(finite)} of {len(values)}, the others never"
    if len(values) < 2 or len(set(values)) == 1 or column.certain:
        return f"{np.mean(values):.3g}"
    mean, low, high = stats.t_interval(values)
    if column.key != "recovery":  # of a teacher: below 0 and above 1 there are, too
        like = "accuracy" if column.key in _SHARES else column.key.replace("_before", "")
        low, high = within(f"eval/{like}", low, high)
    return interval(float(mean), float(low), float(high))


def difference(row: Row, first: Row, key: str) -> str:
    """How a row differs from the first of its section, paired by seed: mean, 95% t-interval, p of the paired bootstrap-t."""
    seeds = sorted(row.values.get(key, {}).keys() & first.values.get(key, {}).keys())
    pairs = [row.values[key][seed] - first.values[key][seed] for seed in seeds]
    if row is first or len(pairs) < 2 or not np.isfinite(pairs).all() or len(set(pairs)) == 1:
        return ""
    mean, low, high = (float(end) for end in stats.t_interval(pairs))
    p = stats.paired_bootstrap(pairs)[3]
    return f"{interval(mean, low, high, sign='+')}, p = {p:.2g}"


def markdown(rows: Sequence[Row]) -> str:
    """A table for each section: a row for each method, a column for each measure, and the difference of the first measure."""
    parts = []
    for section in dict.fromkeys(row.section for row in rows):
        own = [row for row in rows if row.section == section]
        columns = COLUMNS[section]
        titles = ["", *(column.title for column in columns), f"{columns[0].title} less that of {own[0].name}"]
        lines = [f"### {section}", "", f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
        for row in own:
            cells = [estimate(column, list(row.values.get(column.key, {}).values())) for column in columns]
            note = f" ({row.failed} failed or unfinished)" if row.failed else ""
            lines.append(f"| {' | '.join([f'`{row.name}`{note}', *cells, difference(row, own[0], columns[0].key)])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _plain(row: Row) -> dict[str, Any]:
    """For a JSON file, which has null in place of an infinite number."""
    values = {key: {seed: value if np.isfinite(value) else None for seed, value in by.items()} for key, by in row.values.items()}
    return dataclasses.asdict(row) | {"values": values}


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a method_table.json."""
    rows = json.loads(path.read_text())
    number = lambda value: float("inf") if value is None else value
    return [
        Row(**{**row, "values": {key: {int(seed): number(v) for seed, v in by.items()} for key, by in row["values"].items()}})
        for row in rows
    ]
