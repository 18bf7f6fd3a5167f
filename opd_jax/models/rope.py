"""Rotary positions: how a config.json describes their frequencies, and the rotation itself."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models.fields import Fields

_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_NEUTRAL = {"partial_rotary_factor": (1,)}  # accepted at the values with which they do nothing


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `linear` uses the factor alone, `llama3` all four numbers."""

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0  # tokens


# ---- in a config.json


def read(f: Fields, positions: int, theta_default: float, theta_name: str = "rope_theta") -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either spelling, `rope_theta` with `rope_scaling` or `rope_parameters`, refusing two that disagree."""
    old, new = f.fields.get("rope_scaling") or {}, f.fields.get("rope_parameters") or {}
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict):
            raise f.refuse(name, "must be an object or null; correct the file")
    name = "rope_parameters" if new else "rope_scaling"
    rope = Fields(new or old, f"{f.where}: {name}")
    scaling = _read_scaling(rope, positions)
    if old and new and scaling != _read_scaling(Fields(old, f"{f.where}: rope_scaling"), positions):
        raise f.refuse("rope_scaling", f"disagrees with rope_parameters = {new}; keep one of them")
    theta = f.number(theta_name, theta_default)
    inner = rope.number("rope_theta", theta)
    if f.fields.get(theta_name) is not None and inner != theta:
        raise f.refuse(theta_name, f"disagrees with {name}.rope_theta = {inner}; keep one of them")
    return inner, scaling


def read_two(f: Fields, positions: int, theta_default: float, local_default: float) -> tuple[float, RopeScaling | None, float]:
    """(theta, scaling, theta of windowed layers) where the two kinds of layers rotate differently.

    Either `rope_theta`, `rope_scaling` and `rope_local_base_freq`, or `rope_parameters` with an object for each kind of layer.
    """
    nested = f.fields.get("rope_parameters") or {}
    if not isinstance(nested, dict) or not nested.keys() <= {"full_attention", "sliding_attention"}:
        raise f.refuse("rope_parameters", "must hold the objects full_attention and sliding_attention alone; correct the file")
    theta, scaling = read(Fields(f.fields | {"rope_parameters": nested.get("full_attention")}, f.where), positions, theta_default)
    local_fields = {"rope_local_base_freq": f.fields.get("rope_local_base_freq"), "rope_parameters": nested.get("sliding_attention")}
    local_theta, local_scaling = read(Fields(local_fields, f.where), positions, local_default, "rope_local_base_freq")
    if local_scaling is not None:
        raise f.refuse("rope_parameters", "stretches the positions of sliding_attention, which is not supported; use another model")
    return theta, scaling, local_theta


def _read_scaling(rope: Fields, positions: int) -> RopeScaling | None:
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


def write(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling` of a config.json."""
    if scaling is None:
        return None
    factors = {name: getattr(scaling, name) for name in _LLAMA3} if scaling.kind == "llama3" else {}
    return {"rope_type": scaling.kind, "factor": scaling.factor} | factors


# ---- the rotation


def rotation(position_BL: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [B, L, 1, H/2] of the angle at every position and frequency, in float32."""
    angle_BLH = position_BL.astype(jnp.float32)[:, :, None] * jnp.asarray(_frequencies(head_dim, theta, scaling))[None, None, :]
    return jnp.cos(angle_BLH)[:, :, None, :], jnp.sin(angle_BLH)[:, :, None, :]


def rotate(x_BLNH: jax.Array, cos_and_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (h, h + H/2) by its angle: the convention of Hugging Face checkpoints."""
    cos, sin = (jnp.concatenate([r, r], axis=-1).astype(x_BLNH.dtype) for r in cos_and_sin)
    first, second = jnp.split(x_BLNH, 2, axis=-1)
    return x_BLNH * cos + jnp.concatenate([-second, first], axis=-1) * sin


def _frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position [H/2], in float32 arithmetic throughout, as the models were trained.

    The llama3 rule divides wavelengths beyond the old context / low_freq_factor by `factor`, keeps those below the old context /
    high_freq_factor, and interpolates between the two (Llama 3.1, 2024).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1) / np.float32(theta) ** exponent
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / np.float32(scaling.factor)
    turns = np.float32(scaling.original_max_position_embeddings) * frequency / np.float32(2 * np.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1).astype(np.float32)
    return (1 - kept) * frequency / np.float32(scaling.factor) + kept * frequency
