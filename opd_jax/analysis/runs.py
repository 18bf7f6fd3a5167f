"""Run directories as the report reads them, and runs that differ in their seed alone as one group."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from opd_jax import config as config_lib
from opd_jax import files, glossary, machine, metrics
from opd_jax.analysis import checks, stats
from opd_jax.types import UserError

EVALUATED = ("eval/accuracy", "eval/sampled_accuracy", "eval/reverse_kl", "eval/forward_kl", "eval/entropy")
POINTS = 300  # of a curve; of more, neighbours are averaged


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory says about itself."""

    name: str
    config: dict[str, Any]  # flat: {"rollout.batch_size": 64, ...}
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    sessions: list[dict[str, Any]]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if any(name in record for name in EVALUATED)]

    @property
    def step(self) -> int:
        return self.records[-1]["step"] if self.records else 0

    def last(self, name: str, until: int | None = None) -> Any:
        """The newest value of a metric (at this step or before it), or None."""
        kept = (record for record in reversed(self.records) if until is None or record["step"] <= until)
        return next((record[name] for record in kept if name in record), None)


@dataclasses.dataclass(frozen=True)
class Group:
    """One run, or several that differ in their seed alone."""

    name: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    @property
    def seeds(self) -> list[int]:
        return sorted(run.config["seed"] for run in self.runs)

    def common(self, names: Iterable[str] = EVALUATED) -> dict[int, list[dict[str, Any]]]:
        """{step: a record of each run} for the steps at which every run has one of these metrics, the first one first."""
        tables = [{record["step"]: record for record in run.records if any(name in record for name in names)} for run in self.runs]
        return {step: [table[step] for table in tables] for step in sorted(set.intersection(*map(set, tables)))}

    def estimate(self, name: str, records: Sequence[dict[str, Any] | None]) -> tuple[float, float | None, float | None] | None:
        """(value, low, high) of a metric in one record per run: a run's own interval, or Student's t over seeds. None if one lacks it."""
        if any(record is None or name not in record for record in records):
            return None
        values = [record[name] for record in records]
        if len(values) == 1:
            return values[0], records[0].get(f"{name}_low"), records[0].get(f"{name}_high")
        if len(set(values)) == 1:
            return values[0], None, None
        mean, low, high = (float(x) for x in stats.t_interval(values))
        return mean, *within(name, low, high)


def within(name: str, low, high):
    """(low, high) cut off: a share is in [0, 1], a divergence, entropy, length or norm at least 0, whatever Student's t says."""
    described = metrics.GLOSSARY.get(glossary.entry(name))
    fraction = described is not None and described.unit == "fraction"
    least = 0 if fraction or name.endswith(("_kl", "_kl_on_teacher", "entropy", "length", "grad_norm")) else -np.inf
    return np.clip(low, least, None), np.clip(high, None, 1 if fraction else np.inf)


def read_runs(workdirs: Sequence[str | os.PathLike]) -> list[Run]:
    """Reads run directories; names are as short as tells them apart. Raises UserError for a folder that is none, or damaged."""
    paths = [pathlib.Path(workdir) for workdir in workdirs]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _read_run(path: pathlib.Path, name: str) -> Run:
    if not (path / "config.json").is_file():
        raise UserError(f"--workdir={path}: is not a run directory (config.json is missing); give the --workdir of a training run")
    config = config_lib.flatten(config_lib.Config()) | _read_config(path / "config.json")
    records = _read_lines(path / "metrics.jsonl", checks.record_problem)
    return Run(name, config, records, _read_lines(path / "samples.jsonl", checks.sample_problem), machine.read(path))


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    remedy = "restore the file, or give another --workdir"
    fields = files.read_json(path, remedy=remedy)
    try:
        flat = config_lib.flatten(fields)
        problem = checks.config_problem(fields, flat)
    except RecursionError:
        problem = "cannot be read (it is nested too deeply)"
    if problem:
        raise UserError(f"{path}: {problem}; {remedy}")
    return flat


def _read_lines(path: pathlib.Path, problem_of: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """The objects of a file of lines that may not exist yet."""
    records = metrics.read(path) if path.exists() else []
    for number, record in enumerate(records, start=1):
        if problem := problem_of(record):
            raise UserError(f"{path}, line {number}: {problem}; remove the line or restore the file")
    return records


def group_by_seed(runs: Sequence[Run]) -> list[Group]:
    """Runs whose configs differ in seeds alone stand together. A `seed` that comes again is no other observation: it begins a group."""
    groups: list[list[Run]] = []
    for run in runs:
        for members in groups:
            if _but_seed(members[0]) == _but_seed(run) and run.config["seed"] not in [m.config["seed"] for m in members]:
                members.append(run)
                break
        else:
            groups.append([run])
    return [Group(_group_name(members), tuple(members)) for members in groups]


def _but_seed(run: Run) -> dict[str, Any]:
    """The config without seeds: prompts and the models of recipes (configs/FILE.py:student,seed=3) may follow them."""
    kept = {name: value for name, value in run.config.items() if name not in ("seed", "task.seed")}
    names = ("student.recipe", "teacher.recipe", "rollout.cache_recipe")
    recipes = {name: re.sub(r",seed=\d+\b", "", kept.get(name, "")) for name in names}
    return kept | recipes


def _group_name(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    common = os.path.commonprefix([run.name for run in runs]).rstrip("_-. /") or runs[0].name
    return f"{common} ({len(runs)} seeds)"


def series(group: Group, name: str) -> dict[str, Any]:
    """{steps, values, and where there are intervals low, high and band, which says what they are} of a metric through training.

    Over seeds: the mean at the steps that all of them have, with Student's t interval, or from the lowest to the highest of two.
    """
    records = [[record for record in run.records if name in record] for run in group.runs]
    records = [kept for kept in records if kept]
    if not records:
        return {"steps": [], "values": []}
    steps = sorted(set.intersection(*({record["step"] for record in kept} for kept in records)))
    table = [{record["step"]: record for record in kept} for kept in records]
    values = np.array([[one[step][name] for step in steps] for one in table])
    if len(records) == 1 and all(f"{name}_low" in record for record in records[0]):
        low, high = ([record[f"{name}_{end}"] for record in records[0]] for end in ("low", "high"))
        return {"steps": steps, "values": values[0].tolist(), "low": low, "high": high, "band": "95% interval over the evaluation prompts"}
    steps, values = _thin(np.array(steps), values)
    curve = {"steps": steps.tolist(), "values": values.mean(0).tolist()}
    if len(values) == 1 or not steps.size:
        return curve
    if len(values) == 2:
        return curve | {"low": values.min(0), "high": values.max(0), "band": "lowest to highest of 2 seeds"}
    low, high = within(name, *stats.t_interval(values)[1:])
    return curve | {"low": low, "high": high, "band": f"95% t-interval over {len(values)} seeds"}


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbouring points ([S], [n, S]), so that at most POINTS are left."""
    if len(steps) <= POINTS:
        return steps, values
    starts = np.linspace(0, len(steps), POINTS, endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts, axis=1) / sizes
