"""Repeats the published toy study of gradient variance (Fu et al., arXiv 2603.25562) and a discrete one where bias and variance are exact.

python experiments/toy_study.py --workdir=DIR [--quick] [--novariations] [--iterations=N]

Writes tables, curves and figures (opd_jax/analysis/toy/study.py says which), and prints how long each part took.
"""

import pathlib

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli
from opd_jax.analysis.toy import study
from opd_jax.analysis.toy.settings import QUICK, VARIATIONS, Settings

WORKDIR = flags.DEFINE_string("workdir", None, "Folder to write; must not exist, or be empty.")
QUICKLY = flags.DEFINE_bool("quick", False, "A tenth of the published iterations, shorter training of the teachers, and no variations.")
VARIED = flags.DEFINE_bool("variations", True, "Also run variations of the unpublished settings, milder and harsher.")
ITERATIONS = flags.DEFINE_integer("iterations", None, "Updates of a student, instead of the published 2000.")
flags.mark_flags_as_required(["workdir"])


def main(argv: list[str]) -> None:
    fields = dict(QUICK) if QUICKLY.value else {}
    if ITERATIONS.value is not None:
        fields["iterations"] = ITERATIONS.value
    variations = VARIATIONS if VARIED.value and not QUICKLY.value else {}
    study.run(pathlib.Path(WORKDIR.value), Settings(**fields), variations)
    print(f"tables: {pathlib.Path(WORKDIR.value) / 'toy_study.md'}")


if __name__ == "__main__":
    cli.run(main)
