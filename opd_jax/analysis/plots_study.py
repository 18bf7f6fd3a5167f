"""Figures of a gradient study: intervals per estimator, curves over a swept field, and where the variance comes from."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.axis
import matplotlib.figure
import matplotlib.ticker

from opd_jax.analysis import plots

Row = dict[str, Any]
# Of a figure: (title, label of the axis).
QUANTITIES = {
    "variance": ("trace of the covariance of one rollout's gradient", "variance"),
    "snr": ("signal-to-noise of one rollout", "|E g|² / variance"),
    "bias_sequence": ("distance of E g from the sequence-level gradient", "|E g − gradient|"),
    "cosine_sequence": ("cosine of E g and the sequence-level gradient", "cosine"),
}
LOGARITHMIC = ("variance", "snr")
SWEPT = {"T": "completion length, tokens", "gamma": "discount per token", "k": "tokens of the support", "group_size": "rollouts per prompt"}
SWEPT |= {"temperature": "temperature of the sampling law", "top_p": "nucleus mass of the sampling law", "step": "updates"}
# A mean does not know how many rollouts a prompt has: constant by construction.
CONSTANT = (("bias_sequence", "group_size"), ("cosine_sequence", "group_size"))
SHARED_AXES = ("T", "group_size", "temperature", "top_p", "step")
CHOICES = ("gamma", "k")


def figures(rows: Sequence[Row]) -> dict[str, matplotlib.figure.Figure]:
    """{name of the file: figure} of a table; a figure is there where the table has something for it."""
    with matplotlib.rc_context(plots.STYLE):
        base = base_rows(rows)
        made = {name: intervals(base, name) for name in QUANTITIES if any(row[f"{name}_high"] is not None for row in base)}
        made |= {
            f"share_by_{kind}": shares(base, f"share_by_{kind}") for kind in ("position", "parameters") if f"share_by_{kind}" in base[0]
        }
        for field in SWEPT:
            swept = sweep(rows, field)
            shown = [name for name in QUANTITIES if _some(swept, name) and (name, field) not in CONSTANT]
            made |= {f"{name}_by_{field}": curves(swept, field, name, [row["name"] for row in base]) for name in shown}
    return made


def base_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of the base condition, each estimator with its own gamma and k: the first of each name."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row["name"], row)
    return list(found.values())


def sweep(rows: Sequence[Row], field: str) -> dict[str, list[Row]]:
    """{estimator: its rows that differ from its base in this field alone, by the field}; empty where nothing was swept."""
    found = {}
    for base in base_rows(rows):
        others = [name for name in (*SHARED_AXES, *CHOICES) if name != field]
        same = [row for row in rows if row["name"] == base["name"] and all(row[name] == base[name] for name in others)]
        same = sorted((row for row in same if row[field] is not None), key=lambda row: row[field])
        if len(same) > 1:
            found[base["name"]] = same
    return found


def _some(swept: dict[str, list[Row]], name: str) -> bool:
    return any(row[name] is not None for rows in swept.values() for row in rows)


def intervals(rows: Sequence[Row], name: str) -> matplotlib.figure.Figure:
    """A dot and its interval per estimator; a pale interval without a dot where the sample does not resolve the value."""
    figure = matplotlib.figure.Figure(figsize=(4.8, 0.9 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    title, label = QUANTITIES[name]
    for number, row in enumerate(rows):
        low, high, value = row[f"{name}_low"], row[f"{name}_high"], row[name]
        if low is not None:
            told = {"alpha": 0.45, "label": "not resolved from 0: what is possible"} if value is None else {}
            axes.plot([low, high], [number, number], color=plots.colour(0), linewidth=1.4, **told)
        if value is not None:
            axes.plot([value], [number], "o", color=plots.colour(0), markersize=4)
    if name in LOGARITHMIC and any(row[name] is not None for row in rows):
        axes.set_xscale("log", nonpositive="clip")
        _plain_ticks(axes.xaxis)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(label)
    axes.grid(alpha=0.2, axis="x")
    pale = axes.get_legend_handles_labels()[0][:1]  # of many one
    if pale:
        figure.legend(handles=pale, loc="outside lower center", fontsize=7)
    return figure


def _plain_ticks(axis: matplotlib.axis.Axis) -> None:
    """Ticks 0.1, 0.3, 1 ... of a logarithmic axis; powers of ten alone where it is long. The default labels every digit of a decade."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 3.0) if high < 3000 * low else (1.0,)))
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def plain(value: float) -> str:
    """0.3, 300, 3e6: without superscripts, which are small."""
    digits, _, exponent = f"{value:.3g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def shares(rows: Sequence[Row], key: str) -> matplotlib.figure.Figure:
    """Shares of the variance, side by side; they add up to 1, and one may be negative."""
    figure = matplotlib.figure.Figure(figsize=(4.8, 1.3 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for part, name in enumerate(rows[0][key]):
        values = [row[key][name]["share"] or 0.0 for row in rows]
        before = [sum(max(row[key][other]["share"] or 0.0, 0.0) for other in list(row[key])[:part]) for row in rows]
        axes.barh(range(len(rows)), values, left=before, color=plots.colour(part), label=name, height=0.7)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_title("share of the variance by " + key.removeprefix("share_by_"), fontsize=9, loc="left")
    axes.set_xlabel("share; all parts add up to 1")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    return figure


def curves(swept: dict[str, list[Row]], field: str, name: str, order: Sequence[str]) -> matplotlib.figure.Figure:
    """A quantity over a swept field, a line with a band per estimator; values that are not resolved are left out.

    An estimator's place in `order` gives its colour, line and marker, the same in all figures of a study.
    """
    figure = matplotlib.figure.Figure(figsize=(5.2, 3.2 + 0.12 * len(swept)), layout="constrained")
    axes = figure.add_subplot()
    for estimator, rows in swept.items():
        number = order.index(estimator)
        rows = [row for row in rows if row[name] is not None]
        at = [row[field] for row in rows]
        style = {"color": plots.colour(number), "linestyle": plots.line(number), "marker": plots.marker(number)}
        label = estimator if rows else f"{estimator} (not resolved)"
        axes.plot(at, [row[name] for row in rows], label=label, markersize=4, linewidth=1.4, **style)
        ends = ([row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
        axes.fill_between(at, *ends, color=plots.colour(number), alpha=0.15, linewidth=0)
    if field in ("T", "k", "group_size"):
        axes.set_xscale("log", base=2)
        values = sorted({row[field] for rows in swept.values() for row in rows})
        axes.set_xticks(values, [str(value) for value in values], minor=False)
    if name in LOGARITHMIC:
        axes.set_yscale("log", nonpositive="clip")
        _plain_ticks(axes.yaxis)
    title, label = QUANTITIES[name]
    axes.set_xlabel(SWEPT[field])
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(alpha=0.2)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return figure


def svg(figure: matplotlib.figure.Figure) -> str:
    """The figure as text; the same figure gives the same text."""
    text = io.StringIO()
    with matplotlib.rc_context(plots.STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def save_png(figure: matplotlib.figure.Figure, path: str) -> None:
    """Writes the figure, on white."""
    with matplotlib.rc_context(plots.STYLE):
        figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
