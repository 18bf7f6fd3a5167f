"""Everything that a run needs, made and checked before its first step: a config and a folder in, a Job out."""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import checkpoint, learner, machine, metrics, parallel, rollout, trackers
from opd_jax import config as config_lib
from opd_jax import objective as objective_lib
from opd_jax import workdir as workdir_lib
from opd_jax.config import Config
from opd_jax.data import tasks
from opd_jax.data.pipeline import CHECKED_AT_ONCE, Pipeline
from opd_jax.evaluate import Evaluator
from opd_jax.model_io import LoadedModel
from opd_jax.models import lora, spec
from opd_jax.pair import Pair, open_pair
from opd_jax.samples import SampleLog
from opd_jax.types import TrainState, UserError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """The parts of a run. The parameters that are trained are in the state; `student.params` holds the base of an adapter, or nothing."""

    config: Config
    workdir: pathlib.Path
    mesh: Mesh
    task: tasks.Task
    student: LoadedModel
    teacher: LoadedModel | None
    pipeline: Pipeline
    rollouts: rollout.Source
    objective: objective_lib.Objective
    schedule: Callable
    update: Callable
    evaluate: Evaluator | None
    checkpoints: checkpoint.Checkpoints
    writer: metrics.MetricsWriter
    samples: SampleLog
    trackers: trackers.Trackers
    state: TrainState
    step: int
    resumed: bool
    info: dict  # what a checkpoint remembers beside the state

    @property
    def teacher_params(self) -> dict | None:
        return self.teacher.params if self.teacher else None

    def policy(self, params: dict) -> dict:
        """The student's parameters, from those that are trained."""
        return lora.attach(self.student.params, params, self.student.lora) if self.student.lora else params


def setup(
    parsed: Config,
    workdir: str | os.PathLike,
    *,
    make_model: Callable[[str, str], str],
    progress: metrics.Progress,
    own_task: tasks.Task | None = None,
) -> Job:
    """Refuses what can be refused before any work, then loads or restores. `make_model(recipe, cache_dir)` runs a recipe.

    Raises UserError for a config, folder, model, tokenizer or data file that cannot be used.
    """
    if not os.fspath(workdir):
        raise UserError("--workdir='' is no folder; give the folder of the run")
    parsed = tasks.with_own(parsed, own_task)
    asked, workdir = parsed, pathlib.Path(workdir)
    objective = objective_lib.from_config(parsed, has_teacher=bool(parsed.teacher.path or parsed.teacher.recipe))
    workdir_lib.check(workdir, asked)
    trackers.check(parsed.log)
    mesh = parallel.make_mesh(parsed.mesh.data, parsed.mesh.fsdp, parsed.mesh.tensor)
    task = tasks.from_config(parsed, own_task)
    _say_which_gradient(parsed, objective, progress)
    optimizer = learner.make_optimizer(parsed.learner, parsed.steps)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=parsed.checkpoint.keep)
    resumed = bool(checkpoints.steps())
    parsed = run_recipes(parsed, make_model, ("teacher",) if resumed and not parsed.student.lora.rank else ("student", "teacher"))
    progress.phase("loading student and teacher")
    pair = open_pair(parsed, workdir if resumed else None, mesh)
    student, teacher = pair.student, pair.teacher
    pipeline = _make_pipeline(parsed, task, pair)
    evaluate = make_evaluator(parsed, mesh, task, pair)
    state, step, info = _begin_or_resume(parsed, checkpoints, pair, task, optimizer, mesh)
    student = student if student.lora else dataclasses.replace(student, params={})
    writer = metrics.MetricsWriter(workdir)
    writer.truncate_after(step if resumed else -1)
    workdir_lib.describe(workdir, asked, student, base=parsed.student.path, resumed=resumed)
    if not resumed or step < parsed.steps:
        machine.begin_session(workdir, step, mesh)
    return Job(
        config=parsed,
        workdir=workdir,
        mesh=mesh,
        task=task,
        student=student,
        teacher=teacher,
        pipeline=pipeline,
        rollouts=_make_source(parsed, student, teacher, mesh),
        objective=objective,
        schedule=learner.make_schedule(parsed.learner, parsed.steps),
        update=_make_update(parsed, objective, optimizer, student, teacher, state),
        evaluate=evaluate,
        checkpoints=checkpoints,
        writer=writer,
        samples=SampleLog(parsed, student.tokenizer, student.config, teacher.config if teacher else None, mesh),
        trackers=trackers.make(asked, workdir, kept=step if resumed else -1),
        state=state,
        step=step,
        resumed=resumed,
        info=info,
    )


def _begin_or_resume(config: Config, checkpoints, pair: Pair, task: tasks.Task, optimizer, mesh: Mesh) -> tuple[TrainState, int, dict]:
    """(state, its step, what a checkpoint remembers beside it)."""
    identity = workdir_lib.identity(pair, task)
    if checkpoints.steps():
        return workdir_lib.restore(checkpoints, pair, optimizer, mesh, identity, config)
    trained = _init_adapter(pair.student, config.seed, mesh) if pair.student.lora else pair.student.params
    return learner.init_state(trained, optimizer), 0, {"tokens_total": 0, "seconds": 0.0, **identity}


def _say_which_gradient(config: Config, objective: objective_lib.Objective, progress: metrics.Progress) -> None:
    """The claim of the estimator; a warning where completions come from another law than the policy in the loss, of which claims speak."""
    if config.rollout.source == "student":
        progress.phase(f"gradient: {objective_lib.claim(objective, config)}")
    asked, whole = config.rollout, config_lib.Rollout()
    law = {name: getattr(asked, name) for name in ("top_p", "top_k", "min_p") if getattr(asked, name) != getattr(whole, name)}
    if config.rollout.temperature != config.loss.student_temperature:
        law |= {"temperature": config.rollout.temperature, "loss.student_temperature": config.loss.student_temperature}
    if law and config.rollout.source == "student" and config.estimator.importance == "none":
        fields = ", ".join(f"{name} = {value}" for name, value in law.items())
        log.warning(
            "completions are drawn from another law than the policy in the loss (%s): the estimators' claims do not hold for it; "
            "estimator.importance = 'sequence' or 'cumulative' corrects what the law can draw",
            fields,
        )


def run_recipes(config: Config, make_model: Callable[[str, str], str], blocks: tuple[str, ...] = ("student", "teacher")) -> Config:
    """Replaces recipes by the folders that their runs made; a path that is given goes before a recipe."""
    for block in blocks:
        source = getattr(config, block)
        if source.recipe and not source.path:
            path = make_model(source.recipe, config.cache_dir)
            config = dataclasses.replace(config, **{block: dataclasses.replace(source, path=path, recipe="")})
    return config


def _make_pipeline(config: Config, task: tasks.Task, pair: Pair) -> Pipeline:
    """Raises UserError for examples that cannot be used; a very long task is checked in its first batch."""
    examples = task.examples("train")
    pipeline = Pipeline(
        examples,
        pair.student_prompts,
        pair.teacher_prompts,
        prompts_per_step=config.rollout.batch_size // config.rollout.group_size,
        group_size=config.rollout.group_size,
        seed=config.seed,
    )
    first = pipeline.batch(0).examples
    if config.rollout.source == "dataset":
        rollout.check_solutions(examples if len(examples) <= CHECKED_AT_ONCE else first)
    return pipeline


def _make_source(config: Config, student: LoadedModel, teacher: LoadedModel | None, mesh: Mesh) -> rollout.Source:
    return rollout.make_source(
        config.rollout,
        tokenizer=student.tokenizer,
        student=student.config,
        teacher=teacher.config if teacher else None,
        seed=config.seed,
        mesh=mesh,
    )


def _make_update(config: Config, objective, optimizer, student: LoadedModel, teacher: LoadedModel | None, state: TrainState) -> Callable:
    teacher_config = teacher.config if objective.has_teacher else None
    microbatches = config.learner.microbatches
    attach = functools.partial(lora.attach, config=student.lora) if student.lora else None
    settings = {"microbatches": microbatches, "state": state, "attach": attach}
    return learner.make_update(objective, student.config, teacher_config, optimizer, **settings)


def _init_adapter(student: LoadedModel, seed: int, mesh: Mesh) -> dict:
    return spec.init(jax.random.fold_in(jax.random.key(seed), 0x10FA), workdir_lib.trained_specs(student), jnp.float32, mesh)


def make_evaluator(config: Config, mesh: Mesh, task: tasks.Task, pair: Pair) -> Evaluator | None:
    """None where nothing is held out or asked for."""
    held_out = task.examples("eval")
    if config.eval.prompts and not len(held_out):
        log.warning("task.name = %r holds no prompts out (task.eval_size = %d): there is no evaluation", task.name, config.task.eval_size)
    if not config.eval.prompts or not len(held_out):
        return None
    evaluator = Evaluator(
        student=pair.student,
        teacher=pair.teacher,
        task=task,
        examples=[held_out[i] for i in range(min(config.eval.prompts, len(held_out)))],
        samples=config.eval.samples,
        batch_size=config.eval.batch_size,
        max_new_tokens=config.rollout.max_new_tokens,
        student_prompts=pair.student_prompts,
        teacher_prompts=pair.teacher_prompts,
        seed=config.seed,
        mesh=mesh,
        inject_error=config.eval.inject_error,
    )
    evaluator.check()
    return evaluator
