"""Prints a table of runs and writes them, side by side, as one HTML file.

python experiments/report.py --workdir=RUN[,RUN ...] --out=FILE.html
"""

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli
from opd_jax.analysis import report

WORKDIR = flags.DEFINE_list("workdir", None, "Run directories, with commas between them.")
OUT = flags.DEFINE_string("out", None, "HTML file to write.")
flags.mark_flags_as_required(["workdir", "out"])


def main(argv: list[str]) -> None:
    report.write(WORKDIR.value, OUT.value)
    print(report.text_table(WORKDIR.value))
    print(f"report: {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
