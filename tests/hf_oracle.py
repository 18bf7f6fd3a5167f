"""transformers on torch as an oracle: tiny random models, their logits and their greedy continuations."""

import copy

import numpy as np
import torch
import transformers

BASE = {
    "vocab_size": 43,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Softcaps and windows small enough to be seen in tiny models.
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
EXPERTS = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 8,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "head_dim": 8,
    "query_pre_attn_scalar": 5,
    "num_hidden_layers": 3,
    "sliding_window": 5,
    "rope_theta": 700.0,
    "rope_local_base_freq": 50.0,
    "tie_word_embeddings": True,
}
# One model for every choice that changes the numbers.
CASES = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    "llama-head-dim": {"model_type": "llama", "head_dim": 6, "rope_theta": 500.0},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-llama3": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama-rope-parameters": {"model_type": "llama", "rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 700.0}},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 5, "head_dim": 6, "tie_word_embeddings": True},
    "qwen2-window": {"model_type": "qwen2", "max_window_layers": 1} | WINDOW,
    "qwen3-window": {"model_type": "qwen3", "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]} | WINDOW,
    "qwen3_moe": {"model_type": "qwen3_moe"} | EXPERTS,
    "qwen3_moe-some-layers": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    }
    | EXPERTS
    | {"num_experts_per_tok": 3},
    "qwen3_moe-window": {"model_type": "qwen3_moe", "attention_bias": True} | EXPERTS | WINDOW,
    "gemma2": GEMMA2,
    "gemma2-no-caps": GEMMA2
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True, "tie_word_embeddings": False}
    | {"layer_types": ["full_attention", "sliding_attention"]},
    "gemma3": GEMMA3 | {"sliding_window_pattern": 2},
    "gemma3-linear": GEMMA3
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 3.0, "num_hidden_layers": 7},
    "gemma3-rope-parameters": GEMMA3
    | {"rope_theta": None, "rope_local_base_freq": None, "layer_types": ["full_attention", "full_attention", "sliding_attention"]}
    | {"rope_parameters": {"full_attention": LLAMA3 | {"rope_theta": 900.0}, "sliding_attention": {"rope_theta": 40.0}}},
}
# A null here takes the field out of the case; elsewhere it is the field's value.
_LEFT_OUT = ("rope_theta", "rope_local_base_freq")


def fields_of(name: str) -> dict:
    """The config.json of a case."""
    return {key: value for key, value in (BASE | CASES[name]).items() if value is not None or key not in _LEFT_OUT}


def make_model(fields: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A model whose every parameter, norms and biases too, is drawn at random and large enough to be seen in the logits."""
    fields = copy.deepcopy(fields)  # transformers writes into the rotary fields
    norm = 0 if fields["model_type"].startswith("gemma") else 1
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(fields.pop("model_type"), **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(norm + 0.3 * noise if "norm" in name else 0.3 * noise)
    return model.to(dtype).eval()


def save_model(fields: dict, folder, **kwargs) -> transformers.PreTrainedModel:
    """make_model, written to a folder with transformers' own writer."""
    model = make_model(fields, dtype=kwargs.pop("dtype", torch.float32))
    model.save_pretrained(folder, **kwargs)
    return model


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, tokens_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
    """[B, L, V] float32; positions count the real tokens of each row."""
    mask = torch.tensor(mask_BL, dtype=torch.long)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(torch.tensor(tokens_BL), attention_mask=mask, position_ids=positions).logits.float().numpy()


@torch.no_grad()
def greedy(model: transformers.PreTrainedModel, tokens_BS: np.ndarray, mask_BS: np.ndarray, count: int) -> np.ndarray:
    """[B, count] tokens that the model continues with, never stopping early."""
    # Without a stop token; asking for `min_new_tokens` instead would forbid the stop token and change the continuation.
    model.generation_config = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    output = model.generate(torch.tensor(tokens_BS), attention_mask=torch.tensor(mask_BS, dtype=torch.long))
    assert output.shape[1] == tokens_BS.shape[1] + count
    return output[:, tokens_BS.shape[1] :].numpy()


def left_padded(rows: int, length: int, vocab_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) [B, L]; the first row is full, the others have 1 to L real tokens on the right."""
    rng = np.random.default_rng(seed)
    real = np.concatenate([[length], rng.integers(1, length + 1, rows - 1)])
    mask_BL = np.arange(length)[None, :] >= length - real[:, None]
    return np.where(mask_BL, rng.integers(0, vocab_size, (rows, length)), 0), mask_BL
