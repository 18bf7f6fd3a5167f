"""Exit status 2 and one line on stderr for a user's mistake, whichever layer finds it; nothing is written."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def script(name, *flags):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, f"experiments/{name}", *flags], cwd=ROOT, env=environment, capture_output=True, text=True)


QUICK = "--config=configs/quickstart.py:tiny"
CASES = {
    "misspelt field": ([QUICK, "--config.rollout.bach_size=4"], ["bach_size", "batch_size"]),
    "misspelt field of a block": ([QUICK, "--config.learner.learning_rat=1"], ["--config.learner.learning_rat=1", "learning_rate"]),
    "wrong type": ([QUICK, "--config.rollout.batch_size=many"], ["rollout.batch_size", "many", "must be a whole number"]),
    "out of range": ([QUICK, "--config.rollout.top_p=1.5"], ["rollout.top_p", "1.5", "at most 1"]),
    "missing config": (["--config=configs/nothing.py"], ["configs/nothing.py"]),
    "unknown argument of a config": (["--config=configs/quickstart.py:gkd"], ["config argument 'gkd' is not known", "opd"]),
    "no config": ([], ["flag --config is missing; write --config=VALUE"]),
    "unknown flag": ([QUICK, "--cofnig.seed=1"], ["cofnig"]),
    "stray word": ([QUICK, "seed=1"], ["seed=1", "--name=value"]),
    "missing teacher": ([QUICK, "--config.teacher.recipe=", "--config.teacher.path=/nowhere/at/all"], ["/nowhere/at/all"]),
    "unknown task": ([QUICK, "--config.task.name=arithmetics"], ["task.name", "arithmetics", "arithmetic"]),
    "unknown divergence": ([QUICK, "--config.signal.divergence=kl"], ["signal.divergence", "'kl'", "reverse_kl"]),
    "mesh": ([QUICK, "--config.mesh.data=16"], ["mesh.data", "16"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_status_2(case, tmp_path):
    flags, words = CASES[case]
    result = script("train.py", *flags, f"--workdir={tmp_path / 'run'}")
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.slow
def test_unwritable_workdir(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    result = script("train.py", QUICK, f"--workdir={blocked}")
    assert result.returncode == 2 and str(blocked) in result.stderr and len(result.stderr.splitlines()) == 1


def test_help_exits_0_and_names_the_flags():
    result = script("export_hf.py", "--help")
    assert result.returncode == 0
    assert "--workdir" in result.stdout and "--out" in result.stdout


def test_missing_flags_and_folders_of_the_small_scripts(tmp_path):
    result = script("export_hf.py", f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}")
    assert result.returncode == 2 and "is not a run directory" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_start_where_the_user_says(tmp_path):
    show = "cli.run(lambda argv: print(jax.config.jax_compilation_cache_dir))"
    code = f"import jax, sys; sys.path.insert(0, '.'); from opd_jax import cli; {show}"

    def said(*flags, **environment):
        kept = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        asked = [sys.executable, "-c", code, *flags]
        return subprocess.run(asked, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=True).stdout.strip()

    assert said() == str(ROOT / "runs" / "compiled")
    assert said(f"--compiled={tmp_path}") == str(tmp_path)
    assert said("--compiled=") == "None"
    assert said(JAX_COMPILATION_CACHE_DIR=str(tmp_path)) == str(tmp_path)
