"""The folder of a sweep: what was asked for, and which runs are done. Every file appears whole or not at all.

sweep.json              the definition: each run's setting, seed and config
runs/NAME/              run directories
points/NAME.json        how the run ended; NAME.stdout, NAME.stderr: what it printed; NAME.lock: held while it runs
table.json, comparisons.json, table.csv, table.html
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

from opd_jax import config as config_lib
from opd_jax import files
from opd_jax.sweeps.plan import Plan, Trial, describe
from opd_jax.sweeps.pool import Outcome, take_lock
from opd_jax.types import UserError

# Fields that change no number of a run's metrics; they may differ between two starts of a sweep.
FREE = ("log.", "checkpoint.", "mesh.", "cache_dir")
SHOWN = 8  # differences in a message


@dataclasses.dataclass(frozen=True)
class Folder:
    root: pathlib.Path

    def run(self, trial: Trial) -> pathlib.Path:
        return self.root / "runs" / trial.name

    def point(self, name: str) -> pathlib.Path:
        """Path of what is noted of a job, without its ending."""
        return self.root / "points" / name

    def outcome(self, trial: Trial) -> Outcome | None:
        """How a run ended; None where it has not, or where its note or run directory is gone."""
        try:
            fields = json.loads(self.point(trial.name).with_name(f"{trial.name}.json").read_text(encoding="utf-8"))
            outcome = Outcome(int(fields["exit"]), float(fields["seconds"]), int(fields["peak_bytes"]), tuple(map(str, fields["stderr"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return outcome if outcome.exit or (self.run(trial) / "metrics.jsonl").is_file() else None

    def note(self, trial: Trial, outcome: Outcome) -> None:
        write_json(self.point(trial.name).with_name(f"{trial.name}.json"), dataclasses.asdict(outcome))


def write_json(path: pathlib.Path, value: Any) -> None:
    """Raises UserError."""
    write(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write(path: pathlib.Path, text: str) -> None:
    """Puts a file into place, unless it is there with this very text. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.is_file() and path.read_bytes() == text.encode():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text.encode())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({files.reason(error)}); free space, then the same command continues") from None


def begin(root: pathlib.Path, plan: Plan) -> Folder:
    """The folder of a sweep that is new, goes on, or has more points than before. Raises UserError for any other folder."""
    path = root / "sweep.json"
    definition = _definition(plan)
    if path.exists():
        _refuse_another(path, files.read_json(path, remedy="restore the file, or give another --workdir"), definition)
    write_json(path, definition)
    return Folder(root)


@contextlib.contextmanager
def alone(root: pathlib.Path):
    """Refuses a folder in which another sweep is running. Raises UserError."""
    try:
        lock = take_lock(root / "sweep.lock")
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir={root}: cannot be written ({files.reason(error)}); give another folder") from None
    if lock is None:
        raise UserError(f"--workdir={root}: another sweep is running in it; wait for it, or give another folder")
    try:
        yield
    finally:
        os.close(lock)


def check_empty(root: pathlib.Path) -> None:
    """Refuses a folder in which something else lies. Raises UserError."""
    if root.is_dir() and not (root / "sweep.json").exists():
        others = [entry.name for entry in root.iterdir() if entry.name not in ("points", "sweep.lock", "sweep.json.tmp")]
        if others:
            raise UserError(f"--workdir={root}: holds {sorted(others)[0]}, but no sweep.json; give an empty folder, or that of a sweep")


def _definition(plan: Plan) -> dict[str, Any]:
    trials = [
        {"name": t.name, "setting": t.setting, "seed": t.seed, "flags": t.flags(), "config": config_lib.flatten(t.config)}
        for t in plan.trials
    ]
    return {"config": plan.base.name, "overrides": plan.base.overrides, "seeds_vary": plan.seed_fields, "trials": trials}


def _refuse_another(path: pathlib.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Points may be added; none may go or change. Raises UserError that says what differs."""
    try:
        before = {trial["name"]: trial for trial in old["trials"]}
        gone = [describe(one["setting"] | {"seed": one["seed"]}) for one in before.values()]
        configs = {name: config_lib.flatten(config_lib.Config()) | dict(one["config"]) for name, one in before.items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not the definition of a sweep; restore the file, or give another --workdir") from None
    now = {trial["name"]: trial["config"] for trial in new["trials"]}
    gone = [text for text, name in zip(gone, before, strict=True) if name not in now]
    changes = dict.fromkeys(line for name, config in configs.items() if name in now for line in differences(config, now[name]))
    said = [*changes, *(f"no longer asked for: {text}" for text in gone)]
    if said:
        more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
        raise UserError(
            f"--workdir={path.parent}: its sweep is another one ({'; '.join(said[:SHOWN])}{more}); give another --workdir, or the old "
            "definition, to which points may be added"
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields of two flat configs that differ and change numbers, as `name: old -> new`."""
    names = [name for name in sorted(old.keys() | new.keys()) if not name.startswith(FREE)]
    return [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def config_changed(folder: Folder, trial: Trial) -> str:
    """How the config of a finished run differs from the one that was asked for: a config file can be edited while a sweep runs."""
    found = config_lib.flatten(files.read_json(folder.run(trial) / "config.json", remedy="restore the file"))
    return "; ".join(differences(config_lib.flatten(trial.config), found)[:SHOWN])
