"""Everything that a run needs, made and checked before its first step: a config and a folder in, a Job out."""

import dataclasses
import itertools
import logging
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import (
    apart,
    assembly,
    checkpoint,
    claim,
    context_gap,
    difficulty,
    labels,
    learner,
    machine,
    memory_plan,
    metrics,
    parallel,
    processes,
    recipes,
    replay,
    rewards,
    rollout,
    routing,
    trackers,
)
from opd_jax import config as config_lib
from opd_jax import objective as objective_lib
from opd_jax import workdir as workdir_lib
from opd_jax.batches import BatchMaker
from opd_jax.config import Config
from opd_jax.data import privileged, tasks
from opd_jax.data.pipeline import Pipeline
from opd_jax.evaluate import Evaluator
from opd_jax.model_io import LoadedModel
from opd_jax.models import attention_kernels, lora, spec
from opd_jax.pair import Pair, open_pair
from opd_jax.samples import SampleLog
from opd_jax.teachers import Bank, Parameters
from opd_jax.types import TrainState, UserError

log = logging.getLogger(__name__)

LOOKED_AT = 1000  # training examples whose tags are looked at before the first step


@dataclasses.dataclass(frozen=True)
class Job:
    """The parts of a run. The parameters that are trained are in the state; `student.params` holds the base of an adapter, or nothing."""

    config: Config
    workdir: pathlib.Path
    mesh: Mesh
    task: tasks.Task
    student: LoadedModel
    teacher: LoadedModel | None
    bank: Bank | None
    frozen: dict  # parameters of the teachers and of the reference, by name
    pipeline: Pipeline
    rollouts: rollout.Source
    recall: replay.Recall
    make_batch: BatchMaker
    objective: objective_lib.Objective
    schedule: Callable
    update: Callable
    evaluate: Evaluator | None
    context_gap: context_gap.ContextGap | None
    checkpoints: checkpoint.Checkpoints
    writer: metrics.MetricsWriter
    samples: SampleLog
    trackers: trackers.Trackers
    state: TrainState
    step: int
    resumed: bool
    info: dict  # what a checkpoint remembers beside the state

    def scorer(self, state: TrainState) -> dict | None:
        """Parameters of the first teacher as it is now; None without one."""
        if self.teacher is None:
            return None
        kept = self.policy(state.kept) if self.bank.keeps else {}
        return self.bank.main(Parameters(self.frozen, kept, self.policy(state.params)))

    def policy(self, params: dict) -> dict:
        """The student's parameters, from those that are trained."""
        return lora.attach(self.student.params, params, self.student.lora) if self.student.lora else params


def setup(
    parsed: Config,
    workdir: str | os.PathLike,
    *,
    make_model: Callable[[str, str], str],
    make_store: Callable[[str, str], str],
    progress: metrics.Progress,
    own_task: tasks.Task | None = None,
    own_judge: Callable | None = None,
) -> Job:
    """Refuses what can be refused before any work, then loads or restores. Raises UserError for whatever cannot be used.

    `make_model(recipe, cache_dir)` runs a recipe, `make_store(recipe, cache_dir)` writes the store of one; both give its folder.
    """
    parsed = rewards.with_own(tasks.with_own(parsed, own_task), own_judge)
    objective, mesh, task = _checked(parsed, workdir, own_task)
    asked, workdir = parsed, pathlib.Path(workdir)
    _announce(parsed, objective, mesh, progress)
    optimizer = learner.make_optimizer(parsed.learner, parsed.steps)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=parsed.checkpoint.keep)
    resumed = bool(checkpoints.steps())
    parsed = recipes.run_recipes(parsed, make_model, resumed=resumed)
    progress.phase("loading the models")
    parsed, pair = recipes.with_store(parsed, make_store), open_pair(parsed, workdir if resumed else None, mesh)
    bank, frozen = assembly.make_bank(parsed, pair)
    measured = _measure(parsed, workdir, task, pair, mesh, own_judge, progress, resumed=resumed)
    layout = privileged.file_text(parsed.context.privileged)
    identity = workdir_lib.identity(pair, task, difficulty=measured.digest if measured else "", layout=layout)
    stored = replay.open_cache(parsed, objective, pair, identity)
    pipeline = assembly.make_pipeline(parsed, pair, *assembly.training_examples(parsed, task, stored, measured))
    evaluate = assembly.make_evaluator(parsed, mesh, task, pair)
    state, step, info = _begin_or_resume(parsed, workdir, checkpoints, pair, bank, identity, measured, optimizer, mesh)
    stored = stored or replay.begin_collection(parsed, objective, pair, identity, workdir, done=step)
    student, teacher = pair.student if pair.student.lora else dataclasses.replace(pair.student, params={}), pair.teacher
    return Job(
        config=parsed,
        workdir=workdir,
        mesh=mesh,
        task=task,
        student=student,
        teacher=teacher,
        bank=bank,
        frozen=frozen,
        pipeline=pipeline,
        rollouts=assembly.make_source(parsed, student, teacher, task, mesh, stored),
        recall=replay.make_recall(parsed, objective, pair, pipeline, stored, mesh),
        make_batch=assembly.make_batch_maker(parsed, objective, task, pair, mesh, own_judge),
        objective=objective,
        schedule=learner.make_schedule(parsed.learner, parsed.steps),
        update=assembly.make_update(parsed, objective, optimizer, student, bank, state),
        evaluate=evaluate,
        context_gap=context_gap.make(parsed, teacher, pair.teacher_prompts, task, mesh, judge=own_judge),
        checkpoints=checkpoints,
        writer=_begin_writing(workdir, asked, student, base=parsed.student.path, done=step if resumed else -1, mesh=mesh),
        samples=assembly.make_sample_log(parsed, pair, mesh),
        trackers=trackers.make(asked, workdir, kept=step if resumed else -1),
        state=state,
        step=step,
        resumed=resumed,
        info=info,
    )


def _checked(config: Config, workdir: str | os.PathLike, own_task: tasks.Task | None) -> tuple[objective_lib.Objective, Mesh, tasks.Task]:
    """What can be made without a model, having refused all that can be refused without one."""
    if not os.fspath(workdir):
        raise UserError("--workdir='' is no folder; give the folder of the run")
    objective = objective_lib.from_config(config, has_teacher=config_lib.has_teacher(config))
    recipes.check(config, resumed=bool(checkpoint.Checkpoints(pathlib.Path(workdir) / "checkpoints").steps()))
    trackers.check(config.log)
    attention_kernels.check(config.model.attention, config.model.compute_dtype)
    apart.check(config)
    mesh = parallel.from_settings(config.mesh)
    rollout.tell_idle_slots(config.rollout, mesh)
    task = tasks.from_config(config, own_task)
    tasks.check_turns(config, task)
    if config_lib.keeps_scores(config):
        labels.check(config, "rollout.aggregate = True" if config.rollout.aggregate else "rollout.source = 'cache'")
        labels.form_of(objective)
    rewards.check(config, task)
    privileged.check(config, task)
    difficulty.check(config, task)
    first = list(itertools.islice(task.examples("train"), LOOKED_AT))  # batches check the others
    routing.check_names(config, first)
    routing.check(config, first)
    workdir_lib.check(pathlib.Path(workdir), config)  # last: it makes the folder
    return objective, mesh, task


def _begin_writing(
    workdir: pathlib.Path, config: Config, student: LoadedModel, *, base: str, done: int, mesh: Mesh
) -> metrics.MetricsWriter:
    """Describes the run in its folder, and cuts what is on record back to `done` updates (-1: nothing)."""
    writer = metrics.MetricsWriter(workdir)

    def write() -> None:
        writer.truncate_after(done)
        workdir_lib.describe(workdir, config, student, base=base, resumed=done >= 0)
        if done < config.steps:
            machine.begin_session(workdir, max(done, 0), mesh)

    processes.share(None)  # until all are here, one may still look at the folder as it was
    processes.by_first(write)
    return writer


def _begin_or_resume(
    config: Config, workdir: pathlib.Path, checkpoints, pair: Pair, bank: Bank | None, identity: dict[str, str], measured, optimizer, mesh
) -> tuple[TrainState, int, dict]:
    """(state, its step, what a checkpoint remembers beside it). A new run writes what it `measured` of its prompts."""
    if checkpoints.steps():
        return workdir_lib.restore(checkpoints, pair, bank, optimizer, mesh, identity, config)
    if measured:
        processes.share(None)
        processes.by_first(difficulty.write, workdir, measured)
    trained = _init_adapter(pair.student, config.seed, mesh) if pair.student.lora else pair.student.params
    return learner.init_state(trained, optimizer, bank), 0, {"tokens_total": 0, "seconds": 0.0, **identity}


def _announce(config: Config, objective: objective_lib.Objective, mesh: Mesh, progress: metrics.Progress) -> None:
    """Which gradient is followed, and what it will need of the memory. Raises UserError where it cannot fit."""
    _say_which_gradient(config, objective, progress)
    progress.phase(memory_plan.preflight(config, mesh))


def _say_which_gradient(config: Config, objective: objective_lib.Objective, progress: metrics.Progress) -> None:
    """The claim of the estimator; a warning where completions come from another law than the policy in the loss, of which claims speak."""
    corrected = config.rollout.source == "dagger" and config.estimator.importance != "none"
    if config_lib.own_draws(config) or corrected or config.rollout.source == "corrected" or config_lib.keeps_scores(config):
        progress.phase(f"gradient: {claim.of_run(objective, config)}")
    asked, whole = config.rollout, config_lib.Rollout()
    law = {name: getattr(asked, name) for name in ("top_p", "top_k", "min_p") if getattr(asked, name) != getattr(whole, name)}
    if config.rollout.temperature != config.loss.student_temperature:
        law |= {"temperature": config.rollout.temperature, "loss.student_temperature": config.loss.student_temperature}
    distils = config.signal.weight or config.extra_signal.weight  # the correction is of these terms alone
    if law and distils and config_lib.own_draws(config) and config.estimator.importance == "none":
        fields = ", ".join(f"{name} = {value}" for name, value in law.items())
        log.warning(
            "completions are drawn from another law than the policy in the loss (%s): the estimators' claims do not hold for it; "
            "estimator.importance = 'sequence' or 'cumulative' corrects what the law can draw",
            fields,
        )


def _measure(
    config: Config, workdir: pathlib.Path, task: tasks.Task, pair: Pair, mesh: Mesh, judge: Callable | None, progress, *, resumed: bool
) -> difficulty.Measured | None:
    """How difficult training prompts are for the initial student, measured or read; None where all are trained on."""
    if not config_lib.measures_difficulty(config):
        return None
    examples = task.examples("train")
    if resumed:
        return difficulty.read(workdir, config, examples)
    candidates = difficulty.candidates(config, examples)
    progress.phase(f"measuring the difficulty of {len(candidates)} prompts")
    with jax.set_mesh(mesh):
        measured = difficulty.measure(config, task, judge, pair.student, pair.student_prompts, mesh, candidates)
    kept = len(measured.kept(config.task.difficulty_low, config.task.difficulty_high))
    progress.phase(f"{kept} of {len(candidates)} prompts are within task.difficulty_low and task.difficulty_high ({difficulty.FILE})")
    return measured


def _init_adapter(student: LoadedModel, seed: int, mesh: Mesh) -> dict:
    return spec.init(jax.random.fold_in(jax.random.key(seed), 0x10FA), workdir_lib.trained_specs(student), jnp.float32, mesh)
