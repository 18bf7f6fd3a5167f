"""How any model reads: a transformer of this project, or a model of the user's that brings the same three methods.

Sampling, scoring and learning call these functions and nothing else of a model.
"""

from typing import Any, Protocol

import jax

from opd_jax import types
from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig
from opd_jax.numerics.token_stats import DenseHead, Head


class Model(Protocol):
    """A model of the user's; hashable, because it is a static argument of jitted functions. models/nnx_module.py makes one."""

    vocab_size: int
    max_position_embeddings: int  # tokens
    pad_token_id: int | None
    valid_vocab_size: int | None  # rows from here on are padding

    def hidden(self, params: Any, view: types.View) -> Head | DenseHead: ...

    def prefill(self, params: Any, tokens_BS: jax.Array, mask_BS: jax.Array, *, cache_length: int) -> tuple[jax.Array, Any]: ...

    def decode_step(self, params: Any, tokens_B: jax.Array, cache: Any) -> tuple[jax.Array, Any]: ...


def hidden(params: Any, config: ModelConfig | Model, view: types.View) -> Head | DenseHead:
    """What predicts each token of a completion. See transformer.hidden."""
    return transformer.hidden(params, config, view) if isinstance(config, ModelConfig) else config.hidden(params, view)


def prefill(params: Any, config: ModelConfig | Model, tokens_BS: jax.Array, mask_BS: jax.Array, *, cache_length: int):
    """(logits [B, V] of the token after left-padded prompts, cache). See transformer.prefill."""
    if isinstance(config, ModelConfig):
        return transformer.prefill(params, config, tokens_BS, mask_BS, cache_length=cache_length)
    return config.prefill(params, tokens_BS, mask_BS, cache_length=cache_length)


def decode_step(params: Any, config: ModelConfig | Model, tokens_B: jax.Array, cache: Any):
    """(logits [B, V] of the next token, cache with one more). See transformer.decode_step."""
    if isinstance(config, ModelConfig):
        return transformer.decode_step(params, config, tokens_B, cache)
    return config.decode_step(params, tokens_B, cache)
