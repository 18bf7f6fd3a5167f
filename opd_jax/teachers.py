"""The teacher bank: whose laws the student is compared with, which parameters they have, and how they become one target."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax import config as config_lib
from opd_jax.config import Config, ConfigError, Member, check_choice
from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.data.tasks import Example
from opd_jax.model_io import LoadedModel
from opd_jax.models import forward
from opd_jax.models.config import ModelConfig
from opd_jax.models.forward import Model
from opd_jax.numerics.extrapolation import Rule
from opd_jax.numerics.heads import Head
from opd_jax.numerics.targets import Target
from opd_jax.numerics.token_stats import Signal, token_stats
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
    gain: jax.Array | None = None  # of an adaptive extrapolation, a scalar


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
    confidence: members of a mixture weigh softmax_m(log w_m - H_m / confidence) at each token, H_m the entropy of a member's law there, in
    nats at temperature 1: the certain ones count for more (confidence softmax of MAD-OPD, arXiv 2605.01347; exp(-H) of SRPO at 1). 0: w_m.
    scale: the target is q^scale r^(1 - scale) with the reference r (Yang et al., G-OPD); 1 does not look at it. A rule gives each token a
    scale of its own.
    """

    members: tuple[tuple[str, AnyModel], ...]  # (name, model)
    weights: tuple[float, ...] = (1.0,)  # of the members, sum 1
    combine: str = "route"
    update: str = "frozen"
    rate: float = 0.0
    every: int = 1
    confidence: float = 0.0
    scale: float = 1.0
    rule: Rule | None = None
    normalise: bool = True  # of an extrapolated target
    reference: AnyModel | None = None

    @property
    def keeps(self) -> bool:
        """Whether the state has a copy of the student."""
        return self.update in ("ema", "sync")

    @property
    def extrapolates(self) -> bool:
        """Whether the target lies away from the teacher, by way of the reference."""
        return self.scale != 1 or self.rule is not None

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

    def target(
        self,
        parameters: Parameters,
        view: View,
        student_view: View,
        route_B: jax.Array | None,
        *,
        student: Head | None = None,
        mask_BT: jax.Array | None = None,
    ) -> tuple[Target, dict[str, jax.Array]]:
        """(the law that the student is compared with on these rows, what the rule of an adaptive extrapolation needs of them).

        `route_B` has the number of each row's member. A rule looks at the student's own law, on the tokens of the mask.
        """
        first = (self.main(parameters), self.members[0][1])
        laws = [first, *((parameters.frozen[name], model) for name, model in self.members[1:])]
        if self.update == "trust_region":
            laws.append((parameters.live, self.members[0][1]))
        heads = [forward.hidden(params, model, view) for params, model in laws]
        weights = self._weights(heads, view.completion_BT, route_B)
        base = self._pooled(heads, weights)
        if not self.extrapolates:
            return _constant(base), {}
        reference = forward.hidden(parameters.frozen[REFERENCE], self.reference, student_view)
        scale_BT, sums = jnp.full(view.completion_BT.shape, self.scale), {}
        if self.rule is not None:
            scale_BT, sums = self._scales(parameters.gain, student, base, reference, view.completion_BT, mask_BT)
        weights = [scale_BT * weight for weight in weights] + [1 - scale_BT]
        beyond = Target((*heads, reference), jnp.stack(weights), "logit", self.normalise, len(self.members))
        return _constant(beyond), sums

    def _pooled(self, heads: list[Head], weights: list[jax.Array]) -> Target:
        """The members' law, without a reference."""
        if len(heads) == 1:
            return Target((heads[0],))
        pool = "logit" if self.update == "trust_region" or self.combine == "geometric" else "prob"
        return Target(tuple(heads), jnp.stack(weights), pool, members=len(self.members))

    def _scales(self, gain, student: Head, base: Target, reference: Head, tokens_BT: jax.Array, mask_BT: jax.Array):
        """(lambda of each token, sums for the rule)."""
        compare = lambda head, target, needs: jax.lax.stop_gradient(
            token_stats(jax.lax.stop_gradient(head), target, tokens_BT, signal=Signal("nll"), needs=needs)
        )
        own = compare(student, base, {"logp", "target_logp"})
        reference_logp_BT = compare(reference, None, {"logp"}).logp_BT
        nearness_BT = self.rule.nearness(own.logp_BT, own.target_logp_BT, reference_logp_BT)
        sums = self.rule.sums(nearness_BT, own.target_logp_BT - reference_logp_BT, mask_BT, gain)
        return 1 + gain * nearness_BT, sums

    def _weights(self, heads: list[Head], tokens_BT: jax.Array, route_B: jax.Array | None) -> list[jax.Array]:
        """Of each law, [B, T]; they sum to 1 at each token."""
        if self.update == "trust_region":
            each = [1 - self.rate, self.rate]
        elif len(self.members) > 1 and self.combine == "route":
            each = [(route_B == number).astype(jnp.float32)[:, None] for number in range(len(self.members))]
        else:
            each = list(self.weights)
        each = [jnp.broadcast_to(jnp.asarray(weight, jnp.float32), tokens_BT.shape) for weight in each]
        if not self.confidence:
            return each
        entropies = [token_stats(head, None, tokens_BT, signal=Signal("nll"), needs={"entropy"}).entropy_BT for head in heads]
        scores_MBT = jnp.log(jnp.stack(each)) - jnp.stack(entropies) / self.confidence
        return list(jax.nn.softmax(scores_MBT, axis=0))

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
        confidence=settings.confidence,
        scale=config.extrapolation.scale,
        rule=rule_of(config),
        normalise=config.extrapolation.normalise,
        reference=reference,
    )


def rule_of(config: Config) -> Rule | None:
    """The rule of an adaptive extrapolation; None for a fixed scale."""
    settings = config.extrapolation
    return Rule(settings.tau, settings.max_gain) if settings.adaptive else None


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
    if settings.confidence and (len(members) < 2 or settings.combine == "route"):
        raise ConfigError(
            f"config field teacher.confidence = {settings.confidence:g} weighs members of a mixture; use 0, or give teacher.members, and "
            "teacher.combine = 'geometric' or 'arithmetic'"
        )
    _check_extrapolation(config)
    _check_unnormalised(config)


def _check_extrapolation(config: Config) -> None:
    asked, settings = config.extrapolation, config.teacher
    if asked.adaptive and asked.scale != 1:
        raise ConfigError(
            f"config field extrapolation.scale = {asked.scale:g} must be 1, because extrapolation.adaptive gives each token its own"
        )
    if config_lib.extrapolates(config) and len(settings.members) > 1 and settings.combine == "arithmetic":
        named = "adaptive = True" if asked.adaptive else f"scale = {asked.scale:g}"
        raise ConfigError(
            f"config field extrapolation.{named} needs one law per rollout or a geometric mixture, not "
            "teacher.combine = 'arithmetic'; use 'route' or 'geometric'"
        )


def _check_unnormalised(config: Config) -> None:
    """Log-ratios that are off by log Z of their prefix: the gradient of token credit does not see it, everything else does."""
    signal, estimator = config.signal, config.estimator
    if not config_lib.extrapolates(config) or config.extrapolation.normalise:
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
