"""Shapes of published models, so that they can be planned for and timed without their files: facts of their config.json."""

from typing import Any

from opd_jax.models import config as config_lib
from opd_jax.models.config import ModelConfig
from opd_jax.types import UserError

_COLUMNS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
_QWEN = {"vocab_size": 151_936, "rope_theta": 1_000_000.0, "bos_token_id": 151_643, "eos_token_id": 151_645}
_QWEN3 = _QWEN | {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40_960}
_QWEN2 = _QWEN | {"model_type": "qwen2", "max_position_embeddings": 32_768}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128_256, "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5}
_LLAMA3 |= {"bos_token_id": 128_000, "eos_token_id": 128_001}

# Name -> (what its family shares, the columns above).
_SHAPES: dict[str, tuple[dict[str, Any], tuple]] = {
    "qwen3-0.6b": (_QWEN3, (1024, 3072, 28, 16, 8, True)),
    "qwen3-1.7b": (_QWEN3, (2048, 6144, 28, 16, 8, True)),
    "qwen3-4b": (_QWEN3, (2560, 9728, 36, 32, 8, True)),
    "qwen3-8b": (_QWEN3, (4096, 12_288, 36, 32, 8, False)),
    "qwen3-14b": (_QWEN3, (5120, 17_408, 40, 40, 8, False)),
    "qwen3-32b": (_QWEN3, (5120, 25_600, 64, 64, 8, False)),
    "qwen2.5-0.5b": (_QWEN2, (896, 4864, 24, 14, 2, True)),
    "qwen2.5-1.5b": (_QWEN2, (1536, 8960, 28, 12, 2, True)),
    "qwen2.5-7b": (_QWEN2 | {"vocab_size": 152_064}, (3584, 18_944, 28, 28, 4, False)),
    "llama-3.2-1b": (_LLAMA3 | {"head_dim": 64}, (2048, 8192, 16, 32, 8, True)),
    "llama-3.1-8b": (_LLAMA3, (4096, 14_336, 32, 32, 8, False)),
}
NAMES = tuple(_SHAPES)


def shape(name: str) -> ModelConfig:
    """The shape of a published model, by a name of NAMES in any case. Raises UserError.

    Scaling of rotary positions, which changes no size, is left out.
    """
    if name.lower() not in _SHAPES:
        raise UserError(f"model {name!r} is not a published shape known here; valid: {', '.join(NAMES)}, or a folder with a config.json")
    family, columns = _SHAPES[name.lower()]
    return config_lib.from_hf(family | dict(zip(_COLUMNS, columns, strict=True)), where=name)
