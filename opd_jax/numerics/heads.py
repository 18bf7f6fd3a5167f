"""Heads: logits not yet made, and the tiles along T and V in which they are made and used.

Tiles never split B: rows stay on their devices. No array of size [B, T, V] exists, unless a DenseHead brings it.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Bytes of one tile of float32 logits with whole vocabularies; below it a call is a single tile.
TILE_BYTES = 64 * 2**20
# Rows B * t of such a tile below which its products are slow: each reads the whole unembedding, or adds to a gradient of its size.
LEAST_ROWS = 1024
# Columns of a tile of the vocabulary, and its bytes; a call needs some six of them at once.
COLUMNS = 512
COLUMN_TILE_BYTES = 8 * 2**20


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


def topk(head: Head | DenseHead, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids [B, t, K], log-probs [B, t, K], log of the mass outside [B, t]) of one tile, at temperature 1."""
    logp = log_softmax(logits(head, 1.0))
    top, ids = jax.lax.top_k(logp, k)
    # Summed outside, not 1 less the sum inside, which cancels when the top has nearly all mass.
    outside = jnp.put_along_axis(logp, ids, -jnp.inf, axis=-1, inplace=False)
    return ids, top, jax.nn.logsumexp(outside, axis=-1)


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


# ---- gradients of one tile


def through_softcap(head: Head, gradient_BTV: jax.Array) -> jax.Array:
    """Gradient over logits -> over hidden @ unembed."""
    if head.softcap is None:
        return gradient_BTV
    return gradient_BTV * (1 - jnp.square(logits(dataclasses.replace(head, valid_V=None), head.softcap)))


def operand_gradients(head: Head, gradient_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradient over hidden @ unembed, in their type -> over hidden [B, t, D] and unembed [D, V], summed in float32 or wider."""
    accumulate = jnp.promote_types(head.hidden_BTD.dtype, jnp.float32)
    hidden_BTD = jnp.einsum("btv,dv->btd", gradient_BTV, head.unembed_DV, preferred_element_type=accumulate)
    return hidden_BTD, jnp.einsum("btd,btv->dv", head.hidden_BTD, gradient_BTV, preferred_element_type=accumulate)


# ---- tiles


class Tiling(NamedTuple):
    """Positions along T and columns of the vocabulary that are made at once; columns None: all of them."""

    positions: int
    columns: int | None = None


def tiling(rows: int, length: int, vocab: int, *, columns: bool) -> Tiling:
    """The tiles of a call: whole vocabularies of as many positions as fit TILE_BYTES, at least one, whatever that needs.

    With `columns`, for statistics that have a form by tiles of the vocabulary (vocabulary.py): that form, where fewer than LEAST_ROWS rows
    of whole vocabularies fit, and there are more. It makes each logit once more than the other, but the peak does not grow with V, nor with
    T, nor with B up to the 4096 rows of one tile.
    """
    fitting = min(TILE_BYTES // (4 * rows * vocab), length)
    if not columns or fitting * rows >= min(rows * length, LEAST_ROWS):
        return Tiling(max(fitting, 1))
    return Tiling(min(max(COLUMN_TILE_BYTES // (4 * rows * COLUMNS), 1), length), COLUMNS)


def over_tiles(function, carry, inputs, length: int, tile: int, live_BT: jax.Array | None = None):
    """Runs function(carry, inputs of a tile) -> (carry, arrays [B, t, ...]) along T; the arrays come back whole, [B, T, ...].

    Of several tiles those without a True in `live_BT` are not run: there the arrays are 0, and the carry is as it was.
    """
    full, rest = divmod(length, tile)

    def one(carry, start, size):
        run = lambda carry: function(carry, _window(inputs, start, size))
        if live_BT is None or tile >= length:
            return run(carry)
        nothing = lambda carry: (carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, carry)[1]))
        return jax.lax.cond(jnp.any(positions(live_BT, start, size)), run, nothing, carry)

    if full == 1:
        carry, whole = one(carry, 0, tile)
    else:
        carry, pieces = jax.lax.scan(lambda c, i: one(c, i * tile, tile), carry, jnp.arange(full))
        whole = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], full * tile, *x.shape[3:]), pieces)
    if rest:
        carry, last = one(carry, full * tile, rest)
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
