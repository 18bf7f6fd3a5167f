"""Writes the newest student of a run as a Hugging Face folder; an adapter is merged into its base, or written alone for the peft library.

python experiments/export_hf.py --workdir=RUN --out=DIR [--adapter]
"""

import pathlib

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli, model_io
from opd_jax.models import hf, peft
from opd_jax.types import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.")
OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist, or be empty.")
ADAPTER = flags.DEFINE_bool("adapter", False, "Write the adapter alone, in the peft library's format (runs with student.lora.rank > 0).")
flags.mark_flags_as_required(["workdir", "out"])


def main(argv: list[str]) -> None:
    out = pathlib.Path(OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: exists and is not an empty folder; give another one")
    if not model_io.is_run_directory(WORKDIR.value):
        raise UserError(
            f"--workdir={WORKDIR.value}: is not a run directory (model/config.json is missing); give the --workdir of a training run"
        )
    if ADAPTER.value:
        _write_adapter(pathlib.Path(WORKDIR.value), out)
    else:
        model = model_io.open_model(WORKDIR.value)
        hf.save(out, model.params, model.config, model.tokenizer)
    print(f"wrote {out}")


def _write_adapter(workdir: pathlib.Path, out: pathlib.Path) -> None:
    if not (workdir / "model" / peft.CONFIG).is_file():
        raise UserError(f"--adapter: {workdir} trained all weights and has no adapter; leave the flag out")
    _, adapter, lora_config = model_io.open_base_and_adapter(workdir)
    peft.save(out, adapter, lora_config, base=peft.read_config(workdir / "model")[1])


if __name__ == "__main__":
    cli.run(main)
