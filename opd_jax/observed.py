"""What can be seen of an update beside its loss: metrics from sums, and the diagnostics from a look at the statistics of its tokens."""

import jax
import jax.numpy as jnp

from opd_jax import parallel
from opd_jax.numerics import diagnostics
from opd_jax.numerics.estimators import Context
from opd_jax.numerics.targets import AnyTarget
from opd_jax.numerics.token_stats import Head, Signal, Stats, Target, token_stats
from opd_jax.objective import Objective


def look(objective: Objective, student: Head, target: AnyTarget | None, tokens_BT: jax.Array) -> Stats | None:
    """What the diagnostics see of these rows, at temperature 1; None where they are off. Of a law known in part they see nothing.

    A pass over the vocabulary of its own, behind a barrier: the compiler does not merge it with the loss, whose numbers must not depend on
    who looks on.
    """
    if not objective.diagnostics:
        return None
    target = target if isinstance(target, Target) else None
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
    compared = jnp.maximum(sums["compared"], 1.0) if "compared" in sums else tokens
    names = {"kl": "train/reverse_kl", "log_ratio": "train/log_ratio_mean", "disagreement": "teacher/disagreement"}
    names["scale"] = "extrapolation/scale"
    losses = {f"train/{key}": value for key, value in sums.items() if key.startswith("loss_")}
    means = {name: sums[key] / compared for key, name in names.items() if key in sums}
    gates = {f"train/{key}": value[0] / jnp.maximum(value[1], 1.0) for key, value in sums.items() if key.startswith("gate_")}
    return {"train/tokens": sums["tokens"], "rollout/entropy": sums["entropy"] / tokens} | means | losses | gates
