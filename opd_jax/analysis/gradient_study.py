"""The laboratory: bias, variance, signal-to-noise and direction of gradient estimators, on the same rollouts of any student and teacher.

`study` is the function for a notebook, `enumerated` the same for models whose completions can be listed, `run` what `study` and scripts
call. A sample is P prompts with G rollouts each ("shadow" estimators share them), and further rollouts of the same prompts for
the references: of each target the unbiased estimator that sums over the vocabulary where it can, which by Rao-Blackwell has the least
variance. What the numbers mean is in study_report.py; how they are estimated in gradient_stats.py.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import files, parallel, rollout
from opd_jax.analysis import gradient_stats, shadow, study_cost
from opd_jax.analysis.gradient_stats import Laboratory, Parts, Reference, Units
from opd_jax.analysis.study_conditions import (
    ARGUMENTS,
    Condition,
    Plan,
    Shadow,
    checked_numbers,
    conditions,
    references_of,
    resolve,
    variants,
)
from opd_jax.analysis.study_enumerated import enumerated as enumerated
from opd_jax.analysis.study_tables import Result, Row, growth_of, neighbours, numbers
from opd_jax.data import pipeline
from opd_jax.metrics import Progress
from opd_jax.model_io import LoadedModel
from opd_jax.numerics.estimators import Context, Estimator
from opd_jax.types import Prompts, Rollout, UserError, view

SHADOW, REFERENCE = range(2)  # whose draws


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is studied: P prompts, a student at one or several steps, its teacher."""

    params: Callable[[int | None], dict]  # the student's, at a step of a run (None: as given)
    teacher_params: dict
    models: shadow.Models
    prompts: Prompts  # NumPy arrays, a row per prompt
    teacher_prompts: Prompts
    stop_ids: tuple[int, ...]
    mesh: Mesh


def study(
    student: LoadedModel | tuple[dict, Any],
    teacher: LoadedModel | tuple[dict, Any],
    prompts: Sequence[str] | Prompts,
    estimators: Sequence[str] = ("sequence", "to_go", "rao_blackwell_to_go", "token", "token_full"),
    *,
    lengths: Sequence[int] = (32,),
    group_sizes: Sequence[int] = (1,),
    temperatures: Sequence[float] = (1.0,),
    top_ps: Sequence[float] = (1.0,),
    gammas: Sequence[float] = (),
    top_ks: Sequence[int] = (),
    plan: Plan | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """The table of a student, a teacher, prompts and names of the registry: one row per condition and estimator.

    The first of each sequence is the base condition; every further value is one more condition that differs from it in that alone. gammas
    apply to discounted estimators, top_ks to those with a top-k. Models are LoadedModel, or (parameters, configuration) with encoded
    Prompts (one row per prompt, different `id_B`); the teacher reads the student's ids. With several group sizes the number of rollouts is
    len(prompts) times the smallest. Raises UserError for names, numbers or prompts that cannot be used.
    """
    sweeps = {"lengths": lengths, "group_sizes": group_sizes, "temperatures": temperatures, "top_ps": top_ps}
    sweeps = {name: checked_numbers(values, name, least=1) for name, values in sweeps.items()}
    gammas, top_ks = checked_numbers(gammas, "gammas"), checked_numbers(top_ks, "top_ks")
    shadows = variants(resolve(estimators, ARGUMENTS), gammas, top_ks, ARGUMENTS)
    plan, mesh = plan or Plan(), mesh or parallel.make_mesh()
    encoded = _encode(prompts, student, max(lengths))
    base = Condition(*(values[0] for values in sweeps.values()))
    settings = conditions(base, **sweeps)
    rollouts = len(encoded.id_B) * min(group_sizes)
    words = ARGUMENTS if min(group_sizes) > 1 else dataclasses.replace(ARGUMENTS, rollouts="len(prompts)")
    plan.check(settings, rollouts, len(encoded.id_B), mesh, words)
    (params, config), (teacher_params, teacher_config) = (_halves(model) for model in (student, teacher))
    subject = Subject(
        params=lambda step: params,
        teacher_params=teacher_params,
        models=shadow.Models(config, teacher_config),
        prompts=encoded,
        teacher_prompts=encoded,
        stop_ids=tuple(student.tokenizer.eos_ids) if isinstance(student, LoadedModel) else (),
        mesh=mesh,
    )
    return run(subject, shadows, settings, rollouts, plan, progress or Progress(quiet=True)).rows


def _halves(model) -> tuple[dict, Any]:
    return (model.params, model.config) if isinstance(model, LoadedModel) else model


def _encode(prompts: Sequence[str] | Prompts, student, length: int) -> Prompts:
    if isinstance(prompts, Prompts):
        return jax.tree.map(np.asarray, prompts)
    several = not isinstance(prompts, str) and hasattr(prompts, "__len__") and len(prompts) > 0
    if not several or not all(isinstance(text, str) for text in prompts):
        raise UserError(f"prompts = {files.shown(prompts)} must be a list of texts, or encoded Prompts")
    if not isinstance(student, LoadedModel):
        raise UserError("prompts are texts, but the student is (parameters, configuration) without a tokenizer; give encoded Prompts")
    room = student.config.max_position_embeddings - length
    for text in prompts:
        if (tokens := len(student.tokenizer.encode_prompt(text))) > room:
            raise UserError(
                f"prompts: {files.shown(text)} has {tokens} tokens, but beside {length} of a completion (the largest of lengths) the "
                f"student reads at most {room}; leave it out, or lower lengths"
            )
    encoder = pipeline.Encoder(student.tokenizer, room, "refuse")
    return encoder.encode(prompts, range(len(prompts)))[0]


def run(
    subject: Subject, shadows: Sequence[Shadow], settings: Sequence[Condition], rollouts: int, plan: Plan, progress: Progress
) -> Result:
    """All conditions on one set of prompts. Raises UserError for numbers that do not fit, before any work."""
    plan.check(settings, rollouts, len(subject.prompts.id_B), subject.mesh)
    references = references_of([one.estimator for one in shadows])
    cost = study_cost.Cost(subject.params(settings[0].step), shadows, settings, references, rollouts, plan)
    cost.announce(progress)
    rows, pairs, laboratories = [], [], []
    for number, setting in enumerate(settings):
        swept = shadows if number == 0 else [one for one in shadows if one.default]
        sample = _Sample(subject, setting, swept, references, rollouts, plan)
        laboratory = _laboratory(sample.units(cost), sample, plan)
        laboratories.append((setting, swept, laboratory))
        rows += [_row(laboratory, e, one, sample) for e, one in enumerate(swept)]
        pairs += neighbours(laboratory, swept, setting)
    cost.close()
    return Result(rows, pairs, growth_of(laboratories), cost.spent())


# ---- one condition


class _Sample:
    """The rollouts of a condition, and the gradients of all estimators on them, batch by batch."""

    def __init__(self, subject: Subject, setting: Condition, shadows, references: dict[str, Estimator], rollouts: int, plan: Plan):
        self.subject, self.setting, self.references, self.plan = subject, setting, references, plan
        self.estimators = tuple(one.estimator for one in shadows)
        self.estimators += tuple(r for r in references.values() if r not in self.estimators)
        self.prompts = rollouts // setting.group_size
        self.params = subject.params(setting.step)
        self.projection = plan.projection(self.params)
        self.parts = min(plan.position_parts, setting.T)

    @property
    def reference_streams(self) -> dict[str, Reference]:
        """{target: where its reference stands}."""
        count = len(self.estimators)
        return {t: Reference(count + i, self.estimators.index(r)) for i, (t, r) in enumerate(self.references.items())}

    def units(self, cost: study_cost.Cost) -> Units:
        """Raises FloatingPointError for a gradient that is not finite."""
        streams = len(self.estimators) + len(self.references)
        dtype = jax.tree.leaves(self.params)[0].dtype
        running = shadow.start(self.projection, streams, len(self.estimators), self.parts, dtype)
        running = parallel.replicate(running, self.subject.mesh)
        kept = []
        for batch in range(self.plan.batches(self.setting, self.prompts)):
            for rows, reference_rows in self._microbatches(batch):
                started = time.monotonic()
                running, one = self._measure(running, rows, reference_rows)
                kept.append(jax.tree.map(lambda x: np.asarray(x, np.float64), one))
                if not np.isfinite(kept[-1].gram_USS).all():
                    raise FloatingPointError(f"{self.setting}: a gradient is not finite")
                cost.microbatch(self.setting, time.monotonic() - started)
        whole = jax.tree.map(lambda *pieces: np.concatenate(pieces), *kept)
        return _units(self, whole, jax.tree.map(lambda x: np.asarray(x, np.float64), running))

    def _measure(self, running, rows, reference_rows):
        return shadow.measure(
            running,
            self.params,
            self.subject.teacher_params,
            rows,
            reference_rows,
            estimators=self.estimators,
            references=tuple(self.references.values()),
            models=self.subject.models,
            projection=self.projection,
            parts=self.parts,
            units=self.plan.microbatch // self.setting.group_size,
        )

    def _microbatches(self, batch: int):
        """(rows of the estimators, rows of the references) of each microbatch; what looks across rows saw the whole batch."""
        per_batch = self.plan.batch_size // self.setting.group_size
        chosen = slice(batch * per_batch, (batch + 1) * per_batch)
        own = self._rows(chosen, SHADOW, self.estimators)
        independent = self._rows(chosen, REFERENCE, tuple(self.references.values()))
        for start in range(0, self.plan.batch_size, self.plan.microbatch):
            first, last = (at // self.setting.group_size * self.plan.reference for at in (start, start + self.plan.microbatch))
            cut = lambda tree, a, b: parallel.shard_batch(jax.tree.map(lambda x: x[a:b], tree), self.subject.mesh)
            yield cut(own, start, start + self.plan.microbatch), cut(independent, first, last)

    def _rows(self, chosen: slice, purpose: int, estimators: tuple[Estimator, ...]) -> shadow.Rows:
        each = self.setting.group_size if purpose == SHADOW else self.plan.reference
        student, teacher = (_repeat(p, chosen, each) for p in (self.subject.prompts, self.subject.teacher_prompts))
        student, teacher = parallel.shard_batch((student, teacher), self.subject.mesh)
        completions = self._sample(student, purpose)
        group_B = jnp.repeat(jnp.arange(len(student.id_B) // each), each)
        context = Context(completions.mask_BT, completions.behaviour_logp_BT, group_B)
        views = view(student, completions), view(teacher, completions)
        prepare = _jitted_prepare(estimators, self.subject.models)
        return shadow.Rows(*views, prepare(self.params, self.subject.teacher_params, *views, context))

    def _sample(self, prompts: Prompts, purpose: int) -> Rollout:
        """The estimators' draws come from the condition's law; the references' from the policy itself, which their claims are about."""
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.plan.seed), 0x1AB0), purpose)
        law = {"temperature": self.setting.temperature, "top_p": self.setting.top_p} if purpose == SHADOW else {}
        with jax.set_mesh(self.subject.mesh):
            return rollout.sample(
                self.params,
                self.subject.models.student,
                prompts,
                key=key,
                max_new_tokens=self.setting.T,
                stop_ids=self.subject.stop_ids,
                **law,
            )


@functools.lru_cache(maxsize=16)
def _jitted_prepare(estimators, models):
    return jax.jit(functools.partial(shadow.prepare, estimators, models))


def _repeat(prompts: Prompts, chosen: slice, each: int) -> Prompts:
    """Every chosen prompt in `each` rows that follow each other, with the ids of their rollouts."""
    tokens_BS, mask_BS, id_B = (np.repeat(np.asarray(x)[chosen], each, axis=0) for x in (prompts.tokens_BS, prompts.mask_BS, prompts.id_B))
    sample_B = np.tile(np.arange(each, dtype=np.uint64), len(id_B) // each)
    return Prompts(tokens_BS, mask_BS, (id_B.astype(np.uint64) * each + sample_B).astype(np.uint32))


def _units(sample: _Sample, kept: shadow.Kept, running: shadow.Running) -> Units:
    estimators, segments = len(sample.estimators), sample.projection.segments
    mean_SN = running.stream_SN
    groups_EG = np.stack([np.square(mean_SN[:estimators, a:b]).sum(1) for a, b in segments], axis=1)
    whole_ER = running.position_EIR.sum(1)  # a sketch is linear
    positions_EI = np.einsum("eir,er->ei", running.position_EIR, whole_ER)
    edges = [-(-i * sample.setting.T // sample.parts) for i in range(sample.parts + 1)]
    names = tuple(f"{a}-{b - 1}" for a, b in zip(edges[:-1], edges[1:], strict=True))
    return Units(
        rollouts=sample.setting.group_size,
        mean_gram_SS=mean_SN @ mean_SN.T,
        gram_PSS=kept.gram_USS,
        sketch_PSR=kept.sketch_USR,
        second_PE=kept.second_UEG.sum(2),
        parts={
            "parameters": Parts(sample.projection.groups, kept.second_UEG, kept.unit_UEG, groups_EG),
            "position": Parts(names, kept.position_second_UEI, kept.position_unit_UEI, positions_EI),
        },
    )


# ---- tables


def _laboratory(units: Units, sample: _Sample, plan: Plan) -> Laboratory:
    counts_WP = gradient_stats.resample(len(units.gram_PSS), plan.resamples, plan.seed)
    return Laboratory(units, counts_WP, references=list(sample.reference_streams.values()), on_policy=sample.setting.on_policy)


def _row(laboratory: Laboratory, e: int, one: Shadow, sample: _Sample) -> Row:
    named = {
        target: f"{estimator.name} on {sample.prompts * sample.plan.reference} further rollouts"
        for target, estimator in sample.references.items()
    }
    row = numbers(laboratory, e, one, sample.setting, sample.reference_streams, named, sample.prompts)
    row |= {"norm_error": sample.projection.norm_error, "interval_norm_error": sample.projection.sketch_error}
    for kind, parts in laboratory.units.parts.items():
        row[f"share_by_{kind}"] = {name: value.keys("share") for name, value in laboratory.shares(e, parts).items()}
    return row
