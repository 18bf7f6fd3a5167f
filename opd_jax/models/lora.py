"""Low-rank adaptation (Hu et al. 2021) as an overlay on a parameter tree: the base is frozen, W x + (alpha / rank) B A x is computed.

Beside the letters of types.py: R rank. A is [inputs, R], B is [R, outputs], with the axes of the weight they adapt.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util

from opd_jax.models.spec import ParamSpec

# Weight inside a layer -> (its module's name in a checkpoint, how many of its leading axes are inputs).
TARGETS = {
    "attention/q": ("q_proj", 1),
    "attention/k": ("k_proj", 1),
    "attention/v": ("v_proj", 1),
    "attention/o": ("o_proj", 2),
    "mlp/gate": ("gate_proj", 1),
    "mlp/up": ("up_proj", 1),
    "mlp/down": ("down_proj", 1),
}
MODULES = tuple(name for name, _ in TARGETS.values())


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int
    alpha: float  # the update is scaled by alpha / rank
    modules: tuple[str, ...]  # of MODULES


@flax.struct.dataclass
class Adapted:
    """A weight and its low-rank update; stands where the weight stood."""

    base: jax.Array
    a: jax.Array  # [*inputs, R]
    b: jax.Array  # [R, *outputs]
    scale: float = flax.struct.field(pytree_node=False)


def param_specs(base_specs: dict, config: LoraConfig) -> dict:
    """The tree of ParamSpec of the adapter: {"layers": {"0": {"attention": {"q": {"a", "b"}}}}}. B starts at 0, and so does the update."""
    specs = {}
    for path, spec in traverse_util.flatten_dict(base_specs, sep="/").items():
        inputs = _inputs(path, config)
        if inputs:
            fan_in = math.prod(spec.shape[:inputs])
            specs[f"{path}/a"] = ParamSpec((*spec.shape[:inputs], config.rank), (*spec.logical_axes[:inputs], None), _uniform(fan_in))
            specs[f"{path}/b"] = ParamSpec((config.rank, *spec.shape[inputs:]), (None, *spec.logical_axes[inputs:]))
    return traverse_util.unflatten_dict(specs, sep="/")


def present(base_specs: dict, config: LoraConfig) -> tuple[str, ...]:
    """The modules of `config` that the base has; the experts of a mixture are not among them."""
    paths = traverse_util.flatten_dict(base_specs, sep="/")
    found = {TARGETS[path.split("/", 2)[-1]][0] for path in paths if _inputs(path, config)}
    return tuple(module for module in config.modules if module in found)


def attach(base: dict, adapter: dict, config: LoraConfig) -> dict:
    """The base with its targets replaced by Adapted; the arrays are those of the base, not copies."""
    merged = traverse_util.flatten_dict(base, sep="/")
    for path, a, b in _pairs(adapter):
        merged[path] = Adapted(merged[path], a, b, config.alpha / config.rank)
    return traverse_util.unflatten_dict(merged, sep="/")


def merge(base: dict, adapter: dict, config: LoraConfig) -> dict:
    """The base with the update added to its weights, in float32; types and shardings are those of the base."""
    merged = traverse_util.flatten_dict(base, sep="/")
    for path, a, b in _pairs(adapter):
        merged[path] = _merge(merged[path], a, b, config.alpha / config.rank)
    return traverse_util.unflatten_dict(merged, sep="/")


@jax.jit
def _merge(weight: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    update = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1, precision="highest")
    return (weight.astype(jnp.float32) + scale * update).astype(weight.dtype)


def equations(equation: str) -> tuple[str, str]:
    """The einsums of x A and (x A) B for that of x W: "bld,dnh->blnh" gives "bld,dr->blr" and "blr,rnh->blnh"."""
    operands, out = equation.split("->")
    x, w = operands.split(",")
    inputs = "".join(letter for letter in w if letter not in out)
    kept = "".join(letter for letter in x if letter in out)
    return f"{x},{inputs}r->{kept}r", f"{kept}r,r{w.removeprefix(inputs)}->{out}"


def _pairs(adapter: dict):
    flat = traverse_util.flatten_dict(adapter, sep="/")
    for path in flat:
        if path.endswith("/a"):
            path = path.removesuffix("/a")
            yield path, flat[f"{path}/a"], flat[f"{path}/b"]


def _inputs(path: str, config: LoraConfig) -> int:
    """The number of input axes of a targeted weight, 0 of any other parameter."""
    module, inputs = TARGETS.get(path.split("/", 2)[-1], ("", 0))
    return inputs if module in config.modules else 0


def _uniform(fan_in: int):
    """U(-1 / sqrt(fan in), 1 / sqrt(fan in)), as peft starts A."""

    def init(key, shape, dtype):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
