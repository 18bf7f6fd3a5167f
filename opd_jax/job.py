"""Everything that a run needs, made and checked before its first step: a config and a folder in, a Job out."""

import dataclasses
import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import (
    checkpoint,
    claim,
    context_gap,
    difficulty,
    labels,
    learner,
    machine,
    metrics,
    parallel,
    replay,
    rewards,
    rollout,
    routing,
    teachers,
    trackers,
    writing,
)
from opd_jax import config as config_lib
from opd_jax import objective as objective_lib
from opd_jax import workdir as workdir_lib
from opd_jax.batches import BatchMaker
from opd_jax.config import Config
from opd_jax.data import privileged, tasks
from opd_jax.data.pipeline import CHECKED_AT_ONCE, Pipeline
from opd_jax.data.teacher_prompts import TeacherPrompts
from opd_jax.evaluate import Evaluator, Several
from opd_jax.model_io import LoadedModel
from opd_jax.models import lora, spec
from opd_jax.pair import Pair, open_pair
from opd_jax.samples import SampleLog
from opd_jax.store import Store
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
    _say_which_gradient(parsed, objective, progress)
    optimizer = learner.make_optimizer(parsed.learner, parsed.steps)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=parsed.checkpoint.keep)
    resumed = bool(checkpoints.steps())
    parsed = run_recipes(parsed, make_model, with_student=not resumed or bool(parsed.student.lora.rank) or _looks_back(parsed))
    progress.phase("loading student and teacher")
    parsed, pair = _with_store(parsed, make_store), open_pair(parsed, workdir if resumed else None, mesh)
    bank, frozen = _make_bank(parsed, pair)
    measured = _measure(parsed, workdir, task, pair, mesh, own_judge, progress, resumed=resumed)
    layout = privileged.file_text(parsed.context.privileged)
    identity = workdir_lib.identity(pair, task, difficulty=measured.digest if measured else "", layout=layout)
    stored = replay.open_cache(parsed, objective, pair, identity)
    pipeline = make_pipeline(parsed, pair, *_examples(parsed, task, stored, measured))
    evaluate = make_evaluator(parsed, mesh, task, pair)
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
        rollouts=make_source(parsed, student, teacher, task, mesh, stored),
        recall=replay.make_recall(parsed, objective, pair, pipeline, stored, mesh),
        make_batch=_make_batch_maker(parsed, objective, task, pair, mesh, own_judge),
        objective=objective,
        schedule=learner.make_schedule(parsed.learner, parsed.steps),
        update=_make_update(parsed, objective, optimizer, student, bank, state),
        evaluate=evaluate,
        context_gap=context_gap.make(parsed, teacher, pair.teacher_prompts, task, mesh),
        checkpoints=checkpoints,
        writer=_begin_writing(workdir, asked, student, base=parsed.student.path, done=step if resumed else -1, mesh=mesh),
        samples=_make_sample_log(parsed, pair, mesh),
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
    workdir_lib.check(pathlib.Path(workdir), config)
    trackers.check(config.log)
    mesh = parallel.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
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
    return objective, mesh, task


def _begin_writing(
    workdir: pathlib.Path, config: Config, student: LoadedModel, *, base: str, done: int, mesh: Mesh
) -> metrics.MetricsWriter:
    """Describes the run in its folder, and cuts what is on record back to `done` updates (-1: nothing)."""
    writer = metrics.MetricsWriter(workdir)
    writer.truncate_after(done)
    workdir_lib.describe(workdir, config, student, base=base, resumed=done >= 0)
    if done < config.steps:
        machine.begin_session(workdir, max(done, 0), mesh)
    return writer


def _looks_back(config: Config) -> bool:
    """Whether the update needs the student as it was before training."""
    paths = [member.path for member in teachers.asked(config).values()]
    return teachers.STUDENT_INIT in (*paths, *([config.reference.path] if config_lib.needs_reference(config) else []))


def _make_bank(config: Config, pair: Pair) -> tuple[Bank | None, dict]:
    """The bank and the parameters of its models by name."""
    models = {name: member.config for name, member in pair.members.items()}
    frozen = {name: member.params for name, member in pair.members.items()}
    if pair.reference is not None:
        frozen[teachers.REFERENCE] = pair.reference.params
    return teachers.make_bank(config, models, pair.reference and pair.reference.config), frozen


def _make_batch_maker(config: Config, objective, task: tasks.Task, pair: Pair, mesh: Mesh, own_judge: Callable | None) -> BatchMaker:
    informs = objective.has_teacher and config.context.privileged.reads
    writer = None
    if informs and privileged.written(config.context.privileged.reads):
        writer = writing.from_config(config, pair.teacher, pair.teacher_prompts.reader, pair.student.tokenizer, mesh)
    room = writer.encoder.max_prompt_length if writer else 0
    inform = TeacherPrompts(config.context.privileged, pair.teacher_prompts, room) if informs else None
    judge = rewards.OwnJudge(own_judge) if own_judge else None
    teacher = pair.teacher.config if pair.teacher else None
    more = {"judge": judge, "teacher": teacher, "writer": writer}
    return BatchMaker(config, objective, task, pair.student.tokenizer, inform, mesh, **more)


def _begin_or_resume(
    config: Config, workdir: pathlib.Path, checkpoints, pair: Pair, bank: Bank | None, identity: dict[str, str], measured, optimizer, mesh
) -> tuple[TrainState, int, dict]:
    """(state, its step, what a checkpoint remembers beside it). A new run writes what it `measured` of its prompts."""
    if checkpoints.steps():
        return workdir_lib.restore(checkpoints, pair, bank, optimizer, mesh, identity, config)
    if measured:
        difficulty.write(workdir, measured)
    trained = _init_adapter(pair.student, config.seed, mesh) if pair.student.lora else pair.student.params
    return learner.init_state(trained, optimizer, bank), 0, {"tokens_total": 0, "seconds": 0.0, **identity}


def _say_which_gradient(config: Config, objective: objective_lib.Objective, progress: metrics.Progress) -> None:
    """The claim of the estimator; a warning where completions come from another law than the policy in the loss, of which claims speak."""
    corrected = config.rollout.source == "dagger" and config.estimator.importance != "none"
    if config_lib.own_draws(config) or corrected or config.rollout.source == "corrected" or config_lib.keeps_scores(config):
        progress.phase(f"gradient: {claim.of_run(objective, config)}")
    asked, whole = config.rollout, config_lib.Rollout()
    law = {name: getattr(asked, name) for name in ("top_p", "top_k", "min_p") if getattr(asked, name) != getattr(whole, name)}
    if config.rollout.temperature != config.loss.student_temperature:
        law |= {"temperature": config.rollout.temperature, "loss.student_temperature": config.loss.student_temperature}
    if law and config_lib.own_draws(config) and config.estimator.importance == "none":
        fields = ", ".join(f"{name} = {value}" for name, value in law.items())
        log.warning(
            "completions are drawn from another law than the policy in the loss (%s): the estimators' claims do not hold for it; "
            "estimator.importance = 'sequence' or 'cumulative' corrects what the law can draw",
            fields,
        )


def run_recipes(config: Config, make_model: Callable[[str, str], str], *, with_student: bool = True) -> Config:
    """Replaces recipes by the folders that their runs made; a path that is given goes before a recipe (of the reference: after it)."""

    def made(source, default: str = ""):
        if not source.recipe or source.path != default:
            return source
        return dataclasses.replace(source, path=make_model(source.recipe, config.cache_dir), recipe="")

    teacher = made(config.teacher)
    teacher = dataclasses.replace(teacher, members={name: made(member) for name, member in teacher.members.items()})
    reference = made(config.reference, config_lib.Reference.path) if config_lib.needs_reference(config) else config.reference
    student = made(config.student) if with_student else config.student
    return dataclasses.replace(config, student=student, teacher=teacher, reference=reference)


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


def _with_store(config: Config, make_store: Callable[[str, str], str]) -> Config:
    """Replaces rollout.cache_recipe by the folder of its store; a folder that is given goes before it."""
    if not config.rollout.cache_recipe:
        return config
    folder = config.rollout.cache or make_store(config.rollout.cache_recipe, config.cache_dir)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, cache=folder, cache_recipe=""))


def _examples(
    config: Config, task: tasks.Task, stored: Store | None, measured: difficulty.Measured | None
) -> tuple[Sequence[tasks.Example], int | None]:
    """(what is trained on: a store's, those of a chosen difficulty, or all of the task's; a bound of their ids where some are left out)."""
    if config.rollout.source == "cache":
        return replay.examples(stored), None
    chosen = difficulty.chosen(config, measured) if measured else None
    return (chosen, max(example.id for example in chosen) + 1) if chosen else (task.examples("train"), None)


def make_pipeline(config: Config, pair: Pair, examples: Sequence[tasks.Example], ids_below: int | None = None) -> Pipeline:
    """Raises UserError for examples that cannot be used; a very long task is checked in its first batch. `ids_below`: see Pipeline."""
    pipeline = Pipeline(
        examples,
        pair.student_prompts,
        pair.teacher_prompts,
        prompts_per_step=config.rollout.batch_size // config.rollout.group_size,
        group_size=config.rollout.group_size,
        seed=config.seed,
        ids_below=ids_below,
    )
    first = pipeline.batch(0).examples
    if config_lib.needs_solutions(config):
        rollout.check_solutions(examples if len(examples) <= CHECKED_AT_ONCE else first, config.rollout.source)
    return pipeline


def make_source(
    config: Config, student: LoadedModel, teacher: LoadedModel | None, task: tasks.Task, mesh: Mesh, stored: Store | None = None
) -> rollout.Source:
    """Where a config's completions come from; `stored` is for rollout.source=cache."""
    if config.rollout.source == "cache":
        return replay.source(stored, mesh)
    return rollout.make_source(
        config.rollout,
        tokenizer=student.tokenizer,
        student=student.config,
        teacher=teacher.config if teacher else None,
        seed=config.seed,
        mesh=mesh,
        environment=tasks.environment_of(task),
    )


def _make_update(config: Config, objective, optimizer, student: LoadedModel, bank: Bank | None, state: TrainState) -> Callable:
    microbatches = config.learner.microbatches
    attach = functools.partial(lora.attach, config=student.lora) if student.lora else None
    settings = {"microbatches": microbatches, "state": state, "attach": attach}
    return learner.make_update(objective, student.config, bank, optimizer, **settings)


def _init_adapter(student: LoadedModel, seed: int, mesh: Mesh) -> dict:
    return spec.init(jax.random.fold_in(jax.random.key(seed), 0x10FA), workdir_lib.trained_specs(student), jnp.float32, mesh)


def _make_sample_log(config: Config, pair: Pair, mesh: Mesh) -> SampleLog:
    first, *others = [member.config for member in pair.members.values()] or [None]
    others = tuple(others) if config.teacher.combine == "route" else ()
    return SampleLog(config, pair.student.tokenizer, pair.student.config, first, mesh, others=others)


def _several(config: Config, pair: Pair, examples: list[tasks.Example]) -> Several | None:
    """The teachers of an evaluation, where there is more than one."""
    if len(pair.members) < 2:
        return None
    bank = teachers.make_bank(config, {name: member.config for name, member in pair.members.items()}, None)
    bank = dataclasses.replace(bank, scale=1.0, rule=None)
    params = {name: member.params for name, member in pair.members.items()}
    if config.teacher.combine != "route":
        return Several(bank, params)
    teachers.check_tags(config, examples)
    known = teachers.tags(config)
    return Several(bank, params, np.array([known.index(example.tag) for example in examples]))


def of_run(config: Config, workdir: str) -> Config:
    """The config with the newest student of a run; a teacher that is the student as it was before training stays that. Raises UserError."""
    asked, beginning = config.teacher, {"path": config.student.path, "recipe": config.student.recipe}

    def before(source):
        if source.path != teachers.STUDENT_INIT:
            return source
        if not any(beginning.values()):
            raise UserError(
                f"config field teacher.path = {source.path!r}: the student began with random weights, which are not kept; give "
                "--config.teacher.path=DIR, or --config.teacher.path= for no teacher"
            )
        return dataclasses.replace(source, **beginning)

    members = {name: before(member) for name, member in asked.members.items()}
    teacher = dataclasses.replace(before(asked), members=members, update="frozen")
    return dataclasses.replace(config, student=config_lib.Student(path=workdir), teacher=teacher)


def make_evaluator(config: Config, mesh: Mesh, task: tasks.Task, pair: Pair) -> Evaluator | None:
    """None where nothing is held out or asked for."""
    held_out = task.examples("eval")
    if config.eval.prompts and not len(held_out):
        log.warning("task.name = %r holds no prompts out (task.eval_size = %d): there is no evaluation", task.name, config.task.eval_size)
    if not config.eval.prompts or not len(held_out):
        return None
    examples = [held_out[i] for i in range(min(config.eval.prompts, len(held_out)))]
    evaluator = Evaluator(
        student=pair.student,
        teacher=pair.teacher,
        several=_several(config, pair, examples),
        task=task,
        examples=examples,
        samples=config.eval.samples,
        batch_size=config.eval.batch_size,
        max_new_tokens=config.rollout.max_new_tokens,
        student_prompts=pair.student_prompts,
        teacher_prompts=pair.teacher_prompts,
        seed=config.seed,
        mesh=mesh,
        inject_error=config.eval.inject_error,
        turns=rollout.make_turns(config.rollout, tasks.environment_of(task), pair.student.tokenizer, mesh),
    )
    evaluator.check()
    return evaluator
