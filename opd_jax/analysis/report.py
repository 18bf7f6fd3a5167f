"""One run, or several side by side, as one self-contained HTML file and as a table of text."""

import base64
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import markupsafe

from opd_jax import metrics
from opd_jax.analysis import pages, plots, run_tables, study_report, summary, token_view
from opd_jax.analysis.runs import POINTS, Group, Run, group_by_seed, read_runs, series
from opd_jax.types import UserError, one_line

# In this order; a curve is drawn where a run has the metric.
CURVES = (
    "eval/accuracy",
    "eval/sampled_accuracy",
    "eval/reverse_kl",
    "eval/reverse_kl_on_teacher",
    "eval/forward_kl",
    "train/reverse_kl",
    "train/log_ratio_mean",
    "train/loss",
    "rollout/reward",
    "rollout/entropy",
    "rollout/length",
    "train/grad_norm",
)
# Of log.diagnostics, in a section of their own.
DIAGNOSTICS = tuple(name for name in metrics.GLOSSARY if name.startswith("diag/") and metrics.GLOSSARY[name].unit != "token id")
SAMPLE_WIDTH = 600  # characters, in a terminal


def text_table(workdirs: Sequence[str | os.PathLike]) -> str:
    """The table of before and after with its caption, for a terminal."""
    groups = group_by_seed(read_runs(workdirs))
    rows = summary.table(groups)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * sum(widths, 2 * len(widths) - 2), *lines[1:], "", summary.caption(groups)])


def text_samples(workdir: str | os.PathLike, *, count: int = 2) -> str:
    """A few completions of the first and the last step that logged some, for a terminal: control characters are written as escapes."""
    (run,) = read_runs([workdir])
    steps = sorted({sample["step"] for sample in run.samples})
    ends = dict.fromkeys([steps[0], steps[-1]] if steps else [])
    rows = [sample for step in ends for sample in [s for s in run.samples if s["step"] == step][:count]]
    return "\n".join(f"step {row['step']}: {_quoted(row['prompt'] + row['completion'])}" for row in rows)


def _quoted(text: str) -> str:
    return one_line(json.dumps(text, ensure_ascii=False)[:SAMPLE_WIDTH])


def write(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike) -> None:
    """Writes the HTML file, whole or not at all. Raises UserError for a folder that is no run and a file that cannot be written.

    A gradient study in a run's folder gradient_study/ has a section of its own.
    """
    page = render(read_runs(workdirs), [study for workdir in workdirs for study in study_report.of_run(workdir)])
    out = pathlib.Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"report {out}: cannot be written ({error.strerror}); give a file in a folder that can be written") from None


def render(runs: Sequence[Run], studies: Sequence[study_report.Section] = ()) -> str:
    """The page. Every string in it is escaped and made visible, but for what this package wrote: figures, style, script and its data."""
    groups = group_by_seed(runs)
    environment = pages.make_environment()
    style, script = (_source(environment, name) for name in ("report.css", "report.js"))
    between, changed, same = run_tables.config_tables(runs)
    return environment.get_template("report.html.jinja").render(
        title=", ".join(group.name for group in groups),
        names=[run.name for run in runs],
        keys=[(group.name, plots.colour(i), plots.line(i)) for i, group in enumerate(groups)],
        sentences=summary.sentences(groups),
        table=summary.table(groups),
        caption=summary.caption(groups),
        figures=_figures(groups, CURVES),
        diagnostics=_figures(groups, DIAGNOSTICS),
        studies=studies,
        thinned=max((len(run.records) for run in runs), default=0) > POINTS,
        points=POINTS,
        between=between,
        changed=changed,
        same=same,
        environment=run_tables.environment_table(runs),
        samples=[_plain_samples(run, len(runs)) for run in runs],
        worst=[(run.name, len(run.samples), token_view.worst_tokens(run)) for run in runs],
        scale=token_view.SCALE,
        data=markupsafe.Markup(token_view.script_json(token_view.page_data(runs))),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _source(environment: jinja2.Environment, name: str) -> markupsafe.Markup:
    return markupsafe.Markup(environment.loader.get_source(environment, name)[0])


def _figures(groups: Sequence[Group], names: Sequence[str]) -> list[dict[str, Any]]:
    figures = []
    for name in names:
        lines = [series(group, name) for group in groups]
        if any(len(one["steps"]) > 1 for one in lines):
            described = metrics.GLOSSARY[name]
            bands = "; ".join(dict.fromkeys(one["band"] for one in lines if "band" in one))
            svg = markupsafe.Markup(plots.curves(lines, title=name, unit=described.unit))
            figures.append({"meaning": described.meaning, "bands": bands, "svg": svg})
    return figures


def _plain_samples(run: Run, runs: int) -> dict[str, Any]:
    """The first and the last step as text: what is there without the script."""
    shown, _, left_out = token_view.choose(run, runs)
    ends = dict.fromkeys([min(shown), max(shown)] if shown else [])
    rows = [(step, token_view.prompt_of(sample), token_view.completion_of(sample)) for step in ends for sample in shown[step]]
    return {"name": run.name, "rows": rows, "note": token_view.note(run, left_out)}
