"""Preferences between pairs of completions: DPO's loss as an advantage that both completions of a pair share."""

import dataclasses

import jax
import jax.numpy as jnp

from opd_jax.numerics import masked
from opd_jax.numerics.estimators.base import Context, Estimator, Term
from opd_jax.numerics.token_stats import Signal, Stats


@dataclasses.dataclass(frozen=True)
class Preference(Estimator):
    """-log sigmoid(Delta) of each pair, Delta = beta [(log pi - log r)(y+) - (log pi - log r)(y-)], log-probs of whole completions.

    Its gradient is that of the advantages A = +-beta sigmoid(-Delta), a constant of all tokens of y+ (+) and y- (-); where pi = r it is
    beta/2 (grad log pi(y-) - grad log pi(y+)). The target is the reference r. Pairs come from `context.partner_B` (number of the other row,
    in the whole batch) and `context.sign_B` (1 preferred, -1 not, 0 in no pair); rows without a pair have mask 0. Delta needs both rows of
    a pair, so that `prepare` makes it before the batch is split.

    The completions are data: how their law moves with pi has no gradient. The value of a pair is spread over the tokens of its rows, half
    for each, so that with the normaliser pair_mean the loss is the mean of -log sigmoid(Delta) over pairs.
    Sources: Rafailov et al. 2023, DPO, arXiv 2305.18290, eq. 7; on the policy's own pairs Guo et al. 2024, arXiv 2402.04792.
    """

    beta: float = 0.1

    needs = ("logp", "target_logp")

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"preference.beta = {self.beta!r} must be above 0")

    @property
    def looks_across(self) -> bool:
        return True

    def prepare(self, stats: Stats, context: Context) -> Context:
        reward_B = self.beta * masked.masked_sum(stats.logp_BT - stats.target_logp_BT, context.mask_BT, axis=1)
        delta_B = context.sign_B * (reward_B - reward_B[context.partner_B])
        return dataclasses.replace(context, delta_B=jax.lax.stop_gradient(delta_B))

    def terms(self, stats: Stats, context: Context) -> Term:
        advantage_B = context.sign_B * self.beta * jax.nn.sigmoid(-context.delta_B)
        advantage_BT = jnp.broadcast_to(advantage_B[:, None], stats.logp_BT.shape)
        tokens_B = jnp.maximum(jnp.sum(context.mask_BT != 0, axis=1), 1)
        value_B = jnp.abs(context.sign_B) * jax.nn.softplus(-context.delta_B) / (2 * tokens_B)
        # -sg(A) log pi has the gradient and not the value: this constant gives it.
        local_BT = jax.lax.stop_gradient(value_B[:, None] + advantage_BT * stats.logp_BT)
        return Term(context.mask_BT, local_BT=local_BT, advantage_BT=advantage_BT)


def build(*, beta: float, student_temperature: float) -> Preference:
    """The estimator of the config block `preference`; the reference is at the student's temperature. Raises ValueError."""
    return Preference(
        name="preference",
        claim="The gradient of the DPO loss of these pairs, their completions taken as data",
        formula="A_t = +-beta sigmoid(-Delta)",
        reference="Rafailov et al., DPO, arXiv 2305.18290, eq. 7",
        target="",
        unbiased=True,
        signal=Signal("nll", student_temperature=student_temperature, teacher_temperature=student_temperature),
        beta=beta,
    )
