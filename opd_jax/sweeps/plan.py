"""Points -> runs, each with a config that was parsed and checked before anything runs."""

import csv
import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from opd_jax import config as config_lib
from opd_jax import glossary, metrics, objective
from opd_jax.config import Config, ConfigError, loading
from opd_jax.sweeps.combinators import REPLICATES, Point, Sweep, product, seeds

FIELDS = {name: type(value) for name, value in config_lib.flatten(Config()).items()}
NAME_LENGTH = 80  # characters of a run directory's name, without its digest


@dataclasses.dataclass(frozen=True)
class Base:
    """What all runs share: the config file with its argument, and the fields set by --config.FIELD=value."""

    name: str  # FILE.py[:arg]
    overrides: dict[str, Any]
    command: str = ""  # that asked for the sweep, for its page; none from Python

    def with_arguments(self, arguments: dict[str, Any]) -> str:
        """FILE.py:arg with further arguments, of which the last one of a name counts."""
        file, _, arg = self.name.partition(":")
        args = ",".join(filter(None, [arg, *(f"{name}={_text(value)}" for name, value in arguments.items())]))
        return f"{file}:{args}" if args else file


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run: a setting and a seed."""

    name: str  # of its run directory
    setting: Point  # the swept fields but the seed
    seed: int
    source: str  # FILE.py[:arg]
    overrides: dict[str, Any]
    config: Config

    def flags(self) -> list[str]:
        """What experiments/train.py is called with, but for --workdir."""
        return [f"--config={self.source}", *(f"--config.{name}={_text(value)}" for name, value in self.overrides.items())]


@dataclasses.dataclass(frozen=True)
class Plan:
    base: Base
    trials: tuple[Trial, ...]
    metrics: tuple[str, ...]
    seed_fields: tuple[str, ...]  # what differs between the seeds of one setting

    @property
    def settings(self) -> list[Point]:
        """Each setting once, in the order of the points."""
        found: list[Point] = []
        for trial in self.trials:
            if trial.setting not in found:
                found.append(trial.setting)
        return found

    @property
    def fields(self) -> list[str]:
        """The swept fields."""
        return list(dict.fromkeys(name for setting in self.settings for name in setting))


def make(base: Base, sweep: Sweep) -> Plan:
    """Raises ConfigError for a field that does not exist, a value of a wrong type, a config that is refused, and points that come twice."""
    if not sweep.points:
        raise ConfigError("sweep: there are no points; give --sweep=FIELD=v1,v2 or --seeds=N")
    _check_metrics(sweep.metrics)
    points, seeded = list(sweep.points), {name for point in sweep.points for name in point if name in REPLICATES}
    if seeded and sweep.seeds > 1:
        raise ConfigError(f"sweep: --seeds={sweep.seeds}, but the points have seeds of their own ({sorted(seeded)[0]}); give one of them")
    if not seeded:
        base, field, first = _seeding(base)
        points = product(seeds(sweep.seeds, first=first, field=field), points)  # whole seeds first: each one compares all settings
    for name in sorted({name for point in points for name in point} & base.overrides.keys()):
        raise ConfigError(f"config field {name} is swept, and set by --config.{name}; give one of them")
    trials = tuple(_trial(base, point) for point in points)
    _refuse_twins(trials)
    return Plan(base, trials, tuple(sweep.metrics), _varied(trials))


def _seeding(base: Base) -> tuple[Base, str, int]:
    """(base without a seed of its own, ":seed" where the file has that argument or else "seed", the first seed)."""
    first = _resolve(base, {})[1].seed
    without = dataclasses.replace(base, overrides={name: value for name, value in base.overrides.items() if name != "seed"})
    try:
        takes_seeds = _resolve(without, {":seed": first + 1})[1].seed == first + 1
    except ConfigError:  # the file refuses the argument: it has none of that name
        takes_seeds = False
    return without, ":seed" if takes_seeds else "seed", first


def _resolve(base: Base, point: Point) -> tuple[str, Config]:
    """(FILE.py:arg, the parsed config) of a point."""
    source = base.with_arguments({name[1:]: value for name, value in point.items() if name.startswith(":")})
    config = config_lib.parse_with(config_lib.load_config(source), base.overrides | _fields(point))
    objective.from_config(config, has_teacher=config_lib.has_teacher(config))
    return source, config


def _fields(point: Point) -> dict[str, Any]:
    return {name: value for name, value in point.items() if not name.startswith(":")}


def _trial(base: Base, point: Point) -> Trial:
    source, config = _resolve(base, point)
    setting = {name: value for name, value in point.items() if name not in REPLICATES}
    return Trial(_name(setting, config.seed), setting, config.seed, source, base.overrides | _fields(point), config)


def _name(setting: Point, seed: int) -> str:
    """A name that people can read and every file system takes; the digest keeps apart what the readable part does not."""
    parts = [f"{name.rpartition('.')[2].lstrip(':')}-{_text(value)}" for name, value in setting.items()]
    digest = hashlib.blake2b(json.dumps([setting, seed], sort_keys=True).encode(), digest_size=3).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_.+-]', '-', '_'.join([*parts, f'seed-{seed}']))[:NAME_LENGTH]}_{digest}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse_twins(trials: Sequence[Trial]) -> None:
    seen: dict[Config, Trial] = {}
    for trial in trials:
        if trial.config in seen:
            raise ConfigError(f"sweep: {_shown(trial)} and {_shown(seen[trial.config])} are the same run; remove one of the points")
        seen[trial.config] = trial


def _shown(trial: Trial) -> str:
    return describe(trial.setting | {"seed": trial.seed})


def describe(setting: Point) -> str:
    """A setting in one line."""
    return ", ".join(f"{name.lstrip(':')}={_text(value)}" for name, value in setting.items()) or "the config as it is"


def _varied(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Fields that differ between two seeds of one setting."""
    same = [trial for trial in trials if trial.setting == trials[0].setting]
    flat = [config_lib.flatten(trial.config) for trial in same]
    return tuple(name for name in flat[0] if len({repr(one[name]) for one in flat}) > 1)


def _check_metrics(names: Sequence[str]) -> None:
    if not names:
        raise ConfigError("sweep: no metric; give --metric=NAME, such as eval/reverse_kl")
    for name in names:
        if glossary.entry(name) not in metrics.GLOSSARY:
            near = difflib.get_close_matches(name, metrics.GLOSSARY, n=1, cutoff=0.5) or ["eval/reverse_kl"]
            raise ConfigError(f"--metric={name}: no run writes it; did you mean {near[0]}? docs/metrics.md has them all")


def parse_flag(text: str) -> list[Point]:
    """The points of one --sweep=FIELD=v1,v2. A value with a comma stands in double quotes. Raises ConfigError."""
    name, given, values = text.partition("=")
    if not given:
        raise ConfigError(f"--sweep={text}: must be FIELD=v1,v2, such as learner.learning_rate=1e-3,2e-3")
    if not name.startswith(":") and name not in FIELDS:
        raise ConfigError(f"--sweep={text}: {config_lib.no_field(name)}")
    kind = FIELDS.get(name)
    return [{name: _value(one, kind, text)} for one in next(csv.reader([values])) or [""]]


def _value(text: str, kind: type | None, flag: str) -> Any:
    """A value of the field's type; of an argument of the config file a number where it is one, for the table."""
    if kind is bool and text in ("true", "false"):
        return text == "true"
    kinds = [int, float, str] if kind is None else [] if kind is bool else [kind]
    for one in kinds:
        try:
            return one(text)
        except ValueError:
            pass
    raise ConfigError(f"--sweep={flag}: {text!r} must be {'true or false' if kind is bool else kind.__name__}")


def read_file(name: str) -> Sweep | None:
    """What get_sweep(arg) of FILE.py[:arg] gives; None for a file without it. Raises ConfigError."""
    arg = name.partition(":")[2]
    sweep = loading.call(name, lambda module: module.get_sweep(arg or None) if hasattr(module, "get_sweep") else None)
    if sweep is not None and not isinstance(sweep, Sweep):
        raise ConfigError(f"{name}: get_sweep gives a {type(sweep).__name__}, it must give opd_jax.sweeps.Sweep; correct the file")
    return sweep
