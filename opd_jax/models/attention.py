"""Attention between queries and keys that have been projected and rotated; letters as in transformer.py.

Whole sequences (training, scoring, prompts) may be read by a kernel; a generated token, one query, is always read by `to_all`.
"""

import jax
import jax.numpy as jnp

from opd_jax.models import attention_kernels
from opd_jax.models.attention_kernels import Rule

_LONG = 64  # tokens
_QUERY_BLOCKS = 4


def group(q_BLNH: jax.Array, kv_heads: int) -> jax.Array:
    """[B, L, N, H] -> [B, K, G, L, H]: each key/value head with the query heads that share it."""
    batch, length, heads, head_dim = q_BLNH.shape
    return q_BLNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def ungroup(o_BKGLH: jax.Array) -> jax.Array:
    """[B, K, G, L, H] -> [B, L, N, H]."""
    batch, kv_heads, groups, length, head_dim = o_BKGLH.shape
    return o_BKGLH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, head_dim)


def to_all(q_BKGLH: jax.Array, k_BKMH: jax.Array, v_BKMH: jax.Array, visible: jax.Array, rule: Rule) -> jax.Array:
    """Attention of every query to the keys with visible True ([B, L or 1, M]); a query that sees nothing gets finite rubbish.

    The sum is divided by the weights' total after the product with the values: L x H divisions, and gradients of them, in place of L x M.
    """
    dtype, wide = q_BKGLH.dtype, jnp.promote_types(q_BKGLH.dtype, jnp.float32)
    scores_BKGLM = jnp.einsum("bkglh,bkmh->bkglm", q_BKGLH, k_BKMH, preferred_element_type=wide) * rule.scale
    if rule.softcap is not None:
        scores_BKGLM = rule.softcap * jnp.tanh(scores_BKGLM / rule.softcap)
    scores_BKGLM = jnp.where(visible[:, None, None], scores_BKGLM, jnp.finfo(wide).min)
    largest_BKGL1 = jax.lax.stop_gradient(jnp.max(scores_BKGLM, axis=-1, keepdims=True))  # cancels in the quotient
    weights_BKGLM = jnp.exp(scores_BKGLM - largest_BKGL1)
    total_BKGL1 = jnp.sum(weights_BKGLM, axis=-1, keepdims=True)
    sum_BKGLH = jnp.einsum("bkglm,bkmh->bkglh", weights_BKGLM.astype(dtype), v_BKMH, preferred_element_type=wide)
    return (sum_BKGLH / total_BKGL1).astype(dtype)


def read(choice: str, q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, mask_BL: jax.Array, rule: Rule) -> jax.Array:
    """Attention [B, L, N, H] of every token to itself and the real tokens before it, by what `choice` (model.attention) comes to here."""
    kernel = attention_kernels.resolve(choice, q_BLNH.dtype, q_BLNH.shape[-1], rule)
    if kernel != "xla":
        return attention_kernels.KERNELS[kernel](q_BLNH, k_BLKH, v_BLKH, mask_BL, rule)
    q_BKGLH = group(q_BLNH, k_BLKH.shape[2])
    return ungroup(causal(q_BKGLH, k_BLKH.swapaxes(1, 2), v_BLKH.swapaxes(1, 2), mask_BL, rule))


def causal(q_BKGLH: jax.Array, k_BKLH: jax.Array, v_BKLH: jax.Array, mask_BL: jax.Array, rule: Rule) -> jax.Array:
    """Attention of every token to itself and the real tokens before it, or those of them in its window.

    Long sequences go in blocks of queries that skip the keys after them, and those before their windows: on a CPU 54 -> 26 ms forward,
    242 -> 160 ms with the gradient, at batch 32, 128 tokens, 5 layers of width 64; more blocks gained nothing but compile time.
    """
    length = mask_BL.shape[1]
    size = -(-length // _QUERY_BLOCKS) if length >= _LONG else length
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if rule.window is None else max(0, start - rule.window + 1)
        query_L1, key_1M = jnp.arange(start, end)[:, None], jnp.arange(first, end)[None, :]
        visible_BLM = in_reach(query_L1, key_1M, rule)[None] & mask_BL[:, None, first:end]
        outputs.append(to_all(q_BKGLH[:, :, :, start:end], k_BKLH[:, :, first:end], v_BKLH[:, :, first:end], visible_BLM, rule))
    return jnp.concatenate(outputs, axis=3)


def in_reach(query: jax.Array, key: jax.Array, rule: Rule) -> jax.Array:
    """Whether a key is not after a query, and in its window, both given by their columns: gaps in a mask count, as in transformers."""
    reach = key <= query
    return reach if rule.window is None else reach & (key > query - rule.window)
