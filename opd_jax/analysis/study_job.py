"""A study from a config: what it asks for is checked, models are opened or made, prompts are read, then everything is measured."""

import dataclasses
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from opd_jax import model_io, parallel, recipes
from opd_jax.analysis import enumeration, gradient_study, shadow, study_conditions, study_enumerated, study_report, study_tables
from opd_jax.config import Config, ConfigError
from opd_jax.data import tasks
from opd_jax.data.pipeline import Pipeline
from opd_jax.metrics import Progress
from opd_jax.pair import Pair, open_pair

VOCABULARY = 3  # of enumerable models
MOST_LENGTH = max(length for length in range(1, 20) if VOCABULARY**length <= enumeration.MOST_COMPLETIONS)


def run(config: Config, workdir: str | os.PathLike, *, make_model: Callable[[str, str], str], progress: Progress) -> study_tables.Result:
    """The tables of a validated config. `make_model(recipe, cache_dir)` runs a recipe. Raises UserError, before any work."""
    shadows, settings, plan = study_conditions.from_config(config)
    if config.rollout.max_turns > 1:
        raise ConfigError(f"config field rollout.max_turns = {config.rollout.max_turns}: a study samples completions of one turn; use 1")
    if study_conditions.enumerable(config):
        return _enumerable(config, workdir, shadows, settings, plan)
    if config.mesh.teacher:
        raise ConfigError(f"config field mesh.teacher = {config.mesh.teacher} is for runs; a study runs on one mesh, use 0")
    mesh = parallel.from_settings(config.mesh)
    examples = tasks.from_config(config).examples("train")
    rollouts = config.study.rollouts
    plan.check(settings, rollouts, len(examples), mesh)
    _check_steps(config, settings)
    study_report.check_folder(workdir, config)
    longest = max(setting.T for setting in settings)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_new_tokens=longest))
    config = recipes.run_recipes(config, make_model)
    progress.phase("loading the models")
    pair = open_pair(config, None, mesh)
    prompts = rollouts // min(setting.group_size for setting in settings)
    encoders = pair.student_prompts, pair.teacher_prompts
    batch = Pipeline(examples, *encoders, prompts_per_step=prompts, group_size=1, seed=config.seed).batch(0)
    subject = gradient_study.Subject(
        params=lambda step: _params(config, pair, step, mesh),
        teacher_params=pair.teacher.params,
        models=shadow.Models(pair.student.config, pair.teacher.config),
        prompts=batch.prompts,
        teacher_prompts=batch.teacher_prompts,
        stop_ids=tuple(pair.student.tokenizer.eos_ids),
        mesh=mesh,
    )
    return gradient_study.run(subject, shadows, settings, rollouts, plan, progress)


def _enumerable(config: Config, workdir, shadows, settings, plan) -> study_tables.Result:
    """A random student whose features are shared between prefixes; its sampled rollouts against exact gradients.

    It is made for the longest completions, and cut off for shorter ones, so that rows over T speak of one student.
    """
    started = time.monotonic()
    for setting in settings:
        if setting.T > MOST_LENGTH or (setting.temperature, setting.top_p, setting.step) != (1.0, 1.0, None):
            raise ConfigError(
                f"without student.path and teacher.path the study is of random models of {VOCABULARY} tokens, with lengths up to "
                f"{MOST_LENGTH}, temperature 1, top_p 1 and no steps; give models, or change the condition T = {setting.T}, temperature = "
                f"{setting.temperature}, top_p = {setting.top_p}, step = {setting.step}"
            )
    study_report.check_folder(workdir, config)
    laboratories, rows, pairs = [], [], []
    sizes = {"rollouts": config.study.rollouts, "resamples": plan.resamples, "seed": config.seed}
    with jax.enable_x64(True):
        longest = max(setting.T for setting in settings)
        whole = enumeration.make("shared", vocab=VOCABULARY, length=longest, features=2, seed=config.seed)
    for number, setting in enumerate(settings):
        with jax.enable_x64(True):
            model = whole.truncated(setting.T)
        here = shadows if number == 0 else [one for one in shadows if one.default]
        found, laboratory = study_enumerated.measured(model, here, group_size=setting.group_size, **sizes)
        laboratories.append((setting, here, laboratory))
        rows, pairs = rows + found, pairs + study_tables.neighbours(laboratory, here, setting)
    cost = {"conditions": len(settings), "rollouts": len(settings) * config.study.rollouts, "seconds": time.monotonic() - started}
    return study_tables.Result(rows, pairs, study_tables.growth_of(laboratories), cost)


def _params(config: Config, pair: Pair, step: int | None, mesh) -> dict:
    if step is None:
        return pair.student.params
    return model_io.open_model(config.student.path, mesh=mesh, dtype=jnp.float32, step=step).params


def _check_steps(config: Config, settings) -> None:
    asked = [setting.step for setting in settings if setting.step is not None]
    if not asked:
        return
    if not model_io.is_run_directory(config.student.path):
        raise ConfigError(f"config field study.steps = {config.study.steps!r} needs student.path to be a run directory of ours")
    saved = model_io.saved_steps(config.student.path)
    for step in asked:
        if step not in saved:
            raise ConfigError(
                f"config field study.steps: {config.student.path} holds no checkpoint {step}; valid: {', '.join(map(str, saved))}"
            )
