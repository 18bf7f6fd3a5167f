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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["logits_BTV", "valid_V"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseHead:
    """Logits as they are: the form of proofs and oracles."""

    logits_BTV: jax.Array
    valid_V: jax.Array | None = None


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


def _window(inputs, start, size: int):
    """Positions [start, start + size) of everything that has a T axis; unembedding and valid rows are shared by all tiles."""

    def cut(x):
        if isinstance(x, Head):
            return dataclasses.replace(x, hidden_BTD=cut(x.hidden_BTD))
        if isinstance(x, DenseHead):
            return dataclasses.replace(x, logits_BTV=cut(x.logits_BTV))
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    return jax.tree.map(cut, inputs, is_leaf=lambda x: isinstance(x, Head | DenseHead))


# ---- vocabularies


def vocabulary(head: Head | DenseHead) -> int:
    """Rows of the vocabulary, padding included."""
    return (head.logits_BTV if isinstance(head, DenseHead) else head.unembed_DV).shape[-1]


def share_vocabulary(student, teacher):
    """Cuts both heads to the rows that both have; a teacher of None stays None."""
    if teacher is None:
        return student, None
    common = min(vocabulary(student), vocabulary(teacher))
    return _first_rows(student, common), _first_rows(teacher, common)


def _first_rows(head, rows: int):
    if vocabulary(head) == rows:
        return head
    valid_V = None if head.valid_V is None else head.valid_V[:rows]
    if isinstance(head, DenseHead):
        return DenseHead(head.logits_BTV[..., :rows], valid_V)
    return dataclasses.replace(head, unembed_DV=head.unembed_DV[:, :rows], valid_V=valid_V)
