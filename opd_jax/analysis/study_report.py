"""A gradient study as files: JSON, tidy CSV, figures, and a page of its own."""

import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import markupsafe

from opd_jax import config as config_lib
from opd_jax import files
from opd_jax.analysis import pages, plots, plots_study
from opd_jax.analysis.study_tables import Result, Row
from opd_jax.types import UserError

CONDITION = ("T", "gamma", "k", "group_size", "temperature", "top_p", "step")
NUMBERS = ("variance", "variance_batch", "snr", "bias", "bias_sequence", "cosine", "cosine_sequence")
KEYS = {
    "name": "estimator, by its name in numerics/estimators.REGISTRY",
    "T": "tokens per completion at most",
    "gamma": "discount per token; null where the estimator has none",
    "k": "tokens of the support; null where it is the vocabulary or the sampled token",
    "group_size": "rollouts per prompt",
    "temperature": "of the law that the estimators' rollouts are drawn from; claims hold at 1",
    "top_p": "nucleus mass of that law; claims hold at 1",
    "step": "updates that the student had had; null: the student as given",
    "target": "the gradient that the estimator follows by its claim, and is compared with",
    "unbiased": "whether the registry claims no bias to the target, on-policy",
    "reference": "what stands for the target; null: nothing unbiased is known, and bias and cosine are null",
    "reference_sequence": "what stands for sequence_reverse_kl in `bias_sequence` and `cosine_sequence`",
    "prompts": "units of the bootstrap: all rollouts of a prompt go together",
    "rollouts": "rollouts under the estimator; the references have further ones of the same prompts",
    "variance": "trace of the covariance of one rollout's gradient: E |g|^2 - |E g|^2, the latter from pairs of different prompts "
    "(with one rollout per prompt that is the sample covariance with divisor n - 1)",
    "variance_batch": "rollouts times the variance of their mean; other than `variance` where rollouts of a prompt are correlated",
    "snr": "|E g|^2 / variance, the noise taken off |E g|^2",
    "bias": "|E g - target|, the noise taken off",
    "bias_sequence": "|E g - gradient of the sequence-level reverse KL|, likewise",
    "cosine": "of E g and the target, the noise taken off both norms",
    "cosine_sequence": "of E g and the gradient of the sequence-level reverse KL",
    "X_low, X_high": "95% percentile bootstrap over prompts",
    "null": "the interval of the square of a norm holds 0: the sample does not resolve the number, its interval says what is possible",
    "norm_error": "relative standard error of squared norms that are read from sketches; 0: all numbers of the gradients were kept",
    "interval_norm_error": "the same of the sketches that intervals are made from",
    "share_by_position": "share of the variance, tr Cov(part, whole) / variance, of what the tokens from-to contribute; adds up to 1",
    "share_by_parameters": "the same by parameter group",
}
FOLDER, ABOUT = "figures", "gradient_study_about.json"
IN_A_RUN = "gradient_study"  # folder of a study that its run's report shows
# Fields that no number of a study is a function of.
FREE = ("eval.", "log.", "checkpoint.", "cache_dir")


def write(result: Result, workdir: str | os.PathLike, *, config: config_lib.Config | None = None) -> pathlib.Path:
    """Writes all files, each whole or not at all; returns the page. Raises UserError for a folder that cannot be written."""
    workdir = pathlib.Path(workdir)
    figures = plots_study.figures(result.rows)
    drawn = {name: plots_study.svg(figure) for name, figure in figures.items()}
    settings = config_lib.flatten(config) if config is not None else {}
    texts = {
        ABOUT: _json({"keys": KEYS, "cost": result.cost, "config": settings}),  # first: it says whose the others are
        "gradient_study.json": _json(result.rows),
        "gradient_study.csv": tidy(result.rows),
        "gradient_study_pairs.json": _json(result.pairs),
        "gradient_study_pairs.csv": _csv(result.pairs),
        "gradient_study_growth.json": _json(result.growth),
        "gradient_study.html": render(result, drawn, settings),
    }
    texts |= {f"{FOLDER}/{name}.svg": text for name, text in drawn.items()}
    try:
        (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            _whole(workdir / FOLDER / f"{name}.png", functools.partial(plots_study.save_png, figure))
        for name, text in texts.items():
            _whole(workdir / name, lambda to, text=text: pathlib.Path(to).write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({files.reason(error)}); give another folder") from None
    return workdir / "gradient_study.html"


def check_folder(workdir: str | os.PathLike, config: config_lib.Config) -> None:
    """Raises UserError for a folder that cannot be made or written, or that holds a study with other settings, before any work.

    One with the same settings is made again, because what lies behind its paths may have changed.
    """
    about = pathlib.Path(workdir) / ABOUT
    if os.path.lexists(about):
        remedy = "give another --workdir, or restore the file"
        previous = files.read_json(about, remedy=remedy).get("config")
        if not isinstance(previous, dict) or not previous:  # `write` may be called without one
            raise UserError(f"{about}: does not hold the config of a study; {remedy}")
        changed = config_lib.differences(previous, dataclasses.asdict(config), FREE)
        if changed:
            raise UserError(
                f"--workdir={workdir}: its study has other settings ({'; '.join(changed)}); give another --workdir, or the old values"
            )
    try:
        if not os.fspath(workdir):
            raise NotADirectoryError(20, "it is empty")
        (pathlib.Path(workdir) / FOLDER).mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK) or shutil.disk_usage(workdir).free < 2**20:
            raise PermissionError(13, "no room or no right to write")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({files.reason(error)}); give another folder") from None


def _whole(path: pathlib.Path, save: Callable[[str], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save(os.fspath(temporary))
    temporary.replace(path)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def tidy(rows: Sequence[Row]) -> str:
    """One line per condition, estimator and number."""
    table = []
    for row in rows:
        about = {name: row[name] for name in ("name", *CONDITION, "target", "reference")}
        table += [about | {"quantity": q, "value": row[q], "low": row[f"{q}_low"], "high": row[f"{q}_high"]} for q in NUMBERS]
        for kind in ("share_by_position", "share_by_parameters"):
            for part, v in row.get(kind, {}).items():
                table.append(about | {"quantity": f"{kind}:{part}", "value": v["share"], "low": v["share_low"], "high": v["share_high"]})
    return _csv(table)


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


# ---- in the report of a run


@dataclasses.dataclass(frozen=True)
class Section:
    """What the report of a run shows of a study of it."""

    name: str
    bootstraps: list[str]
    table: list[list[str]]
    figures: list[markupsafe.Markup]


def of_run(workdir: str | os.PathLike) -> list[Section]:
    """The study in the folder gradient_study/ of a run, if there is one. Raises UserError for a file that is none."""
    path = pathlib.Path(workdir) / IN_A_RUN / "gradient_study.json"
    if not path.is_file():
        return []
    remedy = "make the study again, or move its folder away"
    try:
        files.check_regular(path, where=str(path), remedy=remedy, limit=files.MAX_JSON_BYTES)
        rows = files.parse_json(path.read_bytes())
        drawn = {name: plots_study.svg(figure) for name, figure in plots_study.figures(rows).items()}
        svgs = [markupsafe.Markup(plots.for_a_page(text, name)) for name, text in drawn.items()]
        return [Section(os.path.basename(os.path.abspath(workdir)), bootstraps(rows), table(rows), svgs)]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: is damaged ({files.reason(error)}); {remedy}") from None


# ---- for people


# What a page and a terminal call the numbers.
HEADINGS = {
    "variance": "variance",
    "variance_batch": "variance in a batch, per rollout",
    "snr": "SNR of a rollout",
    "bias": "bias",
    "bias_sequence": "bias, sequence level",
    "cosine_sequence": "cosine, sequence level",
}


def _number(value: float) -> str:
    """Three digits of any number, so that a value and its interval are written alike."""
    digits, _, exponent = f"{value:#.3g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits.rstrip(".")


def _cell(row: Row, name: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if low is None:
        return "" if value is None else _number(value)
    return f"{'not resolved' if value is None else _number(value)} [{_number(low)}, {_number(high)}]"


def _varying(rows: Sequence[Row]) -> list[str]:
    return [name for name in CONDITION if len({row[name] for row in rows}) > 1]


def _shown(rows: Sequence[Row]) -> list[str]:
    """The numbers that a table has; that of a batch is another than that of a rollout where prompts have several."""
    return [name for name in HEADINGS if name != "variance_batch" or any(row["group_size"] > 1 for row in rows)]


def _cells(row: Row, shown: Sequence[str]) -> list[str]:
    return ["" if name == "variance_batch" and row["group_size"] == 1 else _cell(row, name) for name in shown]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Header, then a row per condition and estimator; columns of the condition are there where they vary."""
    varying, shown = _varying(rows), _shown(rows)
    body = [[row["name"], *("" if row[n] is None else str(row[n]) for n in varying), *_cells(row, shown)] for row in rows]
    return [["estimator", *varying, *(HEADINGS[name] for name in shown)], *body]


def text_table(rows: Sequence[Row]) -> str:
    """The table of the base condition for a terminal, under a line that says which it is."""
    base = plots_study.base_rows(rows)
    shown = [name for name in _shown(base) if name != "cosine_sequence"]
    columns = [["estimator", *(HEADINGS[name] for name in shown)], *([_label(row), *_cells(row, shown)] for row in base)]
    widths = [max(len(row[i]) for row in columns) for i in range(len(columns[0]))]
    shared = {name: value for name, value in base[0].items() if name not in plots_study.CHOICES}
    about = [f"base condition: {_conditions(shared)}", *(f"95% bootstrap over {units}" for units in bootstraps(base))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in columns]
    return "\n".join(["; ".join(about), *lines])


def _label(row: Row) -> str:
    """The estimator with its own discount or support, which another row of it may not share."""
    chosen = ", ".join(f"{name} = {row[name]}" for name in plots_study.CHOICES if row[name] is not None)
    return f"{row['name']} ({chosen})" if chosen else row["name"]


def bootstraps(rows: Sequence[Row]) -> list[str]:
    """What intervals are a bootstrap over, once for all rows that share it; nothing of exact rows."""
    units = {row["group_size"]: row["prompts"] for row in rows if row["prompts"] is not None}
    if len(units) == 1:
        return [f"{prompts} prompts" for prompts in units.values()]
    return [f"{prompts} prompts where group_size = {group}" for group, prompts in units.items()]


def meanings(result: Result, figures: Sequence[str]) -> list[tuple[str, markupsafe.Markup]]:
    """(name, meaning) of what the page has."""
    conditions = [name for name in CONDITION if name in _varying(result.rows) or any(pair.get(name) is not None for pair in result.pairs)]
    found = {"estimator": "name", **{name: name for name in conditions}, **{HEADINGS[name]: name for name in _shown(result.rows)}}
    found |= {"target": "target", "reference": "reference", "brackets": "X_low, X_high", "not resolved": "null"}
    found |= {f"share of the variance by {kind}": key for kind in ("position", "parameters") if (key := f"share_by_{kind}") in figures}
    return [(label, _code(KEYS[key].replace("null", "empty"))) for label, key in found.items()]  # as cells are


def _code(text: str) -> markupsafe.Markup:
    """Text in which `names` stand between backticks."""
    return markupsafe.Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def render(result: Result, figures: dict[str, str], settings: dict[str, Any]) -> str:
    """The page. `figures`: SVG by name."""
    environment = pages.make_environment()
    style = markupsafe.Markup(environment.loader.get_source(environment, "report.css")[0])
    defaults = config_lib.flatten(config_lib.Config())
    return environment.get_template("study.html.jinja").render(
        style=style,
        table=table(result.rows),
        references=sorted({row[k] for row in result.rows for k in ("reference", "reference_sequence") if row[k]}),
        bootstraps=bootstraps(result.rows),
        figures=[markupsafe.Markup(plots.for_a_page(text, name)) for name, text in figures.items()],
        pairs=[(f"{p['name']} / {p['other']}", _conditions(p), _cell(p, "ratio")) for p in result.pairs],
        growth=[(g["name"], ", ".join(map(str, g["values"])), _cell(g, "exponent")) for g in result.growth],
        cost=[(name.removeprefix("time/").replace("_", " "), _count(value)) for name, value in result.cost.items()],
        meanings=meanings(result, list(figures)),
        changed=[(name, value) for name, value in settings.items() if value != defaults[name]],
    )


def _conditions(row: Row) -> str:
    return ", ".join(f"{name} = {row[name]}" for name in CONDITION if row.get(name) is not None)


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,.0f}"
