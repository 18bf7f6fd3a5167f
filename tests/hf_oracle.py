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
}


def fields_of(name: str) -> dict:
    """The config.json of a case."""
    return {key: value for key, value in (BASE | CASES[name]).items() if value is not None}


def make_model(fields: dict, seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A model whose every parameter, norms and biases too, is drawn at random and large enough to be seen in the logits."""
    fields = copy.deepcopy(fields)  # transformers writes into the rotary fields
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(fields.pop("model_type"), **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
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
