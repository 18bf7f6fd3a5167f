"""Per-entry divergence functions: every divergence is a sum over the vocabulary of a non-negative f(p, q), p student, q teacher.

f = 0 and df/dp = 0 at p = q. The linear parts (-p + q and the like) sum to nothing over the whole vocabulary; they keep each entry
non-negative and make truncated sums stationary at p = q. Each kind gives f and p * df/dp from log-probabilities, because p * df/dp stays
finite where df/dp does not: the gradient of a sum over softmax logits z is then `slope - p * sum(slope)`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# kind -> whether it takes beta.
DIVERGENCES = {
    "reverse_kl": False,
    "forward_kl": False,
    "jsd": True,
    "jsd_continuous": True,
    "skew_forward_kl": True,
    "skew_reverse_kl": True,
}
# Losses that are not divergences: they do not vanish at p = q. The first two need no teacher; the last is -log p of the teacher's best
# token.
LOSSES = ("nll", "negative_entropy", "cross_entropy", "top1_cross_entropy")
KINDS = (*DIVERGENCES, *LOSSES)

Entry = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _plogr(logp: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """p * log_ratio with 0 where p is 0, whatever the ratio."""
    p = jnp.exp(logp)
    return jnp.where(p > 0, p * jnp.where(p > 0, log_ratio, 0), 0)


def _log_mixture(weight: float, logq: jax.Array, logp: jax.Array) -> jax.Array:
    """log(weight q + (1 - weight) p), 0 < weight < 1; equal to log p to the last bit where q = p, -inf where both are 0."""
    ratio = jnp.where(jnp.isneginf(logp) & jnp.isneginf(logq), 0, logq - logp)
    from_p = logp + jnp.log1p(weight * jnp.expm1(jnp.minimum(ratio, 0)))
    from_q = logq + jnp.log1p((1 - weight) * jnp.expm1(-jnp.maximum(ratio, 0)))
    return jnp.where(ratio > 0, from_q, from_p)


def entry(kind: str, beta: float | None) -> Entry:
    """The function (logp, logq) -> (f, p df/dp) of a kind."""
    beta = 0.0 if beta is None else float(beta)
    if kind in ("jsd", "jsd_continuous", "skew_forward_kl", "skew_reverse_kl") and beta in (0.0, 1.0):
        return _limit(kind, beta)
    return {
        "reverse_kl": _reverse_kl,
        "forward_kl": _forward_kl,
        "jsd": lambda logp, logq: _jsd(logp, logq, beta, beta),
        "jsd_continuous": lambda logp, logq: _jsd(logp, logq, beta, 1 - beta),
        "skew_forward_kl": lambda logp, logq: _skew_forward_kl(logp, logq, beta),
        "skew_reverse_kl": lambda logp, logq: _skew_reverse_kl(logp, logq, beta),
        "negative_entropy": lambda logp, _: (_plogr(logp, logp), _plogr(logp, logp + 1)),
        "cross_entropy": lambda logp, logq: (-_plogr(logq, logp), -jnp.exp(logq)),
    }[kind]


def linear(kind: str, beta: float | None) -> float:
    """c of a divergence: f is the plain term, such as p log(p/q), and c (p - q). Of the plain term p df/dp is slope - c p."""
    beta = 0.0 if beta is None else float(beta)
    return {
        "reverse_kl": -1.0,
        "forward_kl": 1.0,
        "jsd": {0.0: 1.0, 1.0: -1.0}.get(beta, 0.0),
        "jsd_continuous": 1 - 2 * beta,
        "skew_forward_kl": 1 - beta,
        "skew_reverse_kl": beta - 1,
    }[kind]


def clipped(entry: Entry, clip: float) -> Entry:
    """The entries of a whole law cut off at `clip`, in nats: constants beyond it, whose p df/dp is 0.

    Of forward_kl the plain term q log(q/p) is cut, as published (Zhao et al., OPSD, arXiv 2601.18734); of the others f itself. The linear
    part of forward_kl stays where its term is cut: over a law it sums to nothing, and without a cut no bit changes.
    """
    linear = 1.0 if entry is _forward_kl else 0.0

    def cut(logp: jax.Array, logq: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, slope = entry(logp, logq)
        p, q = jnp.exp(logp), jnp.exp(logq)
        over = value - linear * (p - q) > clip
        return jnp.where(over, clip + linear * (p - q), value), jnp.where(over, linear * p, slope)

    return cut


def _limit(kind: str, beta: float) -> Entry:
    """What the mixtures become at beta 0 and 1; the skewed divergences at 1 compare a law with itself."""
    if kind in ("jsd", "jsd_continuous"):
        return _reverse_kl if beta else _forward_kl
    if beta:
        return lambda logp, logq: (jnp.zeros_like(logp), jnp.zeros_like(logp))
    return _forward_kl if kind == "skew_forward_kl" else _reverse_kl


def _reverse_kl(logp: jax.Array, logq: jax.Array) -> tuple[jax.Array, jax.Array]:
    slope = _plogr(logp, logp - logq)
    return slope - jnp.exp(logp) + jnp.exp(logq), slope


def _forward_kl(logp: jax.Array, logq: jax.Array) -> tuple[jax.Array, jax.Array]:
    p, q = jnp.exp(logp), jnp.exp(logq)
    return _plogr(logq, logq - logp) - q + p, p - q


def _jsd(logp: jax.Array, logq: jax.Array, beta: float, weight_q: float) -> tuple[jax.Array, jax.Array]:
    """weight_q KL(q || M) + (1 - weight_q) KL(p || M) with M = beta q + (1 - beta) p."""
    logm = _log_mixture(beta, logq, logp)
    p, q, m = jnp.exp(logp), jnp.exp(logq), jnp.exp(logm)
    from_q = _plogr(logq, logq - logm) - q + m
    p_log_ratio = _plogr(logp, logp - logm)
    # p (1 - q/m) and p (1 - p/m), the derivative of m times what it changes.
    pull_q, pull_p = p - _plogr(logp, jnp.exp(logq - logm)), p - _plogr(logp, jnp.exp(logp - logm))
    value = weight_q * from_q + (1 - weight_q) * (p_log_ratio - p + m)
    slope = weight_q * (1 - beta) * pull_q + (1 - weight_q) * (p_log_ratio + (1 - beta) * pull_p)
    return value, slope


def _skew_forward_kl(logp: jax.Array, logq: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    logm = _log_mixture(alpha, logq, logp)
    pull = jnp.exp(logp) - _plogr(logp, jnp.exp(logq - logm))
    return _plogr(logq, logq - logm) - jnp.exp(logq) + jnp.exp(logm), (1 - alpha) * pull


def _skew_reverse_kl(logp: jax.Array, logq: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    logm = _log_mixture(alpha, logp, logq)
    p_log_ratio = _plogr(logp, logp - logm)
    pull = jnp.exp(logp) - _plogr(logp, jnp.exp(logp - logm))
    return p_log_ratio - jnp.exp(logp) + jnp.exp(logm), p_log_ratio + alpha * pull
