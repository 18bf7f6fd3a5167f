"""Attention kernels of vendors for whole sequences: what each can do, the choice between them, and how they are called.

cudnn: jax.nn.dot_product_attention on NVIDIA GPUs. flash: JAX's own Pallas kernel on TPUs. Where neither can be used, attention.py's own
form is. They agree on real tokens; what a padding token sees is rubbish in each, of another kind. The forms are compared with each other on
CPUs, cudnn by the same call with XLA in its place, flash in Pallas's interpreter: no test here runs on a GPU or TPU.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from opd_jax import parallel
from opd_jax.types import UserError

_BLOCK = 128  # tokens: the flash kernel reads multiples of it
_WIDEST = 128  # head_dim of cuDNN's backward pass on every GPU that has it


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scores are made, and what a query may see."""

    scale: float  # of the product of query and key
    softcap: float | None = None  # scores are softcap * tanh(score / softcap)
    window: int | None = None  # places that a query sees, its own included; None: all before it


def missing(kernel: str, dtype, head_dim: int | None = None, rule: Rule | None = None) -> str | None:
    """Why a kernel cannot be used here with this type and, where they are given, this shape of heads and rule; None where it can."""
    wanted = {"cudnn": "gpu", "flash": "tpu"}[kernel]
    if jax.default_backend() != wanted:
        return f"it needs a {wanted.upper()}, and this is a {jax.default_backend().upper()}"
    if kernel == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        return f"it needs model.compute_dtype = 'bfloat16', not {jnp.dtype(dtype).name!r}"
    if kernel == "cudnn" and head_dim is not None and (head_dim % 8 or head_dim > _WIDEST):
        return f"it needs a head_dim that is a multiple of 8 and at most {_WIDEST}, not {head_dim}"
    if rule is not None and rule.softcap is not None:
        return "it has no cap on attention scores, which this model has"
    if kernel == "flash" and rule is not None and rule.window is not None:
        return "it has no sliding window, which this model has"
    return None


def resolve(choice: str, dtype, head_dim: int, rule: Rule) -> str:
    """xla, cudnn or flash. "auto" takes a kernel for every layer that it can read, and xla for the others; another choice is kept."""
    if choice != "auto":
        return choice
    return next((kernel for kernel in KERNELS if missing(kernel, dtype, head_dim, rule) is None), "xla")


def check(choice: str, dtype, head_dim: int | None = None, rule: Rule | None = None) -> None:
    """Refuses a kernel that cannot be used. Raises UserError."""
    reason = missing(choice, dtype, head_dim, rule) if choice in KERNELS else None
    if reason:
        raise UserError(f"config field model.attention = {choice!r}: {reason}; use 'auto' or 'xla'")


def cudnn(q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, mask_BL: jax.Array, rule: Rule, *, by: str = "cudnn") -> jax.Array:
    """Attention [B, L, N, H] by jax.nn.dot_product_attention; `by`: its implementation, "xla" in tests."""
    batch, length = mask_BL.shape
    visible_B1LL = jnp.broadcast_to(mask_BL[:, None, None, :], (batch, 1, length, length))
    window = None if rule.window is None else (rule.window - 1, 0)
    settings = {"scale": rule.scale, "is_causal": True, "local_window_size": window, "implementation": by}
    return jax.nn.dot_product_attention(q_BLNH, k_BLKH, v_BLKH, mask=visible_B1LL, **settings)


def flash(q_BLNH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, mask_BL: jax.Array, rule: Rule) -> jax.Array:
    """Attention [B, L, N, H] by the Pallas kernel: padding is a segment of its own, and each device reads its own rows and heads."""
    from jax.experimental.pallas.ops.tpu.flash_attention import SegmentIds, flash_attention

    length = mask_BL.shape[1]
    fill = -length % _BLOCK
    groups = q_BLNH.shape[2] // k_BLKH.shape[2]

    def read(heads, segment_BL):
        segments = SegmentIds(segment_BL, segment_BL)
        return flash_attention(*heads, segment_ids=segments, causal=True, sm_scale=rule.scale)

    heads = []
    for x, copies in ((q_BLNH, 1), (k_BLKH, groups), (v_BLKH, groups)):
        heads.append(jnp.pad(jnp.repeat(x, copies, axis=2), ((0, 0), (0, fill), (0, 0), (0, 0))).swapaxes(1, 2))
    segment_BL = jnp.pad(mask_BL.astype(jnp.int32), ((0, 0), (0, fill)))
    return parallel.over_rows_and_heads(read, heads, segment_BL).swapaxes(1, 2)[:, :length]


KERNELS: dict[str, Callable] = {"cudnn": cudnn, "flash": flash}
