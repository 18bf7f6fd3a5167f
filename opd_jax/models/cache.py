"""The keys and values that a decoding model remembers."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Cache:
    """One slot per token read, prompt padding included. K counts key/value heads, L slots; logical axes (batch, kv_heads, None, None)."""

    keys_BKLH: tuple[jax.Array, ...]  # one array per layer, after the rotation by position
    values_BKLH: tuple[jax.Array, ...]
    mask_BL: jax.Array  # bool, True where a slot holds a real token
    position_B: jax.Array  # int32, position of the next token in each row
    index: jax.Array  # int32 scalar, the slot that the next token fills in every row


def from_prompt(keys_BKSH: tuple[jax.Array, ...], values_BKSH: tuple[jax.Array, ...], mask_BS: jax.Array, length: int) -> Cache:
    """A cache with `length` slots, the first S of them filled."""
    batch, prompt = mask_BS.shape
    assert length >= prompt, f"cache_length = {length} is below the prompt's {prompt} slots"

    def grow(x_BKSH):
        return jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, length - prompt), (0, 0)))

    return Cache(
        keys_BKLH=tuple(map(grow, keys_BKSH)),
        values_BKLH=tuple(map(grow, values_BKSH)),
        mask_BL=jnp.pad(mask_BS, ((0, 0), (0, length - prompt))),
        position_B=mask_BS.sum(1, dtype=jnp.int32),
        index=jnp.int32(prompt),
    )


def write(slots_BKLH: jax.Array, new_BKH: jax.Array, index: jax.Array) -> jax.Array:
    """`slots_BKLH` with one token's keys or values in slot `index`."""
    return jax.lax.dynamic_update_slice_in_dim(slots_BKLH, new_BKH[:, :, None, :].astype(slots_BKLH.dtype), index, axis=2)
