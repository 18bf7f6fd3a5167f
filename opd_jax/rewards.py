"""Rewards of rollouts: a verifier that may fail, advantages within the group of a prompt, which rollouts count. NumPy, in float64.

Rows are rollouts; those of one prompt are `group_size` rows that follow each other.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

import numpy as np

from opd_jax import files, processes
from opd_jax.config import Config, ConfigError, check_choice, needs_verdicts, own_draws
from opd_jax.data import tasks
from opd_jax.data.privileged import Attempt
from opd_jax.data.tasks import Example, Task, Verdict
from opd_jax.types import UserError, one_line

log = logging.getLogger(__name__)

ADVANTAGES = ("none", "centred", "grpo", "rloo")


@dataclasses.dataclass(frozen=True)
class Judged:
    """Completions with their verdicts; `errors` of them are 0 because the verifier failed, the first time for this `reason`."""

    attempts: list[Attempt]
    reward_B: np.ndarray  # float64, finite
    errors: int
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class OwnJudge:
    """A user's function (example, text) -> reward or Verdict, in the place of a task's verifier."""

    function: Callable[[Example, str], float | Verdict]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def parallel(self) -> bool:
        return getattr(self.function, "parallel", False)

    def verify(self, example: Example, text: str) -> Verdict:
        verdict = self.function(example, text)
        return verdict if isinstance(verdict, Verdict) else Verdict(float(verdict))


def with_own(config: Config, judge: Callable | None) -> Config:
    """The config that names a user's own judge. Raises UserError for one that cannot be called, or that is named and not given."""
    if judge is None:
        if config.reward.judge:
            raise ConfigError(
                f"config field reward.judge = {config.reward.judge!r} is no function; give it as train.run(..., judge=...), which names it"
            )
        return config
    if not callable(judge):
        raise UserError(f"judge = {judge!r} cannot be called; give a function (example, text) -> reward or Verdict")
    return dataclasses.replace(config, reward=dataclasses.replace(config.reward, judge=f"{tasks.OWN}{OwnJudge(judge).name}"))


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """A task whose `verify` gives an attempt, or what went wrong: one completion must not end a run."""

    task: Task | OwnJudge

    @property
    def parallel(self) -> bool:
        return getattr(self.task, "parallel", False)

    def verify(self, example: Example, text: str) -> Attempt | str:
        try:
            verdict = self.task.verify(example, text)
            if not math.isfinite(verdict.reward):
                raise ValueError(f"the reward is {verdict.reward}")
            if not isinstance(verdict.feedback, str):
                raise TypeError(f"the feedback is a {type(verdict.feedback).__name__}, it must be text")
            return Attempt(text, float(verdict.reward), verdict.feedback, verdict.well_formed)
        except Exception as error:  # whatever a verifier stumbles over; KeyboardInterrupt and SystemExit are none of these
            return one_line(f"{type(error).__name__}: {files.reason(error)}")


def judge(task: Task | OwnJudge, examples_B: Sequence[Example], texts_B: Sequence[str]) -> Judged:
    """A verdict per completion. Where `verify` raises, or gives no finite number, the reward is 0, without feedback, and is counted.

    Each of several processes asks for its part, once: they agree also where a verifier would not say the same twice.
    """
    verdicts = lambda examples, texts: [
        one if isinstance(one, str) else dataclasses.asdict(one) for one in tasks.verify_many(_Guarded(task), examples, texts)
    ]
    found = [one if isinstance(one, str) else Attempt(**one) for one in processes.divide(verdicts, examples_B, texts_B)]
    reasons = [one for one in found if isinstance(one, str)]
    attempts = [Attempt(text, 0.0, well_formed=False) if isinstance(one, str) else one for text, one in zip(texts_B, found, strict=True)]
    reward_B = np.array([attempt.reward for attempt in attempts], np.float64)
    return Judged(attempts, reward_B, len(reasons), reasons[0] if reasons else "")


class Judge:
    """judge() for one run: the first error of its verifier is logged, the others are only counted."""

    def __init__(self, task: Task | OwnJudge):
        self._task, self._logged = task, False

    def __call__(self, examples_B: Sequence[Example], texts_B: Sequence[str]) -> Judged:
        judged = judge(self._task, examples_B, texts_B)
        if judged.errors and not self._logged:
            whose = "judge" if isinstance(self._task, OwnJudge) else "verifier of task"
            log.warning("the %s %s fails (%s); such completions get reward 0", whose, self._task.name, judged.reason)
            self._logged = True
        return judged


def group_advantages(reward_B: np.ndarray, group_size: int, *, kind: str, eps: float = 1e-6) -> np.ndarray:
    """Advantages [B], float64, of rewards [B] within their groups. Raises UserError.

        none     r_i
        centred  r_i - mean: Dr. GRPO (Liu et al. 2025, arXiv 2503.20783), whose other half is loss.normaliser = constant
        grpo     (r_i - mean) / (s + eps), s the sample standard deviation, with n - 1, as in TRL (its eps is 1e-4); the paper (Shao et al.
                 2024, arXiv 2402.03300) says "std" only
        rloo     r_i - mean of the others = n / (n - 1) (r_i - mean) (Ahmadian et al. 2024, arXiv 2402.14740): unbiased

    But for `none`, a group of equal rewards has advantages of exactly 0. `centred` is 1 - 1/n times the unbiased one, the own reward being
    part of its mean; division by s favours groups with little spread, whose expected gradient is not that of the mean reward.
    """
    if kind not in ADVANTAGES:
        raise UserError(
            f"advantage {kind!r} is not known; valid: {', '.join(ADVANTAGES)} (Dr. GRPO is centred with loss.normaliser = 'constant')"
        )
    reward_PG = _grouped(reward_B, group_size)
    if kind == "none":
        return reward_PG.reshape(-1)
    if group_size < 2:
        raise UserError(f"advantage {kind!r} compares the rollouts of a prompt, but rollout.group_size = {group_size}; give 2 or more")
    mean_P1 = reward_PG.mean(1, keepdims=True)
    advantage_PG = reward_PG - mean_P1
    if kind == "grpo":
        advantage_PG = advantage_PG / (reward_PG.std(1, ddof=1, keepdims=True) + eps)
    elif kind == "rloo":
        advantage_PG = reward_PG - (reward_PG.sum(1, keepdims=True) - reward_PG) / (group_size - 1)
    # Means of equal numbers are off by a rounding, which a division by eps would blow up.
    return np.where(_all_equal(reward_PG)[:, None], 0.0, advantage_PG).reshape(-1)


def _grouped(reward_B: np.ndarray, group_size: int) -> np.ndarray:
    reward_B = np.asarray(reward_B, np.float64)
    if group_size < 1 or len(reward_B) % group_size:
        raise UserError(f"{len(reward_B)} rewards are no whole number of groups; rollout.group_size = {group_size} must divide them")
    if not np.isfinite(reward_B).all():
        raise UserError("rewards must be finite numbers; judge() gives such")
    return reward_B.reshape(-1, group_size)


def _all_equal(reward_PG: np.ndarray) -> np.ndarray:
    return reward_PG.max(1) == reward_PG.min(1)


def informative_B(reward_B: np.ndarray, group_size: int) -> np.ndarray:
    """bool [B]: False in groups of equal rewards, which have no advantage (dynamic sampling, Yu et al. 2025, DAPO, arXiv 2503.14476)."""
    return np.repeat(~_all_equal(_grouped(reward_B, group_size)), group_size)


def term_mask(
    reward_B: np.ndarray, stopped_B: np.ndarray, group_size: int, *, filter_groups: bool = False, mask_overlong: bool = False
) -> np.ndarray:
    """bool [B]: the rollouts that count in the reward's term; the others are still part of their group's mean and deviation.

    `filter_groups` leaves out groups of equal rewards, `mask_overlong` completions that max_new_tokens cut off (both of DAPO). Whoever
    averages over tokens must count those of the mask alone.
    """
    mask_B = informative_B(reward_B, group_size) if filter_groups else np.ones(len(reward_B), bool)
    return mask_B & np.asarray(stopped_B, bool) if mask_overlong else mask_B


def best_and_worst(score_B: np.ndarray, group_size: int, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of the other row [B], sign [B]) of the pairs: the first of the highest score of each group, and of the lowest.

    The sign is 1 for the best, -1 for the worst, 0 for all others. No pair where both have one score, or are one completion (whose scores
    may differ by a rounding).
    """
    score_PG = np.asarray(score_B, np.float64).reshape(-1, group_size)
    first_P = np.arange(len(score_PG)) * group_size
    best_P, worst_P = first_P + score_PG.argmax(1), first_P + score_PG.argmin(1)
    written_BT = np.where(mask_BT, tokens_BT, -1)
    differs_P = (written_BT[best_P] != written_BT[worst_P]).any(1)  # of equal scores the first is both
    best_P, worst_P = best_P[differs_P], worst_P[differs_P]
    partner_B, sign_B = np.arange(len(score_B), dtype=np.int32), np.zeros(len(score_B), np.float32)
    partner_B[best_P], partner_B[worst_P] = worst_P, best_P
    sign_B[best_P], sign_B[worst_P] = 1, -1
    return partner_B, sign_B


def check(config: Config, task: Task) -> None:
    """Refuses, before any work, what the config asks of verdicts and the task cannot give. Raises ConfigError."""
    settings, group_size = config.reward, config.rollout.group_size
    check_choice("reward.advantage", settings.advantage, ADVANTAGES)
    if not needs_verdicts(config):
        return
    if not (task.verifiable or settings.judge):
        raise ConfigError(
            f"config field task.name = {task.name!r} has no verifier, which reward.weight = {settings.weight:g}, preference.judge, masking "
            "or context.privileged.reads ask for; choose another task, give train.run a judge, or leave them at their defaults"
        )
    if settings.weight and not own_draws(config):
        raise ConfigError(
            f"config field rollout.source = {config.rollout.source!r} must be 'student', because reward.weight = {settings.weight:g} is "
            "for the student's own completions"
        )
    if settings.weight and settings.advantage != "none" and group_size < 2:
        raise ConfigError(
            f"config field reward.advantage = {settings.advantage!r} compares the rollouts of a prompt, but rollout.group_size = "
            f"{group_size}; give 2 or more, or 'none'"
        )


def metrics(judged: Judged, group_size: int) -> dict[str, float]:
    """The record's reward/ metrics of a step; opd_jax/glossary/updates.py has their formulas."""
    reward_PG = _grouped(judged.reward_B, group_size)
    solved_PG = reward_PG >= 1
    return {
        "reward/equal_groups": float(_all_equal(reward_PG).mean()),
        "reward/solved_groups": float(solved_PG.all(1).mean()),
        "reward/failed_groups": float((~solved_PG).all(1).mean()),
        "reward/verifier_errors": judged.errors,
        "reward/well_formed": float(np.mean([attempt.well_formed for attempt in judged.attempts])),
    }
