"""Completions -> the batch of an update: verdicts, what the teachers read, and which tokens and advantages each part of the loss has."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import config as config_lib
from opd_jax import learner, parallel, processes, rewards, routing, score, teachers
from opd_jax.apart import Apart
from opd_jax.data import pipeline
from opd_jax.data.privileged import Attempt
from opd_jax.data.tasks import Example, Task
from opd_jax.data.teacher_prompts import Informed, TeacherPrompts
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.models.config import ModelConfig
from opd_jax.models.forward import Model
from opd_jax.numerics.estimators import Context
from opd_jax.numerics.targets import SparseTarget, TokenTarget
from opd_jax.objective import Objective
from opd_jax.replay import Recalled
from opd_jax.rewards import Judge, Judged, OwnJudge
from opd_jax.types import Prompts, Rollout, view
from opd_jax.writing import Writer


class Learnt(NamedTuple):
    """Of an update that learns from other completions than its own."""

    tokens: int  # of prompts, as the student reads them, and completions
    age: float  # updates since they were written, on average
    shares: dict[str, float]  # see token_shares


@dataclasses.dataclass(frozen=True)
class Made:
    """A batch, and what the host found on the way."""

    batch: learner.Batch | None
    judged: Judged | None  # None: nothing in the update asks for verdicts
    counts: dict[str, float]  # metrics context/ and preference/
    teacher_prompts: Prompts  # what the teachers read for this step's completions, on the mesh
    written: tuple[int, int] = (0, 0)  # tokens that the first teacher read, and drew, to write what the teachers read
    learnt: Learnt | None = None  # None: the batch is of this step's completions


class BatchMaker:
    """Makes the batches of one run. `judge`: in place of the task's verifier; `teacher`: the model that ranks (preference.judge)."""

    def __init__(
        self,
        config: config_lib.Config,
        objective: Objective,
        task: Task,
        tokenizer: Tokenizer,
        inform: TeacherPrompts | None,
        mesh: Mesh,
        *,
        judge: OwnJudge | None = None,
        teacher: ModelConfig | Model | None = None,
        writer: Writer | None = None,
        apart: Apart | None = None,
    ):
        self._config, self._objective, self._tokenizer = config, objective, tokenizer
        self._inform, self._mesh, self._teacher, self._writer, self._apart = inform, mesh, teacher, writer, apart
        self._judge = Judge(judge or task)
        self._route = {tag: number for number, tag in enumerate(teachers.tags(config))}

    def __call__(
        self, prompts: pipeline.Batch, completions: Rollout, scorer: dict | None = None, recalled: Recalled | None = None, *, step: int = 0
    ) -> Made:
        """What student and teachers read for these completions, and what looks across rows. `scorer`: parameters of the first teacher.

        `step`, from 0, is that of the draws of a teacher that writes. `recalled`: what to learn from in their place, or these with scores
        that are known.
        """
        if recalled is None or recalled.completions is completions:
            return self._made(prompts, completions, scorer, recalled and recalled.scores, step)
        made = self._made(recalled.prompts, recalled.completions, scorer, recalled.scores, step)
        standing_BT, mask_BT = processes.to_host((recalled.completions.standing_BT, recalled.completions.mask_BT))
        read = np.asarray(recalled.prompts.prompts.mask_BS).sum() + standing_BT.sum()
        own = parallel.shard_batch(prompts.teacher_prompts, self._mesh)
        learnt = Learnt(int(read), recalled.age, token_shares(recalled.prompts.examples, mask_BT))
        return dataclasses.replace(made, judged=None, teacher_prompts=own, learnt=learnt)

    def _made(
        self, prompts: pipeline.Batch, completions: Rollout, scorer: dict | None, scores: SparseTarget | TokenTarget | None, step: int
    ) -> Made:
        routing.check(self._config, prompts.examples)
        judged = self.judge(prompts, completions) if config_lib.needs_verdicts(self._config) else None
        informed = self._informed(prompts, completions, judged, scorer, step)
        read = prompts.teacher_prompts if informed is None else informed.prompts
        student, teacher = parallel.shard_batch((prompts.prompts, read), self._mesh)
        teacher = teacher if self._apart is None else self._apart.hear(teacher, completions)
        own = Context(
            mask_BT=completions.mask_BT,
            behaviour_logp_BT=completions.behaviour_logp_BT,
            group_B=jnp.arange(len(completions.mask_BT)) // self._config.rollout.group_size,
        )
        contexts = self._contexts(own, completions, prompts.examples, judged, informed)
        counts = dict(informed.counts) if informed else {}
        if self._config.preference.weight:
            contexts["preference"] = self._preferred(own, completions, self._ranking(completions, judged, teacher, scorer))
            counts["preference/pairs"] = float((processes.to_host(contexts["preference"].sign_B) > 0).sum() / len(prompts.examples))
        batch = learner.make_batch(
            self._objective,
            view(student, completions),
            view(teacher, completions) if self._objective.has_teacher else None,
            own,
            contexts=contexts,
            route_B=self._routes(prompts.examples),
            compared_B=self._compared(prompts.examples),
            domain_B=self._rows(routing.domains_P(prompts.examples)) if self._config.loss.balance == "tag" else None,
            scores=scores,
        )
        return Made(learner.place(self._mesh, batch), judged, counts, teacher, informed.written if informed else (0, 0))

    def judge(self, prompts: pipeline.Batch, completions: Rollout) -> Judged:
        """The verdicts on a batch of completions; waits for them."""
        return self._judge(
            [example for example in prompts.examples for _ in range(self._config.rollout.group_size)], self.texts(completions)
        )

    def texts(self, completions: Rollout) -> list[str]:
        """All that stands in the completions, whoever wrote it."""
        standing_BT, tokens_BT = processes.to_host((completions.standing_BT, completions.tokens_BT))
        return [self._tokenizer.decode(tokens[standing].tolist()) for tokens, standing in zip(tokens_BT, standing_BT, strict=True)]

    def _informed(
        self, prompts: pipeline.Batch, completions: Rollout, judged: Judged | None, scorer: dict | None, step: int
    ) -> Informed | None:
        if self._inform is None:
            return None
        attempts, id_B, write = judged.attempts if judged else None, prompts.prompts.id_B, None
        if self._writer is not None:
            attempts = attempts or [Attempt(text, 0.0) for text in self.texts(completions)]
            write = lambda texts_B, kind: self._writer(scorer, texts_B, id_B, step=step, kind=kind)
        return self._inform(prompts.examples, attempts, self._config.rollout.group_size, id_B, write)

    def _contexts(
        self, own: Context, completions: Rollout, examples: list[Example], judged: Judged | None, informed: Informed | None
    ) -> dict[str, Context]:
        """Of the parts that do not learn from every token that was drawn, or that have advantages."""
        found = {}
        distilled = self._distilled(completions, examples, judged, informed)
        if distilled is not None:
            found["distillation"] = found["extra"] = dataclasses.replace(own, mask_BT=own.mask_BT & distilled, drawn_BT=own.mask_BT)
        if self._config.reward.weight:
            found["reward"] = self._rewarded(own, completions, examples, judged)
        return found

    def _distilled(
        self, completions: Rollout, examples: list[Example], judged: Judged | None, informed: Informed | None
    ) -> jax.Array | None:
        """Which tokens the distillation terms learn from, [B, T] or [B, 1]; None: all."""
        masking, shape = self._config.masking, completions.mask_BT.shape
        keep_B = np.array(self._rows([routing.distilled(self._config, example) for example in examples]))
        if informed is not None:
            keep_B &= informed.context_B
        if masking.malformed == "drop":
            keep_B &= np.array([attempt.well_formed for attempt in judged.attempts])
        if masking.solved == "drop":
            keep_B &= judged.reward_B < 1
        if masking.failed == "drop":
            keep_B &= judged.reward_B >= 1
        keep_T = np.arange(shape[1]) >= masking.skip_first
        if masking.first_only:
            keep_T &= np.arange(shape[1]) < masking.first_only
        keep_BT = jnp.asarray(keep_B[:, None] & keep_T[None, :])
        if masking.special_tokens == "drop":
            keep_BT &= ~jnp.isin(completions.tokens_BT, jnp.array(sorted(self._tokenizer.special_ids), jnp.int32))
        elif keep_B.all() and keep_T.all():
            return None
        return keep_BT

    def _rewarded(self, own: Context, completions: Rollout, examples: list[Example], judged: Judged) -> Context:
        settings, group_size = self._config.reward, self._config.rollout.group_size
        advantage_B = rewards.group_advantages(judged.reward_B, group_size, kind=settings.advantage)
        filters = {"filter_groups": settings.filter_groups, "mask_overlong": settings.mask_overlong}
        keep_B = rewards.term_mask(judged.reward_B, processes.to_host(completions.stopped_B), group_size, **filters)
        keep_B = keep_B & self._rows([routing.rewarded(self._config, example) for example in examples])
        if settings.only == "solved":
            keep_B = keep_B & (judged.reward_B >= 1)
        advantage_BT = jnp.broadcast_to(jnp.asarray(advantage_B, jnp.float32)[:, None], own.mask_BT.shape)
        mask_BT = own.mask_BT & jnp.asarray(keep_B)[:, None]
        return dataclasses.replace(own, mask_BT=mask_BT, drawn_BT=own.mask_BT, advantage_BT=advantage_BT)

    def _ranking(self, completions: Rollout, judged: Judged | None, read: Prompts, scorer: dict | None) -> np.ndarray:
        """[B] what the completions of a prompt are compared by: rewards, or the teacher's log-probs, after what it reads."""
        if self._config.preference.judge == "reward":
            return judged.reward_B
        logp_BT, mask_BT = processes.to_host((score.logprobs(scorer, self._teacher, read, completions), completions.mask_BT))
        logp_B = logp_BT.sum(1, dtype=np.float64)
        return logp_B / np.maximum(mask_BT.sum(1), 1) if self._config.preference.judge == "teacher_mean" else logp_B

    def _preferred(self, own: Context, completions: Rollout, score_B: np.ndarray) -> Context:
        tokens_BT, mask_BT = processes.to_host((completions.tokens_BT, completions.mask_BT))
        partner_B, sign_B = rewards.best_and_worst(score_B, self._config.rollout.group_size, tokens_BT, mask_BT)
        mask_BT = own.mask_BT & jnp.asarray(sign_B != 0)[:, None]
        return dataclasses.replace(own, mask_BT=mask_BT, drawn_BT=own.mask_BT, partner_B=jnp.asarray(partner_B), sign_B=jnp.asarray(sign_B))

    def _routes(self, examples: list[Example]) -> jax.Array | None:
        """Number of the member of each rollout; None where there is nothing to route. Who has none is not distilled: any will do."""
        return self._rows(np.array([self._route.get(example.tag, 0) for example in examples], np.int32)) if self._routes_rows else None

    def _compared(self, examples: list[Example]) -> jax.Array | None:
        """Which rollouts have a teacher; None: all."""
        has_P = [routing.has_member(self._config, example) for example in examples]
        return None if all(has_P) else self._rows(has_P)

    def _rows(self, values_P) -> jax.Array:
        """[B] what holds of each prompt's rollouts."""
        return jnp.asarray(np.repeat(values_P, self._config.rollout.group_size))

    @property
    def _routes_rows(self) -> bool:
        return len(self._route) > 1 and self._config.teacher.combine == "route"


def token_shares(examples: list[Example], mask_BT: np.ndarray) -> dict[str, float]:
    """Metrics train/token_share/: of each tag, where examples have tags."""
    tokens_P = mask_BT.reshape(len(examples), -1).sum(1)
    tags = np.array([example.tag for example in examples])
    return {f"train/token_share/{tag}": float(tokens_P[tags == tag].sum() / tokens_P.sum()) for tag in sorted(set(tags.tolist())) if tag}
