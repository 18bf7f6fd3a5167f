"""The teacher bank: whose laws the student is compared with, which parameters they have, and how they become one target."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.config import Config, ConfigError, Member, check_choice
from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.data.tasks import Example
from opd_jax.model_io import LoadedModel
from opd_jax.models import forward
from opd_jax.models.config import ModelConfig
from opd_jax.models.forward import Model
from opd_jax.numerics.targets import Target
from opd_jax.types import UserError, View

UPDATES = ("frozen", "live", "ema", "trust_region", "sync")
COMBINATIONS = ("route", "geometric", "arithmetic")
REFERENCE = "reference"  # name of the reference's parameters; those of the members are their names
STUDENT_INIT = "student_init"  # in place of a path: the student as it was before training

AnyModel = ModelConfig | Model


@flax.struct.dataclass
class Parameters:
    """What the laws of a bank are computed from; all of it is constant in a gradient."""

    frozen: dict[str, Any]  # by member, and of the reference
    kept: Any  # a copy of the student that follows it (ema, sync); {} without one
    live: Any  # the student's own


@dataclasses.dataclass(frozen=True)
class Bank:
    """The members, and what is done with them. Hashable: a static argument of jitted functions.

    update, of a self-teacher (one member, whose model is the student's):
        frozen        what it was in the beginning, as are teachers of their own
        live          the student as it is, without a gradient
        ema           kept <- (1 - rate) kept + rate student, after every update
        sync          kept <- student, after every `every` updates
        trust_region  logits (1 - rate) of the frozen member + rate of the live student: the geometric mixture, which is nearest to the
                      student, in KL(q || student), within a distance of the frozen one (Huebotter et al. 2026, SDPO, arXiv 2601.20802)
    combine, of several members: each rollout to one by its tag (route), or all of them, by weight: the geometric mixture, which is what a
    weighted sum of reverse KLs follows, or the arithmetic one, of forward KLs.
    scale: the target is q^scale r^(1 - scale) with the reference r (Yang et al., G-OPD); 1 does not look at it.
    """

    members: tuple[tuple[str, AnyModel], ...]  # (name, model)
    weights: tuple[float, ...] = (1.0,)  # of the members, sum 1
    combine: str = "route"
    update: str = "frozen"
    rate: float = 0.0
    every: int = 1
    scale: float = 1.0
    normalise: bool = True  # of an extrapolated target
    reference: AnyModel | None = None

    @property
    def keeps(self) -> bool:
        """Whether the state has a copy of the student."""
        return self.update in ("ema", "sync")

    def begin(self, trained: dict) -> dict:
        """What is kept before the first update: a copy of what is trained, or nothing."""
        return jax.tree.map(jnp.copy, trained) if self.keeps else {}

    def advance(self, kept: dict, trained: dict, step: jax.Array) -> dict:
        """What is kept after update number `step` (from 1), which made `trained`."""
        if self.update == "ema":
            return jax.tree.map(lambda old, new: ((1 - self.rate) * old + self.rate * new).astype(old.dtype), kept, trained)
        if self.update == "sync":
            due = step % self.every == 0
            return jax.tree.map(lambda old, new: jnp.where(due, new, old), kept, trained)
        return kept

    def main(self, parameters: Parameters) -> Any:
        """Parameters of the first member as it is now: it samples, and annotates samples."""
        if self.update == "live":
            return parameters.live
        return parameters.kept if self.keeps else parameters.frozen[self.members[0][0]]

    def target(self, parameters: Parameters, view: View, student_view: View, route_B: jax.Array | None) -> Target:
        """The law that the student is compared with on these rows; `route_B` has the number of each row's member."""
        first = (self.main(parameters), self.members[0][1])
        laws = [first, *((parameters.frozen[name], model) for name, model in self.members[1:])]
        if self.update == "trust_region":
            laws.append((parameters.live, self.members[0][1]))
        heads = [forward.hidden(params, model, view) for params, model in laws]
        if len(heads) == 1 and self.scale == 1:
            return _constant(Target((heads[0],)))
        shape = view.completion_BT.shape
        weights = [jnp.broadcast_to(weight, shape) for weight in self._weights(route_B)]
        if self.scale == 1:
            pool = "logit" if self.update == "trust_region" or self.combine == "geometric" else "prob"
            return _constant(Target(tuple(heads), jnp.stack(weights), pool, members=len(self.members)))
        heads.append(forward.hidden(parameters.frozen[REFERENCE], self.reference, student_view))
        weights = [self.scale * weight for weight in weights] + [jnp.full(shape, 1 - self.scale, weights[0].dtype)]
        return _constant(Target(tuple(heads), jnp.stack(weights), "logit", self.normalise, len(self.members)))

    def _weights(self, route_B: jax.Array | None) -> list[jax.Array]:
        """Of each law, [B, 1] or [1, 1]; they sum to 1."""
        if self.update == "trust_region":
            return [jnp.full((1, 1), 1 - self.rate), jnp.full((1, 1), self.rate)]
        if len(self.members) > 1 and self.combine == "route":
            return [(route_B == number).astype(jnp.float32)[:, None] for number in range(len(self.members))]
        return [jnp.full((1, 1), weight) for weight in self.weights]

    def reference_target(self, parameters: Parameters, student_view: View) -> Target:
        """The law of the reference, which reads what the student reads."""
        return _constant(Target((forward.hidden(parameters.frozen[REFERENCE], self.reference, student_view),)))


def asked(config: Config) -> dict[str, Member]:
    """The members that a config names; one that is given by teacher.path goes by "teacher"."""
    settings = config.teacher
    return settings.members or ({"teacher": Member(settings.path, settings.recipe)} if settings.path or settings.recipe else {})


def make_bank(config: Config, models: dict[str, AnyModel], reference: AnyModel | None) -> Bank | None:
    """The bank of a validated config, from the models of its members by name; None where there is nobody to ask."""
    settings = config.teacher
    if not models and reference is None:
        return None
    weights = [member.weight for member in asked(config).values()]
    return Bank(
        members=tuple(models.items()),
        weights=tuple(weight / sum(weights) for weight in weights),
        combine=settings.combine,
        update=settings.update,
        rate=settings.rate,
        every=settings.every,
        scale=config.extrapolation.scale,
        normalise=config.extrapolation.normalise,
        reference=reference,
    )


def tags(config: Config) -> tuple[str, ...]:
    """The tag of each member, in order: whose examples are its own."""
    return tuple(member.tag or name for name, member in asked(config).items())


def check_tags(config: Config, examples: Iterable[Example]) -> None:
    """Refuses an example for which there is no teacher. Raises ConfigError."""
    known = tags(config)
    if len(known) < 2 or config.teacher.combine != "route":
        return
    for example in examples:
        if example.tag not in known:
            raise ConfigError(
                f"config field teacher.members: no member has the tag {example.tag!r} of the example {example.prompt[:40]!r}; "
                f"there are {', '.join(known)}; name a member, or its tag, after each"
            )


def check(config: Config) -> None:
    """Refuses what the bank cannot do. Raises ConfigError."""
    settings, members = config.teacher, config.teacher.members
    check_choice("teacher.combine", settings.combine, COMBINATIONS)
    check_choice("teacher.update", settings.update, UPDATES)
    if members and (settings.path or settings.recipe):
        raise ConfigError(f"config field teacher.path = {settings.path or settings.recipe!r} and teacher.members are two answers; give one")
    if REFERENCE in members:
        raise ConfigError(f"config field teacher.members.{REFERENCE}: {REFERENCE!r} is the name of another model; choose another name")
    if settings.combine == "route" and len(set(tags(config))) < len(members):
        raise ConfigError(f"config field teacher.members: two members have one tag ({', '.join(tags(config))}); give each its own")
    for name, member in members.items():
        if not (member.path or member.recipe):
            raise ConfigError(f"config field teacher.members.{name}.path = '' must name a model")
        if not member.weight > 0:
            raise ConfigError(f"config field teacher.members.{name}.weight = {member.weight!r} must be above 0")
    if settings.update != "frozen" and settings.path != STUDENT_INIT:
        raise ConfigError(
            f"config field teacher.update = {settings.update!r} is for a self-teacher, teacher.path = {STUDENT_INIT!r}, not "
            f"{settings.path!r}; use 'frozen'"
        )
    if config.extrapolation.scale != 1 and len(members) > 1 and settings.combine == "arithmetic":
        raise ConfigError(
            f"config field extrapolation.scale = {config.extrapolation.scale:g} needs one law per rollout or a geometric mixture, not "
            "teacher.combine = 'arithmetic'; use 'route' or 'geometric'"
        )
    _check_unnormalised(config)


def _check_unnormalised(config: Config) -> None:
    """Log-ratios that are off by log Z of their prefix: the gradient of token credit does not see it, everything else does."""
    signal, estimator = config.signal, config.estimator
    if config.extrapolation.scale == 1 or config.extrapolation.normalise:
        return
    wanted = {
        "signal.divergence = 'reverse_kl'": signal.divergence == "reverse_kl",
        "signal.support = 'full' or 'sampled'": signal.support in ("full", "sampled"),
        "estimator.credit = 'token'": estimator.credit == "token",
        "gate.kind = 'none' or 'importance_decay'": config.gate.kind in ("none", "importance_decay"),
        "extra_signal.weight = 0": config.extra_signal.weight == 0,
    }
    missing = [words for words, fits in wanted.items() if not fits]
    if missing:
        raise ConfigError(f"config field extrapolation.normalise = False needs {missing[0]}; use that, or extrapolation.normalise = True")


def single(model: AnyModel) -> Bank:
    """The bank of one frozen teacher, whose parameters go by the name "teacher"."""
    return Bank(members=(("teacher", model),))


def _constant(target: Target) -> Target:
    return jax.lax.stop_gradient(target)


def mask_padding(model: LoadedModel, tokenizer: tokenizer_lib.Tokenizer, *, field: str) -> LoadedModel:
    """Masks the rows of a vocabulary that the tokenizer does not use (Qwen2.5 has 151,936 or 152,064 rows for the same ids)."""
    rows, ids = model.config.vocab_size, tokenizer.vocab_size
    if ids > rows:
        raise UserError(
            f"{field}: the model has {rows} vocabulary rows, its tokenizer {ids} ids; give a model and tokenizer that belong together"
        )
    return dataclasses.replace(model, config=dataclasses.replace(model.config, valid_vocab_size=ids))
