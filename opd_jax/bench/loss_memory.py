"""What the loss needs beside its operands: XLA's temporaries of token_stats and its gradient at a large vocabulary."""

import jax
import jax.numpy as jnp

from opd_jax.numerics.heads import Head
from opd_jax.numerics.targets import Target
from opd_jax.numerics.token_stats import Signal, token_stats

ROWS, LENGTH, WIDTH, VOCAB = 8, 512, 1024, 151_936  # 4096 positions of a Qwen3-0.6B and a teacher of the same width


def measure(dtype: str = "float32") -> dict[str, int]:
    """Bytes: temporaries of value and gradient of the full-vocabulary reverse KL, the gradients themselves, and logits never made."""
    hidden, unembed = jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), dtype), jax.ShapeDtypeStruct((WIDTH, VOCAB), dtype)
    tokens_BT = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def loss(student, teacher, tokens_BT):
        stats = token_stats(Head(*student), Target((Head(*teacher),)), tokens_BT, signal=Signal("reverse_kl"), needs={"local"})
        return jnp.mean(stats.local_BT)

    compiled = jax.jit(jax.value_and_grad(loss)).lower((hidden, unembed), (hidden, unembed), tokens_BT).compile()
    found = compiled.memory_analysis()
    return {
        "positions": ROWS * LENGTH,
        "vocabulary": VOCAB,
        "width": WIDTH,
        "temp_bytes": found.temp_size_in_bytes,
        "output_bytes": found.output_size_in_bytes,
        "logits_bytes": 4 * ROWS * LENGTH * VOCAB,
    }
