"""Tiny models and batches that several test files share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models import config as model_config
from opd_jax.models import transformer
from opd_jax.numerics.estimators import Context
from opd_jax.types import Prompts, Rollout

# Shapes (data, fsdp, tensor, sequence) of meshes of 8 devices, on which the same must come out as on one.
MESHES = [(8, 1, 1, 1), (2, 2, 2, 1), (1, 4, 2, 1), (1, 1, 8, 1), (1, 2, 1, 4), (2, 1, 2, 2)]


def tiny_config(vocab_size=17, **changes):
    fields = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return model_config.from_hf(fields | changes, where="tests")


def tiny_model(seed=0, scale=8.0, **changes):
    """(params, config) with larger weights than a fresh model has, so that distributions are far from uniform."""
    config = tiny_config(**changes)
    # New arrays each time, because an update donates them.
    return jax.tree.map(lambda p: p * scale if p.ndim >= 2 else p + 0.0, _initial(seed, config)), config


@functools.cache
def _initial(seed, config):
    return transformer.init(jax.random.key(seed), config)


def ragged_prompts(rng, rows=8, width=6, vocab_size=17) -> Prompts:
    lengths = rng.integers(1, width + 1, rows)
    mask_BS = np.arange(width)[None, :] >= width - lengths[:, None]
    tokens_BS = np.where(mask_BS, rng.integers(0, vocab_size, (rows, width)), 0)
    return Prompts(jnp.asarray(tokens_BS, jnp.int32), jnp.asarray(mask_BS), jnp.arange(rows, dtype=jnp.uint32))


def ragged_rollout(rng, rows=8, length=7, vocab_size=17) -> Rollout:
    lengths = rng.integers(1, length + 1, rows)
    mask_BT = jnp.asarray(np.arange(length)[None, :] < lengths[:, None])
    tokens_BT = jnp.asarray(rng.integers(0, vocab_size, (rows, length)), jnp.int32)
    zeros_BT = jnp.zeros((rows, length), jnp.float32)
    return Rollout(jnp.where(mask_BT, tokens_BT, 0), mask_BT, zeros_BT, zeros_BT, jnp.arange(rows, dtype=jnp.uint32), jnp.ones(rows, bool))


def context_of(rollout: Rollout, group_size: int = 2) -> Context:
    group_B = jnp.arange(len(rollout.mask_BT)) // group_size
    return Context(mask_BT=rollout.mask_BT, behaviour_logp_BT=rollout.behaviour_logp_BT, group_B=group_B)
