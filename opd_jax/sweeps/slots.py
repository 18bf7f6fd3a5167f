"""What each worker gets of the machine: a share of the processor cores, or accelerators of its own."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from opd_jax.config import Config
from opd_jax.types import UserError

# Run in a process of its own: jax holds on to the devices that it has seen until its process ends.
_PROBE = """
import jax, json
devices = jax.local_devices()
chips = dict.fromkeys(str(getattr(d, "coords", d.id)) for d in devices)
print(json.dumps([jax.default_backend(), len(devices), len(chips)]))
"""


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one worker runs."""

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # added to this process's own
    cores: frozenset[int] = frozenset()  # it may run on these alone; empty: on all


def make(workers: int, configs: Sequence[Config]) -> list[Slot]:
    """One slot for each worker. Raises UserError where the machine has no room for so many.

    One worker gets the machine as it is. Several share out the processor cores; on a GPU or TPU each has accelerators of its own, as
    many as the largest mesh of the sweep needs.
    """
    if workers < 1:
        raise UserError(f"--workers={workers}: must be at least 1")
    if workers == 1:
        return [Slot()]
    platform, devices, chips = _probe()
    if platform == "cpu":
        return [Slot(cores=cores) for cores in share_cores(sorted(_usable_cores()), workers)]
    return accelerators(platform, devices, chips, workers, max(c.mesh.devices for c in configs))


def _probe() -> tuple[str, int, int]:
    """(platform, devices, chips) that a process of this environment sees."""
    result = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"--workers: jax cannot list the devices ({last[0]}); repair the installation, or set JAX_PLATFORMS=cpu")
    platform, devices, chips = json.loads(result.stdout.splitlines()[-1])
    return platform, devices, chips


def _usable_cores() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


def share_cores(cores: Sequence[int], workers: int) -> list[frozenset[int]]:
    """Cores for each worker, none in two shares while there are enough; empty shares where the system cannot bind processes to cores."""
    if not cores or workers > len(cores):
        return [frozenset(cores[i % len(cores)] for _ in range(1)) if cores else frozenset() for i in range(workers)]
    ends = [len(cores) * i // workers for i in range(workers + 1)]
    return [frozenset(cores[start:end]) for start, end in zip(ends, ends[1:], strict=False)]


def accelerators(platform: str, devices: int, chips: int, workers: int, each: int) -> list[Slot]:
    """`each` accelerators for a worker, which sees no others."""
    if platform == "tpu":
        if each > 1 or devices != chips:
            raise UserError("--workers: on TPU several workers need chips of one core and a mesh of one device; give --workers=1")
        if workers > chips:
            raise UserError(f"--workers={workers}: there are {chips} TPU chips, and each worker needs one")
        bounds = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        return [Slot({"TPU_VISIBLE_CHIPS": str(i), **bounds}) for i in range(workers)]
    if workers * each > devices:
        raise UserError(f"--workers={workers}: there are {devices} {platform} devices, and each worker needs {each}")
    name = "CUDA_VISIBLE_DEVICES" if platform in ("gpu", "cuda") else "HIP_VISIBLE_DEVICES"
    names = list(filter(None, os.environ.get(name, "").split(","))) or [str(i) for i in range(devices)]
    return [Slot({name: ",".join(names[i * each : (i + 1) * each])}) for i in range(workers)]
