"""Completions -> the batch of an update: verdicts, what the teachers read, and which tokens and advantages each part of the loss has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import config as config_lib
from opd_jax import learner, parallel, rewards, teachers
from opd_jax.data import pipeline
from opd_jax.data.tasks import Example, Task
from opd_jax.data.teacher_prompts import Informed, TeacherPrompts
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.numerics.estimators import Context
from opd_jax.objective import Objective
from opd_jax.rewards import Judge, Judged
from opd_jax.types import Prompts, Rollout, view


@dataclasses.dataclass(frozen=True)
class Made:
    """A batch, and what the host found on the way."""

    batch: learner.Batch | None
    judged: Judged | None  # None: nothing in the update asks for verdicts
    counts: dict[str, float]  # context/ metrics
    teacher_prompts: Prompts  # what the teachers read, on the mesh


class BatchMaker:
    """Makes the batches of one run."""

    def __init__(
        self, config: config_lib.Config, objective: Objective, task: Task, tokenizer: Tokenizer, inform: TeacherPrompts | None, mesh: Mesh
    ):
        self._config, self._objective, self._tokenizer = config, objective, tokenizer
        self._inform, self._mesh = inform, mesh
        self._judge = Judge(task)
        self._route = {tag: number for number, tag in enumerate(teachers.tags(config))}

    def __call__(self, prompts: pipeline.Batch, completions: Rollout) -> Made:
        """What student and teachers read for these completions, and what looks across rows."""
        judged = self.judge(prompts, completions) if config_lib.needs_verdicts(self._config) else None
        informed = self._informed(prompts, judged)
        read = prompts.teacher_prompts if informed is None else informed.prompts
        student, teacher = parallel.shard_batch((prompts.prompts, read), self._mesh)
        own = Context(
            mask_BT=completions.mask_BT,
            behaviour_logp_BT=completions.behaviour_logp_BT,
            group_B=jnp.arange(len(completions.mask_BT)) // self._config.rollout.group_size,
        )
        batch = learner.make_batch(
            self._objective,
            view(student, completions),
            view(teacher, completions) if self._objective.has_teacher else None,
            own,
            contexts=self._contexts(own, completions, judged, informed),
            route_B=self._routes(prompts.examples),
        )
        return Made(learner.place(self._mesh, batch), judged, informed.counts if informed else {}, teacher)

    def judge(self, prompts: pipeline.Batch, completions: Rollout) -> Judged:
        """The verdicts on a batch of completions; waits for them."""
        standing_BT, tokens_BT = np.asarray(completions.standing_BT), np.asarray(completions.tokens_BT)
        texts = [self._tokenizer.decode(tokens[standing].tolist()) for tokens, standing in zip(tokens_BT, standing_BT, strict=True)]
        return self._judge([example for example in prompts.examples for _ in range(self._config.rollout.group_size)], texts)

    def _informed(self, prompts: pipeline.Batch, judged: Judged | None) -> Informed | None:
        if self._inform is None:
            return None
        attempts = judged.attempts if judged else None
        return self._inform(prompts.examples, attempts, self._config.rollout.group_size, prompts.prompts.id_B)

    def _contexts(self, own: Context, completions: Rollout, judged: Judged | None, informed: Informed | None) -> dict[str, Context]:
        """Of the parts that do not learn from every token that was drawn, or that have advantages."""
        found = {}
        distilled = self._distilled(completions, judged, informed)
        if distilled is not None:
            found["distillation"] = found["extra"] = dataclasses.replace(own, mask_BT=own.mask_BT & distilled, drawn_BT=own.mask_BT)
        if self._config.reward.weight:
            found["reward"] = self._rewarded(own, completions, judged)
        return found

    def _distilled(self, completions: Rollout, judged: Judged | None, informed: Informed | None) -> jax.Array | None:
        """Which tokens the distillation terms learn from, [B, T] or [B, 1]; None: all."""
        masking, shape = self._config.masking, completions.mask_BT.shape
        keep_B = np.ones(shape[0], bool)
        if informed is not None:
            keep_B &= informed.context_B
        if masking.malformed == "drop":
            keep_B &= np.array([attempt.well_formed for attempt in judged.attempts])
        if masking.solved == "drop":
            keep_B &= judged.reward_B < 1
        keep_T = np.arange(shape[1]) >= masking.skip_first
        if masking.first_only:
            keep_T &= np.arange(shape[1]) < masking.first_only
        keep_BT = jnp.asarray(keep_B[:, None] & keep_T[None, :])
        if masking.special_tokens == "drop":
            keep_BT &= ~jnp.isin(completions.tokens_BT, jnp.array(sorted(self._tokenizer.special_ids), jnp.int32))
        elif keep_B.all() and keep_T.all():
            return None
        return keep_BT

    def _rewarded(self, own: Context, completions: Rollout, judged: Judged) -> Context:
        settings, group_size = self._config.reward, self._config.rollout.group_size
        advantage_B = rewards.group_advantages(judged.reward_B, group_size, kind=settings.advantage)
        filters = {"filter_groups": settings.filter_groups, "mask_overlong": settings.mask_overlong}
        keep_B = rewards.term_mask(judged.reward_B, np.asarray(completions.stopped_B), group_size, **filters)
        if settings.only == "solved":
            keep_B = keep_B & (judged.reward_B >= 1)
        advantage_BT = jnp.broadcast_to(jnp.asarray(advantage_B, jnp.float32)[:, None], own.mask_BT.shape)
        mask_BT = own.mask_BT & jnp.asarray(keep_B)[:, None]
        return dataclasses.replace(own, mask_BT=mask_BT, drawn_BT=own.mask_BT, advantage_BT=advantage_BT)

    def _routes(self, examples: list[Example]) -> jax.Array | None:
        """Number of the member of each rollout; None where there is nothing to route."""
        if not self._routes_rows:
            return None
        teachers.check_tags(self._config, examples)
        return jnp.repeat(jnp.array([self._route[example.tag] for example in examples], jnp.int32), self._config.rollout.group_size)

    @property
    def _routes_rows(self) -> bool:
        return len(self._route) > 1 and self._config.teacher.combine == "route"
