"""make study: which commands it runs, what it leaves alone, what it refuses."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAST = {"enumerable": "gradient_study.html", "quickstart": "gradient_study.html", "toy": "toy_study.md"}


def study(*arguments):
    command = [sys.executable, "experiments/study.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_finished_parts_are_not_made_again(tmp_path):
    for part, name in LAST.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / name).write_text("mine")
    done = study(f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert [line.split(" is finished")[0] for line in done.stdout.splitlines()] == [str(tmp_path / part) for part in LAST]
    assert {(tmp_path / part / name).read_text() for part, name in LAST.items()} == {"mine"}


@pytest.mark.slow
def test_a_part_that_fails_ends_the_study_with_its_status(tmp_path):
    """The folder of the first part is a file, which its command refuses."""
    (tmp_path / "enumerable").write_text("")
    failed = study(f"--workdir={tmp_path}", "--quick")
    assert failed.returncode == 2 and "enumerable" in failed.stderr
    assert failed.stdout.splitlines()[0].startswith("python experiments/gradient_study.py --config=configs/gradient_study.py:enumerable")
    assert not (tmp_path / "quickstart").exists()


def test_a_teacher_without_a_model_is_refused_before_any_work(tmp_path):
    refused = study(f"--workdir={tmp_path / 'new'}", f"--teacher={tmp_path}")
    assert refused.returncode == 2
    assert refused.stderr.strip() == f"error: --teacher={tmp_path}: has no config.json; give a folder with a model, or leave it out"
    assert not (tmp_path / "new").exists()
