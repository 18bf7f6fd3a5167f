"""Evaluates a student against its teacher and task, as training does before the first and after the last update.

python experiments/evaluate.py --config=configs/NAME.py[:arg] --workdir=RUN     # the newest student of a run
python experiments/evaluate.py --config=configs/NAME.py[:arg] --config.student.path=DIR
"""

import functools
import json
import pathlib

import _checkout  # noqa: F401
import jax
from absl import flags
from ml_collections import config_flags

from opd_jax import assembly, cli, config, metrics, model_io, parallel, processes, recipes, train
from opd_jax.data import tasks
from opd_jax.pair import open_pair
from opd_jax.types import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:arg]; --config.a.b=value changes a field.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory whose newest student is evaluated; without it, the config's student.")
OUT = flags.DEFINE_string("out", None, "File for the values as one JSON object.")
flags.mark_flags_as_required(["config"])


def main(argv: list[str]) -> None:
    progress = metrics.Progress()
    parsed = config.parse(CONFIG.value)
    if WORKDIR.value:
        if not model_io.is_run_directory(WORKDIR.value):
            raise UserError(f"--workdir={WORKDIR.value}: is not a run directory (model/config.json is missing); give one of a training run")
        parsed = recipes.of_run(parsed, WORKDIR.value)
    if OUT.value and not pathlib.Path(OUT.value).resolve().parent.is_dir():
        raise UserError(f"--out={OUT.value}: its folder does not exist; create it, or give another file")
    if OUT.value and pathlib.Path(OUT.value).is_dir():
        raise UserError(f"--out={OUT.value}: is a folder; give a file")
    if not parsed.eval.prompts:
        raise UserError("config field eval.prompts = 0 leaves nothing to evaluate; give --config.eval.prompts=N")
    if not config.has_teacher(parsed):
        progress.phase("no teacher is configured: the KL is left out; --config.teacher.path=DIR adds it")
    task = tasks.from_config(parsed)
    mesh = parallel.from_settings(parsed.mesh)
    parsed = recipes.run_recipes(parsed, functools.partial(train.make_model, progress=progress))
    progress.phase("loading the models")
    pair = open_pair(parsed, None, mesh)
    evaluator = assembly.make_evaluator(parsed, mesh, task, pair)
    if evaluator is None:
        raise UserError("the task holds no prompts out to evaluate on; raise task.eval_size, or give more data")
    progress.phase(f"evaluating on {len(evaluator.examples)} prompts")
    with jax.set_mesh(mesh):
        values = evaluator(pair.student.params)
    progress.close()
    if not processes.first():
        return
    for name, value in values.items():
        print(f"{name:32} {value:.4f}")
    if OUT.value:
        try:
            pathlib.Path(OUT.value).write_text(json.dumps(values, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--out={OUT.value}: cannot be written ({error.strerror}); give another file") from None


if __name__ == "__main__":
    cli.run(main, several=True)
