"""Corrections for completions that another law wrote: older parameters, a temperature, a truncated law.

rho_t = pi(y_t | c_t) / mu(y_t | c_t), mu the law that sampled. Masked tokens (observations, padding) have ratio 1: the environment is the
same under both laws.
"""

import jax
import jax.numpy as jnp

CORRECTIONS = ("none", "token", "clip", "drop", "sequence", "cumulative")
MAX_LOG_WEIGHT = 20.0  # a larger weight, e^20, would be the whole batch; it is cut, so that one token cannot make an infinity


def ratios(logp_BT: jax.Array, behaviour_logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """log rho_t in nats [B, T], constant (stop_gradient), 0 where the mask is 0."""
    return jax.lax.stop_gradient(jnp.where(mask_BT.astype(bool), logp_BT - behaviour_logp_BT, 0))


def check(correction: str, clip: float) -> None:
    """Raises ValueError for an unknown correction, or a clip that leaves no room."""
    if correction not in CORRECTIONS:
        raise ValueError(f"estimator.importance = {correction!r} is not known; valid: {', '.join(CORRECTIONS)}")
    if not clip >= 1:
        raise ValueError(f"estimator.clip = {clip!r} must be at least 1")


def weights(log_rho_BT: jax.Array, *, correction: str, clip: float) -> tuple[jax.Array, jax.Array]:
    """(weights of a local term, weights of a term on the sampled token), both [B, T].

        token       rho_t; corrects neither the prefix of a local term nor that of a sampled one: biased
        clip        min(rho_t, clip): biased, bounded
        drop        rho_t where 1 / clip <= rho_t <= clip, otherwise 0: biased, bounded
        sequence    the product over all tokens of the completion: unbiased where mu covers pi, of the largest variance
        cumulative  rho_{<t} for what is known before the token, rho_{<=t} for what speaks of it: unbiased where mu covers pi

    Sources: Precup, Sutton and Singh, Eligibility Traces for Off-Policy Policy Evaluation (2000); clip: Espeholt et al., IMPALA (2018).
    Raises ValueError for an unknown correction, or clip below 1.
    """
    check(correction, clip)
    through_BT = jnp.cumsum(log_rho_BT, axis=1)
    rho_BT = _bounded(log_rho_BT)
    if correction == "none":
        return jnp.ones_like(rho_BT), jnp.ones_like(rho_BT)
    if correction == "sequence":
        whole_BT = jnp.broadcast_to(_bounded(through_BT[:, -1:]), rho_BT.shape)
        return whole_BT, whole_BT
    if correction == "cumulative":
        return _bounded(through_BT - log_rho_BT), _bounded(through_BT)
    if correction == "clip":
        rho_BT = jnp.minimum(rho_BT, clip)
    if correction == "drop":
        rho_BT = jnp.where((rho_BT <= clip) & (rho_BT * clip >= 1), rho_BT, 0)
    return rho_BT, rho_BT


def _bounded(log_weight: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(log_weight, MAX_LOG_WEIGHT))
