"""Tiles of the vocabulary: columns of the unembedding, and what is gathered over them one tile at a time.

Letters beside those of types.py: W columns of a tile, M ids that are looked up at each position.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from opd_jax.numerics import heads
from opd_jax.numerics.heads import Head

# Blocks of the vocabulary, at most. Every tile takes the same share of each: where the vocabulary lies across as many devices, or a divisor
# of it, none of them sends columns to another or waits for it.
_BLOCKS = 16


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns [start, start + size) of each block of `length`, W = blocks * size in all, of which another tile has the first `skip`."""

    start: jax.Array | int
    size: int
    length: int
    blocks: int
    skip: jax.Array | None = None

    def cut(self, x: jax.Array) -> jax.Array:
        """These columns of an array whose last axis is the vocabulary."""
        blocked = bits(x).reshape(*x.shape[:-1], self.blocks, self.length)
        cut = jax.lax.dynamic_slice_in_dim(blocked, self.start, self.size, axis=-1)
        return of_bits(cut.reshape(*x.shape[:-1], self.blocks * self.size), x.dtype)

    def add(self, x: jax.Array, tile: jax.Array, dtype) -> jax.Array:
        """bits(x + tile): the tile has these columns of it. Takes bits(x) of this type, so that they stay bits from tile to tile."""
        blocked = x.reshape(*x.shape[:-1], self.blocks, self.length)
        total = bits((of_bits(self.cut(x), dtype).astype(tile.dtype) + tile).astype(dtype))
        total = total.reshape(*x.shape[:-1], self.blocks, self.size)
        return jax.lax.dynamic_update_slice_in_dim(blocked, total, self.start, axis=-1).reshape(x.shape)

    def of(self, head: Head) -> Head:
        """The head on these columns; those that another tile has are without mass, as padding rows are."""
        valid_W = None if head.valid_V is None else self.cut(head.valid_V)
        if self.skip is not None:
            new_W = jnp.tile(jnp.arange(self.size) >= self.skip, self.blocks)
            valid_W = new_W if valid_W is None else valid_W & new_W
        return dataclasses.replace(head, unembed_DV=self.cut(head.unembed_DV), valid_V=valid_W)

    def places(self, ids: jax.Array) -> jax.Array:
        """Where ids stand in the tile; W for those that do not."""
        block, place = ids // self.length, ids % self.length - self.start
        here = (place >= (0 if self.skip is None else self.skip)) & (place < self.size) & (block < self.blocks)
        return jnp.where(here, block * self.size + place, self.blocks * self.size)

    def ids(self, places: jax.Array) -> jax.Array:
        """The ids of places in the tile; behind all others, of columns that another tile has."""
        ids = places // self.size * self.length + self.start + places % self.size
        return ids if self.skip is None else jnp.where(places % self.size >= self.skip, ids, self.blocks * self.length)


def bits(x: jax.Array) -> jax.Array:
    """16-bit floats as integers, others as they are: to cut or write some floats of 16 bits, XLA on a CPU makes all of their array wide."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def of_bits(x: jax.Array, dtype) -> jax.Array:
    """The floats of `bits`."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def over_columns(function: Callable, carry, vocab: int, width: int):
    """Runs carry = function(carry, columns) over the vocabulary in tiles of about `width` columns.

    All tiles are of one size, so that one loop has them: a last one of another would need a copy of what is carried, such as the gradient
    of an unembedding. It goes back over columns of the one before it and skips them.
    """
    blocks = math.gcd(vocab, _BLOCKS)
    length = vocab // blocks
    size = min(max(width // blocks, 1), length)
    tiles = -(-length // size)
    if tiles == 1:
        return function(carry, Columns(0, size, length, blocks))

    def one(i, carry):
        if length % size == 0:
            return function(carry, Columns(i * size, size, length, blocks))
        start = jnp.minimum(i * size, length - size)
        return function(carry, Columns(start, size, length, blocks, i * size - start))

    return jax.lax.fori_loop(0, tiles, one, carry)


# ---- what is gathered


LogSum = tuple[jax.Array, jax.Array]  # (largest so far, sum of exp(x - largest)), each [B, t]


def no_log_sum(shape: tuple[int, ...], dtype) -> LogSum:
    return jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype)


def add_log_sum(seen: LogSum, x_BTW: jax.Array) -> LogSum:
    """log sum exp with the largest apart, whose rounding grows with the number of tiles in the last bit alone."""
    largest, total = seen
    new = jnp.maximum(largest, jnp.max(x_BTW, axis=-1))
    shift = jnp.where(jnp.isneginf(new), 0, new)
    return new, total * jnp.exp(largest - shift) + jnp.sum(jnp.exp(x_BTW - shift[..., None]), axis=-1)


def log_sum(seen: LogSum) -> jax.Array:
    return jnp.log(seen[1]) + jnp.where(jnp.isneginf(seen[0]), 0, seen[0])


def look_up(x_BTW: jax.Array, ids_BTM: jax.Array, columns: Columns) -> jax.Array:
    """The entries of ids, 0 for those that are not in the tile: a sum over tiles has each once."""
    places = columns.places(ids_BTM)
    width = x_BTW.shape[-1]
    return jnp.where(places < width, jnp.take_along_axis(x_BTW, jnp.minimum(places, width - 1), axis=-1), 0)


def put(x_BTW: jax.Array, ids_BTM: jax.Array, values_BTM: jax.Array | float, columns: Columns, *, add: bool = False) -> jax.Array:
    """The tile with values set, or added, at ids; those that are elsewhere are dropped."""
    values_BTM = jnp.broadcast_to(jnp.asarray(values_BTM, x_BTW.dtype), ids_BTM.shape)
    one = lambda row_W, places_M, values_M: row_W.at[places_M].add(values_M) if add else row_W.at[places_M].set(values_M)
    return jax.vmap(jax.vmap(one))(x_BTW, columns.places(ids_BTM), values_BTM)


Top = tuple[jax.Array, jax.Array]  # (values, ids), each [B, t, K], largest first, ties by the lower id


def no_top(shape: tuple[int, ...], k: int, vocab: int, dtype) -> Top:
    """Nothing so far: behind everything that has an id."""
    return jnp.full((*shape, k), -jnp.inf, dtype), jnp.full((*shape, k), vocab, jnp.int32)


def add_top(top: Top, x_BTW: jax.Array, columns: Columns) -> Top:
    """The k largest of those so far and a tile's. Ids of a tile lie between those of others: a sort by value and id merges them."""
    k, width = top[0].shape[-1], x_BTW.shape[-1]
    values, places = jax.lax.top_k(x_BTW, min(k, width))
    values = jnp.concatenate([top[0], values], axis=-1)
    ids = jnp.concatenate([top[1], columns.ids(places)], axis=-1)
    values, ids = jax.lax.sort((-values, ids), dimension=-1, num_keys=2)
    return -values[..., :k], ids[..., :k]


def begin(head: Head):
    """(shape [B, t], type) of what is gathered of a head."""
    return head.hidden_BTD.shape[:2], jnp.promote_types(head.hidden_BTD.dtype, jnp.float32)


def topk(head: Head, k: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What heads.topk gives of a tile, from tiles of the vocabulary."""
    shape, dtype = begin(head)
    vocab = heads.vocabulary(head)

    def find(seen, columns):
        z_BTW = heads.logits(columns.of(head), 1.0)
        return add_log_sum(seen[0], z_BTW), add_top(seen[1], z_BTW, columns)

    def sum_outside(seen, columns):
        logits_BTW = heads.logits(columns.of(head), 1.0)
        return add_log_sum(seen, put(logits_BTW, ids_BTK, -jnp.inf, columns))

    total, (top_BTK, ids_BTK) = over_columns(find, (no_log_sum(shape, dtype), no_top(shape, k, vocab, dtype)), vocab, width)
    outside = over_columns(sum_outside, no_log_sum(shape, dtype), vocab, width)
    return ids_BTK, top_BTK - log_sum(total)[..., None], log_sum(outside) - log_sum(total)
