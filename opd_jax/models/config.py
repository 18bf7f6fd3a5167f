"""The shape of a model, read from and written to the fields of a Hugging Face config.json.

Every field that changes the numbers is honoured or refused by name: a model that loads is the model that was saved.
"""

import dataclasses
import json
from typing import Any

from opd_jax.types import UserError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `linear` uses the factor alone, `llama3` all four numbers."""

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0  # tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Hashable, so that it can be a static argument of jit."""

    family: str  # llama, qwen2 or qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int  # tokens
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    initializer_range: float  # standard deviation of fresh weights
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    valid_vocab_size: int | None = None  # rows from here on are padding: Head.valid_V and the sampler mask them, apply() does not
    compute_dtype: str = "float32"  # of matmul operands and the KV cache; sums, norms, softmax and the residual stream are float32
    remat: bool = False  # recompute each layer in the backward pass
    source: str = "{}"  # JSON of the config.json fields that do not change the numbers, kept to be written back


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields that change no number here, whatever their value: names, storage, and settings of generation.
_IGNORED = _names(
    """
    transformers_version _name_or_path name_or_path _commit_hash use_cache return_dict return_dict_in_generate
    output_attentions output_hidden_states output_scores tokenizer_class prefix torchscript id2label label2id num_labels problem_type
    finetuning_task task_specific_params unsloth_version unsloth_fixed _attn_implementation attn_implementation sep_token_id
    decoder_start_token_id do_sample temperature top_k top_p min_p typical_p num_beams num_beam_groups num_return_sequences max_length
    min_length max_new_tokens repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size diversity_penalty
    early_stopping bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty epsilon_cutoff eta_cutoff
    """
)
# Fields of the weights file, decided anew when one is written.
_OF_THE_WEIGHTS = _names("torch_dtype dtype")
# Fields that are accepted at the values with which they do nothing.
_NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "use_sliding_window": (False,),
}
# Fields that from_hf reads.
_HONOURED = _names(
    """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings attention_bias mlp_bias
    initializer_range bos_token_id eos_token_id pad_token_id layer_types
    """
)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class _Fields:
    """A config.json with typed access, whose errors name the file, the field and its value."""

    def __init__(self, fields: dict[str, Any], where: str):
        self.fields, self.where = fields, where

    def refuse(self, name: str, remedy: str) -> UserError:
        value = repr(self.fields.get(name))
        return UserError(f"{self.where}: {name} = {value if len(value) < 100 else value[:100] + '...'}: {remedy}")

    def _get(self, name: str, default: Any, kinds: type | tuple[type, ...], what: str, valid) -> Any:
        value = self.fields.get(name)
        value = default if value is None else value
        if isinstance(value, bool) != (kinds is bool) or not isinstance(value, kinds) or not valid(value):
            raise self.refuse(name, f"must be {what}; correct the file")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        return self._get(name, default, int, "an integer of at least 1", lambda value: value >= 1)

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._get(name, default, (int, float), "a positive number", lambda value: 0 < value < float("inf")))

    def boolean(self, name: str, default: bool) -> bool:
        return self._get(name, default, bool, "true or false", lambda value: True)

    def token(self, name: str) -> int | None:
        return None if self.fields.get(name) is None else self._get(name, None, int, "a token id or null", lambda value: True)

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.fields.get(name)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise self.refuse(name, "must be a token id, a list of them or null; correct the file")
        return tuple(values)


def from_hf(fields: dict[str, Any], *, where: str) -> ModelConfig:
    """Reads the fields of a config.json (`where` names the file in errors).

    Both spellings of the rotary fields are read: `rope_theta` with `rope_scaling`, and `rope_parameters`. Raises UserError for a missing
    field, a bad value, and any field whose value would change the numbers in a way that is not implemented.
    """
    f = _Fields(fields, where)
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        raise f.refuse("model_type", f"is not supported; valid: {', '.join(ARCHITECTURES)}")
    _refuse_missing_and_unknown(f, family)
    heads, kv_heads, head_dim = _heads(f, family)
    layers = f.integer("num_hidden_layers")
    if fields.get("layer_types") not in (None, ["full_attention"] * layers):
        raise f.refuse("layer_types", f"only {layers} times 'full_attention' is supported; use another model")
    positions = f.integer("max_position_embeddings", 2048 if family == "llama" else 32768)
    theta, scaling = _rope(f, positions)
    bias = f.boolean("attention_bias", family == "qwen2")
    if family == "qwen2" and not bias:
        raise f.refuse("attention_bias", "qwen2 always has biases on q, k and v; use model_type llama for a model without")
    return ModelConfig(
        family=family,
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=positions,
        tie_word_embeddings=f.boolean("tie_word_embeddings", False),
        qkv_bias=bias,
        output_bias=bias and family != "qwen2",
        mlp_bias=f.boolean("mlp_bias", False),
        qk_norm=family == "qwen3",
        initializer_range=f.number("initializer_range", 0.02),
        bos_token_id=f.token("bos_token_id"),
        eos_token_ids=f.tokens("eos_token_id"),
        pad_token_id=f.token("pad_token_id"),
        source=json.dumps({k: v for k, v in fields.items() if k not in _HONOURED | _OF_THE_WEIGHTS | _NEUTRAL.keys()}, sort_keys=True),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json, in the spelling that transformers 4 and 5 both read; the inverse of from_hf."""
    scaling = config.rope_scaling
    rope_scaling = None
    if scaling is not None:
        rope_scaling = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope_scaling |= {name: getattr(scaling, name) for name in _LLAMA3}
    eos = config.eos_token_ids
    fields = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
        "pad_token_id": config.pad_token_id,
    }
    if config.family != "qwen2":
        fields["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    return json.loads(config.source) | fields


def _refuse_missing_and_unknown(f: _Fields, family: str) -> None:
    # transformers gives a Qwen config without num_key_value_heads 32 of them, which is hardly what its writer meant.
    required = _REQUIRED if family == "llama" or "num_key_value_heads" in f.fields else (*_REQUIRED, "num_key_value_heads")
    for name in required:
        if f.fields.get(name) is None:
            raise UserError(f"{f.where}: {name} is missing; add it")
    if (f.fields.get("architectures") or [ARCHITECTURES[family]]) != [ARCHITECTURES[family]]:
        raise f.refuse("architectures", f"is not supported; valid for model_type {family}: {ARCHITECTURES[family]}")
    known = _IGNORED | _OF_THE_WEIGHTS | _HONOURED
    if family == "llama":
        known |= {"mlp_bias"}
    else:
        known = known - {"mlp_bias"} | {"sliding_window", "max_window_layers"}  # without use_sliding_window these two do nothing
    for name, value in f.fields.items():
        if name in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[name]:
                raise f.refuse(name, f"is not supported; valid: {_NEUTRAL[name][0]!r}")
        elif name not in known and value not in (None, False, "", [], {}):
            raise f.refuse(name, f"is not a field of {family} known here and may change the numbers; remove it if it does not")


def _heads(f: _Fields, family: str) -> tuple[int, int, int]:
    """(query heads, key/value heads, head dimension)."""
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise f.refuse("num_key_value_heads", f"must divide num_attention_heads = {heads}; correct the file")
    if f.fields.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise f.refuse("hidden_size", f"is not a multiple of num_attention_heads = {heads}; correct the file, or add head_dim")
    head_dim = f.integer("head_dim", 128 if family == "qwen3" else hidden // heads)
    if head_dim % 2:
        raise f.refuse("head_dim", f"gives {head_dim}, which must be even for rotary positions; correct the file")
    return heads, kv_heads, head_dim


def _rope(f: _Fields, positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either spelling, refusing two that disagree."""
    old, new = f.fields.get("rope_scaling") or {}, f.fields.get("rope_parameters") or {}
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict):
            raise f.refuse(name, "must be an object or null; correct the file")
    name = "rope_parameters" if new else "rope_scaling"
    rope = _Fields(new or old, f"{f.where}: {name}")
    scaling = _rope_scaling(rope, positions)
    if old and new and scaling != _rope_scaling(_Fields(old, f"{f.where}: rope_scaling"), positions):
        raise f.refuse("rope_scaling", f"disagrees with rope_parameters = {new}; keep one of them")
    theta = f.number("rope_theta", 10000.0)
    inner = rope.number("rope_theta", theta)
    if f.fields.get("rope_theta") is not None and inner != theta:
        raise f.refuse("rope_theta", f"disagrees with {name}.rope_theta = {inner}; keep one of them")
    return inner, scaling


def _rope_scaling(rope: _Fields, positions: int) -> RopeScaling | None:
    spelling = "rope_type" if "rope_type" in rope.fields else "type"
    kind = rope.fields.get(spelling, "default")
    valid = {"default": (), "linear": ("factor",), "llama3": ("factor", *_LLAMA3)}
    if kind not in valid:
        raise rope.refuse(spelling, f"is not supported; valid: {', '.join(valid)}")
    for key, value in rope.fields.items():
        used = key in ("rope_type", "type", "rope_theta", *valid[kind])
        if not used and value is not None and value not in _NEUTRAL.get(key, ()):
            raise rope.refuse(key, f"is not used by rope type {kind!r} here; remove it if it changes nothing")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, rope.number("factor"))
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.refuse("high_freq_factor", f"must be above low_freq_factor = {low}; correct the file")
    return RopeScaling(kind, rope.number("factor"), low, high, rope.integer("original_max_position_embeddings", positions))
