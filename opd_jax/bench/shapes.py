"""What is timed: two models, a batch and its lengths."""

import dataclasses
from typing import Any

import jax
import numpy as np

from opd_jax import parallel
from opd_jax.models import config as config_lib
from opd_jax.models import published, spec, transformer
from opd_jax.models.config import ModelConfig
from opd_jax.types import UserError

DTYPES = ("float32", "bfloat16")  # of matmul operands; sums, norms, losses and the student's parameters are float32


@dataclasses.dataclass(frozen=True)
class Shape:
    """A job of equal lengths: every prompt has `prompt` tokens, every completion `new_tokens`, no stop token ends one."""

    name: str
    student: ModelConfig
    teacher: ModelConfig
    batch_size: int = 32
    prompt: int = 32
    new_tokens: int = 64
    microbatches: int = 1
    dtypes: tuple[str, ...] = DTYPES
    devices: int = 1  # along the batch

    @property
    def rows(self) -> int:
        """Of a microbatch: what the phases of scoring and learning see at once."""
        return self.batch_size // self.microbatches


def _decoder(width: int = 256, vocab: int = 8192, layers: int = 6, head_dim: int = 32) -> ModelConfig:
    fields = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // head_dim,
        "num_key_value_heads": width // head_dim // 2,
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return config_lib.from_hf(fields, where="bench")


PRESETS = {
    "prototype": lambda: Shape("prototype", _decoder(), _decoder()),
    "tiny": lambda: Shape("tiny", _decoder(32, 64, 2, 8), _decoder(32, 64, 2, 8), batch_size=4, prompt=8, new_tokens=8),
    # 64k completion positions in an update, for one accelerator of 80 GB or more.
    "qwen3_0.6b": lambda: Shape(
        "qwen3_0.6b",
        published.shape("qwen3-0.6b"),
        published.shape("qwen2.5-1.5b"),
        batch_size=64,
        prompt=128,
        new_tokens=1024,
        microbatches=16,
        dtypes=("bfloat16",),
    ),
}
# What a curve changes of a shape, and to what.
CURVES = {
    "prototype": {
        "batch_size": (8, 16, 32, 64),
        "new_tokens": (16, 32, 64, 128),
        "vocab": (2048, 8192, 32_768),
        "width": (128, 256, 512),
        "devices": (1, 2, 4, 8),
    },
    "tiny": {"new_tokens": (4, 8)},
}


def make(name: str, changes: dict[str, int] | None = None) -> Shape:
    """A preset with some fields, or the width or vocabulary of both its models, changed. Raises UserError for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"--shape={name}: is not known; valid: {', '.join(PRESETS)}")
    shape, changes = PRESETS[name](), dict(changes or {})
    base = shape.student
    width, vocab = changes.pop("width", base.hidden_size), changes.pop("vocab", base.vocab_size)
    if (width, vocab) != (base.hidden_size, base.vocab_size):
        model = _decoder(width, vocab, base.num_layers, base.head_dim)
        shape = dataclasses.replace(shape, student=model, teacher=model)
    return dataclasses.replace(shape, **changes)


def models(shape: Shape, mesh: jax.sharding.Mesh | None = None) -> tuple[dict, dict]:
    """Random (student, teacher) parameters in float32, the same in every process; drawn by NumPy, so that nothing is compiled for them."""
    return tuple(_random(config, seed, mesh) for seed, config in enumerate((shape.student, shape.teacher)))


def _random(config: ModelConfig, seed: int, mesh: jax.sharding.Mesh | None) -> dict:
    draws = np.random.default_rng(seed)

    def draw(path, param: spec.ParamSpec) -> jax.Array:
        name = path[-1].key
        if name.endswith(("norm", "_bias")):
            values = np.full(param.shape, name.endswith("norm"), np.float32)
        else:
            values = config.initializer_range * draws.standard_normal(param.shape, np.float32)
        return jax.device_put(values, parallel.sharding(mesh, param.logical_axes, param.shape) if mesh is not None else None)

    return jax.tree.map_with_path(draw, transformer.param_specs(config))


def prompts(shape: Shape) -> np.ndarray:
    """Random prompts [B, S], int64, without the ids of padding and stop tokens."""
    vocab = min(shape.student.vocab_size, shape.teacher.vocab_size)
    return np.random.default_rng(2).integers(2, vocab, (shape.batch_size, shape.prompt))


def describe(shape: Shape) -> dict[str, Any]:
    """For the record."""
    size = lambda model: {
        name: getattr(model, name) for name in ("family", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size")
    }
    numbers = {name: getattr(shape, name) for name in ("name", "batch_size", "prompt", "new_tokens", "microbatches", "devices")}
    return numbers | {"student": size(shape.student), "teacher": size(shape.teacher)}
