"""Writes a store: completions by the rollout source of a config, scored once by its teacher in the form that its signal needs."""

import os
from collections.abc import Callable

import jax

from opd_jax import assembly, labels, parallel, recipes, replay, store
from opd_jax import config as config_lib
from opd_jax import objective as objective_lib
from opd_jax.cli import Interrupted, StopRequest
from opd_jax.config import Config, ConfigError
from opd_jax.data import tasks
from opd_jax.metrics import Progress
from opd_jax.models import spec
from opd_jax.pair import Pair, open_pair
from opd_jax.store import Store

WRITERS = ("student", "teacher", "dagger", "dataset")


def write(
    config: Config,
    folder: str | os.PathLike,
    *,
    make_model: Callable[[str, str], str],
    progress: Progress,
    stop: StopRequest | None = None,
) -> Store:
    """Writes `config.steps` batches of completions and scores, those of updates 1 to `steps` of a student that does not change.

    Goes on where it was stopped. Raises UserError, before any work, for a config whose scores cannot be stored, or a folder with another
    store; Interrupted once `stop` is set, with all batches up to then on disk.
    """
    form = _form(config)
    mesh = parallel.from_settings(config.mesh)
    task = tasks.from_config(config)
    tasks.check_turns(config, task)
    config = recipes.run_recipes(config, make_model)
    progress.phase("loading the models")
    pair = open_pair(config, None, mesh)
    pipeline = assembly.make_pipeline(config, pair, task.examples("train"))
    found = store.begin(folder, replay.describe(config, form, pair, hashes=_hashes(config, pair), batches=config.steps))
    params = pair.teacher.params if pair.teacher else None
    progress.begin(config.steps, done=found.batches)
    try:
        with jax.set_mesh(mesh):
            source = assembly.make_source(config, pair.student, pair.teacher, task, mesh)
            scorer = labels.make_scorer(form, pair.teacher and pair.teacher.config)
            for step in range(found.batches, config.steps):
                if stop:
                    raise Interrupted(stop.signum)
                batch = pipeline.batch(step)
                completions = source(pair.student.params, params, batch, step)
                scores = scorer(params, parallel.shard_batch(batch.teacher_prompts, mesh), completions)
                found.append(batch.examples, completions, scores)
                progress.advance(step + 1, f"{len(found)} prompts with their completions")
    finally:
        progress.close()
    return found


def _form(config: Config) -> labels.Form:
    """What is stored of the teacher's law. Raises ConfigError for a config that gives no store."""
    if config.rollout.source not in WRITERS or config.rollout.aggregate:
        wrong = "rollout.aggregate = True" if config.rollout.aggregate else f"rollout.source = {config.rollout.source!r}"
        raise ConfigError(f"config field {wrong} writes no store; valid: rollout.source = {', '.join(WRITERS)}, without rollout.aggregate")
    if config_lib.measures_difficulty(config):
        raise ConfigError("config field task.difficulty_low or difficulty_high chooses prompts of a run, a store has them all; use 0 and 1")
    if config.mesh.teacher:
        raise ConfigError(f"config field mesh.teacher = {config.mesh.teacher} is for runs; a store is written on one mesh, use 0")
    if config.steps < 1:
        raise ConfigError(f"config field steps = {config.steps} must be at least 1, the batches of a store")
    labels.check(config, "a store")
    return labels.form_of(objective_lib.from_config(config, has_teacher=config_lib.has_teacher(config)))


def _hashes(config: Config, pair: Pair) -> tuple[str, str]:
    teacher = spec.content_hash(pair.teacher.params) if pair.teacher else ""
    return teacher, spec.content_hash(pair.student.params) if config.rollout.source in ("student", "dagger") else ""
