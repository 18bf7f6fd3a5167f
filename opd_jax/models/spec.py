"""Parameters described before they exist: one tree of ParamSpec gives shapes, shardings and initial values."""

import dataclasses
import hashlib
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import parallel, processes


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical axis of each dimension (see parallel.Rules), and `init(key, shape, dtype) -> array`."""

    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    init: Callable = jax.nn.initializers.zeros

    def __post_init__(self):
        assert len(self.shape) == len(self.logical_axes), self


def _map(function: Callable, specs: dict) -> dict:
    return jax.tree.map_with_path(lambda path, spec: function(jax.tree_util.keystr(path, simple=True, separator="/"), spec), specs)


def shardings(specs: dict, mesh: Mesh) -> dict:
    """The NamedSharding of every parameter."""
    return _map(lambda path, spec: parallel.parameter_sharding(mesh, path, spec.logical_axes, spec.shape), specs)


def abstract(specs: dict, dtype, mesh: Mesh | None = None) -> dict:
    """ShapeDtypeStructs, with shardings when a mesh is given."""

    def describe(path, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = parallel.parameter_sharding(mesh, path, spec.logical_axes, spec.shape) if mesh is not None else None
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding)

    return _map(describe, specs)


def init(key: jax.Array, specs: dict, dtype=jnp.float32, mesh: Mesh | None = None) -> dict:
    """Fresh parameters, born on their devices.

    The key of a parameter is a function of `key` and its path alone, so that neither the mesh nor the other parameters change its values.
    """

    def make(key):
        return _map(lambda path, spec: spec.init(jax.random.fold_in(key, zlib.crc32(path.encode())), spec.shape, dtype), specs)

    return jax.jit(make, out_shardings=shardings(specs, mesh) if mesh is not None else None)(key)


def count(specs: dict) -> int:
    """How many numbers the parameters hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(specs, jnp.float32)))


def content_hash(params: dict) -> str:
    """Hex digest of names, shapes and bytes of a parameter tree, the same for any sharding."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = processes.to_host(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
