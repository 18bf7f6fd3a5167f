"""Score-function estimators: advantages of the sampled tokens, with baselines and behaviour corrections."""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from opd_jax.numerics import baselines, importance
from opd_jax.numerics import credit as credit_lib
from opd_jax.numerics.estimators.base import Context, Estimator, Term
from opd_jax.numerics.token_stats import Stats


@dataclasses.dataclass(frozen=True)
class Credited(Estimator, abc.ABC):
    """What ScoreFunction and LocalToGo share: an advantage from rewards of later tokens, less a baseline, corrected for another law.

    Baselines of the state and leave_one_out keep the expected gradient, because E[s_t | c_t] = 0 and other rollouts are independent;
    batch_mean and position_mean include the own sample and do not (baselines.across_rows).
    Off-policy, importance "cumulative" weighs each reward by what is known when it is given (per-decision importance sampling): l_u by
    rho_{<=u}, K_u by rho_{<u}; "sequence" weighs all by the ratio of the completion. Both are unbiased where the law that sampled covers
    pi; the others are not (importance.weights). Claims are made on-policy, where all weights are 1.
    With `mean_future` what comes later counts by its mean (credit.mean_return), which is biased for the sequence level.
    """

    gamma: float = 1.0
    baseline: str = "none"
    importance: str = "none"
    clip: float = 2.0
    mean_future: bool = False

    @abc.abstractmethod
    def advantage(self, stats: Stats, mask_BT: jax.Array, w_known_BT: jax.Array | None, w_drawn_BT: jax.Array | None) -> jax.Array:
        """Advantages [B, T] before the baseline; rewards known before a token is drawn get the first weight, others the second."""

    def __post_init__(self):
        importance.check(self.importance, self.clip)
        if self.baseline not in baselines.BASELINES:
            raise ValueError(f"estimator.baseline = {self.baseline!r} is not known; valid: {', '.join(baselines.BASELINES)}")

    @property
    def looks_across(self) -> bool:
        return self.baseline in baselines.ACROSS_ROWS

    def prepare(self, stats: Stats, context: Context) -> Context:
        if not self.looks_across:
            return context
        advantage_BT = self.advantage(stats, context.mask_BT, None, None)
        return dataclasses.replace(
            context, baseline_BT=baselines.across_rows(advantage_BT, context.mask_BT, context.group_B, kind=self.baseline)
        )

    def _baseline(self, stats: Stats, context: Context) -> jax.Array | float:
        if self.looks_across:
            return context.baseline_BT
        return {"none": lambda: 0.0, "kl": lambda: -stats.kl_BT, "optimal": lambda: stats.optimal_baseline_BT}[self.baseline]()

    def _weighed(self, stats: Stats, context: Context) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """(advantages less their baseline, weights of a local term, weights of the advantages)."""
        mask_BT, baseline_BT = context.mask_BT, self._baseline(stats, context)
        if self.importance == "none" or context.behaviour_logp_BT is None:
            return self.advantage(stats, mask_BT, None, None) - baseline_BT, None, None
        log_rho_BT = context.log_ratios(stats.logp_BT)
        w_local_BT, w_score_BT = importance.weights(log_rho_BT, correction=self.importance, clip=self.clip)
        if self.importance != "cumulative":
            return self.advantage(stats, mask_BT, None, None) - baseline_BT, w_local_BT, w_score_BT
        return self.advantage(stats, mask_BT, w_local_BT, w_score_BT) - w_score_BT * baseline_BT, w_local_BT, None

    def _needs(self, *names: str) -> tuple[str, ...]:
        own = {"kl": ("kl",), "optimal": ("optimal_baseline",)}.get(self.baseline, ())
        return tuple(dict.fromkeys(("logp", *names, *own)))


@dataclasses.dataclass(frozen=True)
class ScoreFunction(Credited):
    """REINFORCE on log-ratios: A_t from `credit.advantages` less a baseline, loss -sum_t sg(A_t) log pi(y_t).

    to_go and sequence credit are unbiased for the sequence-level reverse KL: the past terms have mean 0 (E[s_t | c_t] = 0), and so has the
    gradient of the reward itself. token credit is unbiased for the fixed-prefix reverse KL, and misses g2 of the sequence level. Discounts
    between are biased for both. With `exact_future` the future log-ratios are replaced by their conditional means -K_u (tower rule): the
    same mean, less noise. The baseline -K_t makes A_t = l_t + K_t of token credit (vOPD); it does not always lower the variance.
    Sources: Liu et al., Theory of On-Policy Distillation (2026), Theorems 1 and 2; Fu et al., arXiv 2603.25562, eq. 2 and 3; vOPD: arXiv
    2605.07865; leave_one_out: Kool et al., Buy 4 REINFORCE Samples (2019); optimal: arXiv 2602.07078.
    """

    credit: str = "token"
    exact_future: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.importance == "cumulative" and self.credit == "sequence":
            raise ValueError(
                "estimator.importance = 'cumulative' does not go with estimator.credit = 'sequence', whose past terms need the weights of "
                "later tokens; use estimator.importance = 'sequence', or estimator.credit = 'to_go'"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return self._needs("target_logp", "kl") if self.exact_future else self._needs("target_logp")

    def advantage(self, stats: Stats, mask_BT: jax.Array, w_known_BT: jax.Array | None, w_drawn_BT: jax.Array | None) -> jax.Array:
        log_ratio_BT = jax.lax.stop_gradient(stats.target_logp_BT - stats.logp_BT)
        exact_kl_BT = stats.kl_BT if self.exact_future else None
        if w_drawn_BT is not None:
            log_ratio_BT = w_drawn_BT * log_ratio_BT
            exact_kl_BT = w_known_BT * exact_kl_BT if self.exact_future else None
        choices = {"credit": self.credit, "gamma": self.gamma, "mean_future": self.mean_future}
        return credit_lib.advantages(log_ratio_BT, mask_BT, exact_kl_BT=exact_kl_BT, **choices)

    def terms(self, stats: Stats, context: Context) -> Term:
        advantage_BT, _, w_score_BT = self._weighed(stats, context)
        return Term(context.mask_BT, advantage_BT=advantage_BT, w_score_BT=w_score_BT)


@dataclasses.dataclass(frozen=True)
class LocalToGo(Credited):
    """The exact local term, and the future KLs as the advantage of the sampled token: A_t = -sum_{u > t} gamma^(u - t) K_u.

    With gamma 1 unbiased for the sequence-level reverse KL: the local term is g1 exactly at each prefix, the advantage gives g2.
    Source: the product rule on sum_t E[K_t]; Liu et al., Theory of On-Policy Distillation (2026), Theorem 2.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        return self._needs("local", "kl")

    def advantage(self, stats: Stats, mask_BT: jax.Array, w_known_BT: jax.Array | None, w_drawn_BT: jax.Array | None) -> jax.Array:
        kl_BT = stats.kl_BT if w_known_BT is None else w_known_BT * stats.kl_BT
        of_later = credit_lib.mean_return if self.mean_future else credit_lib.future_return
        return of_later(jnp.where(mask_BT.astype(bool), -kl_BT, 0), mask_BT, self.gamma)

    def terms(self, stats: Stats, context: Context) -> Term:
        advantage_BT, w_local_BT, w_score_BT = self._weighed(stats, context)
        return Term(context.mask_BT, stats.local_BT, advantage_BT, w_local_BT=w_local_BT, w_score_BT=w_score_BT)
