"""Writes the page of all metrics, docs/metrics.md, from opd_jax/glossary.py.

python experiments/glossary.py [--out=FILE.md]
"""

import pathlib

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli, glossary
from opd_jax.types import UserError

OUT = flags.DEFINE_string("out", "docs/metrics.md", "Markdown file to write.")


def main(argv: list[str]) -> None:
    out = pathlib.Path(OUT.value)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(glossary.markdown(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); give a file in a folder that can be written") from None
    print(f"{len(glossary.GLOSSARY)} metrics: {out}")


if __name__ == "__main__":
    cli.run(main)
