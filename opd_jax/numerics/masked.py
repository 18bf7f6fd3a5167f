"""Masked reductions, and the normalisers that turn per-token losses into the loss of a batch."""

import jax
import jax.numpy as jnp

NORMALISERS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
PAIR_MEAN = "pair_mean"  # that of a term on pairs of rollouts, which have no other


def masked_sum(x_BT: jax.Array, mask_BT: jax.Array, axis=None) -> jax.Array:
    """Sum of the entries where the mask is not 0; what stands elsewhere, NaN included, does not count."""
    return jnp.sum(jnp.where(mask_BT.astype(bool), x_BT, 0), axis=axis)


def masked_mean(x_BT: jax.Array, mask_BT: jax.Array, axis=None) -> jax.Array:
    """Mean of the entries where the mask is not 0; 0 where there are none."""
    count = jnp.sum(mask_BT.astype(bool), axis=axis, dtype=x_BT.dtype)
    return masked_sum(x_BT, mask_BT, axis) / jnp.maximum(count, 1)


def normaliser(kind: str, mask_BT: jax.Array, *, max_length: int) -> tuple[jax.Array, jax.Array]:
    """(weights [B, T], Z): the loss of a batch is sum(weights * loss) / Z.

    Both come from the whole batch, so that shares of microbatches, devices and hosts add up. An all-masked batch has weights 0 and Z 1.
    Only `sequence_sum` and `constant` keep the expected gradient of a sum over tokens (up to a fixed factor) when lengths vary.

        token_mean     global mean over tokens
        sequence_mean  mean over rollouts of each one's mean over tokens (rollouts without a token count in the divisor)
        sequence_sum   sum over tokens / number of rollouts
        constant       sum over tokens / (number of rollouts x max_length)
        pair_mean      sum over tokens / number of pairs, of which each is two rollouts with a token
    """
    if kind not in (*NORMALISERS, PAIR_MEAN):
        raise ValueError(f"normaliser {kind!r} is not known; valid: {', '.join(NORMALISERS)}")
    weights_BT = mask_BT.astype(jnp.float32)
    rollouts = jnp.float32(mask_BT.shape[0])
    if kind == "token_mean":
        return weights_BT, jnp.maximum(jnp.sum(weights_BT), 1.0)
    if kind == "sequence_mean":
        return weights_BT / jnp.maximum(jnp.sum(weights_BT, axis=1, keepdims=True), 1.0), rollouts
    if kind == PAIR_MEAN:
        return weights_BT, jnp.maximum(jnp.sum(jnp.any(mask_BT.astype(bool), axis=1), dtype=jnp.float32) / 2, 1.0)
    return weights_BT, rollouts * (max_length if kind == "constant" else 1)


def balanced(weights_BT: jax.Array, mass_B: jax.Array, domain_B: jax.Array) -> jax.Array:
    """The weights [B, T] of a normaliser, scaled row by row so that each domain that has mass has the same share of it; their sum stays.

    `mass_B`: what a row adds to the sum of its domain (>= 0); `domain_B`: numbers from 0 to B - 1. From the whole batch: call it before a
    split. Where all domains have equal masses, or there is one, nothing changes.
    """
    mass_D = jax.ops.segment_sum(mass_B, domain_B, num_segments=len(domain_B))
    each = jnp.sum(mass_D) / jnp.maximum(jnp.sum(mass_D > 0), 1)
    factor_D = jnp.where(mass_D > 0, each / jnp.where(mass_D > 0, mass_D, 1), 1)
    return weights_BT * factor_D[domain_B][:, None]
