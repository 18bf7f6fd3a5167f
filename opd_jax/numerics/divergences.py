"""divergence(): token_stats on dense logits, for users and oracles."""

import jax
import jax.numpy as jnp

from opd_jax.numerics import entries
from opd_jax.numerics.token_stats import DenseHead, Signal, Target, token_stats

SUPPORTS = ("full", "sampled")


def divergence(
    student_logits_BTV: jax.Array,
    teacher_logits_BTV: jax.Array,
    *,
    kind: str,
    beta: float | None = None,
    support: str = "full",
    k: int | None = None,
    tail: str = "renormalise",
    tokens_BT: jax.Array | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> jax.Array:
    """Per-token divergence [B, T] in nats between the laws of a student (p) and a teacher (q), differentiable in the student's logits.

        reverse_kl       KL(p || q)
        forward_kl       KL(q || p)
        jsd              beta KL(q || M) + (1 - beta) KL(p || M), M = beta q + (1 - beta) p; exactly 0 and 1 are forward and reverse KL
                         (Agarwal et al., GKD, ICLR 2024)
        jsd_continuous   (1 - beta) KL(q || M) + beta KL(p || M), the same M; continuous from forward (0) to reverse (1)
        skew_forward_kl  KL(q || beta q + (1 - beta) p)
        skew_reverse_kl  KL(p || beta p + (1 - beta) q)

    support "full" sums over the vocabulary. "sampled" needs `tokens_BT` drawn from p and promises the expected gradient only; its value is
    not a divergence. `k` and `tail` belong to top-k supports, of which there are none yet. Temperatures divide logits; no tau^2 factor.
    Raises ValueError for unknown names, beta missing or outside [0, 1], shapes that differ, and "sampled" without tokens.
    """
    if kind not in entries.DIVERGENCES:
        raise ValueError(f"kind = {kind!r} is not known; valid: {', '.join(entries.DIVERGENCES)}")
    if support not in SUPPORTS:
        raise ValueError(f"support = {support!r} is not known; valid: {', '.join(SUPPORTS)}")
    if k is not None:
        raise ValueError(f"k = {k!r} is for top-k supports; support = {support!r} takes none")
    if tail != "renormalise":
        raise ValueError(f"tail = {tail!r} is for top-k supports; support = {support!r} takes none")
    if student_logits_BTV.ndim != 3 or student_logits_BTV.shape != teacher_logits_BTV.shape:
        raise ValueError(
            f"logits of student and teacher have shapes {student_logits_BTV.shape} and {teacher_logits_BTV.shape}, both must be [B, T, V]"
        )
    if support == "sampled" and tokens_BT is None:
        raise ValueError("support = 'sampled' needs tokens_BT, the tokens that the student drew")
    tokens_BT = jnp.zeros(student_logits_BTV.shape[:-1], jnp.int32) if tokens_BT is None else tokens_BT
    signal = Signal(kind, support, beta, student_temperature, teacher_temperature)
    target = Target((DenseHead(teacher_logits_BTV),))
    return token_stats(DenseHead(student_logits_BTV), target, tokens_BT, signal=signal, needs=("local",)).local_BT
