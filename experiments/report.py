"""Prints a table of runs and writes them, side by side, as one HTML file. Runs that differ in their seed alone are one row and one curve.

python experiments/report.py --workdir=RUN[,RUN ...] [--workdir=RUN ...] --out=FILE.html
"""

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli
from opd_jax.analysis import report

WORKDIR = flags.DEFINE_multi_string("workdir", None, "Run directories, with commas between them; the flag may be repeated.")
OUT = flags.DEFINE_string("out", None, "HTML file to write.")
flags.mark_flags_as_required(["workdir", "out"])


def main(argv: list[str]) -> None:
    workdirs = [workdir for given in WORKDIR.value for workdir in given.split(",") if workdir]
    report.write(workdirs, OUT.value)
    print(report.text_table(workdirs))
    print(f"report: {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
