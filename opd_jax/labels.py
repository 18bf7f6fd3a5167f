"""What is kept of a teacher's law beside a completion, so that the teacher is asked once: which form a run needs, and how it is made."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from opd_jax import score, teachers
from opd_jax.config import Config, ConfigError
from opd_jax.models.config import ModelConfig
from opd_jax.numerics import targets
from opd_jax.numerics.targets import SparseTarget, TokenTarget
from opd_jax.objective import Objective, Part
from opd_jax.types import Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class Form:
    """none: the objective asks no teacher. tokens: log-probs of the completions' tokens. topk: the k most probable tokens, and the rest."""

    scores: str = "none"
    k: int = 0


def form_of(objective: Objective) -> Form:
    """The least that the terms of an objective need. Raises ConfigError for a term that needs more of a law than is kept."""
    parts = [part for part in objective.parts if part.against == "teacher" and part.compares]
    sizes = [_size(part) for part in parts]
    if not parts:
        return Form()
    form = Form("topk", max(sizes)) if any(sizes) else Form("tokens")
    placeholder = SparseTarget(np.empty((1, 1, form.k)), None, None) if form.k else TokenTarget(None)
    for part in parts:
        try:
            targets.check(placeholder, part.estimator.signal, part.needs)
        except ValueError as error:
            raise ConfigError(f"config field {_block(part)}: {error}") from None
    return form


def _size(part: Part) -> int:
    """Tokens of a top-k that a term needs; 0: the log-probs of the sampled tokens. Raises ConfigError for one that needs the whole law."""
    signal = part.estimator.signal
    if signal.kind == "top1_cross_entropy":
        return 1
    if signal.support == "topk_teacher":
        return signal.k
    if signal.support == "sampled" or not signal.needs_target:
        return 0
    raise ConfigError(
        f"config field {_block(part)}.support = {signal.support!r} with {_block(part)}.divergence = {signal.kind!r} needs more of the "
        "teacher's law than is stored; use 'topk_teacher' with a k, 'sampled', or the divergence 'top1_cross_entropy'"
    )


def _block(part: Part) -> str:
    return "extra_signal" if part.name == "extra" else "signal"


def check(config: Config, field: str) -> None:
    """Refuses what scores that are made once cannot follow; `field` is the one that asks for them. Raises ConfigError."""
    frozen = {
        "teacher.members": (len(teachers.asked(config)) < 2, "one teacher"),
        "teacher.update": (config.teacher.update == "frozen", "'frozen'"),
        "extrapolation.adaptive": (not config.extrapolation.adaptive, "False"),
        "extrapolation.scale": (config.extrapolation.scale == 1, "1"),
        "context.privileged.reads": (not config.context.privileged.reads, "'' (what a teacher reads beside the question is not stored)"),
    }
    for name, (fits, valid) in frozen.items():
        if not fits:
            value = functools.reduce(getattr, name.split("."), config)
            value = ", ".join(value) if isinstance(value, Mapping) else value
            raise ConfigError(f"config field {name} = {value!r} must be {valid}, because {field} keeps a teacher's scores")


def make_scorer(form: Form, teacher: ModelConfig | None) -> Callable[[Any, Prompts, Rollout], dict[str, jax.Array]]:
    """(teacher's parameters, its prompts, completions) -> scores by the names of store.SCORES, float32 nats at temperature 1.

    Raises ConfigError for a top-k of more tokens than there are.
    """
    if form.scores == "none":
        return lambda params, prompts, rollout: {}
    if form.scores == "tokens":
        return lambda params, prompts, rollout: {"logp_BT": score.logprobs(params, teacher, prompts, rollout)}
    known = teacher.valid_vocab_size or teacher.vocab_size
    if form.k > known:
        raise ConfigError(f"config field signal.k = {form.k} must be at most {known}, the tokens of the teacher's vocabulary")
    names = ("ids_BTK", "logp_BTK", "rest_BT")
    return lambda params, prompts, rollout: dict(zip(names, score.topk(params, teacher, prompts, rollout, k=form.k), strict=True))


def target(scores: dict[str, Any]) -> SparseTarget | TokenTarget | None:
    """What the student is compared with, from scores."""
    if not scores:
        return None
    return SparseTarget(**scores) if "ids_BTK" in scores else TokenTarget(**scores)
