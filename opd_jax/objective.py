"""The only place where numerics meet config: which statistics, which estimator, which normaliser -> the loss of a batch."""

import dataclasses
import functools
import re

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax import config as config_lib
from opd_jax import teachers
from opd_jax.config import Config, ConfigError, check_choice, keeps_scores, needs_solutions
from opd_jax.numerics import baselines, credit, entries, estimators, gates, importance, masked
from opd_jax.numerics.estimators import Context, Estimator
from opd_jax.numerics.gates import Gate
from opd_jax.numerics.targets import AnyTarget
from opd_jax.numerics.token_stats import SUPPORTS, TAILS, Head, Signal, Stats, token_stats


@dataclasses.dataclass(frozen=True)
class Part:
    """One term of the loss, coefficient / Z sum_bt w_bt g_bt (loss of the estimator at b, t), with a mask and a normaliser of its own.

    w and Z are the normaliser's, by the mask alone; g are the gate's weights.
    """

    name: str  # distillation, extra, reward, preference, labels, reference or entropy
    estimator: Estimator
    coefficient: float = 1.0
    normaliser: str = "token_mean"
    against: str = "teacher"  # the target that it compares with: teacher or reference
    gate: Gate = Gate()

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that it reads."""
        return frozenset({"logp", *self.estimator.needs, *self.gate.needs})

    @property
    def compares(self) -> bool:
        """It reads the law that it is against."""
        return self.estimator.signal.needs_target or bool(self.gate.needs)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The sum of its parts; the first is what metrics and diagnostics speak of. Hashable: a static argument of jitted functions."""

    parts: tuple[Part, ...]
    max_length: int  # tokens, the divisor of normaliser="constant"
    has_teacher: bool  # the teacher reads each update's completions; otherwise none is asked, or its scores come with them
    diagnostics: bool = False  # measure diag/ beside the loss
    several: bool = False  # there are several teachers, which may disagree

    @property
    def estimator(self) -> Estimator:
        """Of the first part."""
        return self.parts[0].estimator

    @property
    def looks_across(self) -> bool:
        return any(part.estimator.looks_across for part in self.parts)

    @property
    def has_reference(self) -> bool:
        return any(part.against == "reference" for part in self.parts)

    @property
    def shown(self) -> frozenset[str]:
        """Statistics that the metrics show, at temperature 1."""
        compared = {"target_logp", "kl"} | ({"disagreement"} if self.several else set())
        return frozenset({"logp", "entropy"} | (compared if self.has_teacher else set()))


# What each model of the loss says of some rows: heads of the student, targets by the name of who is compared with.
Targets = dict[str, AnyTarget | None]


def from_config(config: Config, *, has_teacher: bool) -> Objective:
    """The objective of a validated config. Raises ConfigError for a signal or credit that does not exist or does not fit."""
    teachers.check(config)
    parts = _parts(config)
    needing = next((part for part in parts if part.against == "teacher" and part.compares), None)
    if needing and not has_teacher and config.rollout.source != "cache":
        block, settings = ("extra_signal", config.extra_signal) if needing.name == "extra" else ("signal", config.signal)
        asked = f"{block}.divergence = {settings.divergence!r}"
        if not needing.estimator.signal.needs_target:
            asked = f"{GATES[needing.name]}.kind = {needing.gate.kind!r}"
        raise ConfigError(f"config field teacher.path = '' must name a model, because {asked} needs a teacher")
    if not needing:
        _refuse_idle(config)
    # Cross-entropy needs no teacher, and the metrics that compare with one speak of the student's own completions.
    scored = has_teacher and not keeps_scores(config) and (bool(needing) or config.rollout.source in ("student", "mix"))
    if config.extrapolation.adaptive and not (scored and needing):
        raise ConfigError(
            "config field extrapolation.adaptive = True needs a teacher that scores, and a term that compares with it; give teacher.path "
            "and signal.weight, or use False"
        )
    several = len(teachers.asked(config)) > 1
    return Objective(parts, config.rollout.max_new_tokens, scored, config.log.diagnostics, several)


def _refuse_idle(config: Config) -> None:
    """Refuses what changes the teacher's law where no term compares with it. Raises ConfigError."""
    asks = config.preference.weight and config.preference.judge != "reward"
    for field, value, neutral in (
        ("context.privileged.reads", config.context.privileged.reads, ""),
        ("extrapolation.scale", config.extrapolation.scale, 1.0),
    ):
        if value != neutral and not asks:
            raise ConfigError(
                f"config field {field} = {value!r} changes what a teacher says, and no term of the loss compares with one; give "
                f"signal.divergence and signal.weight such a term, or use {neutral!r}"
            )


# Part -> the config block of its gate.
GATES = {"distillation": "gate", "extra": "extra_signal.gate"}


def _parts(config: Config) -> tuple[Part, ...]:
    loss, reward, regulariser = config.loss, config.reward, config.regulariser
    warm = {"student_temperature": loss.student_temperature}
    both = warm | {"teacher_temperature": loss.student_temperature}  # the reference is compared as the student is
    parts = _distillation(config)
    if reward.weight:
        built = _from_numerics(lambda: estimators.rewarded.build(clip_low=reward.clip_low, clip_high=reward.clip_high, **warm))
        parts.append(Part("reward", built, reward.weight, loss.normaliser))
    if config.preference.weight:
        built = _from_numerics(lambda: estimators.preference.build(beta=config.preference.beta, **warm))
        parts.append(Part("preference", built, config.preference.weight, masked.PAIR_MEAN, "reference"))
    if loss.labels:
        parts.append(Part("labels", _from_numerics(lambda: estimators.build(Signal("nll"), "token", 1.0)), loss.labels, loss.normaliser))
    if regulariser.kl:
        built = _from_numerics(lambda: estimators.build(Signal(regulariser.divergence, **both), "token", 1.0))
        parts.append(Part("reference", built, regulariser.kl, loss.normaliser, "reference"))
    if regulariser.entropy:
        built = _from_numerics(lambda: estimators.build(Signal("negative_entropy", **warm), "token", 1.0))
        parts.append(Part("entropy", built, regulariser.entropy, loss.normaliser))
    if not parts:
        raise ConfigError(
            "config field signal.weight = 0 leaves no loss; give it, reward.weight, preference.weight, loss.labels or "
            "regulariser.kl a value"
        )
    return tuple(parts)


def _distillation(config: Config) -> list[Part]:
    """The terms of `signal` and `extra_signal`, those that have a weight."""
    extra, normaliser, parts = config.extra_signal, config.loss.normaliser, []
    built = _estimator(config)  # refuses what it must also where it has no weight: extra_signal shares its choices
    if config.signal.weight:
        parts.append(Part("distillation", built, config.signal.weight, normaliser, gate=_gate("gate", config.gate)))
    elif config.gate.kind != "none":
        raise ConfigError(f"config field gate.kind = {config.gate.kind!r} weighs the term that signal.weight = 0 leaves out; use 'none'")
    if extra.weight:
        signal, asked = _signal("extra_signal", extra, config.loss), config.estimator
        off_policy = {"importance": asked.importance, "clip": asked.clip}
        built = _from_numerics(lambda: estimators.build(signal, "token", 1.0, **off_policy), "extra_signal")
        parts.append(Part("extra", built, extra.weight, normaliser, gate=_gate("extra_signal.gate", extra.gate)))
    elif extra.gate.kind != "none":
        raise ConfigError(
            f"config field extra_signal.gate.kind = {extra.gate.kind!r} weighs the term that extra_signal.weight = 0 leaves out; use 'none'"
        )
    return parts


def _from_numerics(make, block: str = "signal"):
    """make(), whose errors speak of the config block `signal`, with those of another block of its kind by that one's name."""
    try:
        return make()
    except ValueError as error:
        raise ConfigError(re.sub(r"\bsignal\.", f"{block}.", str(error))) from None


def _gate(block: str, settings: config_lib.Gate) -> Gate:
    check_choice(f"{block}.kind", settings.kind, gates.GATES)
    return Gate(settings.kind, settings.threshold, settings.gain)


def _signal(block: str, settings: config_lib.Signal, loss: config_lib.Loss) -> Signal:
    check_choice(f"{block}.divergence", settings.divergence, entries.KINDS)
    check_choice(f"{block}.support", settings.support, SUPPORTS)
    check_choice(f"{block}.tail", settings.tail, TAILS)
    compared = {
        "kind": settings.divergence,
        "support": settings.support,
        "tail": settings.tail,
        "k": settings.k if settings.k or settings.support.startswith("topk") else None,
        "beta": settings.beta,
        "clip": settings.clip,
        "student_temperature": loss.student_temperature,
        "teacher_temperature": loss.teacher_temperature,
    }
    return _from_numerics(lambda: Signal(**compared), block)


def _estimator(config: Config) -> Estimator:
    asked, signal = config.estimator, _signal("signal", config.signal, config.loss)
    check_choice("estimator.credit", asked.credit, credit.CREDITS)
    check_choice("estimator.baseline", asked.baseline, baselines.BASELINES)
    check_choice("estimator.importance", asked.importance, importance.CORRECTIONS)
    if asked.baseline == "leave_one_out" and config.rollout.group_size < 2:
        raise ConfigError(
            f"config field estimator.baseline = 'leave_one_out' needs rollout.group_size of at least 2, not {config.rollout.group_size}"
        )
    if asked.importance != "none" and (needs_solutions(config) or config.rollout.source == "corrected"):
        raise ConfigError(
            f"config field estimator.importance = {asked.importance!r} needs the law that wrote the completions, which rollout.source = "
            f"{config.rollout.source!r} does not give; use 'none', or rollout.source = 'student', 'teacher' or 'dagger'"
        )
    if asked.importance != "none" and config.rollout.temperature == 0:
        raise ConfigError(
            f"config field estimator.importance = {asked.importance!r} needs draws, and rollout.temperature = 0 is greedy; use 'none', or "
            "a temperature above 0"
        )
    choices = {name: getattr(asked, name) for name in ("exact_future", "length_normalised", "baseline", "importance", "clip")}
    return _from_numerics(lambda: estimators.build(signal, asked.credit, asked.gamma, **choices))


@flax.struct.dataclass
class Share:
    """What a part needs of a batch, made from the whole of it before it is split."""

    context: Context
    weights_BT: jax.Array
    denominator: jax.Array


def share(part: Part, context: Context, max_length: int, domain_B: jax.Array | None = None) -> Share:
    """With the weights and the global denominator of the part's normaliser; `domain_B`: whose domains are to have equal shares of it."""
    weights_BT, denominator = masked.normaliser(part.normaliser, context.mask_BT, max_length=max_length)
    if domain_B is not None:
        mass_B = jnp.sum(weights_BT, axis=1)
        mass_B = (mass_B > 0).astype(mass_B.dtype) if part.normaliser == masked.PAIR_MEAN else mass_B  # a pair counts once, however long
        weights_BT = masked.balanced(weights_BT, mass_B, domain_B)
    return Share(context, weights_BT, denominator)


def loss(
    objective: Objective,
    student: Head,
    targets: Targets,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    shares: tuple["Share", ...],
    compared_B: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(what these rows add to the loss, masked sums for the metrics); those of microbatches add up. `shares` are those of the parts.

    `compared_B`: the rows that have a teacher; None: all.
    """
    found, shown = _statistics(objective, student, targets, tokens_BT, _looked_at(mask_BT, shares))
    values, gated = [], {}
    for part, stats, share in zip(objective.parts, found, shares, strict=True):
        term = part.estimator.terms(stats, _prepared(part, stats, share.context))
        weights_BT, gate_BT = share.weights_BT, part.gate.weights(stats, share.context.mask_BT)
        if gate_BT is not None:
            weights_BT = weights_BT * gate_BT
            gated[f"gate_{part.name}"] = jnp.stack([jnp.sum(gate_BT), jnp.sum(share.context.mask_BT, dtype=gate_BT.dtype)])
        loss_B = estimators.loss_B(stats, dataclasses.replace(term, mask_BT=term.mask_BT * weights_BT))
        value = jnp.sum(loss_B) / share.denominator
        values.append(value if part.coefficient == 1 else part.coefficient * value)
    sums = _sums(shown, mask_BT, compared_B) | gated
    if len(values) > 1:
        sums |= {f"loss_{part.name}": value for part, value in zip(objective.parts, values, strict=True)}
    return sum(values[1:], values[0]), jax.lax.stop_gradient(sums)


def _statistics(
    objective: Objective, student: Head, targets: Targets, tokens_BT: jax.Array, mask_BT: jax.Array
) -> tuple[list[Stats], Stats]:
    """(statistics for each part, those that the metrics show): one pass over the vocabulary for each signal and target."""
    passes: dict[tuple, set[str]] = {}
    for part in objective.parts:
        passes.setdefault(_pass_of(objective, part), set()).update(part.needs)
    first = _pass_of(objective, objective.parts[0])
    # What the metrics show is at temperature 1, and against the teacher.
    exact = (first[0].student_temperature, first[0].teacher_temperature) == (1.0, 1.0) and first[1] == "teacher"
    if exact:
        passes[first] |= objective.shown
    made = {
        (signal, against): token_stats(student, targets[against], tokens_BT, signal=signal, needs=frozenset(needs), mask_BT=mask_BT)
        for (signal, against), needs in passes.items()
    }
    shown = made[first]
    if not exact:
        plain = {"signal": Signal("nll"), "needs": objective.shown, "mask_BT": mask_BT}
        shown = token_stats(jax.lax.stop_gradient(student), targets["teacher"], tokens_BT, **plain)
    return [made[_pass_of(objective, part)] for part in objective.parts], shown


def _pass_of(objective: Objective, part: Part) -> tuple[Signal, str]:
    """(signal, target) of the pass that serves a part: that of the first part, where the log-prob alone is asked for."""
    first, own = objective.parts[0].estimator.signal, part.estimator
    if part.needs <= {"logp"} and own.signal.student_temperature == first.student_temperature:
        return first, objective.parts[0].against
    return own.signal, part.against


def _looked_at(mask_BT: jax.Array, shares: tuple[Share, ...]) -> jax.Array:
    """The positions of which somebody reads a statistic."""
    contexts = [share.context for share in shares]
    drawn = [context.drawn_BT for context in contexts if context.drawn_BT is not None]
    return functools.reduce(jnp.logical_or, [context.mask_BT for context in contexts] + drawn, mask_BT)


def statistics(
    objective: Objective, student: Head, targets: Targets, tokens_BT: jax.Array, mask_BT: jax.Array, shares: tuple[Share, ...]
) -> list[Stats]:
    """What the estimators look at, without a gradient: for `prepared`, where a batch is split."""
    return jax.lax.stop_gradient(_statistics(objective, student, targets, tokens_BT, _looked_at(mask_BT, shares))[0])


def prepared(objective: Objective, found: list[Stats], shares: tuple[Share, ...]) -> tuple[Share, ...]:
    """The shares with what looks across rows, from the statistics of the whole batch; once it is there it stays."""
    each = zip(objective.parts, found, shares, strict=True)
    return tuple(one.replace(context=_prepared(part, stats, one.context)) for part, stats, one in each)


def _prepared(part: Part, stats: Stats, context: Context) -> Context:
    there = context.baseline_BT is not None or context.delta_B is not None
    if there or not part.estimator.looks_across:
        return context
    return part.estimator.prepare(jax.lax.stop_gradient(stats), context)


def _sums(stats: Stats, mask_BT: jax.Array, compared_B: jax.Array | None) -> dict[str, jax.Array]:
    sums = {"tokens": jnp.sum(mask_BT, dtype=jnp.float32), "entropy": masked.masked_sum(stats.entropy_BT, mask_BT)}
    if compared_B is not None:
        mask_BT = mask_BT & compared_B[:, None]
        sums["compared"] = jnp.sum(mask_BT, dtype=jnp.float32)
    if stats.kl_BT is not None:
        sums["kl"] = masked.masked_sum(stats.kl_BT, mask_BT)
        sums["log_ratio"] = masked.masked_sum(stats.target_logp_BT - stats.logp_BT, mask_BT)
    if stats.disagreement_BT is not None:
        sums["disagreement"] = masked.masked_sum(stats.disagreement_BT, mask_BT)
    return sums
