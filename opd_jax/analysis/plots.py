"""Curves as SVG text. The only importer of matplotlib."""

import io
from collections.abc import Sequence

import matplotlib.figure

INK = "#010203"  # stands for the page's text colour, whatever the page's theme
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899")  # readable on white and on black

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "opd_jax",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def colour(number: int) -> str:
    """The colour of curve `number`; they repeat after eight."""
    return COLOURS[number % len(COLOURS)]


def curves(series: Sequence[dict], *, title: str, unit: str) -> str:
    """An <svg> element with one line per series: {label, steps, values, and optional low and high for a band}.

    Axes and text take the colour of the text around the element. A series of one point is a dot.
    """
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for number, one in enumerate(series):
            marker = "o" if len(one["steps"]) < 12 else ""
            axes.plot(one["steps"], one["values"], color=colour(number), linewidth=1.4, marker=marker, markersize=3)
            if "low" in one:
                axes.fill_between(one["steps"], one["low"], one["high"], color=colour(number), alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("updates")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.2)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
