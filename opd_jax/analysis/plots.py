"""Curves as SVG text. Only files named plots import matplotlib."""

import html
import io
import re
from collections.abc import Sequence

import matplotlib.figure
import matplotlib.ticker

INK = "#010203"  # stands for the page's text colour, whatever the page's theme
# Contrast of at least 3 to 1 on white and on the dark page; neighbours differ in lightness or in their line as well as in hue.
COLOURS = ("#3b82f6", "#e0620d", "#0d9668", "#a855f7", "#ef4444", "#a1810b", "#0891b2", "#ec4899")
LINES = ("solid", "dashed", "dotted")
MARKERS = ("o", "s", "^", "D", "v")

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


def line(number: int) -> str:
    """The line of curve `number`: solid, dashed or dotted, in turn."""
    return LINES[number % len(LINES)]


def marker(number: int) -> str:
    """The marker of curve `number`; with 8 colours, 3 lines and 5 markers, which have no common factor, 120 curves differ."""
    return MARKERS[number % len(MARKERS)]


def curves(series: Sequence[dict], *, title: str, unit: str) -> str:
    """An <svg> element with one line per series: {steps, values, and optional low and high for a band}.

    Axes and text take the colour of the text around the element. A series of one point is a dot.
    """
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for number, one in enumerate(series):
            marker = "o" if len(one["steps"]) < 12 else ""
            style = {"color": colour(number), "linestyle": line(number), "marker": marker}
            axes.plot(one["steps"], one["values"], linewidth=1.4, markersize=3, **style)
            if "low" in one:
                axes.fill_between(one["steps"], one["low"], one["high"], color=colour(number), alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("updates")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=6, integer=True))
        axes.set_ylabel(unit)
        axes.grid(alpha=0.2)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return for_a_page(text.getvalue(), title)


def for_a_page(svg: str, title: str) -> str:
    """The element alone, named, in the page's ink, without the ids that nothing refers to: several figures share one page."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    referred = set(re.findall(r"#(\w+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referred else "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
