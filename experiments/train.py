"""Starts or resumes a run.

python experiments/train.py --config=configs/NAME.py[:arg] --workdir=DIR [--config.a.b=value ...]
"""

import pathlib

import _checkout  # noqa: F401
from absl import flags
from ml_collections import config_flags

from opd_jax import cli, metrics, processes, train
from opd_jax.analysis import report

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:arg]; --config.a.b=value changes a field.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; an existing run is resumed.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    stop = cli.StopRequest().install()
    progress = metrics.Progress()
    records = sum(1 for _ in train.run(CONFIG.value, WORKDIR.value, stop=stop, progress=progress))
    out = pathlib.Path(WORKDIR.value) / "report.html"
    if not processes.first():
        return
    if records or not out.exists():
        report.write([WORKDIR.value], out)
        progress.phase(f"{report.text_table([WORKDIR.value])}\n\n{report.text_samples(WORKDIR.value)}\n")
        progress.phase(f"report: {out}")
    else:
        progress.phase(f"{WORKDIR.value} is finished; nothing to do")


if __name__ == "__main__":
    cli.run(main, several=True)
