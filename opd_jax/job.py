"""Everything that a run needs, made and checked before its first step: a config and a folder in, a Job out."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import checkpoint, files, learner, machine, metrics, model_io, parallel, rollout, teachers, trackers
from opd_jax import config as config_lib
from opd_jax import objective as objective_lib
from opd_jax.config import Config
from opd_jax.data import tasks
from opd_jax.data.pipeline import CHECKED_AT_ONCE, Pipeline
from opd_jax.evaluate import Evaluator
from opd_jax.model_io import LoadedModel
from opd_jax.models import lora, spec, transformer
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
    check_workdir(workdir, asked)
    trackers.check(parsed.log)
    mesh = parallel.make_mesh(parsed.mesh.data, parsed.mesh.fsdp, parsed.mesh.tensor)
    task = tasks.from_config(parsed, own_task)
    _warn_of_other_laws(parsed)
    optimizer = learner.make_optimizer(parsed.learner, parsed.steps)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", keep=parsed.checkpoint.keep)
    resumed = bool(checkpoints.steps())
    parsed = run_recipes(parsed, make_model, ("teacher",) if resumed and not parsed.student.lora.rank else ("student", "teacher"))
    progress.phase("loading student and teacher")
    pair = open_pair(parsed, workdir if resumed else None, mesh)
    student, teacher = pair.student, pair.teacher
    pipeline = _make_pipeline(parsed, task, pair)
    evaluate = make_evaluator(parsed, mesh, task, pair)
    identity = _identity(student, teacher, task)
    if resumed:
        state, step, info = _restore(checkpoints, student, optimizer, mesh, identity, parsed)
    else:
        trained = _init_adapter(student, parsed.seed, mesh) if student.lora else student.params
        state, step, info = learner.init_state(trained, optimizer), 0, {"tokens_total": 0, "seconds": 0.0, **identity}
    student = student if student.lora else dataclasses.replace(student, params={})
    writer = metrics.MetricsWriter(workdir)
    writer.truncate_after(step if resumed else -1)
    _describe_run(workdir, asked, student, base=parsed.student.path, resumed=resumed)
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


def check_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Creates the folder, or refuses one that cannot be written or that holds a run with another config."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"--workdir={workdir}: cannot be created ({files.reason(error)}); give a folder that can be written") from None
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: is not writable; give another folder or change its permissions")
    path = workdir / "config.json"
    if not os.path.lexists(path):
        found = [name for name in ("metrics.jsonl", "samples.jsonl", "checkpoints", "model") if os.path.lexists(workdir / name)]
        if found:
            raise UserError(f"--workdir={workdir}: holds {found[0]} but no config.json; give another folder, or restore the file")
        return
    remedy = "give another --workdir, or restore the file"
    previous = config_lib.flatten(files.read_json(path, remedy=remedy))
    if not isinstance(previous.get("steps"), int):
        raise UserError(f"{path}: is not the config of a run (steps = {files.shown(previous.get('steps'))}); {remedy}")
    if (workdir / "checkpoints").exists() and not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir / 'checkpoints'}: is not a folder; give another --workdir, or restore it")
    changed = config_lib.differences(previous, dataclasses.asdict(config))
    if changed:
        raise UserError(
            f"--workdir={workdir}: its run has another config ({'; '.join(changed)}); give another --workdir, or the old values"
        )
    if config.steps > previous["steps"] and not config.learner.decay_steps:
        log.warning("steps grow from %d to %d: the schedule is now stretched; set learner.decay_steps", previous["steps"], config.steps)
    records, samples = (metrics.read(p) if os.path.lexists(p) else [] for p in (workdir / "metrics.jsonl", workdir / "samples.jsonl"))
    trained = any(record["step"] > 0 for record in [*records, *samples])
    if trained and not checkpoint.Checkpoints(workdir / "checkpoints").steps():
        raise UserError(f"{workdir / 'checkpoints'}: is empty, but metrics.jsonl shows updates; restore it, or give another --workdir")


def _describe_run(workdir: pathlib.Path, config: Config, student: LoadedModel, *, base: str, resumed: bool) -> None:
    """Writes config.json and model/ where they are missing or out of date. Raises UserError."""
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    path, temporary = workdir / "config.json", workdir / "config.tmp"
    try:
        if not path.exists() or path.read_text() != text:
            temporary.write_text(text)
            temporary.replace(path)
        if not (resumed and model_io.is_run_directory(workdir)):
            model_io.describe(workdir, student, base)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--workdir={workdir}: cannot be written ({files.reason(error)}); free space, or give another folder") from None


def _warn_of_other_laws(config: Config) -> None:
    """Says where completions come from another law than the policy in the loss, which is what the estimators' claims are about."""
    asked, whole = config.rollout, config_lib.Rollout()
    law = {name: getattr(asked, name) for name in ("top_p", "top_k", "min_p") if getattr(asked, name) != getattr(whole, name)}
    if config.rollout.temperature != config.loss.student_temperature:
        law |= {"temperature": config.rollout.temperature, "loss.student_temperature": config.loss.student_temperature}
    if law and config.rollout.source == "student":
        fields = ", ".join(f"{name} = {value}" for name, value in law.items())
        log.warning(
            "completions are drawn from another law than the policy in the loss (%s): the estimators' claims do not hold for it", fields
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


def _identity(student: LoadedModel, teacher: LoadedModel | None, task: tasks.Task) -> dict[str, str]:
    """Hashes of what a run reads and never writes; a resumed run must find the same."""
    base = teachers.content_hash(student.params) if student.lora else ""
    if teacher is None:
        return {"teacher_hash": "", "data_hash": task.digest, "base_hash": base}
    shared = student.lora is not None and teacher.params is student.params
    return {"teacher_hash": base if shared else teachers.content_hash(teacher.params), "data_hash": task.digest, "base_hash": base}


def _trained_specs(student: LoadedModel) -> dict:
    """What is trained: all parameters, or those of an adapter."""
    specs = transformer.param_specs(student.config)
    return lora.param_specs(specs, student.lora) if student.lora else specs


def _init_adapter(student: LoadedModel, seed: int, mesh: Mesh) -> dict:
    specs = _trained_specs(student)
    if not specs:
        raise UserError(f"student.lora.targets: the student has none of {', '.join(student.lora.modules)}; give others")
    return spec.init(jax.random.fold_in(jax.random.key(seed), 0x10FA), specs, jnp.float32, mesh)


def _restore(checkpoints, student, optimizer, mesh, identity: dict, config: Config) -> tuple[TrainState, int, dict]:
    params = spec.abstract(_trained_specs(student), jnp.float32, mesh)
    step, state, info = checkpoints.restore(learner.abstract_state(params, optimizer))
    kinds = {"base_hash": str, "teacher_hash": str, "data_hash": str, "tokens_total": int, "seconds": (int, float)}
    for name, kind in kinds.items():
        if not isinstance(info.get(name), kind):
            raise UserError(
                f"{checkpoints.directory / str(step)}: info.json has {name} = {files.shown(info.get(name))}; restore it, or "
                "give another --workdir"
            )
    if int(state.step) != step:
        raise UserError(f"{checkpoints.directory / str(step)}: holds the state after {int(state.step)} updates; rename it back")
    if info["base_hash"] != identity["base_hash"]:
        raise UserError(
            f"student.path = {config.student.path!r}: its weights are not those this run began with; restore them or give another --workdir"
        )
    if info["teacher_hash"] != identity["teacher_hash"]:
        raise UserError(
            f"teacher.path = {config.teacher.path!r}: its weights are not those this run began with; restore them or give another --workdir"
        )
    if info["data_hash"] != identity["data_hash"]:
        raise UserError(f"task.path = {config.task.path!r}: is not the file this run began with; restore it, or give another --workdir")
    return state, step, info


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
    )
    evaluator.check()
    return evaluator
