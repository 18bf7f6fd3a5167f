"""Heads: logits not yet made, and the tiles along T in which they are made and used.

Tiles never split B: rows stay on their devices. No array of size [B, T, V] exists, unless a DenseHead brings it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Bytes of one tile of float32 logits; below it a call is a single tile.
TILE_BYTES = 64 * 2**20


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden_BTD", "unembed_DV", "valid_V"], meta_fields=["softcap"])
@dataclasses.dataclass(frozen=True)
class Head:
    """Logits not yet made: softcap * tanh(hidden @ unembed / softcap), or hidden @ unembed without a softcap.

    `valid_V` (bool, None: all) is False on padding rows of the vocabulary: they have no mass.
    """

    hidden_BTD: jax.Array
    unembed_DV: jax.Array
    softcap: float | None = None
    valid_V: jax.Array | None = None

    def window(self, start, size: int) -> "Head":
        """The head of positions [start, start + size)."""
        return dataclasses.replace(self, hidden_BTD=positions(self.hidden_BTD, start, size))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["logits_BTV", "valid_V"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseHead:
    """Logits as they are: the form of proofs and oracles."""

    logits_BTV: jax.Array
    valid_V: jax.Array | None = None

    def window(self, start, size: int) -> "DenseHead":
        """The head of positions [start, start + size)."""
        return dataclasses.replace(self, logits_BTV=positions(self.logits_BTV, start, size))


def topk(head: Head | DenseHead, *, k: int, tile: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids [B, T, K], log-probs [B, T, K], log of the mass outside [B, T]) of the k most probable tokens at temperature 1."""
    hidden = head.logits_BTV if isinstance(head, DenseHead) else head.hidden_BTD

    def one(_, inputs):
        logp = log_softmax(logits(inputs, 1.0))
        top, ids = jax.lax.top_k(logp, k)
        # Summed outside, not 1 less the sum inside, which cancels when the top has nearly all mass.
        outside = jnp.put_along_axis(logp, ids, -jnp.inf, axis=-1, inplace=False)
        return None, (ids, top, jax.nn.logsumexp(outside, axis=-1))

    rows, length = hidden.shape[:2]
    return over_tiles(one, None, head, length, tile or fitting_tile(rows, length, vocabulary(head)))[1]


# ---- logits of one tile


def logits(head: Head | DenseHead, temperature: float) -> jax.Array:
    """Logits [B, t, V] over the temperature, -inf on rows that are not valid; float32, or float64 for float64 heads."""
    if isinstance(head, DenseHead):
        logits = head.logits_BTV.astype(jnp.promote_types(head.logits_BTV.dtype, jnp.float32))
    else:
        accumulate = jnp.promote_types(head.hidden_BTD.dtype, jnp.float32)
        logits = jnp.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV, preferred_element_type=accumulate)
        if head.softcap is not None:
            logits = head.softcap * jnp.tanh(logits / head.softcap)
    logits = logits / temperature
    return logits if head.valid_V is None else jnp.where(head.valid_V[None, None, :], logits, -jnp.inf)


def log_softmax(logits: jax.Array) -> jax.Array:
    return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def pick(x_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The entry of each position's token, [B, T]."""
    return jnp.take_along_axis(x_BTV, tokens_BT[..., None], axis=-1)[..., 0]


# ---- tiles


def fitting_tile(rows: int, length: int, vocab: int) -> int:
    """Positions whose logits fit TILE_BYTES, at least one."""
    return min(max(TILE_BYTES // (4 * rows * vocab), 1), length)


def over_tiles(function, carry, inputs, length: int, tile: int):
    """Runs function(carry, inputs of a tile) -> (carry, arrays [B, t, ...]) along T; the arrays come back whole, [B, T, ...]."""
    full, rest = divmod(length, tile)
    if full == 1:
        carry, whole = function(carry, _window(inputs, 0, tile))
    else:
        carry, pieces = jax.lax.scan(lambda c, i: function(c, _window(inputs, i * tile, tile)), carry, jnp.arange(full))
        whole = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], full * tile, *x.shape[3:]), pieces)
    if rest:
        carry, last = function(carry, _window(inputs, full * tile, rest))
        whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), whole, last)
    return carry, whole


def positions(x: jax.Array, start, size: int, axis: int = 1) -> jax.Array:
    """Positions [start, start + size) of an array with a T axis."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _window(inputs, start, size: int):
    """Positions [start, start + size) of everything; what has more than per-token arrays [B, T, ...] cuts itself."""
    cuts_itself = lambda x: hasattr(x, "window")
    return jax.tree.map(lambda x: x.window(start, size) if cuts_itself(x) else positions(x, start, size), inputs, is_leaf=cuts_itself)


# ---- vocabularies


def vocabulary(head: Head | DenseHead) -> int:
    """Rows of the vocabulary, padding included."""
    return (head.logits_BTV if isinstance(head, DenseHead) else head.unembed_DV).shape[-1]


def first_rows(head: Head | DenseHead, rows: int):
    """The head on the first rows of its vocabulary."""
    if vocabulary(head) == rows:
        return head
    valid_V = None if head.valid_V is None else head.valid_V[:rows]
    if isinstance(head, DenseHead):
        return DenseHead(head.logits_BTV[..., :rows], valid_V)
    return dataclasses.replace(head, unembed_DV=head.unembed_DV[:, :rows], valid_V=valid_V)
