"""Makes the figures and tables of the README's section on estimators, by the commands that it prints: `make study`.

python experiments/study.py [--workdir=runs/study] [--teacher=DIR] [--quick]

Exact and sampled bias and variance on enumerable students, the pair of the quickstart, the toy study (without variations of its settings,
which experiments/toy_study.py alone makes too); with --teacher (a Hugging Face folder
of a small language model, the README's is karpathy's stories260K) that model and a student pruned from it. Each part has a folder of its
own; one that is finished is not made again. --quick: smaller samples, wider intervals.
"""

import pathlib
import shlex
import subprocess
import sys
import time

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli
from opd_jax.types import UserError

WORKDIR = flags.DEFINE_string("workdir", "runs/study", "Folder of the parts.")
TEACHER = flags.DEFINE_string("teacher", "", "Hugging Face folder of a small language model; empty: without it.")
QUICK = flags.DEFINE_bool("quick", False, "Smaller samples.")


def parts(folder: pathlib.Path, teacher: str, quick: bool) -> dict[str, list[str]]:
    """{folder of a part: the arguments of its command, script first}."""
    study = ["gradient_study.py", "--config=configs/gradient_study.py:"]
    size = ["--config.study.rollouts=64"] if quick else []
    found = {
        "enumerable": [study[0], study[1] + "enumerable", f"--workdir={folder / 'enumerable'}"],
        "quickstart": [study[0], study[1] + "quickstart", f"--workdir={folder / 'quickstart'}", *size],
    }
    if teacher:
        student = folder / "pruned"
        models = [f"--config.student.path={student}", f"--config.teacher.path={teacher}"]
        found["pruned"] = ["prune.py", f"--teacher={teacher}", "--keep=0,1,3,4", f"--out={student}"]
        found["stories"] = [study[0], study[1] + "stories", f"--workdir={folder / 'stories'}", *models, *size]
    found["toy"] = ["toy_study.py", f"--workdir={folder / 'toy'}", "--quick" if quick else "--novariations"]
    return found


# What a finished part has.
LAST = {"pruned": "config.json", "toy": "toy_study.md"}


def main(argv: list[str]) -> None:
    scripts, folder = pathlib.Path(__file__).parent, pathlib.Path(WORKDIR.value)
    if TEACHER.value and not (pathlib.Path(TEACHER.value) / "config.json").is_file():
        raise UserError(f"--teacher={TEACHER.value}: has no config.json; give a folder with a model, or leave it out")
    for name, (script, *arguments) in parts(folder, TEACHER.value, QUICK.value).items():
        if (folder / name / LAST.get(name, "gradient_study.html")).exists():
            print(f"{folder / name} is finished; delete it to make it again", flush=True)
            continue
        print(shlex.join(["python", f"experiments/{script}", *arguments]), flush=True)
        begin = time.perf_counter()
        status = subprocess.run([sys.executable, scripts / script, *arguments], check=False).returncode
        if status:
            sys.exit(status)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    cli.run(main)
