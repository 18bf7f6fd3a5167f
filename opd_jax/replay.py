"""Completions that an update learns from where they are not only its own: those of a store, or all of the run so far.

rollout.source=cache     completions and scores of a store: the teacher is not asked (Lightning OPD, arXiv 2604.13010)
rollout.aggregate=true   each step's completions join the set D, with what the teacher says of them; the update learns from as many,
                         drawn from D uniformly (Ross, Gordon and Bagnell 2011, DAgger, algorithm 3.1)
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from opd_jax import checkpoint, labels, model_io, parallel, rollout, store
from opd_jax.config import Config, ConfigError
from opd_jax.data.pipeline import Batch, Pipeline
from opd_jax.data.tasks import Example, Lazy
from opd_jax.numerics.targets import SparseTarget, TokenTarget
from opd_jax.objective import Objective
from opd_jax.pair import Pair
from opd_jax.store import Description, Store
from opd_jax.types import Rollout

log = logging.getLogger(__name__)

FOLDER = "replay"  # of a run directory
LAW = ("temperature", "top_p", "top_k", "min_p", "max_new_tokens", "max_turns")  # of config.Rollout


class Recalled(NamedTuple):
    """What an update learns from."""

    prompts: Batch
    completions: Rollout
    scores: SparseTarget | TokenTarget | None
    age: float | None = None  # updates since they were written, on average; None: this run did not write them


# (this step's prompts, its completions, the teacher's parameters, step) -> what is learnt from; None: these completions
Recall = Callable[[Batch, Rollout, Any, int], Recalled | None]


def describe(config: Config, form: labels.Form, pair: Pair, *, hashes: tuple[str, str], batches: int) -> Description:
    """The description of a store that a run with this config writes. `hashes`: of the teacher and of the student that writes."""
    settings = config.rollout
    readers = [encoder.reader.digest for encoder in (pair.student_prompts, pair.teacher_prompts) if encoder]
    return Description(
        teacher_hash=hashes[0],
        tokenizer=pair.student.tokenizer.fingerprint(),
        student_reads=readers[0],
        teacher_reads=readers[-1],
        task=config.task.name,
        writer=settings.source,
        writer_hash=hashes[1],
        law={name: getattr(settings, name) for name in LAW},
        rows=settings.batch_size,
        group_size=settings.group_size,
        scores=form.scores,
        k=form.k,
        batches=batches,
    )


def _hash_of_teacher(pair: Pair, identity: dict[str, str]) -> str:
    return identity["teacher_hash"].split()[0] if pair.members else ""


def make_recall(config: Config, objective: Objective, pair: Pair, pipeline: Pipeline, found: Store | None, mesh: Mesh) -> Recall:
    """How the updates of a config come to their completions; `found` is the store of its source, or of its aggregation."""
    if found is None:
        return lambda prompts, completions, teacher_params, step: None
    if not config.rollout.aggregate:
        return _from_cache(found, mesh)
    scorer = labels.make_scorer(labels.form_of(objective), pair.teacher.config)
    return aggregate(found, scorer, pipeline, seed=config.seed, mesh=mesh)


# ---- rollout.source=cache


def open_cache(config: Config, objective: Objective, pair: Pair, identity: dict[str, str]) -> Store | None:
    """The store of a config, whole and verified; its digest becomes part of the run's `identity`. None: the config has another source.

    Raises UserError for a store of another tokenizer, template (of student or teacher), task, law, form or teacher than the config's.
    """
    if config.rollout.source != "cache":
        return None
    form, found = labels.form_of(objective), store.read(config.rollout.cache)
    _check_settings(config, found.description)
    _check_contents(config, form, pair, found)
    if pair.members:
        found.check_teacher(_hash_of_teacher(pair, identity))
    if form.scores != "none" and model_io.is_run_directory(config.student.path):
        _check_consistency(found, config.student.path)
    identity["store_hash"] = found.digest
    return found


def _check_settings(config: Config, known: Description) -> None:
    """The config says what the store holds, so that whoever reads it is not misled."""
    settings = config.rollout
    asked = {f"rollout.{name}": (getattr(settings, name), known.law[name]) for name in LAW}
    asked |= {"rollout.group_size": (settings.group_size, known.group_size), "task.name": (config.task.name, known.task)}
    for name, (value, stored) in asked.items():
        if value != stored:
            raise ConfigError(f"config field {name} = {value!r} must be {stored!r}, as in what wrote rollout.cache = {settings.cache!r}")
    if config.preference.weight and known.writer == "dataset":
        raise ConfigError(
            f"config field preference.weight = {config.preference.weight:g} compares completions of a prompt, and rollout.cache = "
            f"{settings.cache!r} has one of each, a data set's; use 0, or a store that a model wrote"
        )
    asked_for = config.estimator.importance
    if asked_for != "none" and known.writer == "dataset":
        raise ConfigError(
            f"config field estimator.importance = {asked_for!r} needs the law that wrote the completions, and those of rollout.cache = "
            f"{settings.cache!r} are a data set's; use 'none'"
        )


def _check_contents(config: Config, form: labels.Form, pair: Pair, found: Store) -> None:
    known, where, tokenizer = found.description, f"config field rollout.cache = {config.rollout.cache!r}", pair.student.tokenizer
    if tokenizer.fingerprint() != known.tokenizer:
        raise ConfigError(f"{where}: its ids are those of another tokenizer than student.path has; give a store of this one")
    if pair.student_prompts.reader.digest != known.student_reads:
        raise ConfigError(f"{where}: its prompts were read with another context.student; give that, or write another store")
    if pair.members and (pair.teacher_prompts or pair.student_prompts).reader.digest != known.teacher_reads:
        raise ConfigError(f"{where}: its teacher read prompts with another context.teacher; give that, or write another store")
    if form.scores not in ("none", known.scores) or form.k > known.k:
        needed = f"the top {form.k}" if form.k else "log-probs of the sampled tokens"
        has = {"none": "no scores", "tokens": "log-probs of the sampled tokens"}.get(known.scores, f"the top {known.k}")
        raise ConfigError(f"{where}: holds {has}, the signal needs {needed}; write a store with the config of this run")
    highest = found.highest_token
    if highest >= tokenizer.vocab_size:
        raise ConfigError(f"{where}: holds the token {highest}, the tokenizer has {tokenizer.vocab_size}; write the store again")


def _check_consistency(found: Store, student_path: str) -> None:
    """Warns where the student was made with another teacher than the one whose scores are stored."""
    learnt_from = checkpoint.remembered(pathlib.Path(student_path) / "checkpoints").get("teacher_hash", "")
    if learnt_from and found.description.teacher_hash not in str(learnt_from).split():
        log.warning(
            "student.path = %r learnt from another teacher than the one whose scores rollout.cache holds: the gradient keeps a bias that "
            "no number of updates removes (teacher consistency, arXiv 2604.13010)",
            student_path,
        )


def examples(found: Store) -> Sequence[Example]:
    """The examples of a store, whose `id` is the number of their prompt in it."""
    return Lazy(len(found), lambda prompt: dataclasses.replace(found.example(prompt), id=prompt))


def source(found: Store, mesh: Mesh) -> rollout.Source:
    """Completions of the store for prompts of `examples`."""
    return lambda _, __, batch, ___: parallel.shard_batch(found.completions([example.id for example in batch.examples]), mesh)


def _from_cache(found: Store, mesh: Mesh) -> Recall:
    """The scores beside the completions."""

    def recall(prompts: Batch, completions: Rollout, _, __) -> Recalled:
        rows = [example.id for example in prompts.examples]
        scores = found.scores(rows, teacher_hash=found.description.teacher_hash)
        return Recalled(prompts, completions, labels.target(parallel.shard_batch(scores, mesh)))

    return recall


# ---- rollout.aggregate


def begin_collection(
    config: Config, objective: Objective, pair: Pair, identity: dict[str, str], workdir: pathlib.Path, *, done: int
) -> Store | None:
    """The store of all completions so far, in the run's folder, cut back to the `done` updates of its checkpoint; None: there is none."""
    if not config.rollout.aggregate:
        return None
    description = describe(config, labels.form_of(objective), pair, hashes=(_hash_of_teacher(pair, identity), ""), batches=0)
    return store.begin(workdir / FOLDER, description, keep=done)


def drawn(seed: int, step: int, per_step: int) -> list[int]:
    """Numbers of the prompts that update `step` (from 0) learns from: `per_step` of all so far, uniform, each at most once, ascending."""
    rng = np.random.default_rng([seed, step, 0xDA66])
    return sorted(rng.choice((step + 1) * per_step, per_step, replace=False).tolist())


def aggregate(found: Store, scorer: Callable, pipeline: Pipeline, *, seed: int, mesh: Mesh) -> Recall:
    """Scores a step's completions, adds them to the store, and draws from all that are there. The store must have a batch for each step."""
    description = found.description
    per_step = description.rows // description.group_size

    def recall(prompts: Batch, completions: Rollout, teacher_params: Any, step: int) -> Recalled:
        assert found.batches == step
        theirs = parallel.shard_batch(prompts.teacher_prompts, mesh)
        found.append(prompts.examples, completions, scorer(teacher_params, theirs, completions))
        chosen = drawn(seed, step, per_step)
        learnt = found.completions(chosen)
        batch = pipeline.encode([found.example(prompt) for prompt in chosen], learnt.id_B)
        scores = found.scores(chosen, teacher_hash=description.teacher_hash)
        learnt, scores = parallel.shard_batch((learnt, scores), mesh)
        return Recalled(batch, learnt, labels.target(scores), float(step - np.mean(np.array(chosen) // per_step)))

    return recall
