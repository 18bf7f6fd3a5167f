"""Several processes that run one program: how they start, what they tell each other, and who writes files.

Every process runs the same host code on the same values, so that all of them start the same computations in the same order. Rows of a
batch lie on the devices of all; what the host reads of them is gathered. Process 0 writes the files (of checkpoints each its shards). With
one process every function here does the obvious, at no cost.
"""

import contextlib
import functools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opd_jax import files
from opd_jax.types import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
GRACE_SECONDS = 3.0  # the others have to say why they end, before process 0, whose end ends them, is gone

_working_alone = False


def start() -> None:
    """Joins the processes of this program, where the environment says that there are several. Call it before the first computation.

    By VARIABLES, all of them or none; otherwise by what a step of several Slurm tasks, or a TPU pod, says of itself. Raises UserError.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    found = _from_variables(given) if given else detect(os.environ)
    if found is None:
        return
    try:
        jax.distributed.initialize(**found)
    except (RuntimeError, ValueError, OSError) as error:
        where = ", ".join(f"{name}={value}" for name, value in given.items()) or "the processes that Slurm or the TPU pod names"
        raise UserError(f"{where}: the processes did not find each other ({str(error).splitlines()[0]}); correct it") from None
    if not first():
        logging.getLogger().setLevel(logging.ERROR)  # a warning of all need not be said by all


def _from_variables(given: dict[str, str]) -> dict[str, Any]:
    missing = [name for name in VARIABLES if name not in given]
    said = ", ".join(f"{name}={value}" for name, value in given.items())
    if missing:
        raise UserError(f"environment: {said}, but not {', '.join(missing)}; set all of {', '.join(VARIABLES)}, or none")
    address, *numbers = (given[name] for name in VARIABLES)
    if not re.fullmatch(r"\S+:[0-9]{1,5}", address) or not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
        raise UserError(f"environment: {said}; give HOST:PORT of process 0, the number of processes, and this one's number from 0")
    count, index = map(int, numbers)
    if not index < count:
        raise UserError(f"environment: JAX_PROCESS_ID={index} must be below JAX_NUM_PROCESSES={count}")
    # Detection would give each task of Slurm one device of its host; who sets the variables has said who sees what.
    return {"coordinator_address": address, "num_processes": count, "process_id": index, "cluster_detection_method": "deactivate"}


def detect(environment) -> dict[str, Any] | None:
    """Settings for jax.distributed where other processes are known to run: it would wait for them elsewhere."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdecimal() and int(tasks) > 1 and "SLURM_STEP_NODELIST" in environment:
        return {"cluster_detection_method": "slurm"}
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    slices = environment.get("MEGASCALE_NUM_SLICES", "")
    if "," in hosts or (slices.isdecimal() and int(slices) > 1):
        return {}
    return None


def leave(status: int) -> None:
    """Ends this process without waiting for others, which may wait for it. Returns where all went well, or there is one process."""
    if status == 0 or jax.process_count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(GRACE_SECONDS)
    os._exit(status)


def index() -> int:
    """This process's number, from 0."""
    return 0 if _working_alone else jax.process_index()


def count() -> int:
    """How many processes run this together."""
    return 1 if _working_alone else jax.process_count()


def first() -> bool:
    """Whether this process writes files and speaks to the user."""
    return index() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In it this process is the only one, with the devices that are its own."""
    global _working_alone
    before, _working_alone = _working_alone, True
    try:
        yield
    finally:
        _working_alone = before


def working_alone() -> bool:
    """Whether there are others, who wait."""
    return _working_alone and jax.process_count() > 1


def devices() -> list[jax.Device]:
    """Of all processes, or those of the one that works alone."""
    return jax.local_devices() if working_alone() else jax.devices()


# ---- arrays


def gather(tree):
    """Arrays of which this process can read every row; it starts the transfer and does not wait for it. What is here already stays."""
    return jax.tree.map(lambda x: _everywhere(x) if _is_elsewhere(x) else x, tree)


def to_host(tree):
    """NumPy arrays with every row, whichever processes hold them."""
    return jax.tree.map(np.asarray, gather(tree))


def _is_elsewhere(x) -> bool:
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def _everywhere(x: jax.Array) -> jax.Array:
    return _copy(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)


@functools.cache
def _copy(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda x: x, out_shardings=sharding)


# ---- what the hosts tell each other


def share(value: Any) -> list:
    """What each process gave, in their order: values that JSON has. All must call it."""
    if count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few lengths, each of which is compiled once
    padded[: data.size] = data
    return [json.loads(row[:size].tobytes()) for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)]


def divide(function: Callable[[Sequence], list], *columns: Sequence) -> list:
    """`function` of rows, a value that JSON has for each, where every process does its part of the rows."""
    if count() == 1:
        return function(*columns)
    rows, here = len(columns[0]), index()
    part = slice(here * rows // count(), (here + 1) * rows // count())
    return [value for values in share(function(*(column[part] for column in columns))) for value in values]


def by_first(function: Callable, *arguments) -> None:
    """Process 0 alone runs a function that writes; the others wait. What stops it there is raised everywhere."""
    stopped = None
    if first():
        try:
            function(*arguments)
        except (OSError, ValueError, KeyError) as error:
            stopped = error
    said = share(None if stopped is None else str(stopped) if isinstance(stopped, UserError) else files.reason(stopped))[0]
    if stopped is not None:
        raise stopped
    if said is not None:
        raise UserError(said)


class Agreement:
    """A number that any process may raise above 0, read at the same call by all.

    Called once a step it gives the largest of the call before, whose exchange is over by then: nobody waits for it.
    """

    def __init__(self):
        self._asked: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if count() == 1:
            return number
        before, self._asked = self._asked, _largest(number)
        return 0 if before is None else int(before)


def _largest(number: int) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()), ("all",))
    rows = NamedSharding(mesh, PartitionSpec("all"))
    everyone = jax.make_array_from_callback((mesh.size,), rows, lambda at: np.full(len(range(*at[0].indices(mesh.size))), number, np.int32))
    return _max(NamedSharding(mesh, PartitionSpec()))(everyone)


@functools.cache
def _max(sharding: NamedSharding) -> Callable:
    return jax.jit(lambda x: x.max(), out_shardings=sharding)
