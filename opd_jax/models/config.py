"""The shape of a model, read from and written to the fields of a Hugging Face config.json.

Every field that changes the numbers is honoured or refused by name: a model that loads is the model that was saved.
"""

import dataclasses
import json
from typing import Any

from opd_jax.models import rope
from opd_jax.models.families import FAMILIES, Family, names
from opd_jax.models.fields import Fields
from opd_jax.models.rope import RopeScaling
from opd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ between the layers of one model."""

    windowed: bool = False  # a token sees `sliding_window` tokens alone, and rotates by `local_rope_theta` where there is one
    experts: bool = False  # the feed-forward layer is a mixture of experts


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Hashable, so that it can be a static argument of jit."""

    family: str  # llama, mistral, qwen2, qwen3, qwen3_moe, gemma2 or gemma3_text; `traits` has what all of a family share
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    layers: tuple[Layer, ...]  # one per layer
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    local_rope_theta: float | None  # of windowed layers, never scaled; None: as the others
    max_position_embeddings: int  # tokens
    sliding_window: int | None  # tokens that a windowed layer sees, the own included
    query_scalar: int  # attention scores are divided by its square root
    attention_softcap: float | None  # of attention scores
    final_softcap: float | None  # of logits
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    num_experts: int  # of a layer with experts; 0: there are none
    experts_per_token: int
    expert_size: int  # width of one expert
    normalise_experts: bool  # the weights of a token's experts sum to 1
    initializer_range: float  # standard deviation of fresh weights
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    valid_vocab_size: int | None = None  # rows from here on are padding: Head.valid_V and the sampler mask them, apply() does not
    compute_dtype: str = "float32"  # of matmul operands and the KV cache; sums, norms, softmax and the residual stream are float32
    remat: bool = False  # recompute each layer in the backward pass
    attention: str = "auto"  # what reads whole sequences; auto, xla or a kernel of attention_kernels.py
    source: str = "{}"  # JSON of the config.json fields that do not change the numbers, kept to be written back

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]


# Fields that change no number here, whatever their value: names, storage, and settings of generation.
_IGNORED = names(
    """
    transformers_version _name_or_path name_or_path _commit_hash use_cache return_dict return_dict_in_generate
    output_attentions output_hidden_states output_scores tokenizer_class prefix torchscript id2label label2id num_labels problem_type
    finetuning_task task_specific_params unsloth_version unsloth_fixed _attn_implementation attn_implementation sep_token_id
    decoder_start_token_id do_sample temperature top_k top_p min_p typical_p num_beams num_beam_groups num_return_sequences max_length
    min_length max_new_tokens repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size diversity_penalty
    early_stopping bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty epsilon_cutoff eta_cutoff cache_implementation output_router_logits router_aux_loss_coef
    _sliding_window_pattern is_llama_config transformers.js_config
    """
)
# Fields of the weights file, decided anew when one is written.
_OF_THE_WEIGHTS = names("torch_dtype dtype")
# Fields that are accepted at the values with which they do nothing; the activation is the family's.
_ACTIVATION = names("hidden_act hidden_activation")
_NEUTRAL = {
    "attention_dropout": (0,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "use_sliding_window": (False,),
    "use_bidirectional_attention": (False,),
}
_TYPES = ("full_attention", "sliding_attention")
# Fields that from_hf reads for every family; families.py has the others.
_HONOURED = names(
    """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings attention_bias layer_types
    initializer_range bos_token_id eos_token_id pad_token_id
    """
)
_REQUIRED = names("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads")


def from_hf(fields: dict[str, Any], *, where: str) -> ModelConfig:
    """Reads the fields of a config.json (`where` names the file in errors).

    Both spellings of the rotary fields are read: `rope_theta` with `rope_scaling`, and `rope_parameters`. Raises UserError for a missing
    field, a bad value, and any field whose value would change the numbers in a way that is not implemented.
    """
    f = Fields(fields, where)
    name = fields.get("model_type")
    if name not in FAMILIES:
        raise f.refuse("model_type", f"is not supported; valid: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    _refuse_missing_and_unknown(f, name, family)
    heads, kv_heads, head_dim = _heads(f, family)
    positions = f.integer("max_position_embeddings", family.context)
    theta, scaling, local_theta = _rope(f, family, positions)
    bias = _bias(f, name, family)
    window, windowed = _windows(f, name, family)
    experts = _experts(f) if family.experts else (False,) * len(windowed)
    return ModelConfig(
        family=name,
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        num_layers=len(windowed),
        layers=tuple(map(Layer, windowed, experts)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
        max_position_embeddings=positions,
        sliding_window=window,
        query_scalar=f.integer("query_pre_attn_scalar", family.query_scalar) if family.query_scalar else head_dim,
        attention_softcap=f.optional_number("attn_logit_softcapping", family.attention_softcap),
        final_softcap=f.optional_number("final_logit_softcapping", family.final_softcap),
        tie_word_embeddings=f.boolean("tie_word_embeddings", family.tied),
        qkv_bias=bias,
        output_bias=bias and family.output_bias,
        mlp_bias=f.boolean("mlp_bias", False),
        qk_norm=family.qk_norm,
        **_sizes_of_experts(f, family),
        initializer_range=f.number("initializer_range", 0.02),
        bos_token_id=f.token("bos_token_id", family.bos),
        eos_token_ids=f.tokens("eos_token_id", family.eos),
        pad_token_id=f.token("pad_token_id", family.pad),
        source=_source(fields, family, window),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json, in the spelling that transformers 4 and 5 both read; the inverse of from_hf."""
    eos, family = config.eos_token_ids, config.traits
    fields = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "hidden_activation" if "hidden_activation" in family.fields else "hidden_act": family.activation[0],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope.write(config.rope_scaling),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
        "pad_token_id": config.pad_token_id,
    }
    if family.bias is None:
        fields["attention_bias"] = config.qkv_bias
    own = {name: value for name, value in _own_fields(config).items() if name in family.fields}
    return json.loads(config.source) | fields | own | _window_fields(config)


def _own_fields(config: ModelConfig) -> dict[str, Any]:
    """Fields that only some families have."""
    return {
        "mlp_bias": config.mlp_bias,
        "query_pre_attn_scalar": config.query_scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
        "rope_local_base_freq": config.local_rope_theta,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.normalise_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(config.layers) if not layer.experts],
    }


def _window_fields(config: ModelConfig) -> dict[str, Any]:
    family, window = config.traits, config.sliding_window
    switch = {"use_sliding_window": window is not None} if family.window_switch else {}
    if not family.windows or (switch and window is None):
        return switch  # a switched-off window may stand in `source`
    types = {} if family.windows == "all" else {"layer_types": [_TYPES[layer.windowed] for layer in config.layers]}
    return switch | {"sliding_window": window} | types


# ---- parts


def _refuse_missing_and_unknown(f: Fields, name: str, family: Family) -> None:
    for field in sorted(_REQUIRED | family.required):
        if f.fields.get(field) is None:
            raise UserError(f"{f.where}: {field} is missing; add it")
    if (f.fields.get("architectures") or [family.architecture]) != [family.architecture]:
        raise f.refuse("architectures", f"is not supported; valid for model_type {name}: {family.architecture}")
    neutral = {field: valid for field, valid in _NEUTRAL.items() if field not in family.fields}
    neutral |= dict.fromkeys(_ACTIVATION, family.activation)
    known = _IGNORED | _OF_THE_WEIGHTS | _HONOURED | family.fields
    for field, value in f.fields.items():
        if field in neutral:
            if value is not None and value not in neutral[field]:
                raise f.refuse(field, f"is not supported; valid: {neutral[field][0]!r}")
        elif field not in known and value not in (None, False, "", [], {}):
            raise f.refuse(field, f"is not a field of {name} known here and may change the numbers; remove it if it does not")


def _source(fields: dict[str, Any], family: Family, window: int | None) -> str:
    """What is kept to be written back. A Qwen without windows says much of them all the same."""
    own = family.fields - (names("sliding_window max_window_layers") if family.window_switch and window is None else frozenset())
    read = _HONOURED | _OF_THE_WEIGHTS | _ACTIVATION | _NEUTRAL.keys() | own
    return json.dumps({name: value for name, value in fields.items() if name not in read}, sort_keys=True)


def _heads(f: Fields, family: Family) -> tuple[int, int, int]:
    """(query heads, key/value heads, head dimension)."""
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise f.refuse("num_key_value_heads", f"must divide num_attention_heads = {heads}; correct the file")
    if f.fields.get("head_dim") is None and family.head_dim is None and hidden % heads:
        raise f.refuse("hidden_size", f"is not a multiple of num_attention_heads = {heads}; correct the file, or add head_dim")
    head_dim = f.integer("head_dim", family.head_dim or hidden // heads)
    if head_dim % 2:
        raise f.refuse("head_dim", f"gives {head_dim}, which must be even for rotary positions; correct the file")
    return heads, kv_heads, head_dim


def _rope(f: Fields, family: Family, positions: int) -> tuple[float, RopeScaling | None, float | None]:
    if family.local_rope_theta is not None:
        return rope.read_two(f, positions, family.rope_theta, family.local_rope_theta)
    return *rope.read(f, positions, family.rope_theta), None


def _bias(f: Fields, name: str, family: Family) -> bool:
    bias = f.boolean("attention_bias", bool(family.bias))
    if family.bias is not None and bias != family.bias:
        what = "always has biases on q, k and v; use model_type llama for a model without" if family.bias else "has no biases"
        raise f.refuse("attention_bias", f"{name} {what}")
    return bias


def _windows(f: Fields, name: str, family: Family) -> tuple[int | None, tuple[bool, ...]]:
    """(tokens in a sliding window, which layers have one)."""
    layers = range(f.integer("num_hidden_layers"))
    on = bool(family.windows) and (not family.window_switch or f.boolean("use_sliding_window", False))
    window = f.optional_integer("sliding_window", 4096) if on else None
    if window is not None and f.fields.get("sliding_window_size") not in (None, window):
        raise f.refuse("sliding_window_size", f"disagrees with sliding_window = {window}; keep one of them")
    if family.windows == "alternate":
        period = f.integer("sliding_window_pattern", family.window_period)
        windowed = tuple((i + 1) % period != 0 for i in layers)
    else:
        first = f.integer("max_window_layers", 28, least=0) if family.windows == "last" else 0
        windowed = tuple(window is not None and i >= first for i in layers)
    given = f.fields.get("layer_types")
    if given is not None and given != [_TYPES[w] for w in windowed]:
        free = window is not None and family.windows in ("last", "alternate")
        if not free or not isinstance(given, list) or len(given) != len(layers) or not set(given) <= set(_TYPES):
            what = " or ".join(map(repr, _TYPES)) if free else repr(_TYPES[window is not None])
            raise f.refuse("layer_types", f"must be {len(layers)} times {what} for this {name}; correct the file, or use another model")
        windowed = tuple(kind == _TYPES[True] for kind in given)
    if window is None and any(windowed):
        raise f.refuse("sliding_window", f"must be an integer, because layers of {name} have windows; correct the file")
    return window, windowed


def _experts(f: Fields) -> tuple[bool, ...]:
    """Which layers are mixtures of experts."""
    dense, step = f.fields.get("mlp_only_layers") or [], f.integer("decoder_sparse_step", 1)
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise f.refuse("mlp_only_layers", "must be a list of layer numbers or null; correct the file")
    return tuple((i + 1) % step == 0 and i not in dense for i in range(f.integer("num_hidden_layers")))


def _sizes_of_experts(f: Fields, family: Family) -> dict[str, Any]:
    if not family.experts:
        return {"num_experts": 0, "experts_per_token": 0, "expert_size": 0, "normalise_experts": False}
    name = "num_experts" if f.fields.get("num_experts") is not None else "num_local_experts"  # transformers 5 writes the second
    if f.fields.get(name) is None:
        raise UserError(f"{f.where}: num_experts is missing; add it")
    count, chosen = f.integer(name), f.integer("num_experts_per_tok")
    if f.fields.get("num_local_experts") not in (None, count):
        raise f.refuse("num_local_experts", f"disagrees with num_experts = {count}; keep one of them")
    if chosen > count:
        raise f.refuse("num_experts_per_tok", f"must be at most {name} = {count}; correct the file")
    return {
        "num_experts": count,
        "experts_per_token": chosen,
        "expert_size": f.integer("moe_intermediate_size"),
        "normalise_experts": f.boolean("norm_topk_prob", False),
    }
