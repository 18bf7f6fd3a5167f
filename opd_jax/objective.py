"""The only place where numerics meet config: which statistics, which estimator, which normaliser -> the loss of a batch."""

import dataclasses

import jax
import jax.numpy as jnp

from opd_jax import parallel
from opd_jax.config import Config, ConfigError, check_choice
from opd_jax.numerics import baselines, credit, diagnostics, entries, estimators, importance, masked
from opd_jax.numerics.estimators import Context, Estimator
from opd_jax.numerics.token_stats import SUPPORTS, TAILS, Head, Signal, Stats, Target, token_stats


@dataclasses.dataclass(frozen=True)
class Objective:
    """L = (1 / Z) sum_bt w_bt (loss of the estimator at b, t). Hashable: a static argument of jitted functions."""

    estimator: Estimator
    normaliser: str
    max_length: int  # tokens, the divisor of normaliser="constant"
    has_teacher: bool  # the teacher scores each update's completions
    diagnostics: bool = False  # measure diag/ beside the loss

    @property
    def shown(self) -> frozenset[str]:
        """Statistics that the metrics show, at temperature 1."""
        return frozenset({"logp", "entropy"} | ({"target_logp", "kl"} if self.has_teacher else set()))

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the estimator uses, and those that the metrics show."""
        return self.shown | set(self.estimator.needs)


def from_config(config: Config, *, has_teacher: bool) -> Objective:
    """The objective of a validated config. Raises ConfigError for a signal or credit that does not exist or does not fit."""
    built = _estimator(config)
    if built.signal.needs_target and not has_teacher:
        raise ConfigError(
            f"config field teacher.path = '' must name a model, because signal.divergence = {config.signal.divergence!r} needs a teacher"
        )
    # Cross-entropy needs no teacher, and the metrics that compare with one speak of the student's own completions.
    scored = has_teacher and (built.signal.needs_target or config.rollout.source == "student")
    return Objective(built, config.loss.normaliser, config.rollout.max_new_tokens, scored, config.log.diagnostics)


def _estimator(config: Config) -> Estimator:
    signal, loss, asked = config.signal, config.loss, config.estimator
    check_choice("signal.divergence", signal.divergence, entries.KINDS)
    check_choice("signal.support", signal.support, SUPPORTS)
    check_choice("signal.tail", signal.tail, TAILS)
    check_choice("estimator.credit", asked.credit, credit.CREDITS)
    check_choice("estimator.baseline", asked.baseline, baselines.BASELINES)
    check_choice("estimator.importance", asked.importance, importance.CORRECTIONS)
    if asked.baseline == "leave_one_out" and config.rollout.group_size < 2:
        raise ConfigError(
            f"config field estimator.baseline = 'leave_one_out' needs rollout.group_size of at least 2, not {config.rollout.group_size}"
        )
    if asked.importance != "none" and config.rollout.source == "dataset":
        raise ConfigError(
            f"config field estimator.importance = {asked.importance!r} needs the law that wrote the completions, which rollout.source = "
            "'dataset' does not give; use 'none', or rollout.source = 'student' or 'teacher'"
        )
    if asked.importance != "none" and config.rollout.temperature == 0:
        raise ConfigError(
            f"config field estimator.importance = {asked.importance!r} needs draws, and rollout.temperature = 0 is greedy; use 'none', or "
            "a temperature above 0"
        )
    compared = {
        "kind": signal.divergence,
        "support": signal.support,
        "tail": signal.tail,
        "k": signal.k if signal.k or signal.support.startswith("topk") else None,
        "beta": signal.beta,
        "student_temperature": loss.student_temperature,
        "teacher_temperature": loss.teacher_temperature,
    }
    choices = {name: getattr(asked, name) for name in ("exact_future", "baseline", "importance", "clip")}
    try:
        return estimators.build(Signal(**compared), asked.credit, asked.gamma, **choices)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def claim(objective: Objective, config: Config) -> str:
    """Which gradient a run on the student's completions follows, in one line; what its law and its normaliser spoil comes first."""
    law, asked, spoilt = config.rollout, config.estimator.importance, []
    truncated = [f"{name}={value}" for name, value, whole in _truncations(law) if value != whole]
    if truncated:
        spoilt.append(f"rollout.{truncated[0]} draws nothing outside its tokens, which no ratio brings back")
    elif law.temperature != config.loss.student_temperature and asked not in ("cumulative", "sequence"):
        spoilt.append(f"completions are drawn at temperature {law.temperature:g}, corrected by estimator.importance={asked}")
    if objective.normaliser in ("token_mean", "sequence_mean"):
        spoilt.append(f"lengths weigh completions (loss.normaliser={objective.normaliser})")
    return f"{objective.estimator.claim}{', but for: ' if spoilt else ''}{'; '.join(spoilt)}"


def _truncations(law) -> list[tuple]:
    return [("top_p", law.top_p, 1.0), ("top_k", law.top_k, 0), ("min_p", law.min_p, 0.0)]


def normalise(objective: Objective, context: Context) -> tuple[jax.Array, jax.Array]:
    """(weights [B, T], Z): made from the whole batch, before it is split."""
    return masked.normaliser(objective.normaliser, context.mask_BT, max_length=objective.max_length)


def loss(
    objective: Objective,
    student: Head,
    target: Target | None,
    tokens_BT: jax.Array,
    context: Context,
    weights_BT: jax.Array,
    denominator: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(the share of these rows in the loss, masked sums for the metrics). Shares and sums of microbatches add up."""
    signal = objective.estimator.signal
    exact = (signal.student_temperature, signal.teacher_temperature) == (1.0, 1.0)
    own = {"logp", *objective.estimator.needs}
    stats = token_stats(student, target, tokens_BT, signal=signal, needs=objective.needs if exact else own)
    context = prepared(objective, stats, context)
    shown = stats
    if not exact:
        shown = token_stats(jax.lax.stop_gradient(student), target, tokens_BT, signal=Signal("nll"), needs=objective.shown)
    term = objective.estimator.terms(stats, context)
    loss_B = estimators.loss_B(stats, dataclasses.replace(term, mask_BT=term.mask_BT * weights_BT))
    return jnp.sum(loss_B) / denominator, jax.lax.stop_gradient(_sums(shown, context))


def statistics(objective: Objective, student: Head, target: Target | None, tokens_BT: jax.Array) -> Stats:
    """What the estimator looks at, without a gradient: for `prepared`, where a batch is split."""
    stats = token_stats(student, target, tokens_BT, signal=objective.estimator.signal, needs={"logp", *objective.estimator.needs})
    return jax.lax.stop_gradient(stats)


def prepared(objective: Objective, stats: Stats, context: Context) -> Context:
    """The context with what looks across rows, from the statistics of the whole batch; once it is there it stays."""
    if not objective.estimator.looks_across or context.baseline_BT is not None:
        return context
    return objective.estimator.prepare(jax.lax.stop_gradient(stats), context)


def _sums(stats: Stats, context: Context) -> dict[str, jax.Array]:
    mask_BT = context.mask_BT
    sums = {"tokens": jnp.sum(mask_BT, dtype=jnp.float32), "entropy": masked.masked_sum(stats.entropy_BT, mask_BT)}
    if stats.kl_BT is not None:
        sums["kl"] = masked.masked_sum(stats.kl_BT, mask_BT)
        sums["log_ratio"] = masked.masked_sum(stats.target_logp_BT - stats.logp_BT, mask_BT)
    return sums


def look(objective: Objective, student: Head, target: Target | None, tokens_BT: jax.Array) -> Stats | None:
    """What the diagnostics see of these rows, at temperature 1; None where they are off.

    A pass over the vocabulary of its own, behind a barrier: the compiler does not merge it with the loss, whose numbers must not depend on
    who looks on.
    """
    if not objective.diagnostics:
        return None
    student, target = jax.lax.optimization_barrier(jax.lax.stop_gradient((student, target)))
    k = objective.estimator.signal.k or diagnostics.TOP
    signal = Signal("reverse_kl", "topk_teacher", k=k) if target is not None else Signal("nll")
    needs = diagnostics.NEEDS if target is not None else ("logp",)
    return token_stats(student, target, tokens_BT, signal=signal, needs=needs)


def diagnose(stats: Stats, square_M: jax.Array | None, grad_norm: jax.Array, context: Context) -> dict[str, jax.Array]:
    """The diagnostics of a whole batch: scalars by metric name (NaN: there is none), and `log_ratio_BT` [B, T] where there is a teacher.

    `stats` of all rows; `square_M` are the squared gradient norms of the microbatches (None: one), `grad_norm` is the norm of their sum.
    """
    mask_BT = context.mask_BT
    found = {}
    if context.behaviour_logp_BT is not None:
        found |= diagnostics.effective_samples(stats.logp_BT - context.behaviour_logp_BT, mask_BT)
    if square_M is not None:
        found |= diagnostics.gradient_noise(square_M, jnp.square(grad_norm), mask_BT.shape[0])
    if stats.kl_BT is not None:
        log_ratio_BT = stats.target_logp_BT - stats.logp_BT
        found |= diagnostics.log_ratios(log_ratio_BT, mask_BT) | diagnostics.against_teacher(stats, mask_BT)
        found["log_ratio_BT"] = parallel.constrain(log_ratio_BT, None, None)  # whole on every device: the host reads it
    return found


def metrics(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Means per token of the sums of a whole batch."""
    tokens = jnp.maximum(sums["tokens"], 1.0)
    names = {"kl": "train/reverse_kl", "log_ratio": "train/log_ratio_mean", "entropy": "rollout/entropy"}
    return {"train/tokens": sums["tokens"]} | {name: sums[key] / tokens for key, name in names.items() if key in sums}
