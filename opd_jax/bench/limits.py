"""What the machine can do at most, measured: matmuls and memory traffic."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

SIZES = {"cpu": 2048}  # of square matmuls, by platform; elsewhere:
LARGE = 8192
STREAM_BYTES = 128 * 2**20  # of each array that is streamed through memory


class Limits:
    """matmul_float32, matmul_bfloat16 (operands; the sum is float32) and stream: each a function, and the work that a run of it does."""

    def __init__(self):
        self._size = SIZES.get(jax.devices()[0].platform, LARGE)

    def phase(self, name: str) -> Callable:
        if name == "stream":
            x, y = (jnp.full(STREAM_BYTES // 4, value, jnp.float32) for value in (1.0, 2.0))
            run = jax.jit(lambda x, y: x + 0.5 * y)
            return lambda: run(x, y)
        x, y = (jax.random.normal(jax.random.key(seed), (self._size, self._size), name.removeprefix("matmul_")) for seed in (0, 1))
        run = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32))
        return lambda: run(x, y)

    def work(self, name: str) -> float:
        """FLOPs of a matmul, bytes of a stream (two arrays read, one written)."""
        return 3 * STREAM_BYTES if name == "stream" else 2 * self._size**3
