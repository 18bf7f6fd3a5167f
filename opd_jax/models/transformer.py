"""Decoder-only transformers as functions of a parameter pytree: apply and hidden read whole sequences, prefill and decode_step generate.

Beside the letters of types.py: K key/value heads, G query heads per key/value head (N = K G), M the keys that a query may see, E experts,
R tokens of all rows, C experts per token. What differs between families is in families.py and ModelConfig.
Matmul operands are in `config.compute_dtype`; sums, norms, softmax and the residual stream are float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import initializers

from opd_jax import parallel, types
from opd_jax.models import attention, lora, rope, spec
from opd_jax.models import cache as cache_lib
from opd_jax.models.alignment import states_before
from opd_jax.models.cache import Cache
from opd_jax.models.config import Layer, ModelConfig
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
        "layers": {str(i): _layer_specs(config, layer, normal) for i, layer in enumerate(config.layers)},
        "final_norm": _norm_spec(config, d),
    }
    if not config.tie_word_embeddings:
        specs["unembed"] = ParamSpec((d, v), ("embed", "vocab"), normal)
    return specs


def _norm_spec(config: ModelConfig, size: int) -> ParamSpec:
    return ParamSpec((size,), (None,), initializers.zeros if config.traits.zero_centred_norms else initializers.ones)


def _layer_specs(config: ModelConfig, layer: Layer, normal: Callable) -> dict:
    d, h, n, k = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    attention = {
        "norm": _norm_spec(config, d),
        "q": ParamSpec((d, n, h), ("embed", "heads", "head_dim"), normal),
        "k": ParamSpec((d, k, h), ("embed", "kv_heads", "head_dim"), normal),
        "v": ParamSpec((d, k, h), ("embed", "kv_heads", "head_dim"), normal),
        "o": ParamSpec((n, h, d), ("heads", "head_dim", "embed"), normal),
    }
    # Biases are flat, so that "matrices have two axes or more" holds for weight decay.
    if config.qkv_bias:
        attention |= {"q_bias": ParamSpec((n * h,), ("heads",)), "k_bias": ParamSpec((k * h,), ("kv_heads",))}
        attention |= {"v_bias": ParamSpec((k * h,), ("kv_heads",))}
    if config.output_bias:
        attention["o_bias"] = ParamSpec((d,), (None,))
    if config.qk_norm:
        attention |= {"q_norm": _norm_spec(config, h), "k_norm": _norm_spec(config, h)}
    mlp = {"norm": _norm_spec(config, d)} | (_expert_specs(config, normal) if layer.experts else _mlp_specs(config, normal))
    if config.traits.post_norms:
        attention["post_norm"], mlp["post_norm"] = _norm_spec(config, d), _norm_spec(config, d)
    return {"attention": attention, "mlp": mlp}


def _mlp_specs(config: ModelConfig, normal: Callable) -> dict:
    d, f = config.hidden_size, config.intermediate_size
    mlp = {
        "gate": ParamSpec((d, f), ("embed", "ffn"), normal),
        "up": ParamSpec((d, f), ("embed", "ffn"), normal),
        "down": ParamSpec((f, d), ("ffn", "embed"), normal),
    }
    if config.mlp_bias:
        mlp |= {"gate_bias": ParamSpec((f,), ("ffn",)), "up_bias": ParamSpec((f,), ("ffn",)), "down_bias": ParamSpec((d,), (None,))}
    return mlp


def _expert_specs(config: ModelConfig, normal: Callable) -> dict:
    d, f, e = config.hidden_size, config.expert_size, config.num_experts
    return {
        "router": ParamSpec((d, e), ("embed", None), normal),
        "expert_gate": ParamSpec((e, d, f), ("expert", "embed", "ffn"), normal),
        "expert_up": ParamSpec((e, d, f), ("expert", "embed", "ffn"), normal),
        "expert_down": ParamSpec((e, f, d), ("expert", "ffn", "embed"), normal),
    }


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

    Every row of the prompt needs a real token in its last place.
    """
    hidden_BTD = states_before(view, lambda tokens_BL, mask_BL: _read(params, config, tokens_BL, mask_BL)[0])
    return head(params, config, constrain(hidden_BTD, "batch", "length", "act_embed"))


def head(params: dict, config: ModelConfig, hidden_BTD: jax.Array) -> Head:
    """What makes logits of hidden states."""
    return Head(hidden_BTD, _unembedding(params, config), softcap=config.final_softcap, valid_V=_valid_vocabulary(config))


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
    rotations = _rotations(config, cache.position_B[:, None])
    x_BLD = _embed(params, config, tokens_B[:, None])
    keys_and_values = []
    for i, layer in enumerate(config.layers):

        def attend(q_BLNH, k_BLKH, v_BLKH, rule, i=i):
            keys_BKLH = cache_lib.write(cache.keys_BKLH[i], k_BLKH[:, 0], cache.index)
            values_BKLH = cache_lib.write(cache.values_BKLH[i], v_BLKH[:, 0], cache.index)
            q_BKGLH = attention.group(q_BLNH, config.num_kv_heads)
            visible_B1L = (mask_BL & attention.in_reach(cache.index, jnp.arange(length)[None, :], rule))[:, None, :]
            return attention.ungroup(attention.to_all(q_BKGLH, keys_BKLH, values_BKLH, visible_B1L, rule)), (keys_BKLH, values_BKLH)

        x_BLD, kept = _layer(params["layers"][str(i)], config, layer, x_BLD, rotations, attend)
        keys_and_values.append(kept)
    keys, values = zip(*keys_and_values, strict=True)
    x_BD = _norm(x_BLD[:, 0], params["final_norm"], config).astype(config.compute_dtype)
    cache = cache.replace(keys_BKLH=keys, values_BKLH=values, mask_BL=mask_BL, position_B=cache.position_B + 1, index=cache.index + 1)
    return _next_logits(params, config, x_BD), cache


# ---- the network


def _read(params: dict, config: ModelConfig, tokens_BL: jax.Array, mask_BL: jax.Array) -> tuple[jax.Array, list]:
    """(hidden states after the final norm [B, L, D] in the compute type, (keys, values) [B, K, L, H] of every layer)."""
    position_BL = jnp.maximum(jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - 1, 0)
    rotations = _rotations(config, position_BL)

    def attend(q_BLNH, k_BLKH, v_BLKH, rule):
        o_BLNH = attention.read(config.attention, q_BLNH, k_BLKH, v_BLKH, mask_BL, rule)
        return o_BLNH, (k_BLKH.swapaxes(1, 2), v_BLKH.swapaxes(1, 2))

    def read(weights, layer, x_BLD):
        return _layer(weights, config, layer, x_BLD, rotations, attend)

    if config.remat:
        read = jax.checkpoint(read, static_argnums=1)
    x_BLD = _embed(params, config, tokens_BL)
    keys_and_values = []
    for i, layer in enumerate(config.layers):
        x_BLD, kept = read(params["layers"][str(i)], layer, x_BLD)
        keys_and_values.append(kept)
    return _norm(x_BLD, params["final_norm"], config).astype(config.compute_dtype), keys_and_values


def _rotations(config: ModelConfig, position_BL: jax.Array) -> tuple:
    """The rotations (of layers without a window, of layers with one)."""
    plain = rope.rotation(position_BL, config.head_dim, config.rope_theta, config.rope_scaling)
    theta = config.local_rope_theta
    return plain, plain if theta is None else rope.rotation(position_BL, config.head_dim, theta, None)


def _layer(weights: dict, config: ModelConfig, layer: Layer, x_BLD: jax.Array, rotations, attend: Callable) -> tuple[jax.Array, tuple]:
    """One layer. `attend(q_BLNH, k_BLKH, v_BLKH, rule) -> (o_BLNH, what to keep)` is all that differs between reading and generating."""
    attend = functools.partial(attend, rule=attention_rule(config, layer))
    with jax.named_scope("attention"):
        y_BLD, kept = _attention_block(weights["attention"], config, x_BLD, rotations[layer.windowed], attend)
        x_BLD = _add(x_BLD, y_BLD, weights["attention"], config)
    with jax.named_scope("mlp"):
        block = _expert_block if layer.experts else _mlp_block
        x_BLD = _add(x_BLD, block(weights["mlp"], config, x_BLD), weights["mlp"], config)
    return x_BLD, kept


def attention_rule(config: ModelConfig, layer: Layer) -> attention.Rule:
    return attention.Rule(config.query_scalar**-0.5, config.attention_softcap, config.sliding_window if layer.windowed else None)


def _add(x_BLD: jax.Array, y_BLD: jax.Array, weights: dict, config: ModelConfig) -> jax.Array:
    y_BLD = _norm(y_BLD, weights["post_norm"], config) if config.traits.post_norms else y_BLD
    return constrain(x_BLD + y_BLD, "batch", "length", "act_embed")


def _attention_block(weights: dict, config: ModelConfig, x_BLD: jax.Array, rotation, attend: Callable) -> tuple[jax.Array, tuple]:
    y_BLD = _norm(x_BLD, weights["norm"], config)

    def project(name, axis):
        z_BLNH = _matmul("bld,dnh->blnh", y_BLD, weights[name], config)
        if config.qkv_bias:
            z_BLNH = z_BLNH + weights[f"{name}_bias"].astype(z_BLNH.dtype).reshape(1, 1, *z_BLNH.shape[2:])
        if config.qk_norm and name != "v":
            z_BLNH = _norm(z_BLNH, weights[f"{name}_norm"], config)
        z_BLNH = z_BLNH if name == "v" else rope.rotate(z_BLNH, rotation)
        return constrain(z_BLNH.astype(config.compute_dtype), "batch", "length", axis, "head_dim")

    o_BLNH, kept = attend(project("q", "heads"), project("k", "kv_heads"), project("v", "kv_heads"))
    # einsum contracts in alphabetical order: with an h for the z it would transpose the weights, at every token that is generated.
    o_BLD = _matmul("blnz,nzd->bld", o_BLNH, weights["o"], config)
    return (o_BLD + weights["o_bias"].astype(o_BLD.dtype)[None, None] if config.output_bias else o_BLD), kept


def _mlp_block(weights: dict, config: ModelConfig, x_BLD: jax.Array) -> jax.Array:
    def project(equation, y, name):
        z = _matmul(equation, y, weights[name], config)
        return z + weights[f"{name}_bias"].astype(z.dtype)[None, None] if config.mlp_bias else z

    y_BLD = _norm(x_BLD, weights["norm"], config)
    gated_BLF = _activate(project("bld,df->blf", y_BLD, "gate"), config) * project("bld,df->blf", y_BLD, "up")
    return project("blf,fd->bld", constrain(gated_BLF, "batch", "length", "ffn"), "down")


def _activate(x: jax.Array, config: ModelConfig) -> jax.Array:
    return {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}[config.traits.activation[0]](x)


def _expert_block(weights: dict, config: ModelConfig, x_BLD: jax.Array) -> jax.Array:
    """A mixture of experts: the sum of the `experts_per_token` best of a token, weighted by the router (its auxiliary loss is not used).

    Tokens are sorted by expert, so that a ragged product multiplies each expert with its own tokens alone; a CPU, which has no such
    product, multiplies every expert with all of them and masks, to the same result. Each device sorts the rows it holds.
    """

    def read(x_BLD, weights):
        y_RD = _norm(x_BLD, weights["norm"], config).reshape(-1, x_BLD.shape[-1])
        share_RE = jax.nn.softmax(_matmul("rd,de->re", y_RD, weights["router"], config), axis=-1)
        share_RC, expert_RC = jax.lax.top_k(share_RE, config.experts_per_token)
        if config.normalise_experts:
            share_RC = share_RC / jnp.sum(share_RC, axis=-1, keepdims=True)
        order = jnp.argsort(expert_RC.ravel(), stable=True)  # places in the flat [R C], sorted by expert
        size_E = jnp.bincount(expert_RC.ravel(), length=config.num_experts)

        def project(y, name):
            return _grouped_matmul(y, weights[f"expert_{name}"], size_E, config)

        sorted_D = y_RD[order // config.experts_per_token]
        gated_F = _activate(project(sorted_D, "gate"), config) * project(sorted_D, "up")
        each_RCD = project(gated_F, "down")[jnp.argsort(order)].reshape(*expert_RC.shape, -1)
        return jnp.sum(each_RCD * share_RC[:, :, None], axis=1).reshape(x_BLD.shape)

    return parallel.over_rows(read, x_BLD, weights)


def _wide(dtype: str) -> jnp.dtype:
    """Of sums and of what stays between products: float32, or float64 for a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


def _matmul(equation: str, x: jax.Array, w: jax.Array | lora.Adapted, config: ModelConfig) -> jax.Array:
    """Operands in the compute type, sums in float32, in the backward pass too; a weight may have a low-rank update on it."""
    if isinstance(w, lora.Adapted):
        down, up = lora.equations(equation)
        update = _matmul(up, _matmul(down, x, w.a, config), w.b, config)
        return _matmul(equation, x, w.base, config) + w.scale * update
    return _product(equation, config.compute_dtype, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of operands in `dtype`, summed in float32 or wider. Reverse mode only.

    The cotangent is one more operand: rounded to 16 bits where they are, while jax's own rule keeps it wide and so makes float32 products
    of both gradients. The weights' is written with x first: a CPU transposes the first operand, and x needs less work than the cotangent,
    which jax's rule has there. Gradients come in the types of x and w, without a rounding on the way.
    """
    return jnp.einsum(equation, x.astype(dtype), w.astype(dtype), preferred_element_type=_wide(dtype))


def _product_forward(equation, dtype, x, w):
    kept = x.astype(dtype)
    return _product(equation, dtype, kept, w), (kept, jnp.zeros((), x.dtype), w)


def _product_backward(equation, dtype, kept, cotangent):
    x, of_x, w = kept
    operands, out = equation.split("->")
    of_operands = operands.split(",")
    product = functools.partial(jnp.einsum, preferred_element_type=_wide(dtype))
    cotangent = cotangent.astype(dtype)
    over_x = product(f"{out},{of_operands[1]}->{of_operands[0]}", cotangent, w.astype(dtype))
    over_w = product(f"{of_operands[0]},{out}->{of_operands[1]}", x, cotangent)
    return over_x.astype(of_x.dtype), over_w.astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)


def _grouped_matmul(x: jax.Array, w: jax.Array, size_E: jax.Array, config: ModelConfig) -> jax.Array:
    """The first size_E[0] rows of x times w[0], the next size_E[1] times w[1], ...; types as in _matmul."""
    return _grouped_product(config.compute_dtype, x, w, size_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_product(dtype: str, x: jax.Array, w: jax.Array, size_E: jax.Array) -> jax.Array:
    """As _product: jax's own rule would round the gradients to the type of the operands."""
    return jax.lax.ragged_dot(x.astype(dtype), w.astype(dtype), size_E, preferred_element_type=_wide(dtype))


def _grouped_product_forward(dtype, x, w, size_E):
    kept = x.astype(dtype)
    return _grouped_product(dtype, kept, w, size_E), (kept, jnp.zeros((), x.dtype), w, size_E)


def _grouped_product_backward(dtype, kept, cotangent):
    x, of_x, w, size_E = kept
    cotangent, wide = cotangent.astype(dtype), _wide(dtype)
    over_x = jax.lax.ragged_dot(cotangent, w.astype(dtype).swapaxes(1, 2), size_E, preferred_element_type=wide)
    rows = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    over_w = jax.lax.ragged_dot_general(x, cotangent, size_E, rows, preferred_element_type=wide)
    return over_x.astype(of_x.dtype), over_w.astype(w.dtype), None


_grouped_product.defvjp(_grouped_product_forward, _grouped_product_backward)


def _norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32."""
    x = x.astype(_wide(config.compute_dtype))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.rms_norm_eps)
    scale = scale.astype(x.dtype) + 1 if config.traits.zero_centred_norms else scale.astype(x.dtype)
    return x * inverse * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def _embed(params: dict, config: ModelConfig, tokens_BL: jax.Array) -> jax.Array:
    x_BLD = params["embed"][tokens_BL].astype(_wide(config.compute_dtype))
    if config.traits.scaled_embedding:
        # In the type of the weights, as the models were trained: 33.94 is 34 in bfloat16.
        x_BLD = x_BLD * jnp.float32(config.hidden_size**0.5).astype(params["embed"].dtype).astype(x_BLD.dtype)
    return constrain(x_BLD, "batch", "length", "act_embed")


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
        logits = jnp.einsum("...d,dv->...v", x, _unembedding(params, config), preferred_element_type=_wide(config.compute_dtype))
        return logits if config.final_softcap is None else config.final_softcap * jnp.tanh(logits / config.final_softcap)


def _next_logits(params: dict, config: ModelConfig, x_BD: jax.Array) -> jax.Array:
    logits_BV = _logits(params, config, x_BD)
    valid_V = _valid_vocabulary(config)
    return logits_BV if valid_V is None else jnp.where(valid_V[None, :], logits_BV, -jnp.inf)
