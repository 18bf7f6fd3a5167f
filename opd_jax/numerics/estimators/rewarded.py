"""Advantages that are given: rewards of a verifier, made into advantages by the host, with the clipped surrogate of PPO."""

import dataclasses

import jax
import jax.numpy as jnp

from opd_jax.numerics import importance
from opd_jax.numerics.estimators.base import Context, Estimator, Term
from opd_jax.numerics.token_stats import Signal, Stats


@dataclasses.dataclass(frozen=True)
class Rewarded(Estimator):
    """-sum_t rho_t 1[unclipped] A_t s_t, A from `context.advantage_BT` (constant), rho_t the ratio to the law that sampled.

    Unclipped and on-policy it is unbiased for minus the gradient of the expected reward, where A is the completion's reward, or that less a
    baseline which does not depend on the completion (rloo; not grpo, whose deviation includes it). With `clip_low` and `clip_high` it is
    the gradient of min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A): a token that has moved far in the direction of its advantage has
    none. Off-policy the token ratio corrects the token and not its prefix: biased. Without a law that sampled, all ratios are 1.
    Sources: Williams (1992); Schulman et al., PPO (2017), eq. 7; Yu et al., DAPO, arXiv 2503.14476, for two bounds.
    """

    clip_low: float = 0.0
    clip_high: float = 0.0

    def __post_init__(self):
        for name in ("clip_low", "clip_high"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"reward.{name} = {getattr(self, name)!r} must be 0 (off) or more")
        if (self.clip_low > 0) != (self.clip_high > 0):
            raise ValueError(
                f"reward.clip_low = {self.clip_low:g} and reward.clip_high = {self.clip_high:g} must be both 0 (off) or both above it"
            )
        if self.clip_low >= 1:
            raise ValueError(f"reward.clip_low = {self.clip_low:g} must be below 1, or no ratio is below 1 - clip_low")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logp",)

    def terms(self, stats: Stats, context: Context) -> Term:
        advantage_BT = jax.lax.stop_gradient(context.advantage_BT)
        if context.behaviour_logp_BT is None or not self.clip_high:
            return Term(context.mask_BT, advantage_BT=advantage_BT)
        rho_BT = jnp.exp(jnp.minimum(context.log_ratios(stats.logp_BT), importance.MAX_LOG_WEIGHT))
        moved_BT = jnp.where(advantage_BT > 0, rho_BT > 1 + self.clip_high, rho_BT < 1 - self.clip_low)
        return Term(context.mask_BT, advantage_BT=advantage_BT, w_score_BT=jnp.where(moved_BT, 0, rho_BT))


def build(*, clip_low: float, clip_high: float, student_temperature: float) -> Rewarded:
    """The estimator of the config block `reward`. Raises ValueError."""
    return Rewarded(
        name="clipped_reward" if clip_high else "reward",
        claim="Unbiased for minus the gradient of the expected reward, on-policy, if the baseline does not include the own rollout",
        formula="A_t = the advantage of the completion",
        reference="Williams (1992); Schulman et al., PPO (2017), eq. 7",
        target="",
        unbiased=True,
        signal=Signal("nll", student_temperature=student_temperature),
        clip_low=clip_low,
        clip_high=clip_high,
    )
