"""Masked reductions, and the normalisers that turn per-token losses into the loss of a batch."""

import jax
import jax.numpy as jnp

NORMALISERS = ("token_mean", "sequence_mean", "sequence_sum", "constant")


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
    """
    if kind not in NORMALISERS:
        raise ValueError(f"normaliser {kind!r} is not known; valid: {', '.join(NORMALISERS)}")
    weights_BT = mask_BT.astype(jnp.float32)
    rollouts = jnp.float32(mask_BT.shape[0])
    if kind == "token_mean":
        return weights_BT, jnp.maximum(jnp.sum(weights_BT), 1.0)
    if kind == "sequence_mean":
        return weights_BT / jnp.maximum(jnp.sum(weights_BT, axis=1, keepdims=True), 1.0), rollouts
    return weights_BT, rollouts * (max_length if kind == "constant" else 1)
