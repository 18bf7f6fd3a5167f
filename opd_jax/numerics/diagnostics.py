"""What an update says about itself beside its loss: arithmetic on [B, T] statistics of the whole batch, and on norms of gradients.

Results are scalars by metric name; NaN means that the batch has no such quantity (no tokens, a divisor of 0), and is not written.
Masked positions do not count, whatever stands there.
"""

import jax
import jax.numpy as jnp

from opd_jax.numerics import masked
from opd_jax.numerics.token_stats import Stats

LEVELS = (5, 50, 95)  # percent, of the quantiles
QUARTERS = 4  # parts of the completion's T positions whose quantiles are told apart
OUTLIER = 10.0  # nats; a log-ratio beyond it in size is an outlier
TOP = 16  # k of the teacher's top-k where the signal has none
# Statistics of reverse KL renormalised on the teacher's top-k.
NEEDS = (
    *("logp", "target_logp", "kl", "target_entropy", "local", "mass", "target_mass", "overlap"),
    *("gradient_square", "full_gradient_square", "gradient_dot"),
)


def log_ratios(log_ratio_BT: jax.Array, mask_BT: jax.Array) -> dict[str, jax.Array]:
    """Sign, outliers and quantiles of l = log q(y) - log pi(y); quantiles over all positions, and over each quarter of the T positions."""
    mask_BT = mask_BT.astype(bool)
    length = mask_BT.shape[1]
    edges = [number * length // QUARTERS for number in range(QUARTERS + 1)]
    found = {
        "diag/negative_log_ratios": _mean(log_ratio_BT < 0, mask_BT),
        "diag/outlier_tokens": masked.masked_sum(jnp.abs(log_ratio_BT) > OUTLIER, mask_BT).astype(jnp.float32),
        **_quantiles(log_ratio_BT, mask_BT, ""),
    }
    for number, (start, end) in enumerate(zip(edges, edges[1:], strict=False), start=1):
        if start < end:
            found |= _quantiles(log_ratio_BT[:, start:end], mask_BT[:, start:end], f"_quarter_{number}")
    return found


def effective_samples(log_weight_BT: jax.Array, mask_BT: jax.Array) -> dict[str, jax.Array]:
    """(sum w)^2 / (n sum w^2), from 1/n to 1, of the importance weights w = exp(log pi(y) - log mu(y)) of n tokens, and of n rollouts.

    The weight of a rollout is the product over its tokens; rollouts without a token do not count. Source: Kong 1992.
    """
    some_B = jnp.any(mask_BT.astype(bool), axis=1)
    return {
        "diag/ess_token": _effective(log_weight_BT, mask_BT),
        "diag/ess_sequence": _effective(masked.masked_sum(log_weight_BT, mask_BT, axis=1), some_B),
    }


def against_teacher(stats: Stats, mask_BT: jax.Array) -> dict[str, jax.Array]:
    """The teacher's entropy, what its top-k sees of both laws, and how far reverse KL renormalised on that top-k is from the full one.

    `stats` has NEEDS, of that signal. The two gradients are by the student's logits, all tokens as one vector.
    """
    squares = (stats.gradient_square_BT, stats.full_gradient_square_BT, stats.gradient_dot_BT)
    short, full, dot = (masked.masked_sum(x, mask_BT) for x in squares)
    return {
        "diag/teacher_entropy": _mean(stats.target_entropy_BT, mask_BT),
        "diag/topk_overlap": _mean(stats.overlap_BT, mask_BT),
        "diag/topk_student_mass": _mean(stats.mass_BT, mask_BT),
        "diag/topk_teacher_mass": _mean(stats.target_mass_BT, mask_BT),
        "diag/topk_kl_gap": _mean(stats.local_BT - stats.kl_BT, mask_BT),
        "diag/topk_gradient_cosine": dot / jnp.sqrt(short * full),
        "diag/topk_gradient_error": jnp.sqrt(jnp.maximum(short - 2 * dot + full, 0) / full),
    }


def gradient_noise(square_M: jax.Array, square: jax.Array, rollouts: int) -> dict[str, jax.Array]:
    """Signal and noise of a gradient G = sum_m g_m from |g_m|^2 of its M >= 2 microbatches and |G|^2; `rollouts` is B.

    The denominator of the loss is global, so g_m is a share and M g_m a draw of G from B / M rollouts. For M independent draws with mean mu
    and covariance C, E |G|^2 = |mu|^2 + tr C / M and E M sum_m |g_m|^2 = |mu|^2 + tr C: two equations, two unknowns. This is McCandlish et
    al. 2018, appendix A.1, with B_small = B / M and B_big = B. Signal and noise are unbiased where draws are independent and the
    denominator is the same for every batch; their ratios are not.
    """
    count = square_M.shape[0]
    assert count >= 2, "one microbatch has no spread"
    of_a_draw = (count * jnp.sum(square_M) - square) * (count / (count - 1))
    signal, noise = square - of_a_draw / count, of_a_draw * (rollouts / count)
    return {
        "diag/gradient_signal": signal,
        "diag/gradient_noise": noise,
        "diag/gradient_snr": signal / noise,
        "diag/noise_scale": jnp.where(signal > 0, noise / signal, jnp.nan),
    }


def _mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    return masked.masked_sum(x_BT, mask_BT) / jnp.sum(mask_BT.astype(bool))


def _quantiles(x_BT: jax.Array, mask_BT: jax.Array, where: str) -> dict[str, jax.Array]:
    """By linear interpolation between the sorted values that count."""
    levels = jnp.array(LEVELS, x_BT.dtype) / 100
    values = jnp.nanquantile(jnp.where(mask_BT, x_BT, jnp.nan), levels)
    return {f"diag/log_ratio_p{level:02d}{where}": value for level, value in zip(LEVELS, values, strict=True)}


def _effective(log_weight: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled by the largest weight, so that no product over a long rollout overflows."""
    mask = mask.astype(bool)
    shifted = log_weight - jnp.max(jnp.where(mask, log_weight, -jnp.inf))
    total, squares = (masked.masked_sum(jnp.exp(power * shifted), mask) for power in (1, 2))
    return jnp.square(total) / (jnp.sum(mask) * squares)
