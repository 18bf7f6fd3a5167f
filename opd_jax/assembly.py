"""The parts of a run, each made from its config, the models and the task: what job.py puts together, and scripts ask for alone."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from opd_jax import config as config_lib
from opd_jax import difficulty, learner, replay, rewards, rollout, routing, teachers, writing
from opd_jax.batches import BatchMaker
from opd_jax.config import Config
from opd_jax.data import privileged, tasks
from opd_jax.data.pipeline import CHECKED_AT_ONCE, Pipeline
from opd_jax.data.teacher_prompts import TeacherPrompts
from opd_jax.evaluate import Evaluator, Several
from opd_jax.model_io import LoadedModel
from opd_jax.models import lora
from opd_jax.pair import Pair
from opd_jax.samples import SampleLog
from opd_jax.store import Store
from opd_jax.teachers import Bank
from opd_jax.types import TrainState

log = logging.getLogger(__name__)


def make_bank(config: Config, pair: Pair) -> tuple[Bank | None, dict]:
    """The bank and the parameters of its models by name."""
    models = {name: member.config for name, member in pair.scorers.items()}
    frozen = {name: member.params for name, member in pair.scorers.items()}
    if pair.reference is not None:
        frozen[teachers.REFERENCE] = pair.reference.params
    return teachers.make_bank(config, models, pair.reference and pair.reference.config), frozen


def make_batch_maker(config: Config, objective, task: tasks.Task, pair: Pair, mesh: Mesh, own_judge: Callable | None) -> BatchMaker:
    informs = objective.has_teacher and config.context.privileged.reads
    writer = None
    if informs and privileged.written(config.context.privileged.reads):
        writer = writing.from_config(config, pair.teacher, pair.teacher_prompts.reader, pair.student.tokenizer, mesh)
    room = writer.encoder.max_prompt_length if writer else 0
    inform = TeacherPrompts(config.context.privileged, pair.teacher_prompts, room) if informs else None
    judge = rewards.OwnJudge(own_judge) if own_judge else None
    teacher = pair.teacher.config if pair.teacher else None
    more = {"judge": judge, "teacher": teacher, "writer": writer, "apart": pair.apart}
    return BatchMaker(config, objective, task, pair.student.tokenizer, inform, mesh, **more)


def training_examples(
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


def make_update(config: Config, objective, optimizer, student: LoadedModel, bank: Bank | None, state: TrainState) -> Callable:
    microbatches = config.learner.microbatches
    attach = functools.partial(lora.attach, config=student.lora) if student.lora else None
    settings = {"microbatches": microbatches, "state": state, "attach": attach}
    return learner.make_update(objective, student.config, bank, optimizer, **settings)


def make_sample_log(config: Config, pair: Pair, mesh: Mesh) -> SampleLog:
    first, *others = [member.config for member in pair.scorers.values()] or [None]
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
    teachers.check_tags(config, [example for example in examples if routing.distilled(config, example)])
    number = {tag: number for number, tag in enumerate(teachers.tags(config))}
    has_P = np.array([example.tag in number for example in examples])
    return Several(bank, params, np.array([number.get(example.tag, 0) for example in examples]), None if has_P.all() else has_P)


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
        apart=pair.apart,
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
