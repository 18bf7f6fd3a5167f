"""One run, or several side by side, as one self-contained HTML file and as a table of text."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from opd_jax import config as config_lib
from opd_jax import files, metrics
from opd_jax.analysis import plots
from opd_jax.types import UserError

# In this order; a curve is drawn where a run has the metric.
CURVES = (
    "eval/accuracy",
    "eval/sampled_accuracy",
    "eval/reverse_kl",
    "eval/forward_kl",
    "train/reverse_kl",
    "train/loss",
    "rollout/reward",
    "rollout/entropy",
    "rollout/length",
    "train/grad_norm",
)
COLUMNS = {
    "eval/accuracy": "accuracy, greedy",
    "eval/sampled_accuracy": "accuracy, sampled",
    "eval/reverse_kl": "reverse KL",
    "eval/forward_kl": "forward KL",
    "eval/entropy": "entropy",
}
SPOKEN = {"eval/accuracy": "greedy accuracy", "eval/reverse_kl": "reverse KL to the teacher", "train/loss": "loss"}
SAMPLES_SHOWN = 6  # of each step, on the page
SAMPLE_WIDTH = 600  # characters, in a terminal


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory says about itself."""

    name: str
    config: dict[str, Any]  # flat: {"rollout.batch_size": 64, ...}
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.records if any(name in record for name in COLUMNS)]


def read_runs(workdirs: Sequence[str | os.PathLike]) -> list[Run]:
    """Reads run directories; names are as short as tells them apart. Raises UserError for a folder that is none."""
    paths = [pathlib.Path(workdir) for workdir in workdirs]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _read_run(path: pathlib.Path, name: str) -> Run:
    if not (path / "config.json").is_file():
        raise UserError(f"--workdir={path}: is not a run directory (config.json is missing); give the --workdir of a training run")
    config = config_lib.flatten(files.read_json(path / "config.json", remedy="restore the file, or give another --workdir"))
    records, samples = (metrics.read(path / name) if (path / name).exists() else [] for name in ("metrics.jsonl", "samples.jsonl"))
    return Run(name, config, records, samples)


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Header, then one row per state of a student: before and after each run; rows that say the same are one. The teacher comes last."""
    columns = [name for name in COLUMNS if any(name in record for run in runs for record in run.evaluations)]
    before: dict[tuple, list[str]] = {}
    after, teacher = [], {}
    for run in runs:
        if not run.evaluations:
            continue
        first, last, end = run.evaluations[0], run.evaluations[-1], run.records[-1]
        if first["step"] == 0:
            before.setdefault(tuple(_cells(first, columns)), []).append(run.name)
        if last["step"] > 0:
            used = [f"{end['rollout/tokens_total']:,}", f"{end['time/total_seconds']:.0f} s"]
            after.append([run.name, str(last["step"]), *_cells(last, columns), *used])
        if "eval/teacher_sampled_accuracy" in last:
            teacher["eval/sampled_accuracy"] = f"{last['eval/teacher_sampled_accuracy']:.2f}"
    start = [
        ["before training" if len(before) == 1 else ", ".join(names) + ", before", "0", *cells, "", ""] for cells, names in before.items()
    ]
    end = [["teacher", "", *(teacher.get(name, "") for name in columns), "", ""]] if teacher else []
    return [["student", "updates", *(COLUMNS[name] for name in columns), "tokens", "time"], *start, *after, *end]


def _cells(record: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """`value [low, high]`, or an empty cell."""
    cells = []
    for name in columns:
        if name not in record:
            cells.append("")
        elif f"{name}_low" in record:
            cells.append(f"{record[name]:.2f} [{record[f'{name}_low']:.2f}, {record[f'{name}_high']:.2f}]")
        else:
            cells.append(f"{record[name]:.2f}")
    return cells


def caption(runs: Sequence[Run]) -> str:
    """What the numbers of the table are, in one or two sentences."""
    prompts = sorted({int(record["eval/prompts"]) for run in runs for record in run.evaluations})
    samples = sorted({run.config["eval.samples"] for run in runs})
    seeds = sorted({run.config["seed"] for run in runs})
    text = (
        f"In brackets: 95% intervals over the {_either(prompts)} held-out evaluation prompts, not over seeds (seed {_either(seeds)}). "
        f"All but greedy accuracy: samples at temperature 1, {_either(samples)} per prompt. KL to the teacher and entropy: nats per token. "
        "Tokens: completion tokens in the loss. Time: training, without evaluations."
    )
    trained_on = sorted({run.config["task.train_size"] for run in runs})
    if trained_on == [0]:
        return text
    return f"{text} Training prompts: {_either([size or 'unlimited' for size in trained_on])}, drawn again and again."


def _either(values: Sequence) -> str:
    return " or ".join(str(value) for value in values) or "no"


def text_table(workdirs: Sequence[str | os.PathLike]) -> str:
    """The table and its caption for a terminal."""
    runs = read_runs(workdirs)
    rows = table(runs)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * sum(widths, 2 * len(widths) - 2), *lines[1:], "", caption(runs)])


def text_samples(workdir: str | os.PathLike, *, count: int = 2) -> str:
    """A few completions of the first and the last step that logged some, for a terminal: control characters are written as escapes."""
    (run,) = read_runs([workdir])
    rows = _first_and_last_samples(run, count)
    return "\n".join(
        f"step {row['step']}: {json.dumps(row['prompt'] + row['completion'], ensure_ascii=False)[:SAMPLE_WIDTH]}" for row in rows
    )


def sentences(runs: Sequence[Run]) -> list[str]:
    """What happened in each run, with numbers."""
    result = []
    for run in runs:
        done, asked = run.records[-1]["step"] if run.records else 0, run.config["steps"]
        text = f"{run.name}: {done} of {asked} updates"
        if "time/total_seconds" in (run.records or [{}])[-1]:
            text += f" in {run.records[-1]['time/total_seconds']:.0f} s on {run.records[-1]['rollout/tokens_total']:,} completion tokens"
        changes = []
        for name, spoken in SPOKEN.items():
            values = [record[name] for record in run.records if name in record]
            if len(values) > 1:
                changes.append(f"{spoken} {values[0]:.3f} → {values[-1]:.3f}")
        result.append(f"{text}; {', '.join(changes)}." if changes else f"{text}.")
    return result


def config_table(runs: Sequence[Run]) -> tuple[list[tuple[str, list]], list[tuple[str, list]]]:
    """(fields that differ between the runs or from the defaults, all other fields), each a name with one value per run."""
    defaults = config_lib.flatten(config_lib.Config())
    changed, same = [], []
    for name in dict.fromkeys(name for run in runs for name in run.config):
        values = [run.config.get(name) for run in runs]
        (changed if any(value != defaults.get(name) for value in values) else same).append((name, values))
    return changed, same


def write(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike) -> None:
    """Writes the HTML file, whole or not at all. Raises UserError for a folder that is no run and a file that cannot be written."""
    runs = read_runs(workdirs)
    templates = jinja2.PackageLoader("opd_jax.analysis", ".")
    environment = jinja2.Environment(loader=templates, autoescape=True, undefined=jinja2.StrictUndefined)
    changed, same = config_table(runs)
    page = environment.get_template("report.html.jinja").render(
        title=", ".join(run.name for run in runs),
        names=[run.name for run in runs],
        colours=[plots.colour(number) for number in range(len(runs))],
        sentences=sentences(runs),
        table=table(runs),
        caption=caption(runs),
        figures=_figures(runs),
        changed=changed,
        same=same,
        samples=[(run.name, _first_and_last_samples(run, SAMPLES_SHOWN)) for run in runs],
    )
    out = pathlib.Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); give a file in a folder that can be written") from None


def _figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    figures = []
    for name in CURVES:
        series = [_series(run, name) for run in runs]
        if any(len(one["steps"]) > 1 for one in series):
            described = metrics.GLOSSARY[name]
            figures.append({"name": name, "meaning": described.meaning, "svg": plots.curves(series, title=name, unit=described.unit)})
    return figures


def _series(run: Run, name: str) -> dict[str, list]:
    records = [record for record in run.records if name in record]
    one = {"steps": [record["step"] for record in records], "values": [record[name] for record in records]}
    if records and all(f"{name}_low" in record for record in records):
        one |= {end: [record[f"{name}_{end}"] for record in records] for end in ("low", "high")}
    return one


def _first_and_last_samples(run: Run, count: int) -> list[dict[str, Any]]:
    """At most `count` of each step."""
    steps = sorted({sample["step"] for sample in run.samples})
    shown = dict.fromkeys([steps[0], steps[-1]] if steps else [])
    return [sample for step in shown for sample in [s for s in run.samples if s["step"] == step][:count]]
