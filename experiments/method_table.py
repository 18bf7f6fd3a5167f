"""Compares the methods of the field at equal budgets, over 3 seeds, and writes the tables of docs/results.md.

python experiments/method_table.py --workdir=runs/method_table [--sections=few,sdpo] [--quick] [--workers=2]

Sections, rows and settings are in configs/sweeps/methods.py, whose docstring says what each is. Each section is a sweep in a folder of
its own (experiments/sweep.py, with its page); --workdir gets method_table.md and method_table.json: mean and 95% interval over seeds by
Student's t, and each row's difference from the first one of its section, paired by seed, with the p of the paired bootstrap-t (which is
at least 0.11 with 3 seeds). Killed at any moment the same command goes on. --quick: one seed and three rows of each section.
"""

import os
import pathlib
import sys

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli, method_table
from opd_jax.config import check_choice
from opd_jax.sweeps import sweep

WORKDIR = flags.DEFINE_string("workdir", "runs/method_table", "Folder of the sections.")
SECTIONS = flags.DEFINE_list("sections", list(method_table.COLUMNS), "Which sections, with commas.")
QUICK = flags.DEFINE_bool("quick", False, "One seed, and the first three rows of each section.")
TINY = flags.DEFINE_bool("tiny", False, "Runs of seconds that show nothing, for tests.")
WORKERS = flags.DEFINE_integer("workers", 2, "Runs at a time.")
MEMORY_GB = flags.DEFINE_float("memory_gb", 0.0, "Main memory for all runs at a time, in 10**9 bytes; 0: no limit.")


def main(argv: list[str]) -> None:
    for name in SECTIONS.value:
        check_choice("--sections", name, tuple(method_table.COLUMNS))
    stop, folder = cli.StopRequest().install(), pathlib.Path(WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    # Runs of a section differ in their seeds and in little else: what one has compiled the others need not. Same programs, same numbers.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((folder / "compiled").resolve()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    budget = sweep.Budget(WORKERS.value, MEMORY_GB.value)
    rows = method_table.run(folder, SECTIONS.value, quick=QUICK.value, tiny=TINY.value, budget=budget, stop=stop)
    print(f"\n{method_table.markdown(rows)}\n{folder / 'method_table.md'}")
    sys.exit(1 if any(row.failed for row in rows) else 0)


if __name__ == "__main__":
    cli.run(main)
