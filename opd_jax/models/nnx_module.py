"""A flax `nnx.Module` as a model of this project: split once into a plain pytree, merged inside each call."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from opd_jax import types
from opd_jax.models.alignment import states_before
from opd_jax.numerics.token_stats import DenseHead
from opd_jax.types import UserError


@flax.struct.dataclass
class TokenCache:
    """What has been read so far; a module without a cache of its own reads it again for each token."""

    tokens_BL: jax.Array
    mask_BL: jax.Array
    index: jax.Array  # int32 scalar, the slot that the next token fills


@dataclasses.dataclass(frozen=True)
class ModuleModel:
    """Reads with a module `module(tokens_BL, mask_BL) -> logits [B, L, V]`, causal, indifferent to what stands where the mask is False.

    Decoding reads the whole sequence for each token: time grows with the square of the length, and scoring holds [B, L, V] logits.
    """

    graphdef: nnx.GraphDef
    vocab_size: int
    max_position_embeddings: int  # tokens
    pad_token_id: int | None = None
    valid_vocab_size: None = None  # every logit is of a token

    def hidden(self, params: dict, view: types.View) -> DenseHead:
        return DenseHead(states_before(view, functools.partial(self._logits, params)))

    def prefill(self, params: dict, tokens_BS: jax.Array, mask_BS: jax.Array, *, cache_length: int) -> tuple[jax.Array, TokenCache]:
        empty = ((0, 0), (0, cache_length - tokens_BS.shape[1]))
        cache = TokenCache(jnp.pad(tokens_BS, empty), jnp.pad(mask_BS.astype(bool), empty), jnp.int32(tokens_BS.shape[1]))
        return self._logits(params, tokens_BS, mask_BS.astype(bool))[:, -1], cache

    def decode_step(self, params: dict, tokens_B: jax.Array, cache: TokenCache) -> tuple[jax.Array, TokenCache]:
        write = lambda x_BL, new_B: jax.lax.dynamic_update_slice_in_dim(x_BL, new_B[:, None], cache.index, axis=1)
        tokens_BL, mask_BL = write(cache.tokens_BL, tokens_B), write(cache.mask_BL, jnp.ones(tokens_B.shape, bool))
        logits_BLV = self._logits(params, tokens_BL, mask_BL)
        next_BV = jax.lax.dynamic_index_in_dim(logits_BLV, cache.index, axis=1, keepdims=False)
        return next_BV, TokenCache(tokens_BL, mask_BL, cache.index + 1)

    def _logits(self, params: dict, tokens_BL: jax.Array, mask_BL: jax.Array) -> jax.Array:
        logits_BLV = nnx.merge(self.graphdef, params)(tokens_BL, mask_BL)
        return logits_BLV.astype(jnp.promote_types(logits_BLV.dtype, jnp.float32))


def split(
    module: nnx.Module, *, vocab_size: int, max_position_embeddings: int, pad_token_id: int | None = None
) -> tuple[dict, ModuleModel]:
    """(parameters as a pytree of dicts, the model to pass wherever a model config is asked for).

    `nnx.update(module, params)` puts trained parameters back. Raises UserError for a module whose result depends on more than parameters
    and tokens, such as one with dropout or running statistics.
    """
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    if jax.tree.leaves(rest):
        path, variable = next(iter(nnx.to_flat_state(rest)))
        raise UserError(
            f"module {type(module).__name__}: {'.'.join(map(str, path))} is a {type(variable).__name__}, not a parameter; build the module "
            "without dropout, caches and running statistics"
        )
    return nnx.to_pure_dict(params), ModuleModel(graphdef, vocab_size, max_position_embeddings, pad_token_id)
