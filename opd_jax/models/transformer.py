"""Decoder-only transformers as functions of a parameter pytree: apply and hidden read whole sequences, prefill and decode_step generate.

Beside the letters of types.py: K key/value heads, G query heads per key/value head (N = K G), M the keys that a query may see.
Matmul operands are in `config.compute_dtype`; sums, norms, softmax and the residual stream are float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from opd_jax import types
from opd_jax.models import cache as cache_lib
from opd_jax.models import lora, spec
from opd_jax.models.cache import Cache
from opd_jax.models.config import ModelConfig
from opd_jax.models.spec import ParamSpec
from opd_jax.numerics.token_stats import Head
from opd_jax.parallel import constrain

# ---- parameters


def param_specs(config: ModelConfig) -> dict:
    """The tree of ParamSpec: embed, layers/0.., final_norm and, when not tied, unembed."""
    d, v = config.hidden_size, config.vocab_size
    normal = initializers.normal(config.initializer_range)
    specs = {
        "embed": ParamSpec((v, d), ("vocab", "embed"), normal),
        "layers": {str(i): _layer_specs(config, normal) for i in range(config.num_layers)},
        "final_norm": ParamSpec((d,), (None,), initializers.ones),
    }
    if not config.tie_word_embeddings:
        specs["unembed"] = ParamSpec((d, v), ("embed", "vocab"), normal)
    return specs


def _layer_specs(config: ModelConfig, normal: Callable) -> dict:
    d, f, h, n, k = config.hidden_size, config.intermediate_size, config.head_dim, config.num_heads, config.num_kv_heads
    scale = functools.partial(ParamSpec, init=initializers.ones)
    attention = {
        "norm": scale((d,), (None,)),
        "q": ParamSpec((d, n, h), ("embed", "heads", "head_dim"), normal),
        "k": ParamSpec((d, k, h), ("embed", "kv_heads", "head_dim"), normal),
        "v": ParamSpec((d, k, h), ("embed", "kv_heads", "head_dim"), normal),
        "o": ParamSpec((n, h, d), ("heads", "head_dim", "embed"), normal),
    }
    mlp = {
        "norm": scale((d,), (None,)),
        "gate": ParamSpec((d, f), ("embed", "ffn"), normal),
        "up": ParamSpec((d, f), ("embed", "ffn"), normal),
        "down": ParamSpec((f, d), ("ffn", "embed"), normal),
    }
    # Biases are flat, so that "matrices have two axes or more" holds for weight decay.
    if config.qkv_bias:
        attention |= {"q_bias": ParamSpec((n * h,), ("heads",)), "k_bias": ParamSpec((k * h,), ("kv_heads",))}
        attention |= {"v_bias": ParamSpec((k * h,), ("kv_heads",))}
    if config.output_bias:
        attention["o_bias"] = ParamSpec((d,), (None,))
    if config.qk_norm:
        attention |= {"q_norm": scale((h,), (None,)), "k_norm": scale((h,), (None,))}
    if config.mlp_bias:
        mlp |= {"gate_bias": ParamSpec((f,), ("ffn",)), "up_bias": ParamSpec((f,), ("ffn",)), "down_bias": ParamSpec((d,), (None,))}
    return {"attention": attention, "mlp": mlp}


def init(key: jax.Array, config: ModelConfig, *, mesh: jax.sharding.Mesh | None = None, dtype=jnp.float32) -> dict:
    """Fresh parameters, born sharded when a mesh is given; the values do not depend on it."""
    return spec.init(key, param_specs(config), dtype, mesh)


# ---- the four ways to read


@functools.partial(jax.jit, static_argnames="model_config")
def apply(params: dict, model_config: ModelConfig, tokens_BL: jax.Array, *, mask_BL: jax.Array | None = None) -> jax.Array:
    """Logits [B, L, V] in float32; entry l predicts token l + 1. Positions count the True entries of `mask_BL`: left padding is free."""
    mask_BL = jnp.ones(tokens_BL.shape, bool) if mask_BL is None else mask_BL.astype(bool)
    x_BLD, _ = _read(params, model_config, tokens_BL, mask_BL)
    return constrain(_logits(params, model_config, x_BLD), "batch", "length", "vocab")


def hidden(params: dict, config: ModelConfig, view: types.View) -> Head:
    """What predicts a completion: `hidden_BTD[:, t]` speaks of `completion_BT[:, t]`.

    The one function that shifts logits against tokens. Every row of the prompt needs a real token in its last place.
    """
    tokens_BL = jnp.concatenate([view.prompt_BS, view.completion_BT], axis=1)[:, :-1]
    mask_BL = jnp.concatenate([view.prompt_mask_BS.astype(bool), jnp.ones(view.completion_BT.shape, bool)], axis=1)[:, :-1]
    x_BLD, _ = _read(params, config, tokens_BL, mask_BL)
    hidden_BTD = x_BLD[:, view.prompt_BS.shape[1] - 1 :]
    return Head(hidden_BTD, _unembedding(params, config), softcap=None, valid_V=_valid_vocabulary(config))


def prefill(params: dict, config: ModelConfig, tokens_BS: jax.Array, mask_BS: jax.Array, *, cache_length: int) -> tuple[jax.Array, Cache]:
    """Reads left-padded prompts: (float32 logits [B, V] of the next token, a cache with `cache_length` slots, S of them filled).

    Logits of padding rows of the vocabulary are -inf.
    """
    mask_BS = mask_BS.astype(bool)
    x_BSD, keys_and_values = _read(params, config, tokens_BS, mask_BS)
    keys, values = zip(*keys_and_values, strict=True)
    return _next_logits(params, config, x_BSD[:, -1]), cache_lib.from_prompt(keys, values, mask_BS, cache_length)


def decode_step(params: dict, config: ModelConfig, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads one token per row: (float32 logits [B, V] of the next token, the cache with one more slot filled)."""
    batch, length = cache.mask_BL.shape
    mask_BL = jax.lax.dynamic_update_slice_in_dim(cache.mask_BL, jnp.ones((batch, 1), bool), cache.index, axis=1)
    rotation = _rotation(config, cache.position_B[:, None])
    x_BLD = _embed(params, config, tokens_B[:, None])
    keys_and_values = []
    for i in range(config.num_layers):

        def attend(q_BLNH, k_BLKH, v_BLKH, i=i):
            keys_BKLH = cache_lib.write(cache.keys_BKLH[i], k_BLKH[:, 0], cache.index)
            values_BKLH = cache_lib.write(cache.values_BKLH[i], v_BLKH[:, 0], cache.index)
            q_BKGLH = _group(q_BLNH, config)
            return _ungroup(_attention(q_BKGLH, keys_BKLH, values_BKLH, mask_BL[:, None, :])), (keys_BKLH, values_BKLH)

        x_BLD, kept = _layer(params["layers"][str(i)], config, x_BLD, rotation, attend)
        keys_and_values.append(kept)
    keys, values = zip(*keys_and_values, strict=True)
    x_BD = _norm(x_BLD[:, 0], params["final_norm"], config).astype(config.compute_dtype)
    cache = cache.replace(keys_BKLH=keys, values_BKLH=values, mask_BL=mask_BL, position_B=cache.position_B + 1, index=cache.index + 1)
    return _next_logits(params, config, x_BD), cache


# ---- the network


def _read(params: dict, config: ModelConfig, tokens_BL: jax.Array, mask_BL: jax.Array) -> tuple[jax.Array, list]:
    """(hidden states after the final norm [B, L, D] in the compute type, (keys, values) [B, K, L, H] of every layer)."""
    position_BL = jnp.maximum(jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - 1, 0)
    rotation = _rotation(config, position_BL)

    def attend(q_BLNH, k_BLKH, v_BLKH):
        keys_BKLH, values_BKLH = k_BLKH.swapaxes(1, 2), v_BLKH.swapaxes(1, 2)
        return _ungroup(_causal_attention(_group(q_BLNH, config), keys_BKLH, values_BKLH, mask_BL)), (keys_BKLH, values_BKLH)

    def layer(weights, x_BLD):
        return _layer(weights, config, x_BLD, rotation, attend)

    if config.remat:
        layer = jax.checkpoint(layer)
    x_BLD = _embed(params, config, tokens_BL)
    keys_and_values = []
    for i in range(config.num_layers):
        x_BLD, kept = layer(params["layers"][str(i)], x_BLD)
        keys_and_values.append(kept)
    return _norm(x_BLD, params["final_norm"], config).astype(config.compute_dtype), keys_and_values


def _layer(weights: dict, config: ModelConfig, x_BLD: jax.Array, rotation, attend: Callable) -> tuple[jax.Array, tuple]:
    """One layer. `attend(q_BLNH, k_BLKH, v_BLKH) -> (o_BLNH, what to keep)` is all that differs between reading and generating."""
    with jax.named_scope("attention"):
        mixed_BLD, kept = _attention_block(weights["attention"], config, x_BLD, rotation, attend)
        x_BLD = constrain(x_BLD + mixed_BLD, "batch", "length", "act_embed")
    with jax.named_scope("mlp"):
        x_BLD = constrain(x_BLD + _mlp_block(weights["mlp"], config, x_BLD), "batch", "length", "act_embed")
    return x_BLD, kept


def _attention_block(weights: dict, config: ModelConfig, x_BLD: jax.Array, rotation, attend: Callable) -> tuple[jax.Array, tuple]:
    y_BLD = _norm(x_BLD, weights["norm"], config)

    def project(name, axis):
        z_BLNH = _matmul("bld,dnh->blnh", y_BLD, weights[name], config)
        if config.qkv_bias:
            z_BLNH = z_BLNH + weights[f"{name}_bias"].astype(z_BLNH.dtype).reshape(1, 1, *z_BLNH.shape[2:])
        if config.qk_norm and name != "v":
            z_BLNH = _norm(z_BLNH, weights[f"{name}_norm"], config)
        z_BLNH = z_BLNH if name == "v" else _rotate(z_BLNH, rotation)
        return constrain(z_BLNH.astype(config.compute_dtype), "batch", "length", axis, "head_dim")

    o_BLNH, kept = attend(project("q", "heads"), project("k", "kv_heads"), project("v", "kv_heads"))
    o_BLD = _matmul("blnh,nhd->bld", o_BLNH, weights["o"], config)
    return (o_BLD + weights["o_bias"].astype(o_BLD.dtype)[None, None] if config.output_bias else o_BLD), kept


def _mlp_block(weights: dict, config: ModelConfig, x_BLD: jax.Array) -> jax.Array:
    def project(equation, y, name):
        z = _matmul(equation, y, weights[name], config)
        return z + weights[f"{name}_bias"].astype(z.dtype)[None, None] if config.mlp_bias else z

    y_BLD = _norm(x_BLD, weights["norm"], config)
    gated_BLF = jax.nn.silu(project("bld,df->blf", y_BLD, "gate")) * project("bld,df->blf", y_BLD, "up")
    return project("blf,fd->bld", constrain(gated_BLF, "batch", "length", "ffn"), "down")


def _accumulation(config: ModelConfig):
    return jnp.promote_types(config.compute_dtype, jnp.float32)


def _matmul(equation: str, x: jax.Array, w: jax.Array | lora.Adapted, config: ModelConfig) -> jax.Array:
    """Operands in the compute type, sums in float32; a weight may have a low-rank update on it."""
    if isinstance(w, lora.Adapted):
        down, up = lora.equations(equation)
        update = _matmul(up, _matmul(down, x, w.a, config), w.b, config)
        return _matmul(equation, x, w.base, config) + w.scale * update
    dtype = config.compute_dtype
    return jnp.einsum(equation, x.astype(dtype), w.astype(dtype), preferred_element_type=_accumulation(config))


def _norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32."""
    x = x.astype(_accumulation(config))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.rms_norm_eps)
    return x * inverse * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)


def _embed(params: dict, config: ModelConfig, tokens_BL: jax.Array) -> jax.Array:
    return constrain(params["embed"][tokens_BL].astype(_accumulation(config)), "batch", "length", "act_embed")


# ---- the vocabulary


def _unembedding(params: dict, config: ModelConfig) -> jax.Array:
    weight_DV = params["embed"].T if config.tie_word_embeddings else params["unembed"]
    return weight_DV.astype(config.compute_dtype)


def _valid_vocabulary(config: ModelConfig) -> jax.Array | None:
    """bool [V], None when every row of the vocabulary is a token."""
    if config.valid_vocab_size is None or config.valid_vocab_size >= config.vocab_size:
        return None
    return jnp.arange(config.vocab_size) < config.valid_vocab_size


def _logits(params: dict, config: ModelConfig, x: jax.Array) -> jax.Array:
    with jax.named_scope("unembed"):
        return jnp.einsum("...d,dv->...v", x, _unembedding(params, config), preferred_element_type=_accumulation(config))


def _next_logits(params: dict, config: ModelConfig, x_BD: jax.Array) -> jax.Array:
    logits_BV = _logits(params, config, x_BD)
    valid_V = _valid_vocabulary(config)
    return logits_BV if valid_V is None else jnp.where(valid_V[None, :], logits_BV, -jnp.inf)


# ---- attention

_LONG = 64  # tokens
_QUERY_BLOCKS = 4


def _group(q_BLNH: jax.Array, config: ModelConfig) -> jax.Array:
    """[B, L, N, H] -> [B, K, G, L, H]: each key/value head with the query heads that share it."""
    batch, length, heads, head_dim = q_BLNH.shape
    return q_BLNH.reshape(batch, length, config.num_kv_heads, heads // config.num_kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def _ungroup(o_BKGLH: jax.Array) -> jax.Array:
    """[B, K, G, L, H] -> [B, L, N, H]."""
    batch, kv_heads, groups, length, head_dim = o_BKGLH.shape
    return o_BKGLH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * groups, head_dim)


def _attention(q_BKGLH: jax.Array, k_BKMH: jax.Array, v_BKMH: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention of every query to the keys with visible True ([B, L or 1, M]); a query that sees nothing gets finite rubbish.

    The sum is divided by the weights' total after the product with the values: L x H divisions, and gradients of them, in place of L x M.
    """
    dtype, wide = q_BKGLH.dtype, jnp.promote_types(q_BKGLH.dtype, jnp.float32)
    scores_BKGLM = jnp.einsum("bkglh,bkmh->bkglm", q_BKGLH, k_BKMH, preferred_element_type=wide) * q_BKGLH.shape[-1] ** -0.5
    scores_BKGLM = jnp.where(visible[:, None, None], scores_BKGLM, jnp.finfo(wide).min)
    largest_BKGL1 = jax.lax.stop_gradient(jnp.max(scores_BKGLM, axis=-1, keepdims=True))  # cancels in the quotient
    weights_BKGLM = jnp.exp(scores_BKGLM - largest_BKGL1)
    total_BKGL1 = jnp.sum(weights_BKGLM, axis=-1, keepdims=True)
    sum_BKGLH = jnp.einsum("bkglm,bkmh->bkglh", weights_BKGLM.astype(dtype), v_BKMH, preferred_element_type=wide)
    return (sum_BKGLH / total_BKGL1).astype(dtype)


def _causal_attention(q_BKGLH: jax.Array, k_BKLH: jax.Array, v_BKLH: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """Attention of every token to itself and the real tokens before it.

    Long sequences go in blocks of queries that skip the keys after them: on a CPU 54 -> 26 ms forward, 242 -> 160 ms with the gradient, at
    batch 32, 128 tokens, 5 layers of width 64; more blocks gained nothing but compile time.
    """
    length = mask_BL.shape[1]
    size = -(-length // _QUERY_BLOCKS) if length >= _LONG else length
    outputs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        causal_LM = jnp.arange(end)[None, :] <= jnp.arange(start, end)[:, None]
        visible_BLM = causal_LM[None] & mask_BL[:, None, :end]
        outputs.append(_attention(q_BKGLH[:, :, :, start:end], k_BKLH[:, :, :end], v_BKLH[:, :, :end], visible_BLM))
    return jnp.concatenate(outputs, axis=3)


# ---- rotary positions


def _rotation(config: ModelConfig, position_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [B, L, 1, H/2] of the angle at every position and frequency, in float32."""
    angle_BLH = position_BL.astype(jnp.float32)[:, :, None] * jnp.asarray(_frequencies(config))[None, None, :]
    return jnp.cos(angle_BLH)[:, :, None, :], jnp.sin(angle_BLH)[:, :, None, :]


def _rotate(x_BLNH: jax.Array, rotation) -> jax.Array:
    """Rotates each pair (h, h + H/2) by its angle: the convention of Hugging Face checkpoints."""
    cos, sin = (r.astype(x_BLNH.dtype) for r in rotation)
    first, second = jnp.split(x_BLNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position [H/2], in float32 arithmetic throughout, as the models were trained.

    The llama3 rule divides wavelengths beyond the old context / low_freq_factor by `factor`, keeps those below the old context /
    high_freq_factor, and interpolates between the two (Llama 3.1, 2024).
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequency = np.float32(1) / np.float32(config.rope_theta) ** exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / np.float32(scaling.factor)
    turns = np.float32(scaling.original_max_position_embeddings) * frequency / np.float32(2 * np.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1).astype(np.float32)
    return (1 - kept) * frequency / np.float32(scaling.factor) + kept * frequency
