"""Figures of the toy study, as PNG and SVG files: gradient variance, visited positions, exact bias and variance."""

import pathlib
from collections.abc import Sequence

import matplotlib
import matplotlib.colors
import matplotlib.figure
import numpy as np

BLOCKS = 100  # of iterations, whose median is one point of a curve
FAR = 8  # positions, from which on a heat map that reaches further is logarithmic
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "svg.hashsalt": "opd_jax"}


def _colours(count: int) -> list:
    """From dark to bright in the order of gamma."""
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0, 0.9, count)]


def _save(figure: matplotlib.figure.Figure, stem: pathlib.Path) -> None:
    figure.savefig(stem.with_suffix(".png"), dpi=130)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def _figure(rows: int, columns: int, width: float, height: float, **shared):
    figure = matplotlib.figure.Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def medians(values_SI: np.ndarray, blocks: int) -> np.ndarray:
    """Medians of so many blocks of iterations, [seeds, blocks]; NaN where a value is not finite, and for 0, which no log axis shows.

    Single zeros are common on the chain: all trajectories of a batch may be the same one, and with them all gradients.
    """
    pieces = np.array_split(np.where(np.isfinite(values_SI), values_SI, np.nan), blocks, axis=-1)
    found_SX = np.stack([np.median(piece, axis=-1) for piece in pieces], axis=-1)
    return np.where(found_SX > 0, found_SX, np.nan)


def variance(stem: pathlib.Path, variance_GSI: np.ndarray, gammas: Sequence[float], *, title: str) -> None:
    """Gradient variance against iteration on a log axis, one panel per task: geometric mean over seeds, from the least to the largest seed.

    Iterations alternate between the tasks, the first is on the left one. A curve ends where a seed's variance is no longer finite.
    """
    variance_GSI = variance_GSI.astype(np.float64)  # margins beyond the largest float32
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(1, 2, 4.6, 3.2, sharey=True)
        figure.suptitle(title, fontsize=9)
        for task, (name, axis) in enumerate(zip(("left", "right"), axes[0], strict=True)):
            iterations = np.arange(1, variance_GSI.shape[-1] + 1)[task::2]
            blocks = min(BLOCKS, len(iterations))
            x = [piece.mean() for piece in np.array_split(iterations, blocks)]
            for values_SI, gamma, colour in zip(variance_GSI[..., task::2], gammas, _colours(len(gammas)), strict=True):
                y_SX = np.log10(medians(values_SI, blocks))
                axis.plot(x, 10 ** y_SX.mean(0), color=colour, linewidth=1.3, label=f"γ = {gamma:g}")
                axis.fill_between(x, 10 ** y_SX.min(0), 10 ** y_SX.max(0), color=colour, alpha=0.2, linewidth=0)
            axis.set(title=f"{name} task", xlabel="iteration")
        # Without a finite value, as after a divergence at once, a log axis finds no limits of its own.
        finite = variance_GSI[np.isfinite(variance_GSI) & (variance_GSI > 0)]
        low, high = (np.log10(finite.min()), np.log10(finite.max())) if finite.size else (0, 1)
        axes[0, 0].set(yscale="log", ylim=(10 ** (low - 0.2), 10 ** (high + 0.2)), ylabel="gradient variance, output layer")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
        _save(figure, stem)


def visits(
    stem: pathlib.Path,
    visits_STX: dict[str, np.ndarray],
    seeds: Sequence[int],
    edges: np.ndarray,
    targets: Sequence[float],
    *,
    title: str,
) -> None:
    """Heat maps of time x position, a column per title and a row per seed: the share of visits, divided by the panel's largest.

    Dotted lines are the targets. Positions beyond FAR are drawn on a log scale, so that who drifts is seen beside who stays.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(len(seeds), len(visits_STX), 2.4, 1.9, sharex=True, sharey=True)
        figure.suptitle(title, fontsize=9)
        for p, (panel, panel_STX) in enumerate(visits_STX.items()):
            for s, seed in enumerate(seeds):
                seen_TX, axis = panel_STX[s], axes[s, p]
                shown_XT = seen_TX.T / max(seen_TX.max(), 1e-12)
                times = np.arange(len(seen_TX) + 1) - 0.5
                norm = matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=1)  # rare visits are seen, too
                colours = axis.pcolormesh(times, edges, shown_XT, cmap="magma", norm=norm, rasterized=True)
                for target in targets:
                    axis.axhline(target, color="white", linewidth=0.6, linestyle="dotted")
                if s == 0:
                    axis.set_title(panel, fontsize=9)
                if p == 0:
                    axis.set_ylabel(f"seed {seed}\nposition")
            axes[-1, p].set_xlabel("time")
        if edges[-1] > 2 * FAR:
            far = [-edges[-1], -FAR, 0, FAR, edges[-1]]
            axes[0, 0].set_yscale("symlog", linthresh=FAR)
            axes[0, 0].set_yticks(far, [f"{place:g}" for place in far], minor=False)
            axes[0, 0].set_yticks([], minor=True)
        figure.colorbar(colours, ax=axes, label="share of visits / the panel's largest", shrink=0.6)
        _save(figure, stem)


def exact(stem: pathlib.Path, rows: Sequence[dict], batch: int, *, title: str) -> None:
    """Exact squared bias, variance of the batch's mean, and their sum against gamma; one line per point of training.

    Lines are geometric means over seeds and tasks; the bias of gamma = 1 is 0 and has no point.
    """
    names = ("squared bias", f"variance / {batch}", f"squared error, batch of {batch}")
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(1, 3, 3.2, 3.0, sharex=True, sharey=True)
        figure.suptitle(title, fontsize=9)
        points = sorted({row["iteration"] for row in rows})
        for point, colour in zip(points, _colours(len(points)), strict=True):
            own = [row for row in rows if row["iteration"] == point]
            gammas = sorted({row["gamma"] for row in own})
            of = lambda name, own=own, gammas=gammas: np.array([[row[name] for row in own if row["gamma"] == g] for g in gammas])
            bias_GR, noise_GR = of("bias") ** 2, of("variance") / batch
            bias_GR = np.where(np.array(gammas)[:, None] < 1, bias_GR, np.nan)
            for axis, values_GR in zip(axes[0], (bias_GR, noise_GR, np.nan_to_num(bias_GR) + noise_GR), strict=True):
                logs = np.log10(values_GR)
                axis.plot(gammas, 10 ** logs.mean(1), color=colour, marker="o", markersize=3, label=f"iteration {point}")
        for axis, name in zip(axes[0], names, strict=True):
            axis.set(yscale="log", title=name, xlabel="γ")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
        _save(figure, stem)
