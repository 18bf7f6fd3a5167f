"""The device mesh, and the rules that lay logical axes of arrays on it.

Arrays are described by logical axes ("batch", "vocab", "ffn", ...); `Rules` says which mesh axis carries each. Meshes use Auto axes:
code states shardings at a few named points and the compiler propagates them. Without a mesh every function here is the identity.
"""

import contextlib
import contextvars
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opd_jax import config as config_lib
from opd_jax import processes
from opd_jax.types import UserError

AXES = ("data", "fsdp", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis (or several, or None = replicated). Names that begin with `act_` belong to activations."""

    batch: tuple[str, ...] = ("data", "fsdp")
    vocab: str | None = "tensor"
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    ffn: str | None = "tensor"
    expert: str | None = None  # a device holds a slice of every expert's width, so that no routing leaves it idle, and no token travels
    length: str | None = "sequence"
    act_embed: str | None = None


RULES = Rules()


def from_settings(settings: config_lib.Mesh) -> Mesh:
    """The mesh of a config's student, and of whatever shares its devices. Raises UserError."""
    devices = processes.devices()
    if settings.teacher >= len(devices):
        raise UserError(f"mesh.teacher = {settings.teacher} leaves no device to the student: there are {len(devices)}; give fewer")
    mine = devices[: len(devices) - settings.teacher]
    return make_mesh(settings.data, settings.fsdp, settings.tensor, settings.sequence, devices=mine)


def teacher_mesh(settings: config_lib.Mesh) -> Mesh | None:
    """The mesh of a teacher that has devices of its own: parameters and rows are divided among them."""
    return make_mesh(fsdp=settings.teacher, devices=processes.devices()[-settings.teacher :]) if settings.teacher else None


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, *, devices=None) -> Mesh:
    """A mesh over the devices of all processes, or over one device when every size is 1 and there is one process. Raises UserError."""
    devices = processes.devices() if devices is None else devices
    shape = (data, fsdp, sequence, tensor)
    size = math.prod(shape)
    single = processes.count() == 1
    if size == 1 and single:
        devices = devices[:1]
    if size != len(devices):
        raise UserError(
            f"mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence = {data} * {fsdp} * {tensor} * {sequence} = {size}, "
            f"but there are {len(devices)} devices{'' if single else f' of {processes.count()} processes'}: "
            f"make the product {len(devices)}{', or 1 to use one device' if single else ''}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def partition_spec(mesh: Mesh, logical_axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of an array. A dimension that its mesh axes do not divide is replicated (and logged once)."""
    entries = []
    users: dict[str, str] = {}  # mesh axis -> the logical axis that lies along it
    for name, size in zip(logical_axes, shape, strict=True):
        axes = _mesh_axes(mesh, name, rules)
        for axis in axes:
            if axis in users:
                raise UserError(
                    f"logical axes {users[axis]!r} and {name!r} of one array both lie along mesh axis {axis!r}: change the rule of one in "
                    "parallel.Rules"
                )
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            if (name, size) != ("length", 1):  # a single token, which decoding reads
                _report_replicated(name, size, axes, ways)
            axes = ()
        users |= dict.fromkeys(axes, name)
        entries.append(axes[0] if len(axes) == 1 else (axes or None))
    return PartitionSpec(*entries)


def _mesh_axes(mesh: Mesh, name: str | None, rules: Rules) -> tuple[str, ...]:
    """The axes of the mesh that carry a logical axis; a mesh of the user's may lack some."""
    axes = getattr(rules, name) if name else None
    axes = (axes,) if isinstance(axes, str) else (axes or ())
    return tuple(axis for axis in axes if axis in mesh.shape)


def _fields(axes: tuple[str, ...]) -> str:
    """The config fields of mesh axes, as a product."""
    return " * ".join(f"mesh.{axis}" for axis in axes)


_strict = contextvars.ContextVar("strict", default=False)


@contextlib.contextmanager
def strict(on: bool = True) -> Iterator[None]:
    """In it a parameter that cannot be divided as the rules say is refused, in place of being replicated."""
    token = _strict.set(on)
    try:
        yield
    finally:
        _strict.reset(token)


def parameter_sharding(mesh: Mesh, name: str, logical_axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """The NamedSharding of a parameter. Raises UserError within `strict` for a dimension that would be replicated."""
    if _strict.get():
        _check_divided(mesh, name, logical_axes, shape)
    return sharding(mesh, logical_axes, shape)


def _check_divided(mesh: Mesh, name: str, logical_axes: tuple[str | None, ...], shape: tuple[int, ...]) -> None:
    for place, (axis, size) in enumerate(zip(logical_axes, shape, strict=True)):
        along = _mesh_axes(mesh, axis, RULES)
        ways = math.prod(mesh.shape[one] for one in along)
        if size % ways:
            raise UserError(
                f"config field {_fields(along)} = {ways} does not divide dimension {place} ({axis}) of parameter {name}, which is {size}; "
                "give a divisor of it, or mesh.strict = False, which replicates it"
            )


def splits_length() -> bool:
    """Whether the mesh of `jax.set_mesh` has devices along the length."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and any(mesh.shape[axis] > 1 for axis in _mesh_axes(mesh, "length", RULES))


_reported: set[tuple] = set()


def _report_replicated(name: str, size: int, axes: tuple[str, ...], ways: int) -> None:
    if (name, size, axes, ways) not in _reported:
        _reported.add((name, size, axes, ways))
        logging.getLogger(__name__).warning("axis %r of size %d is replicated: %s = %d does not divide it", name, size, _fields(axes), ways)


def sharding(mesh: Mesh, logical_axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules = RULES) -> NamedSharding:
    """The NamedSharding of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(mesh, logical_axes, shape, rules))


def spread() -> bool:
    """Whether `jax.set_mesh` has set a mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """States the sharding of an activation under `jax.set_mesh`; the identity without a mesh."""
    if not spread():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(jax.sharding.get_abstract_mesh(), logical_axes, x.shape))


def within_loop(params, variable):
    """`params` as if they depended on `variable`, what a loop goes over: under fsdp the compiler may else gather them before the loop.

    All of a model would lie on every device throughout, where layer by layer within the loop suffices. Without fsdp just the parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return params
    return jax.lax.optimization_barrier((params, variable))[0]


def over_rows(function: Callable, x_B: jax.Array, weights):
    """`function(x_B, weights)`, where each device reads the rows that it holds alone; `x_B` and the result have the batch as first axis.

    For functions that treat rows alike but mix them, such as sorting tokens. Without a mesh, or axes for rows, just the function.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = set(_mesh_axes(mesh, "batch", RULES))
    if not (spread() and axes):
        return function(x_B, weights)
    rows = PartitionSpec(partition_spec(mesh, ("batch",) + (None,) * (x_B.ndim - 1), x_B.shape)[0])
    over = rows[0] or ()  # nothing, where the axes cannot share the rows

    def read(x_B, weights):
        # Said here, so that gradients over weights are summed over devices whatever rule makes those of the products.
        return function(x_B, jax.lax.pcast(weights, over, to="varying"))

    return jax.shard_map(read, in_specs=(rows, PartitionSpec()), out_specs=rows, axis_names=axes)(x_B, weights)


def over_rows_and_heads(function: Callable, heads: list, x_BL: jax.Array) -> jax.Array:
    """`function(heads, x_BL)`, where each device reads its rows and attention heads alone; `heads` and the result are [B, N, L, H].

    For kernels that the compiler cannot split. Without a mesh just the function.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(heads, x_BL)
    of_heads = partition_spec(mesh, ("batch", "heads", None, None), heads[0].shape)
    specs = ([of_heads] * len(heads), PartitionSpec(of_heads[0]))
    return jax.shard_map(function, in_specs=specs, out_specs=of_heads, check_vma=False)(heads, x_BL)


def shard_batch(tree, mesh: Mesh):
    """Puts arrays on the mesh with their leading axis over the batch axes; each process puts the rows that its devices hold."""
    return jax.tree.map(lambda x: put(x, sharding(mesh, ("batch",) + (None,) * (x.ndim - 1), x.shape)), tree)


def replicate(tree, mesh: Mesh):
    """Puts arrays on every device of the mesh."""
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, PartitionSpec())), tree)


def put(x, sharding: NamedSharding) -> jax.Array:
    """Lays out an array that every process has whole, or one that lies on the mesh already."""
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable or not here:
        return jax.device_put(x, sharding)
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
