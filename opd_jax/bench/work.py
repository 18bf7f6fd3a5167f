"""What the phases of a step must do at least: FLOPs of the mathematics, bytes of what is read and written once, and the time of both.

Attention counts the pairs of a query and a key that it sees; a pass back counts twice the pass forward. Recomputation (of logits tile by
tile, of layers by model.remat), masked pairs, norms and activations are the implementation's: they are not counted, and so cost share.
"""

from typing import NamedTuple

import jax.numpy as jnp

from opd_jax import cost
from opd_jax.bench.shapes import Shape
from opd_jax.models import spec, transformer
from opd_jax.models.config import ModelConfig

FLOAT32 = 4  # bytes


class Work(NamedTuple):
    flops: float
    bytes: float


class Limits(NamedTuple):
    """Of a machine, as measured."""

    flops: float  # per second, of a matmul with operands of the type that is timed, summed in float32
    bytes: float  # per second


PHASES = ("prefill", "decode", "generate", "teacher", "gradient", "optimizer", "update", "step")


def parts(shape: Shape, phase: str) -> dict[str, int]:
    """The phases that one consists of, and how often each; {} of one that has no parts."""
    return {
        "generate": {"prefill": 1, "decode": 1},
        "update": {"teacher": shape.microbatches, "gradient": shape.microbatches, "optimizer": 1},
        "step": {"generate": 1, "update": 1},
    }.get(phase, {})


def work(shape: Shape, phase: str, dtype: str) -> Work:
    """Of one run of a phase. `teacher` and `gradient` are of a microbatch."""
    size, rows = jnp.dtype(dtype).itemsize, shape.rows
    length = shape.prompt + shape.new_tokens
    student, teacher = shape.student, shape.teacher
    if phase == "prefill":
        flops = _body(student, shape.batch_size, 0, shape.prompt) + _head(student, shape.batch_size)
        return Work(flops, size * (_weights(student) + _cache(student, shape.batch_size, shape.prompt)))
    if phase == "decode":  # the last token is drawn and need not be read
        steps = shape.new_tokens - 1
        flops = _body(student, shape.batch_size, shape.prompt, length - 1) + steps * _head(student, shape.batch_size)
        remembered = sum(_cache(student, shape.batch_size, place) for place in range(shape.prompt, length - 1))
        return Work(flops, size * (steps * _weights(student) + remembered))
    if phase == "teacher":
        return Work(_body(teacher, rows, 0, length), size * (_weights(teacher) - _unembedding(teacher)))
    if phase == "gradient":
        positions = rows * shape.new_tokens
        flops = 3 * (_body(student, rows, 0, length) + _head(student, positions)) + _head(teacher, positions)
        return Work(flops, size * (2 * _weights(student) + _unembedding(teacher)) + FLOAT32 * _all(student))
    if phase == "optimizer":  # parameters and two moments are read and written, gradients read
        return Work(0, 7 * FLOAT32 * _all(student))
    each = [(times, work(shape, part, dtype)) for part, times in parts(shape, phase).items()]
    return Work(sum(times * one.flops for times, one in each), sum(times * one.bytes for times, one in each))


def floor_seconds(shape: Shape, phase: str, dtype: str, limits: Limits) -> float:
    """The time that a phase takes at the machine's limits: of matmuls or of memory, whichever is longer, summed over its parts."""
    if consists := parts(shape, phase):
        return sum(times * floor_seconds(shape, part, dtype, limits) for part, times in consists.items())
    needed = work(shape, phase, dtype)
    return max(needed.flops / limits.flops, needed.bytes / limits.bytes)


def tokens(shape: Shape, phase: str) -> int:
    """Prompt tokens of a prefill, completion tokens of the other phases; 0 of the optimizer."""
    rows = {"teacher": shape.rows, "gradient": shape.rows, "optimizer": 0}.get(phase, shape.batch_size)
    return rows * (shape.prompt if phase == "prefill" else shape.new_tokens)


def _body(model: ModelConfig, rows: int, start: int, end: int) -> float:
    """Forward FLOPs of all layers on places [start, end) of `rows` sequences."""
    linear = cost.active_parameters(model) - _unembedding(model)
    pairs = sum(_seen(model, layer.windowed, start, end) for layer in model.layers)
    return rows * (2 * linear * (end - start) + 4 * model.num_heads * model.head_dim * pairs)


def _seen(model: ModelConfig, windowed: bool, start: int, end: int) -> int:
    """Pairs of a query in [start, end) and a key that it sees."""
    if windowed:
        return sum(min(place + 1, model.sliding_window) for place in range(start, end))
    return (end * (end + 1) - start * (start + 1)) // 2


def _head(model: ModelConfig, positions: int) -> float:
    return 2 * _unembedding(model) * positions


def _cache(model: ModelConfig, rows: int, places: int) -> int:
    """Numbers in the keys and values of so many places."""
    return 2 * rows * model.num_layers * model.num_kv_heads * model.head_dim * places


def _unembedding(model: ModelConfig) -> int:
    return model.hidden_size * model.vocab_size


def _weights(model: ModelConfig) -> int:
    """Numbers that a pass reads: the embedding is looked up in few rows."""
    return _all(model) - (0 if model.tie_word_embeddings else _unembedding(model))


def _all(model: ModelConfig) -> int:
    return spec.count(transformer.param_specs(model))
