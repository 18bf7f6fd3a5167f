"""Measures bias, variance and signal-to-noise of gradient estimators on the same rollouts of a student and its teacher.

python experiments/gradient_study.py --config=configs/gradient_study.py[:arg] --workdir=DIR [--config.study.estimators=all ...]
"""

import functools

import _checkout  # noqa: F401
from absl import flags
from ml_collections import config_flags

from opd_jax import cli, config, metrics, train
from opd_jax.analysis import study_job, study_report

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:arg]; --config.a.b=value changes a field.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the tables, figures and page.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    progress = metrics.Progress()
    parsed = config.parse(CONFIG.value)
    make_model = functools.partial(train.make_model, progress=progress)
    result = study_job.run(parsed, WORKDIR.value, make_model=make_model, progress=progress)
    progress.phase(study_report.text_table(result.rows))
    progress.phase(f"page: {study_report.write(result, WORKDIR.value, config=parsed)}")


if __name__ == "__main__":
    cli.run(main)
