"""A task of one's own: the page's code runs as it stands, resumes, and is not taken for another task; verdicts keep their order."""

import inspect
import json
import pathlib
import re
import threading
import time

import pytest

from opd_jax import config as config_lib
from opd_jax import metrics, train
from opd_jax.data import tasks
from opd_jax.data.tasks import Example, Verdict
from opd_jax.types import UserError

PAGE = pathlib.Path(tasks.__file__).with_name("README.md")
CODE = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


@pytest.mark.slow
def test_the_page_runs_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(CODE.splitlines()) <= 32
    names = {}
    exec(CODE, names)
    workdir = tmp_path / "runs" / "backwards"
    records = metrics.read(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[0]["eval/prompts"] == 4 and 0 <= records[-1]["eval/accuracy"] <= 1
    assert json.loads((workdir / "config.json").read_text())["task"]["name"] == "own:backwards"
    assert capsys.readouterr().out.startswith("0 None ")

    c, own = names["c"], names["Backwards"](names["words"])
    for example in own.examples("train"):
        assert own.verify(example, example.solution).reward == 1.0 and own.verify(example, "x").reward == 0.0
    c.learner.decay_steps = 0
    c.steps = 3
    assert [record["step"] for record in train.run(c, workdir, task=own)] == [3]
    c.steps = 4
    with pytest.raises(UserError, match="task.name: 'own:backwards' -> 'arithmetic'"):
        list(train.run(c, workdir))
    with pytest.raises(UserError, match="is not the file this run began with"):
        list(train.run(c, workdir, task=names["Backwards"](names["words"][::-1])))


def test_an_object_that_is_no_task(tmp_path):
    class Half:
        name = "half"

        def verify(self, example, text):
            return Verdict(0.0)

    with pytest.raises(UserError, match="task = Half: has no verifiable, digest, examples; opd_jax/data/tasks/README.md"):
        list(train.run(config_lib.default(), tmp_path / "run", task=Half()))
    assert not (tmp_path / "run").exists()


class Slow:
    parallel = True

    def __init__(self):
        self.threads = set()

    def verify(self, example, text):
        self.threads.add(threading.get_ident())
        time.sleep(0.02 if example.id == 0 else 0.0)
        return Verdict(float(text == example.answer))


def test_verdicts_of_a_parallel_task_are_in_order():
    task, examples = Slow(), [Example(i, "", answer=str(i)) for i in range(20)]
    verdicts = tasks.verify_many(task, examples, [str(i if i % 2 else -1) for i in range(20)])
    assert [verdict.reward for verdict in verdicts] == [float(i % 2) for i in range(20)]
    assert threading.get_ident() not in task.threads
    task.parallel = False
    task.threads.clear()
    tasks.verify_many(task, examples, ["x"] * 20)
    assert task.threads == {threading.get_ident()}


def test_an_error_of_a_verifier_is_not_swallowed():
    class Broken:
        parallel = True

        def verify(self, example, text):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tasks.verify_many(Broken(), [Example(0, "")], ["x"])


def test_every_built_in_name_is_documented():
    with pytest.raises(UserError, match="task.name = '' is not known") as error:
        tasks.make("", path="", level=1, train_size=0, eval_size=0, seed=0)
    names = re.search(r"valid: ([\w, ]+)", str(error.value))[1].split(", ")
    assert len(names) == 12
    documented = re.search(r'# (.*)\n    name: str = "arithmetic"', inspect.getsource(config_lib.Task))[1]
    assert re.split(r", | or ", documented) == names
