"""divergence(): token_stats on dense logits, for users and oracles."""

import jax
import jax.numpy as jnp

from opd_jax.numerics import entries
from opd_jax.numerics.signals import SAMPLED_TAILS
from opd_jax.numerics.token_stats import DenseHead, Signal, Target, token_stats


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
    clip: float = 0.0,
) -> jax.Array:
    """Per-token divergence [B, T] in nats between the laws of a student (p) and a teacher (q), differentiable in the student's logits.

        reverse_kl       KL(p || q)
        forward_kl       KL(q || p)
        jsd              beta KL(q || M) + (1 - beta) KL(p || M), M = beta q + (1 - beta) p; exactly 0 and 1 are forward and reverse KL
                         (Agarwal et al., GKD, ICLR 2024)
        jsd_continuous   (1 - beta) KL(q || M) + beta KL(p || M), the same M; continuous from forward (0) to reverse (1)
        skew_forward_kl  KL(q || beta q + (1 - beta) p)
        skew_reverse_kl  KL(p || beta p + (1 - beta) q)

    Supports and tails as in `Signal`: "full" sums over the vocabulary; the top-k ones (topk_teacher, topk_student, topk_union, each also
    with "+token") need `k`, and `tail` says what becomes of the rest. `k` with another support is refused, as is a `tail` that is not the
    default. "sampled" and the sampled tails need `tokens_BT` drawn from p and promise the expected gradient only (of "sampled_tail" that
    of "full"), their value is not a divergence; "+token" needs them too. Temperatures divide logits; no tau^2 factor. `clip`
    (nats, 0: off) cuts each entry of the sum off: biased, see `Signal`.
    Raises ValueError for unknown names, beta missing or outside [0, 1], k missing or below 1, shapes that differ, and tokens missing.
    """
    if kind not in entries.DIVERGENCES:
        raise ValueError(f"kind = {kind!r} is not known; valid: {', '.join(entries.DIVERGENCES)}")
    temperatures = {"student_temperature": student_temperature, "teacher_temperature": teacher_temperature}
    signal = Signal(kind, support, tail=tail, k=k, beta=beta, clip=clip, **temperatures)
    if student_logits_BTV.ndim != 3 or student_logits_BTV.shape != teacher_logits_BTV.shape:
        raise ValueError(
            f"logits of student and teacher have shapes {student_logits_BTV.shape} and {teacher_logits_BTV.shape}, both must be [B, T, V]"
        )
    if signal.reads_tokens and tokens_BT is None:
        named = f"tail = {tail!r}" if tail in SAMPLED_TAILS else f"support = {support!r}"
        raise ValueError(f"{named} needs tokens_BT, the tokens that the student drew")
    tokens_BT = jnp.zeros(student_logits_BTV.shape[:-1], jnp.int32) if tokens_BT is None else tokens_BT
    target = Target((DenseHead(teacher_logits_BTV),))
    return token_stats(DenseHead(student_logits_BTV), target, tokens_BT, signal=signal, needs=("local",)).local_BT
