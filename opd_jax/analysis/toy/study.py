"""The whole toy study: trains on both worlds, measures, draws, and writes JSON, curves, figures and a page of tables into one folder.

toy_study.json         settings (published and ours apart), summaries with intervals over seeds, statements of the paper, exact facts
toy_study.md           the same as tables
toy_study_curves.npz   gradient variance and sampled sequence KL of every update, [gammas, seeds, iterations]
*.png, *.svg           variance and visits of each setting; exact bias and variance on the chain
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from opd_jax.analysis import plots_toy
from opd_jax.analysis.toy import cases, exact, learning, network, results, tables
from opd_jax.analysis.toy.settings import CHUNKS, VARIATION, Settings
from opd_jax.analysis.toy.worlds import Chain, Gaussian, World
from opd_jax.files import reason
from opd_jax.types import UserError

EXACT_AT = (0, 1, 4, 10, CHUNKS)  # pieces of training after which the chain's students are studied exactly


_print = functools.partial(print, flush=True)  # progress is for those who wait, also at the other end of a pipe


def run(out: pathlib.Path, settings: Settings, variations: dict[str, dict], *, say: Callable[[str], None] = _print) -> dict:
    """Runs everything and writes it into `out`, a folder that does not exist or is empty; returns what toy_study.json holds.

    `variations` are fields that differ from `settings`, by name; settings with the same sigma range share their teachers.
    """
    changed = {"defaults": settings, **{name: dataclasses.replace(settings, **VARIATION, **fields) for name, fields in variations.items()}}
    _make_folder(out)
    curves, taught, seconds = {}, {}, {}
    found: dict = {"settings": settings.split(), "gaussian": {}}

    def timed(name: str, function: Callable):
        say(f"{name}: begins")
        begun = time.perf_counter()
        value = function()
        seconds[name] = round(time.perf_counter() - begun, 1)
        say(f"{name}: {seconds[name]:.0f} s")
        return value

    for name, its in changed.items():
        world, full = Gaussian(its.min_sigma, its.max_step), f"gaussian, {name}"
        summary, _ = timed(full, functools.partial(_walk, out, full, world, its, taught, curves, say))
        found["gaussian"][name] = {"changed": variations.get(name, {}), **summary}
    found["chain"], training = timed("chain", lambda: _walk(out, "chain", Chain(), settings, taught, curves, say))
    with jax.enable_x64(True):
        found["chain"]["exact"] = timed("chain, exact", lambda: exact_rows(training, settings))
        found["facts"] = timed("facts", cases.rows)
    title = "chain, at the students of γ = 0: exact; geometric means over seeds and tasks"
    plots_toy.exact(out / "chain_exact", found["chain"]["exact"], settings.batch, title=title)
    np.savez_compressed(out / "toy_study_curves.npz", **curves)
    (out / "toy_study.md").write_text(tables.page(found), encoding="utf-8")
    (out / "toy_study.json").write_text(json.dumps(found | {"seconds": seconds}, indent=1, allow_nan=False), encoding="utf-8")
    return found


def _walk(
    out: pathlib.Path, name: str, world: World, settings: Settings, taught: dict, curves: dict, say: Callable[[str], None]
) -> tuple[dict, learning.Training]:
    """Teachers (once per world, kept in `taught`), students, figures and summary of one setting; adds to `curves`."""
    stem = "".join(c if c.isalnum() else "_" for c in name)
    if world not in taught:
        say(f"{name}: teachers, {settings.teacher_iterations} iterations")
        taught[world] = jax.block_until_ready(learning.teachers(world, settings))
    say(f"{name}: students of {len(settings.gammas)} gammas and {len(settings.seeds)} seeds, {settings.iterations} iterations")
    training = learning.students(world, settings, taught[world])
    evaluation = learning.evaluate(world, settings, training)
    curves[f"{stem}_variance"], curves[f"{stem}_reverse_kl"] = np.asarray(training.variance_GSI), np.asarray(training.reverse_kl_GSI)
    figures = _draw(out / stem, name, world, settings, training, evaluation)
    return {**results.summary(settings, training, evaluation), "figures": figures}, training


def _make_folder(out: pathlib.Path) -> None:
    remedy = "give a folder that does not exist or is empty"
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--workdir={out}: exists and is not an empty folder; {remedy}")
        out.mkdir(parents=True, exist_ok=True)
        probe = out / "toy_study.json"  # a folder that cannot be written is refused before any work
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--workdir={out}: cannot be written ({reason(error)}); {remedy}") from None


def _draw(stem: pathlib.Path, name: str, world: World, settings: Settings, training, evaluation: learning.Evaluation) -> list[str]:
    """Both figures of one setting; their names without the suffix."""
    seeds = ", ".join(map(str, settings.seeds))
    title = f"{name}: mean and range of seeds {seeds}"
    plots_toy.variance(stem.with_name(f"{stem.name}_variance"), np.asarray(training.variance_GSI), settings.gammas, title=title)
    shown = [0, len(settings.gammas) // 2, len(settings.gammas) - 1]
    visits = {f"γ = {settings.gammas[g]:g}": np.asarray(evaluation.visits_GSTX)[g] for g in shown}
    visits["teachers"] = np.asarray(evaluation.teacher_visits_STX)
    title = f"{name}: visits of both tasks after {settings.iterations} iterations"
    plots_toy.visits(stem.with_name(f"{stem.name}_visits"), visits, settings.seeds, world.edges, settings.targets, title=title)
    return [f"{stem.name}_variance", f"{stem.name}_visits"]


def exact_rows(training: learning.Training, settings: Settings) -> list[dict]:
    """Exact bias and variance of each gamma's estimator at the students of gamma = 0, at points of their training: a row per gamma."""
    zero, rows = settings.gammas.index(0.0), []
    for piece in EXACT_AT:
        for s, seed in enumerate(settings.seeds):
            for k, task in enumerate(results.TASKS):
                student, teacher = _at(training.snapshots, piece, zero, s), _at(training.teachers, s, k)
                measured = jax.tree.map(np.asarray, exact.study(student, teacher, k, settings=settings))
                place = {"iteration": piece * settings.iterations // CHUNKS, "seed": seed, "task": task}
                place["gradient"] = float(measured.pop("gradient"))
                for g, gamma in enumerate(settings.gammas):
                    rows.append({**place, "gamma": gamma, **{name: float(values[g]) for name, values in measured.items()}})
    return rows


def _at(params: network.Params, *index: int) -> network.Params:
    return jax.tree.map(lambda x: x[index], params)
