"""ConfigDict -> frozen dataclasses, once; nothing below this package sees a ConfigDict. The fields are in fields.py.

A file in `configs/` starts from `default()` (an ml_collections.ConfigDict that holds every field), changes what it needs and returns it
from `get_config(arg)`. The trainer turns it into a `Config` with `parse()`, which refuses unknown fields, wrong types and bad values.
"""

import dataclasses
import difflib
import re
import typing
from typing import Any

from ml_collections import ConfigDict

from opd_jax.config.arguments import parse_arg, split_arg
from opd_jax.config.checks import FAMILIES, ConfigError, check_choice, validate
from opd_jax.config.fields import (
    FREE_ON_RESUME,
    Architecture,
    Blocks,
    Checkpoint,
    Config,
    Context,
    Estimator,
    Eval,
    Extrapolation,
    ExtraSignal,
    Gate,
    Learner,
    Log,
    Lora,
    Loss,
    Masking,
    Member,
    Mesh,
    Model,
    Preference,
    Privileged,
    Reader,
    Reference,
    Regulariser,
    Reward,
    Rollout,
    Signal,
    Student,
    Study,
    Task,
    Teacher,
    flatten,
)
from opd_jax.config.loading import load_config
from opd_jax.config.questions import (
    extrapolates,
    has_teacher,
    keeps_scores,
    measures_difficulty,
    names_in,
    needs_reference,
    needs_solutions,
    needs_verdicts,
    own_draws,
)


def default() -> ConfigDict:
    """All fields at their defaults, as the ConfigDict that a config file edits."""
    return ConfigDict(dataclasses.asdict(Config()))


def member(**fields) -> ConfigDict:
    """A block for config.teacher.members.NAME: path or recipe, tag, weight."""
    return ConfigDict(dataclasses.asdict(Member()) | fields)


def parse(config: ConfigDict) -> Config:
    """The frozen, validated Config of a ConfigDict. Raises ConfigError."""
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config is a {type(config).__name__}, it must be the ConfigDict of opd_jax.config.default(); correct get_config")
    parsed = _build(Config, config.to_dict(), "")
    validate(parsed)
    return parsed


def parse_with(config: ConfigDict, values: dict[str, Any]) -> Config:
    """parse() of a config in which {"estimator.gamma": 0.5, ...} are set. Raises ConfigError, also for a field that does not exist."""
    fields = config.to_dict()
    valid = flatten(fields)
    for name, value in values.items():
        if name not in valid:
            raise ConfigError(no_field(name))
        *blocks, last = name.split(".")
        block = fields
        for one in blocks:
            block = block[one]
        block[last] = value
    return parse(ConfigDict(fields))


def no_field(name: str) -> str:
    """What is wrong with the full name of a field that does not exist, or that is a block of fields."""
    valid = list(flatten(Config()))
    inside = [field for field in valid if field.startswith(name + ".")]
    return f"config field {name} is a block; its fields: {', '.join(inside)}" if inside else unknown_field(name, valid)


def _build(cls: type, fields: Any, prefix: str):
    if not isinstance(fields, dict):
        raise ConfigError(f"config field {prefix[:-1]} = {fields!r} must be a block with the fields {', '.join(_names(cls))}")
    names = _names(cls)
    for name in fields:
        if name not in names:
            raise ConfigError(unknown_field(prefix + name, [prefix + n for n in names]))
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in fields:
            values[field.name] = _convert(field.type, fields[field.name], prefix + field.name)
    return cls(**values)


def _convert(kind: type, value: Any, name: str):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name + ".")
    if typing.get_origin(kind) is dict:
        return _build_named(typing.get_args(kind)[1], value, name + ".")
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config field {name} = {value!r} has type {type(value).__name__}, it must be {kind.__name__}")
    return kind(value)


def _build_named(cls: type, blocks: Any, prefix: str) -> dict[str, Any]:
    """Blocks of one kind by names that the user gives."""
    if not isinstance(blocks, dict):
        raise ConfigError(f"config field {prefix[:-1]} = {blocks!r} must hold blocks by name; see opd_jax.config.member()")
    for name in blocks:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise ConfigError(f"config field {prefix}{name} is no name; use letters, digits and _")
    return Blocks({name: _build(cls, fields, f"{prefix}{name}.") for name, fields in blocks.items()})


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def unknown_field(name: str, valid: list[str]) -> str:
    """The message for a field that does not exist, with the nearest name that does."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"
    return f"config field {name} does not exist; {hint}"


def differences(old: dict, new: dict, free: tuple[str, ...] = FREE_ON_RESUME) -> list[str]:
    """Fields of two nested config dicts that differ and that a resumed run may not change, as `name: old -> new`; `free` ones may."""
    # A run of an earlier version lacks the fields that came since; their defaults are what it did.
    old, new = flatten(Config()) | flatten(old), flatten(new)
    changed = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        grown = name == "steps" and before is not None and after is not None and after >= before
        if before != after and not grown and not name.startswith(free):
            changed.append(f"{name}: {before!r} -> {after!r}")
    return changed
