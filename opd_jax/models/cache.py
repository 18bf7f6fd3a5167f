"""The keys and values that a decoding model remembers."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax import parallel


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
    prompt = mask_BS.shape[1]
    if parallel.splits_length():  # generating repeats itself over the devices along the length
        whole = lambda x_BKSH: parallel.constrain(x_BKSH, "batch", "kv_heads", None, None)
        keys_BKSH, values_BKSH = (tuple(map(whole, each)) for each in (keys_BKSH, values_BKSH))
    return grown(Cache(keys_BKSH, values_BKSH, mask_BS, mask_BS.sum(1, dtype=jnp.int32), jnp.int32(prompt)), length)


def grown(cache: Cache, length: int) -> Cache:
    """The cache with `length` slots, the new ones empty."""
    slots = cache.mask_BL.shape[1]
    assert length >= slots, f"{length} slots are fewer than the {slots} of the cache"

    def pad(x, axis):
        return jnp.pad(x, [(0, length - slots if i == axis else 0) for i in range(x.ndim)])

    keys, values = (tuple(pad(x_BKLH, 2) for x_BKLH in each) for each in (cache.keys_BKLH, cache.values_BKLH))
    return cache.replace(keys_BKLH=keys, values_BKLH=values, mask_BL=pad(cache.mask_BL, 1))


def write(slots_BKLH: jax.Array, new_BKH: jax.Array, index: jax.Array) -> jax.Array:
    """`slots_BKLH` with one token's keys or values in slot `index`."""
    return _put(slots_BKLH, new_BKH[:, :, None, :], (0, 0, index, 0))


def placed(cache: Cache, row: jax.Array, keys_KSH: list[jax.Array], values_KSH: list[jax.Array], mask_S: jax.Array) -> Cache:
    """The cache with a prompt in one row, right before the slot that is filled next; what the row held is forgotten."""
    start = cache.index - len(mask_S)

    def put(each_BKLH, each_KSH):
        return tuple(_put(x_BKLH, x_KSH[None], (row, 0, start, 0)) for x_BKLH, x_KSH in zip(each_BKLH, each_KSH, strict=True))

    mask_L = jax.lax.dynamic_update_slice(jnp.zeros(cache.mask_BL.shape[1], bool), mask_S, (start,))
    return cache.replace(
        keys_BKLH=put(cache.keys_BKLH, keys_KSH),
        values_BKLH=put(cache.values_BKLH, values_KSH),
        mask_BL=cache.mask_BL.at[row].set(mask_L),
        position_B=cache.position_B.at[row].set(mask_S.sum(dtype=jnp.int32)),
    )


def moved(cache: Cache, index: int) -> Cache:
    """The cache with its last `index` slots at its front, and `index` to be filled next; those behind are empty."""
    length = cache.mask_BL.shape[1]

    def move(x, axis):
        return jax.lax.dynamic_slice_in_dim(x, cache.index - index, index, axis)

    keys, values = (tuple(move(x_BKLH, 2) for x_BKLH in each) for each in (cache.keys_BKLH, cache.values_BKLH))
    return grown(Cache(keys, values, move(cache.mask_BL, 1), cache.position_B, jnp.int32(index)), length)


def _put(slots: jax.Array, new: jax.Array, start: tuple) -> jax.Array:
    new = new.astype(slots.dtype)
    put = lambda slots, new: jax.lax.dynamic_update_slice(slots, new, start)
    if slots.dtype != jnp.bfloat16:
        return put(slots, new)
    # A CPU would convert all slots to float32 and back for one: 0.2 ms for 393,216 numbers, 12 times a step of 6 layers. Bits it leaves.
    bits, floats = (functools.partial(jax.lax.bitcast_convert_type, new_dtype=kind) for kind in (jnp.uint16, jnp.bfloat16))
    return jax.lax.platform_dependent(slots, new, cpu=lambda slots, new: floats(put(bits(slots), bits(new))), default=put)
