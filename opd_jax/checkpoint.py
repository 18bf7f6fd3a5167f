"""Atomic, verified checkpoints of a TrainState, and of what a run remembers beside it. The only importer of orbax.

An entry is `checkpoints/<step>/`: `state/` as orbax writes it, `info.json`, and `manifest.json` with the SHA-256 of every other file. It is
written under a name with `tmp` in it and renamed when it is complete, so that a name without `tmp` means a whole entry.
"""

import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from opd_jax import files, processes
from opd_jax.types import TrainState, UserError

log = logging.getLogger(__name__)


class Checkpoints:
    """The entries of one directory."""

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        self.directory = pathlib.Path(directory).resolve()
        self._keep = keep

    def steps(self) -> list[int]:
        """Steps of all complete entries, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if re.fullmatch(r"[0-9]{1,18}", entry.name) and entry.is_dir())

    def save(self, step: int, state: TrainState, info: dict[str, Any]) -> None:
        """Writes an entry, replacing one of the same step, then removes old ones. Complete when it returns. Raises UserError.

        Of several processes each writes its shards, and the first all else.
        """
        try:
            processes.by_first(self._begin, step)
            _agree_on_numbers()
            with ocp.StandardCheckpointer(**_who_writes()) as checkpointer:
                # Where others wait, orbax takes no arrays of this process's devices alone.
                saved = processes.to_host(state) if processes.working_alone() else state
                checkpointer.save(self.directory / f"{step}.tmp" / "state", saved)
            processes.by_first(self._finish, step, info)
        except (OSError, ValueError) as error:  # the latter from what orbax writes with, where the disk is full
            if processes.first():
                shutil.rmtree(self.directory / f"{step}.tmp", ignore_errors=True)
            raise UserError(
                f"{self.directory}: a checkpoint cannot be written ({files.reason(error)}); free space or give another --workdir"
            ) from None

    def _begin(self, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = self.directory / f"{step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _finish(self, step: int, info: dict[str, Any]) -> None:
        temporary, final = self.directory / f"{step}.tmp", self.directory / str(step)
        (temporary / "info.json").write_text(json.dumps(info))
        (temporary / "manifest.json").write_text(json.dumps(_digests(temporary)))
        _flush_to_disk(temporary)
        if final.exists():
            self._set_aside(step)
        temporary.rename(final)
        _flush(self.directory)
        shutil.rmtree(self.directory / f"{step}.tmp_old", ignore_errors=True)
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.directory / str(old), ignore_errors=True)

    def restore(self, abstract_state: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """(step, state, info) of the newest entry that is whole, its arrays placed as `abstract_state` says; None without entries.

        An entry that cannot be read is passed over with a warning, and set aside (renamed to STEP.tmp_old) once an older one is restored:
        the run goes on from there and will reach that step again. Raises UserError when there are entries and none can be read.
        """
        found = self._newest(lambda entry: _load(entry / "state", abstract_state))
        if found is not None:
            processes.by_first(self._set_aside_after, found[0])
        return found

    def _set_aside_after(self, restored: int) -> None:
        for step in self.steps():
            if step > restored:
                self._set_aside(step)

    def _set_aside(self, step: int) -> None:
        aside = self.directory / f"{step}.tmp_old"
        shutil.rmtree(aside, ignore_errors=True)
        (self.directory / str(step)).rename(aside)

    def restore_params(self, abstract_params: dict, step: int | None = None) -> tuple[dict, dict[str, Any]]:
        """(the parameters alone, info) of the newest entry that is whole, or of one step. Raises UserError when there is none."""
        result = self._newest(lambda entry: _load_params(entry / "state", abstract_params), step)
        if result is None:
            raise UserError(f"{self.directory}: holds no checkpoint; let the run save one, or give another folder")
        return result[1], result[2]

    def remembered(self) -> dict[str, Any] | None:
        """info of the newest entry that is whole; None without entries."""
        found = self._newest(lambda entry: None)
        return found and found[2]

    def _newest(self, load, step: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        steps = [one for one in self.steps() if step in (None, one)]
        reasons = []
        for step in reversed(steps):
            entry = self.directory / str(step)
            try:
                processes.by_first(_verify, entry)
                return step, load(entry), _read_json(entry / "info.json")
            except (ValueError, OSError, KeyError) as error:
                reason = files.reason(error)
                reasons.append(f"{step}: {reason}")
                log.warning("checkpoint %s cannot be read (%s); trying the one before it", entry, reason)
        if steps:
            raise UserError(f"{self.directory}: no checkpoint can be read ({'; '.join(reasons)}); restore one, or give another --workdir")
        return None


def newest_step(directory: str | os.PathLike) -> int:
    """Step of the newest entry if that is whole, otherwise -1."""
    checkpoints = Checkpoints(directory)
    steps = checkpoints.steps()
    try:
        _verify(checkpoints.directory / str(steps[-1]))
        return steps[-1]
    except (IndexError, ValueError, OSError):
        return -1


def remembered(directory: str | os.PathLike) -> dict[str, Any]:
    """What a run remembers beside its newest readable state. Raises UserError when there is none."""
    found = Checkpoints(directory).remembered()
    if found is None:
        raise UserError(f"{directory}: holds no checkpoint; let the run save one, or give another folder")
    return found


def restore_params(directory: str | os.PathLike, abstract_params: dict, step: int | None = None) -> dict:
    """The parameters of the newest readable entry of a run, or of one step, placed as `abstract_params` says. Raises UserError."""
    return Checkpoints(directory).restore_params(abstract_params, step)[0]


def restore_params_and_info(directory: str | os.PathLike, abstract_params: dict, step: int | None = None) -> tuple[dict, dict[str, Any]]:
    """As restore_params, with what the run remembered beside them."""
    return Checkpoints(directory).restore_params(abstract_params, step)


def _who_writes() -> dict[str, Any]:
    """Settings of orbax where a process works alone while others wait: it would wait for them."""
    if not processes.working_alone():
        return {}
    me = jax.process_index()
    mine = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix="alone")
    return {"multiprocessing_options": mine}


_saved_alone = 0  # saves of this process while others waited


def _agree_on_numbers() -> None:
    """Those that waited catch up: each process counts its saves, and orbax lets none write before a folder is made by their number."""
    global _saved_alone
    if processes.working_alone():
        _saved_alone += 1
    elif processes.count() > 1:
        most = max(processes.share(_saved_alone))
        with processes.alone(), ocp.StandardCheckpointer(**_who_writes()) as checkpointer:
            for _ in range(most - _saved_alone):
                checkpointer.synchronize_next_awaitable_signal_operation_id()
        _saved_alone = most


def _load(path: pathlib.Path, abstract: TrainState) -> TrainState:
    """The state; a field that the version which saved it did not have must be empty, and stays so."""
    saved = _saved(path)
    _check_shapes(saved, abstract)
    fields = {name: value for name, value in vars(abstract).items() if name in saved}
    with ocp.StandardCheckpointer(**_who_writes()) as checkpointer:
        return abstract.replace(**checkpointer.restore(path, fields))


def _saved(path: pathlib.Path) -> dict[str, Any]:
    """The tree of what is saved, described."""
    with ocp.StandardCheckpointer(**_who_writes()) as checkpointer:
        return checkpointer.metadata(path).item_metadata.tree


def _check_shapes(saved: Any, abstract: Any) -> None:
    """Raises ValueError for an array that is missing, too many or of another shape; orbax names any one of them, at great length."""
    found, asked = _shapes(saved), _shapes(abstract)
    for name in sorted(asked | found, key=lambda name: not name.startswith("params/")):  # what the user knows comes first
        if name not in found:
            raise ValueError(f"{name} is missing")
        if name not in asked:
            raise ValueError(f"{name} is not of this model")
        if found[name] != asked[name]:
            raise ValueError(f"{name} has shape {found[name]}, the model asks for {asked[name]}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _load_params(path: pathlib.Path, abstract_params: dict) -> dict:
    """The parameters alone, each of the type and shape, and in the place, that `abstract_params` says (the first device by default)."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    as_asked = lambda x: ocp.ArrayRestoreArgs(dtype=x.dtype, sharding=x.sharding or here, global_shape=x.shape, strict=True)
    item = {"params": abstract_params}
    arguments = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(as_asked, item), partial_restore=True)
    _check_shapes({"params": _saved(path)["params"]}, item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**_who_writes()), **_who_writes()) as checkpointer:
        return checkpointer.restore(path, args=arguments)["params"]


def _files(entry: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in entry.rglob("*") if path.is_file() and path != entry / "manifest.json")


def _digests(entry: pathlib.Path) -> dict[str, str]:
    digests = {}
    for path in _files(entry):
        with path.open("rb") as file:
            digests[str(path.relative_to(entry))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _verify(entry: pathlib.Path) -> None:
    expected, found = _read_json(entry / "manifest.json"), _digests(entry)
    for name in sorted(found):
        if name not in expected and (name == "info.json" or name.startswith("state/")):
            raise ValueError(f"manifest.json does not list {name}")
    for name in expected:
        if found.get(name) != expected[name]:
            raise ValueError(f"{name} is {'damaged' if name in found else 'missing'}")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """Raises ValueError or OSError."""
    if path.stat().st_size > files.MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is damaged")
    value = files.parse_json(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is damaged")
    return value


def _flush_to_disk(entry: pathlib.Path) -> None:
    """A rename may reach the disk before the bytes do; after a power cut the entry would be whole in name only."""
    for path in sorted(entry.rglob("*"), reverse=True):
        _flush(path)
    _flush(entry)


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
