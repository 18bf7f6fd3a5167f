"""Per-token log-ratios -> advantages: which later (or earlier) log-ratios a token answers for."""

import jax
import jax.numpy as jnp

CREDITS = ("token", "to_go", "discounted", "sequence")


def advantages(
    log_ratio_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    credit: str,
    gamma: float = 1.0,
    exact_kl_BT: jax.Array | None = None,
    mean_future: bool = False,
) -> jax.Array:
    """Advantages [B, T] of sampled tokens from l_t = log q(y_t) - log pi(y_t), in nats, reward convention.

        token       A_t = l_t
        to_go       A_t = sum_{u >= t} l_u
        discounted  A_t = sum_{u >= t} gamma^(u - t) l_u
        sequence    A_t = sum_u l_u

    With `exact_kl_BT`, K_u = KL(pi || q) at each prefix, the future terms l_u (u > t) are replaced by their conditional means -K_u
    (Rao-Blackwell). With `mean_future` their sum is divided by the sum of their discounts: the mean of what comes later, of to_go and
    discounted (the length normalisation of Gu et al. 2024, MiniLLM, arXiv 2306.08543, 2.2). Masked tokens (observations of tools,
    padding) neither add nor discount; return crosses them; they get 0.

    Source: Liu et al., Theory of On-Policy Distillation (2026), Theorem 1; gamma: Fu et al., arXiv 2603.25562, eq. 3.
    Raises ValueError for an unknown credit, gamma outside [0, 1], exact_kl_BT with `sequence`, whose terms are not all future, or
    mean_future with a credit that has no future.
    """
    if credit not in CREDITS:
        raise ValueError(f"credit {credit!r} is not known; valid: {', '.join(CREDITS)}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma!r} must be between 0 and 1")
    if credit == "sequence" and exact_kl_BT is not None:
        raise ValueError("credit 'sequence' takes no exact_kl_BT: it sums past terms too; use 'to_go'")
    if mean_future and credit not in ("to_go", "discounted"):
        raise ValueError(f"mean_future is for credit 'to_go' or 'discounted', not {credit!r}")
    mask_BT = mask_BT.astype(bool)
    own_BT = jnp.where(mask_BT, log_ratio_BT, 0)
    if credit == "token":
        return own_BT
    if credit == "sequence":
        return jnp.where(mask_BT, jnp.sum(own_BT, axis=1, keepdims=True), 0)
    future_BT = own_BT if exact_kl_BT is None else jnp.where(mask_BT, -exact_kl_BT, 0).astype(own_BT.dtype)
    discount = gamma if credit == "discounted" else 1.0
    of_later = mean_return if mean_future else future_return
    return jnp.where(mask_BT, own_BT + of_later(future_BT, mask_BT, discount), 0)


def future_return(reward_BT: jax.Array, mask_BT: jax.Array, gamma: float = 1.0) -> jax.Array:
    """sum_{u > t} gamma^(number of unmasked tokens in (t, u]) r_u, by a reverse scan: no powers of gamma that underflow."""

    def step(return_B, inputs):
        reward_B, mask_B = inputs
        later_B = return_B
        return jnp.where(mask_B, reward_B + gamma * return_B, return_B), later_B

    zero_B = jnp.zeros(reward_BT.shape[0], reward_BT.dtype)
    _, later_TB = jax.lax.scan(step, zero_B, (reward_BT.T, mask_BT.astype(bool).T), reverse=True)
    return gamma * later_TB.T


def mean_return(reward_BT: jax.Array, mask_BT: jax.Array, gamma: float = 1.0) -> jax.Array:
    """`future_return` divided by the sum of its discounts: with gamma 1 the mean of the later rewards; 0 where there are none."""
    weight_BT = future_return(mask_BT.astype(reward_BT.dtype), mask_BT, gamma)
    return jnp.where(weight_BT > 0, future_return(reward_BT, mask_BT, gamma) / jnp.where(weight_BT > 0, weight_BT, 1), 0)
