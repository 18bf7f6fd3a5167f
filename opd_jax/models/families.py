"""The model families: what all models of one have in common, and what transformers takes where a config.json is silent."""

import dataclasses


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


@dataclasses.dataclass(frozen=True)
class Family:
    """Traits of a model_type. The defaults are those of Llama."""

    architecture: str
    activation: tuple[str, ...] = ("silu", "swish")  # of the feed-forward layer, under every name that it has
    bias: bool | None = None  # on q, k and v: True always, False never, None as `attention_bias` says
    output_bias: bool = True  # whether the attention's output has a bias where q, k and v have
    qk_norm: bool = False  # norms on each head's queries and keys
    post_norms: bool = False  # norms after attention and feed-forward layer too, before the residual sum
    zero_centred_norms: bool = False  # a norm multiplies by 1 + weight
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    experts: bool = False  # feed-forward layers may be mixtures of experts
    windows: str = ""  # which layers have a sliding window: none (""), all, those from `max_window_layers` on, or `alternate`
    window_switch: bool = False  # windows are off unless `use_sliding_window`
    window_period: int = 2  # of `alternate`: each layer but every such one has a window
    local_rope_theta: float | None = None  # windowed layers rotate by a base of their own
    # What transformers assumes for missing fields.
    context: int = 32768
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rope_theta: float = 10000.0
    tied: bool = False
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    query_scalar: int | None = None  # None: the family has no `query_pre_attn_scalar`, and head_dim takes its place
    attention_softcap: float | None = None
    final_softcap: float | None = None
    # Fields that from_hf reads for this family alone, and those that must be there.
    fields: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()


# transformers gives these families' configs without num_key_value_heads a fixed number, which is hardly what their writers meant.
_KV = names("num_key_value_heads")
_SWITCHED = names("use_sliding_window sliding_window max_window_layers")
_EXPERTS = names(
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers"
)
_GEMMA = dict(
    activation=("gelu_pytorch_tanh",),
    post_norms=True,
    zero_centred_norms=True,
    scaled_embedding=True,
    windows="alternate",
    head_dim=256,
    tied=True,
    bos=2,
    eos=1,
    pad=0,
    query_scalar=256,
    required=_KV,
)
_GEMMA_FIELDS = names("hidden_activation query_pre_attn_scalar final_logit_softcapping sliding_window")

FAMILIES = {
    "llama": Family("LlamaForCausalLM", context=2048, fields=names("mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        bias=False,
        windows="all",
        context=131072,
        bos=1,
        eos=2,
        fields=names("sliding_window"),
        required=_KV,
    ),
    "qwen2": Family("Qwen2ForCausalLM", bias=True, output_bias=False, windows="last", window_switch=True, fields=_SWITCHED, required=_KV),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, windows="last", window_switch=True, head_dim=128, fields=_SWITCHED, required=_KV),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        experts=True,
        windows="all",
        window_switch=True,
        fields=_SWITCHED | _EXPERTS,
        required=_KV | names("num_experts_per_tok moe_intermediate_size"),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        **_GEMMA,
        context=8192,
        attention_softcap=50.0,
        final_softcap=30.0,
        fields=_GEMMA_FIELDS | names("attn_logit_softcapping sliding_window_size"),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        **_GEMMA,
        qk_norm=True,
        context=131072,
        window_period=6,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
        fields=_GEMMA_FIELDS | names("rope_local_base_freq sliding_window_pattern"),
    ),
}
