"""Writes the newest student of a run as a Hugging Face folder.

python experiments/export_hf.py --workdir=RUN --out=DIR
"""

import pathlib

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli, model_io
from opd_jax.models import hf
from opd_jax.types import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")
OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist, or be empty.")
flags.mark_flags_as_required(["workdir", "out"])


def main(argv: list[str]) -> None:
    out = pathlib.Path(OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: exists and is not an empty folder; give another one")
    if not model_io.is_run_directory(WORKDIR.value):
        raise UserError(
            f"--workdir={WORKDIR.value}: is not a run directory (model/config.json is missing); give the --workdir of a training run"
        )
    model = model_io.open_model(WORKDIR.value)
    hf.save(out, model.params, model.config, model.tokenizer)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main)
