"""Losses of one position: the signal itself, functions of the sampled log-ratio, and several samples per position."""

import dataclasses

import jax
import jax.numpy as jnp

from opd_jax.numerics import importance as importance_lib
from opd_jax.numerics.estimators.base import Context, Estimator, Term
from opd_jax.numerics.token_stats import Stats


@dataclasses.dataclass(frozen=True)
class Local(Estimator):
    """A differentiable per-token loss: the signal itself, prefixes taken as data.

    Unbiased for the fixed-prefix gradient of its divergence where the support is the whole vocabulary, or sampled, or a top-k with a
    sampled tail; other top-k losses follow another gradient. It misses g2, the change of the prefixes' law: biased for the sequence
    level.
    With support "full" it has no sampling noise but that of the prefixes. Off-policy a loss that is known before the token is drawn needs
    rho_{<t}, one of the sampled token rho_{<=t} (`importance`, see importance.weights).
    Sources: Agarwal et al., GKD (ICLR 2024), eq. 2; Fu et al., arXiv 2603.25562, eq. 4 and 6 to 8.
    """

    importance: str = "none"
    clip: float = 2.0

    def __post_init__(self):
        importance_lib.check(self.importance, self.clip)
        if self.importance == "cumulative" and self.signal.tail.startswith("sampled_tail") and self.signal.support.startswith("topk"):
            raise ValueError(
                f"estimator.importance = 'cumulative' does not go with signal.tail = {self.signal.tail!r}, whose two parts need different "
                "weights; use 'sequence', or signal.tail = 'generalised'"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("local",) if self.importance == "none" else ("local", "logp")

    def terms(self, stats: Stats, context: Context) -> Term:
        if self.importance == "none" or context.behaviour_logp_BT is None:
            return Term(context.mask_BT, local_BT=stats.local_BT)
        log_rho_BT = context.log_ratios(stats.logp_BT)
        w_local_BT, w_score_BT = importance_lib.weights(log_rho_BT, correction=self.importance, clip=self.clip)
        weight_BT = w_score_BT if self.signal.reads_tokens else w_local_BT
        return Term(context.mask_BT, local_BT=stats.local_BT, w_local_BT=weight_BT)


# Functions of delta = log pi(y) - log q(y) at y ~ pi. As values k1 and k3 are unbiased for K_t, k2 is not.
LOG_RATIO_VALUES = {
    "k1": lambda delta: delta,
    "k2": lambda delta: jnp.square(delta) / 2,
    "k3": lambda delta: jnp.expm1(-delta) + delta,
}


@dataclasses.dataclass(frozen=True)
class LogRatioLoss(Estimator):
    """k1, k2 or k3 at the sampled token, differentiated as a loss; `k3_plus` has the value of k3 and the gradient of k2 (straight through).

    With delta = log pi - log q the gradients are s, delta s and (1 - e^-delta) s. Their means over y ~ pi are 0, grad KL(pi || q) and
    grad KL(q || pi): k1 learns nothing, k2 is the reverse KL, k3 is the FORWARD KL. e^-delta has no bound: k3 and the value of k3_plus may
    overflow in float32, where the teacher is e^88 times as sure as the student.
    Sources: Schulman, Approximating KL Divergence (2020); Tang and Munos, arXiv 2506.09477.
    """

    value: str = "k2"

    needs = ("logp", "target_logp")

    def terms(self, stats: Stats, context: Context) -> Term:
        delta_BT = stats.logp_BT - stats.target_logp_BT
        if self.value == "k3_plus":
            k2_BT, k3_BT = LOG_RATIO_VALUES["k2"](delta_BT), LOG_RATIO_VALUES["k3"](delta_BT)
            return Term(context.mask_BT, local_BT=k2_BT + jax.lax.stop_gradient(k3_BT - k2_BT))
        return Term(context.mask_BT, local_BT=LOG_RATIO_VALUES[self.value](delta_BT))


@dataclasses.dataclass(frozen=True)
class LogRatioReward(Estimator):
    """-k1, -k2 or -k3 at the sampled token as the advantage of REINFORCE, constant under the gradient.

    k1 is `token`: unbiased for the reverse KL of the position. k2 and k3 are other rewards, with other gradients: biased.
    Source: Tang and Munos, arXiv 2506.09477.
    """

    value: str = "k1"

    needs = ("logp", "target_logp")

    def terms(self, stats: Stats, context: Context) -> Term:
        delta_BT = jax.lax.stop_gradient(stats.logp_BT - stats.target_logp_BT)
        return Term(context.mask_BT, advantage_BT=-LOG_RATIO_VALUES[self.value](delta_BT))


@dataclasses.dataclass(frozen=True)
class MultiSample(Estimator):
    """Token-level reverse KL from N further draws y^n ~ pi(.|c_t) at each prefix: -(1/N) sum_n sg(l^n - b^n) log pi(y^n).

    Unbiased for the fixed-prefix reverse KL, with 1/N of the noise of one draw; with `leave_one_out` b^n is the mean of the other draws'
    log-ratios, which keeps the mean (N >= 2). The sampled completion itself is not used. Needs `extra_tokens_BTN`, so it is in no default.
    Sources: Kool et al., Buy 4 REINFORCE Samples (2019); AsyncOPD, arXiv 2606.24143.
    """

    leave_one_out: bool = False

    needs = ("logp", "extra_logp", "extra_target_logp")

    def terms(self, stats: Stats, context: Context) -> Term:
        if stats.extra_logp_BTN is None:
            raise ValueError("extra_tokens_BTN is missing: this estimator reads further draws at each position")
        reward_BTN = jax.lax.stop_gradient(stats.extra_target_logp_BTN - stats.extra_logp_BTN)
        draws = reward_BTN.shape[-1]
        if self.leave_one_out:
            if draws < 2:
                raise ValueError(f"extra_tokens_BTN has {draws} draw per position; leave_one_out needs 2")
            reward_BTN = (reward_BTN - jnp.mean(reward_BTN, axis=-1, keepdims=True)) * (draws / (draws - 1))
        return Term(context.mask_BT, local_BT=-jnp.mean(jax.lax.stop_gradient(reward_BTN) * stats.extra_logp_BTN, axis=-1))
