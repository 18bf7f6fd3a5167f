"""What every script shares: flags, exit status and signals.

Exit status: 0 finished, 2 a user's mistake (one line on stderr), 143/130 after SIGTERM/SIGINT with the state saved, 1 anything else.
"""

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from absl import app, flags

from opd_jax import processes
from opd_jax.types import UserError, one_line

COMPILED = flags.DEFINE_string(
    "compiled",
    "runs/compiled",
    "Folder that keeps compiled programs for the next start; empty: none. The variable JAX_COMPILATION_CACHE_DIR, where set, has the say.",
)


class Interrupted(Exception):
    """A run stopped because it was asked to, its state saved; `signum` says by which signal."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}; the state is saved, the same command continues")
        self.signum = signum


class StopRequest:
    """Remembers SIGTERM or SIGINT, so that a loop can finish its step and save. A second SIGINT interrupts at once."""

    def __init__(self):
        self.signum = 0

    def install(self) -> "StopRequest":
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGINT, self._remember)
        return self

    def _remember(self, signum, frame):
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.signum = signum

    def __bool__(self) -> bool:
        return self.signum != 0


def run(main: Callable[[list[str]], None], *, several: bool = False) -> None:
    """Parses flags, calls main(argv) and exits with the documented status. `several`: joins other processes where there are such."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch, of which nothing here has need
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        status = _status(main, several)
    except Exception:
        if not several or processes.count() == 1:
            raise
        traceback.print_exc()
        status = 1
    processes.leave(status)
    sys.exit(status)


def _status(main: Callable[[list[str]], None], several: bool) -> int:
    try:
        argv = _parse_flags()
    except SystemExit:
        if _asks_for_help():  # it was answered; absl's own status for it is 1
            return 0
        return _refuse("--config: the file ends the program (sys.exit) instead of giving a config; correct the file")
    except Exception as error:  # absl and config files raise many types; each is a mistake on the command line or in the file
        return _refuse(_flag_message(error))
    _keep_compiled_programs()
    try:
        if several:
            processes.start()
        main(argv)
    except UserError as error:
        return _refuse(str(error))
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except KeyboardInterrupt:
        print("interrupted before the state could be saved; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _keep_compiled_programs() -> None:
    """What takes seconds to compile is compiled once for all runs."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and COMPILED.value:
        import jax

        jax.config.update("jax_compilation_cache_dir", os.path.abspath(COMPILED.value))


def _asks_for_help() -> bool:
    return any(argument.lstrip("-").startswith(("help", "?")) for argument in sys.argv[1:])


def _parse_flags() -> list[str]:
    app.define_help_flags()
    _check_config_files()
    argv = flags.FLAGS(sys.argv)
    if len(argv) > 1:
        raise UserError(f"argument {argv[1]!r} is not a flag; write --name=value (--help lists them)")
    for name in flags.FLAGS:
        getattr(flags.FLAGS[name].value, "keys", None)  # a config file that could not be opened raises OSError when it is first used
    return argv


def _check_config_files() -> None:
    """Of a pipe or a device no end may come, so that it must not be opened."""
    for argument, following in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=False):  # without arguments the second has one too many
        name, given, value = argument.partition("=")
        path = (value if given else following).partition(":")[0]
        if name in ("--config", "-config") and os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"--config={path}: is not a file; give a config file such as configs/quickstart.py")


def _flag_message(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"--config: the file cannot be loaded ({str(error).splitlines()[-1].strip()}); give an existing file"
    if "Traceback" in str(error):  # ml_collections wraps what a config file raised into a text with its traceback
        raised = _raised(error)
        said = f"{type(raised).__name__}: {raised}"
        return str(raised) if isinstance(raised, UserError) else f"--config: the file cannot be loaded ({said}); correct the file"
    if isinstance(error, UserError | flags.Error):
        return _in_words(str(error))
    if isinstance(error, KeyError | AttributeError):  # ml_collections: a field that does not exist, quoted once or twice
        text = re.sub(r"\\+n", " ", re.sub(r"\\+'", "'", str(error))).strip("'\"")
        name, _, hint = text.partition("' ")
        flag = next((argument for argument in sys.argv[1:] if name in argument), "--config")
        return f"{flag}: there is no field {name!r}; {hint or 'opd_jax/config/fields.py has them all'}"
    return f"{type(error).__name__}: {error}"


def _in_words(text: str) -> str:
    """What absl and Python's own conversions say, for people."""
    missing = re.search(r"Flag (--\w+) must have a value other than None", text)
    if missing:
        return f"flag {missing[1]} is missing; write {missing[1]}=VALUE (--help says what)"
    text = re.sub(r"invalid literal for int\(\) with base 10: .*", "must be a whole number", text)
    return re.sub(r"could not convert string to float: .*", "must be a number", text)


def _raised(error: BaseException) -> BaseException:
    """What the config file itself raised: the first of the chain that does not quote a traceback."""
    while "Traceback" in str(error) and error.__context__ is not None:
        error = error.__context__
    return error


def _refuse(message: str) -> int:
    print("error: " + one_line(" ".join(message.split())), file=sys.stderr)
    return 2
