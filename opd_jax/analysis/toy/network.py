"""The student and the teachers of the toy study: an MLP of three layers, about 4K parameters."""

import jax
import jax.numpy as jnp

INPUTS = 3  # task (-1 left, 1 right), position, time / horizon
LAYERS = ("first", "second", "output")
Params = dict[str, dict[str, jax.Array]]


def init(key: jax.Array, *, width: int, outputs: int) -> Params:
    """Weights with variance 1 / inputs (LeCun), biases 0."""
    sizes = (INPUTS, width, width, outputs)
    return {
        name: {"weight": jax.random.normal(key, (i, o)) / jnp.sqrt(i), "bias": jnp.zeros(o)}
        for name, key, i, o in zip(LAYERS, jax.random.split(key, len(LAYERS)), sizes[:-1], sizes[1:], strict=True)
    }


def apply(params: Params, sign, position, time) -> jax.Array:
    """Outputs [..., outputs] at positions [...]; `sign` of the task and `time` (share of the horizon) broadcast against them."""
    x = jnp.stack(jnp.broadcast_arrays(sign * jnp.ones_like(position), position, time * jnp.ones_like(position)), axis=-1)
    for name in LAYERS:
        x = x @ params[name]["weight"] + params[name]["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
        if name != LAYERS[-1]:
            x = jnp.tanh(x)
    return x
