"""The text after the colon of `--config=FILE.py:arg`."""

import difflib
from typing import Any

from ml_collections import ConfigDict

from opd_jax.config.checks import ConfigError, check_choice


def parse_arg(arg: str | None, **declared):
    """Parses the text after the colon of `--config=FILE.py:arg` into a ConfigDict.

    Each keyword declares a name with its default. A tuple declares choices, the first one is the default, and a bare choice selects it:
    `parse_arg("sft,tiny,seed=2", role=("opd", "sft"), tiny=False, seed=0)` gives role="sft", tiny=True, seed=2.
    """
    result = {name: value[0] if isinstance(value, tuple) else value for name, value in declared.items()}
    choices = {choice: name for name, value in declared.items() if isinstance(value, tuple) for choice in value}
    for part in filter(None, (arg or "").split(",")):
        name, given, text = part.partition("=")
        if not given and name in choices:
            result[choices[name]] = name
        elif not given and isinstance(declared.get(name), bool):
            result[name] = True
        elif given and name in declared:
            result[name] = _parse_value(name, text, declared[name])
        else:
            flags = [n for n, v in declared.items() if isinstance(v, bool)]
            valid = [*choices, *flags, *(f"{n}=..." for n in declared if n not in flags)]
            near = difflib.get_close_matches(part, valid, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"config argument {part!r} is not known; valid: {', '.join(valid)}{hint}")
    return ConfigDict(result)


def split_arg(arg: str | None, **declared) -> tuple[ConfigDict, str]:
    """(parse_arg() of the parts that are declared, the other parts), for a config file that builds on another: it takes the rest."""
    names = {*declared, *(choice for value in declared.values() if isinstance(value, tuple) for choice in value)}
    parts = [part for part in (arg or "").split(",") if part]
    own = [part for part in parts if part.partition("=")[0] in names]
    return parse_arg(",".join(own), **declared), ",".join(part for part in parts if part not in own)


def _parse_value(name: str, text: str, default: Any):
    if isinstance(default, tuple):
        check_choice(f"argument {name}", text, default)
        return text
    kind = type(default)
    if kind is bool:
        check_choice(f"argument {name}", text, ("true", "false"))
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"config argument {name} = {text!r} must be {kind.__name__}") from None
