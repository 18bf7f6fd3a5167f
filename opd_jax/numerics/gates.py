"""Weights of the tokens of a term, from statistics of their own row: constants of the gradient, which follows another objective with them.

A weight multiplies what its token adds to the loss. Advantages, and the denominators of normalisers, count the tokens of the mask as
before: weights that are small make the term small.
"""

import dataclasses

import jax
import jax.numpy as jnp

from opd_jax.numerics.token_stats import Stats

GATES = ("none", "teacher_entropy_above", "teacher_entropy_below", "confidence", "importance_decay")

# Nats that one log-ratio counts for at most: where a teacher rules a token out, the others still have a share.
MAX_LOG_RATIO = 1e6


@dataclasses.dataclass(frozen=True)
class Gate:
    """Which weights. H_t is the entropy of the teacher's law, l_t = log q(y_t) - log pi(y_t), both of the laws that the term compares.

    none                   1
    teacher_entropy_above  1[H_t > threshold] (EOPD, arXiv 2603.07079, for its forward KL: 0.8 nats)
    teacher_entropy_below  1[H_t <= threshold]
    confidence             exp(-H_t): 1 where the teacher is certain, 1/n where it is even between n tokens. SRPO has weights proportional
                           to it; they are not divided by their mean here, which would make a token's weight depend on other rows
    importance_decay       1 + gain (1 - sum_{i<t} |l_i| / sum_i |l_i|), from 1 + gain down to 1 as the row's log-ratios are used up
                           (IW-OPD, arXiv 2606.22600: gain 0.5); reads later tokens, and 1 + gain where all log-ratios are 0

    Raises ValueError.
    """

    kind: str = "none"
    threshold: float = 0.8  # nats
    gain: float = 0.5

    def __post_init__(self):
        if self.kind not in GATES:
            raise ValueError(f"gate.kind = {self.kind!r} is not known; valid: {', '.join(GATES)}")
        for name in ("threshold", "gain"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"gate.{name} = {getattr(self, name)!r} must be 0 or more, and finite")

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that `weights` reads."""
        if self.kind == "none":
            return ()
        return ("logp", "target_logp") if self.kind == "importance_decay" else ("target_entropy",)

    @property
    def words(self) -> str:
        """What it does to an objective, for the claim of a run; empty: nothing."""
        return {
            "none": "",
            "teacher_entropy_above": f"tokens count where the teacher's entropy is above {self.threshold:g} nats",
            "teacher_entropy_below": f"tokens count where the teacher's entropy is at most {self.threshold:g} nats",
            "confidence": "tokens weigh exp(-H), H the teacher's entropy",
            "importance_decay": f"tokens weigh from {1 + self.gain:g} down to 1 by the log-ratios of their completion, later ones included",
        }[self.kind]

    def weights(self, stats: Stats, mask_BT: jax.Array) -> jax.Array | None:
        """The weights [B, T], constants, 0 where the mask is 0; None: all are 1."""
        if self.kind == "none":
            return None
        mask_BT = mask_BT.astype(bool)
        if self.kind == "importance_decay":
            weight_BT = 1 + self.gain * _left(jnp.where(mask_BT, stats.target_logp_BT - stats.logp_BT, 0))
        else:
            entropy_BT = stats.target_entropy_BT
            weight_BT = {
                "teacher_entropy_above": lambda: (entropy_BT > self.threshold).astype(entropy_BT.dtype),
                "teacher_entropy_below": lambda: (entropy_BT <= self.threshold).astype(entropy_BT.dtype),
                "confidence": lambda: jnp.exp(-entropy_BT),
            }[self.kind]()
        return jax.lax.stop_gradient(jnp.where(mask_BT, weight_BT, 0))


def _left(log_ratio_BT: jax.Array) -> jax.Array:
    """1 - sum_{i<t} |l_i| / sum_i |l_i|, which is sum_{i>=t} / sum_i: between 0 and 1, and 1 where all are 0."""
    size_BT = jnp.minimum(jnp.abs(log_ratio_BT), MAX_LOG_RATIO)
    from_here_BT = jnp.cumsum(size_BT[:, ::-1], axis=1)[:, ::-1]
    total_B1 = from_here_BT[:, :1]
    return jnp.where(total_B1 > 0, from_here_BT / jnp.where(total_B1 > 0, total_B1, 1), 1)
