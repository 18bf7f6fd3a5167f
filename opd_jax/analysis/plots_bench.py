"""Figures of experiments/bench.py."""

import math
import pathlib
from collections.abc import Sequence

import matplotlib
import matplotlib.figure

from opd_jax.analysis import plots


def scaling(panels: Sequence[dict], path: pathlib.Path) -> None:
    """A file with one log-log panel per curve: {title, values, seconds: {name: [...]}, exponents: {name: (power, error)}}."""
    style = plots.STYLE | dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), "black")
    columns = min(len(panels), 3)
    with matplotlib.rc_context(style):
        size = (3.6 * columns, 3.0 * math.ceil(len(panels) / columns))
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        grid = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            for number, (name, seconds) in enumerate(panel["seconds"].items()):
                label = f"{name}, power {panel['exponents'][name][0]:.2f}"
                look = {"color": plots.colour(number), "marker": plots.marker(number), "linestyle": plots.line(number)}
                axes.plot(panel["values"], [1e3 * second for second in seconds], label=label, markersize=4, **look)
            axes.set(xscale="log", yscale="log", xlabel=panel["title"], ylabel="ms")
            axes.set_xticks(panel["values"], [f"{value:,}" for value in panel["values"]])
            axes.minorticks_off()
            axes.legend(fontsize=7)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.savefig(path, dpi=120)
