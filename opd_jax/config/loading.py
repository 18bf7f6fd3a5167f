"""Config files by name: configs/FILE.py[:arg] -> what its functions give."""

import importlib.util
import pathlib
import types
from collections.abc import Callable
from typing import Any

from opd_jax.config.checks import ConfigError
from opd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def load_config(name: str):
    """The ConfigDict of configs/FILE.py[:arg]; a relative path is looked up from here, then from the checkout. Raises ConfigError."""
    _, _, arg = name.partition(":")
    return call(name, lambda module: module.get_config(arg or None))


def find(name: str) -> pathlib.Path:
    """The file of FILE.py[:arg]. Raises ConfigError."""
    file = name.partition(":")[0]
    candidates = [pathlib.Path(file), ROOT / file]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise ConfigError(f"recipe {name!r}: there is no file {file}; give the path of a config file")
    return path


def call(name: str, function: Callable[[types.ModuleType], Any]) -> Any:
    """function(the module of FILE.py). Raises ConfigError for whatever goes wrong in it: a config file is the user's code."""
    path = find(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ConfigError(f"recipe {name!r}: {path} is not a Python file; give a config file such as configs/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return function(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"recipe {name!r}: {path} cannot be loaded ({type(error).__name__}: {error}); correct the file") from error
