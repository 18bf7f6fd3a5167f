"""The run directory before the first step: whether it may be used, what a run is recognised by, and how it is taken up again."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib

import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import checkpoint, cost, files, learner, metrics, model_io, teachers
from opd_jax import config as config_lib
from opd_jax.checkpoint import Checkpoints
from opd_jax.config import Config
from opd_jax.data import tasks
from opd_jax.model_io import LoadedModel
from opd_jax.models import lora, spec, transformer
from opd_jax.pair import Pair
from opd_jax.teachers import Bank
from opd_jax.types import TrainState, UserError

log = logging.getLogger(__name__)


def check(workdir: pathlib.Path, config: Config) -> None:
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


def describe(workdir: pathlib.Path, config: Config, student: LoadedModel, *, base: str, resumed: bool) -> None:
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


def identity(pair: Pair, task: tasks.Task, *, difficulty: str = "", layout: str = "") -> dict[str, str]:
    """Hashes of what a run reads and never writes; a resumed run must find the same.

    `difficulty`: that of its choice of prompts; `layout`: the text of a file of context.privileged.
    """
    student = pair.student
    base = spec.content_hash(student.params) if student.lora else ""
    others = [*pair.members.values(), *([pair.reference] if pair.reference else [])]
    scorers = [base if student.lora and other.params is student.params else spec.content_hash(other.params) for other in others]
    readers = [encoder.reader.digest for encoder in (pair.student_prompts, pair.teacher_prompts) if encoder]
    readers += [hashlib.blake2b(layout.encode(), digest_size=16).hexdigest()] if layout else []
    hashes = {"base_hash": base, "teacher_hash": " ".join(scorers), "data_hash": task.digest, "prompts_hash": " ".join(readers)}
    return hashes | ({"difficulty_hash": difficulty} if difficulty else {})


def _others(config: Config) -> str:
    """Paths of the teachers, and of the reference where there is one."""
    paths = [member.path for member in teachers.asked(config).values()]
    return ", ".join([*paths, *([config.reference.path] if config_lib.needs_reference(config) else [])])


def trained_specs(student: LoadedModel) -> dict:
    """What is trained: all parameters, or those of an adapter."""
    specs = transformer.param_specs(student.config)
    return lora.param_specs(specs, student.lora) if student.lora else specs


def restore(
    checkpoints: Checkpoints, pair: Pair, bank: Bank | None, optimizer, mesh: Mesh, expected: dict[str, str], config: Config
) -> tuple[TrainState, int, dict]:
    """(state, its step, info) of the newest checkpoint. Raises UserError where what the run reads is not what it began with."""
    params = spec.abstract(trained_specs(pair.student), jnp.float32, mesh)
    step, state, info = checkpoints.restore(learner.abstract_state(params, optimizer, bank))
    counted = {name: int for name in cost.Work._fields if name in info}  # which older versions did not
    for name, kind in {**dict.fromkeys(expected, str), "tokens_total": int, "seconds": (int, float), **counted}.items():
        if not isinstance(info.get(name), kind):
            raise UserError(
                f"{checkpoints.directory / str(step)}: info.json has {name} = {files.shown(info.get(name))}; restore it, or "
                "give another --workdir"
            )
    if int(state.step) != step:
        raise UserError(f"{checkpoints.directory / str(step)}: holds the state after {int(state.step)} updates; rename it back")
    changed = {
        "base_hash": f"student.path = {config.student.path!r}: its weights are not those",
        "teacher_hash": f"teacher.path = {_others(config)!r}: its weights are not those",
        "data_hash": f"task.path = {config.task.path!r}: is not the file",
        "store_hash": f"rollout.cache = {config.rollout.cache!r}: is not the store",
        "prompts_hash": f"context.student.template = {config.context.student.template!r} (or the teacher's, a tokenizer, or a file of "
        "context.privileged.layout) is not what",
    }
    changed |= {"difficulty_hash": f"{checkpoints.directory.parent / 'difficulty.json'}: is not what"}
    for name, what in changed.items():
        if info.get(name, "") != expected.get(name, ""):
            raise UserError(f"{what} this run began with; restore it, or give another --workdir")
    return state, step, info
