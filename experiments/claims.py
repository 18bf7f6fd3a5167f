"""Writes the table of claims into the README, from the registry of estimators.

python experiments/claims.py [--out=README.md]
"""

import pathlib

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli
from opd_jax.analysis import claims
from opd_jax.numerics.estimators import REGISTRY
from opd_jax.types import UserError

OUT = flags.DEFINE_string("out", "README.md", "Markdown file with the two marks that the table stands between.")


def main(argv: list[str]) -> None:
    out = pathlib.Path(OUT.value)
    try:
        text = claims.insert(out.read_text(encoding="utf-8"), where=f"--out={out}")
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={out}: cannot be read and written ({error.strerror}); give an existing file") from None
    print(f"{len(REGISTRY)} estimators: {out}")


if __name__ == "__main__":
    cli.run(main)
