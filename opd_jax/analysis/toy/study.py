"""The whole toy study: trains on both worlds, measures, draws, and writes JSON, curves, figures and a page of tables into one folder.

toy_study.json         settings (published and ours apart), summaries with intervals over seeds, statements of the paper, exact facts
toy_study.md           the same as tables
toy_study_curves.npz   gradient variance and sampled sequence KL of every update, [gammas, seeds, iterations]
*.png, *.svg           variance and visits of each setting; exact bias and variance on the chain
"""

import dataclasses
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


def run(out: pathlib.Path, settings: Settings, variations: dict[str, dict], *, say: Callable[[str], None] = print) -> dict:
    """Runs everything and writes it into `out`, a folder that does not exist or is empty; returns what toy_study.json holds.

    `variations` are fields that differ from `settings`, by name; settings with the same sigma range share their teachers.
    """
    changed = {"defaults": settings, **{name: dataclasses.replace(settings, **VARIATION, **fields) for name, fields in variations.items()}}
    _make_folder(out)
    curves, taught, seconds = {}, {}, {}
    found: dict = {"settings": settings.split(), "gaussian": {}}

    def one(name: str, world: World, its: Settings) -> tuple[dict, learning.Training]:
        begun, stem = time.perf_counter(), "".join(c if c.isalnum() else "_" for c in name)
        if world not in taught:
            taught[world] = learning.teachers(world, its)
        training = learning.students(world, its, taught[world])
        evaluation = learning.evaluate(world, its, training)
        curves[f"{stem}_variance"], curves[f"{stem}_reverse_kl"] = np.asarray(training.variance_GSI), np.asarray(training.reverse_kl_GSI)
        figures = _draw(out / stem, name, world, its, training, evaluation)
        seconds[stem] = round(time.perf_counter() - begun, 1)
        say(f"{name}: {seconds[stem]:.0f} s")
        return {**results.summary(its, training, evaluation), "figures": figures}, training

    for name, its in changed.items():
        summary, _ = one(f"gaussian, {name}", Gaussian(its.min_sigma, its.max_step), its)
        found["gaussian"][name] = {"changed": variations.get(name, {}), **summary}
    found["chain"], training = one("chain", Chain(), settings)
    begun = time.perf_counter()
    with jax.enable_x64(True):
        found["chain"]["exact"], found["facts"] = exact_rows(training, settings), cases.rows()
    plots_toy.exact(
        out / "chain_exact",
        found["chain"]["exact"],
        settings.batch,
        title="chain, at the students of γ = 0: exact; geometric means over seeds and tasks",
    )
    seconds["exact"] = round(time.perf_counter() - begun, 1)
    say(f"exact: {seconds['exact']:.0f} s")
    np.savez_compressed(out / "toy_study_curves.npz", **curves)
    (out / "toy_study.md").write_text(tables.page(found), encoding="utf-8")
    (out / "toy_study.json").write_text(json.dumps(found | {"time/seconds": seconds}, indent=1, allow_nan=False), encoding="utf-8")
    return found


def _make_folder(out: pathlib.Path) -> None:
    remedy = "give a folder that does not exist or is empty"
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--workdir={out}: exists and is not an empty folder; {remedy}")
        out.mkdir(parents=True, exist_ok=True)
        (out / "toy_study.json").touch()  # a folder that cannot be written is refused before any work
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
                measured = jax.tree.map(np.asarray, exact.study(student, teacher, task=k, settings=settings))
                place = {"iteration": piece * settings.iterations // CHUNKS, "seed": seed, "task": task}
                place["gradient"] = float(measured.pop("gradient"))
                for g, gamma in enumerate(settings.gammas):
                    rows.append({**place, "gamma": gamma, **{name: float(values[g]) for name, values in measured.items()}})
    return rows


def _at(params: network.Params, *index: int) -> network.Params:
    return jax.tree.map(lambda x: x[index], params)
