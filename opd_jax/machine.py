"""environment.json of a run directory: what each session of a run ran on, and the memory it needed. No names of hosts, users or folders."""

import json
import logging
import os
import pathlib
import platform
import sys
from importlib import metadata
from typing import Any

from jax.sharding import Mesh

import opd_jax
from opd_jax import processes

log = logging.getLogger(__name__)

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def facts(mesh: Mesh) -> dict[str, Any]:
    """Versions, devices and host of this process."""
    devices = mesh.devices.flat
    return {
        "opd_jax": opd_jax.__version__,
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": mesh.devices.size,
        "processes": processes.count(),
    }


def _cpu_name() -> str:
    """The processor's name as the system gives it, or its architecture."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def peak_memory(mesh: Mesh) -> dict[str, int]:
    """Bytes: the most that this process had in main memory, and on one device where the device tells. Empty where neither is known."""
    peaks = {}
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak_host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # not on Windows
        pass
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in mesh.local_devices]
    return peaks | ({"peak_device_bytes": max(told)} if max(told) else {})


def begin_session(workdir: pathlib.Path, step: int, mesh: Mesh) -> None:
    """Appends a session that begins at `step`. Sessions whose work from there on was cut back are dropped."""
    kept = [session for session in read(workdir) if session["from_step"] < step]
    _write(workdir, [*kept, {"from_step": step, **facts(mesh)}])


def end_session(workdir: pathlib.Path, step: int, mesh: Mesh) -> None:
    """Completes the last session."""
    sessions = read(workdir)
    if sessions:
        _write(workdir, [*sessions[:-1], sessions[-1] | {"to_step": step, **peak_memory(mesh)}])


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The sessions of a run, the oldest first; none where the file is missing or damaged: it is a note, nothing depends on it."""
    try:
        sessions = json.loads((pathlib.Path(workdir) / "environment.json").read_text(encoding="utf-8"))["sessions"]
        return [session for session in sessions if isinstance(session["from_step"], int)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _write(workdir: pathlib.Path, sessions: list[dict[str, Any]]) -> None:
    if not processes.first():
        return
    path = pathlib.Path(workdir) / "environment.json"
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps({"sessions": sessions}, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        log.warning("%s: cannot be written (%s); the report will lack it", path, error.strerror)
