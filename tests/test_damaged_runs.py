"""Damaged files of a run: the report refuses them in one line that names file, line, field and value, and writes nothing."""

import json
import shutil

import pytest
from run_directories import annotated, make

from opd_jax.analysis import report, runs
from opd_jax.types import UserError

GOOD = annotated(["a", "b"], [-1.0, -2.0], special=[1])
HUGE = 10**200


def without(*names, **changes):
    return {name: value for name, value in (GOOD | changes).items() if name not in names}


LINE = "remove the line or restore the file"
SAMPLES = {
    "no prompt": ({"step": 1}, "prompt is missing, it must be text"),
    "numeric prompt": (without(prompt=5), "prompt = 5 must be text"),
    "no completion": (without("completion"), "completion is missing, it must be text"),
    "completion null": (without(completion=None), "completion = None must be text"),
    "step below 0": (without(step=-1), "step = -1 must be from 0 to 9007199254740992"),
    "step too large": (without(step=2**60), f"step = {2**60} must be from 0 to 9007199254740992"),
    "tokens as text": (without(tokens="ab"), "tokens = 'ab' must be a list"),
    "a numeric token": (without(tokens=["a", 1]), "tokens[1] = 1 must be text"),
    "student_logp as text": (without(student_logp="hi"), "student_logp = 'hi' must be a list"),
    "a textual student_logp": (without(student_logp=[-1.0, "x"]), "student_logp[1] = 'x' must be a number or null"),
    "a true student_logp": (without(student_logp=[True, -1.0]), "student_logp[0] = True must be a number or null"),
    "a huge teacher_logp": (without(teacher_logp=[-HUGE, -1]), f"teacher_logp[0] = -1{'0' * 98}... must be at most 1e+100 in size"),
    "nested entropy": (without(student_entropy=[[1.0], 1.0]), "student_entropy[0] = [1.0] must be a number or null"),
    "teacher_entropy missing one": (without(teacher_entropy=[1.0]), "teacher_entropy has 1 values, token_ids has 2"),
    "more token_ids": (without(tokens=["a"], token_ids=[1, 2]), "tokens has 1 values, token_ids has 2"),
    "special as a number": (without(special=3), "special = 3 must be a list"),
    "special as text": (without(special=["0"]), "special[0] = '0' must be the position of a token"),
    "special beyond": (without(special=[2]), "special[0] = 2 must be the position of a token"),
    "special below": (without(special=[-1]), "special[0] = -1 must be the position of a token"),
    "teacher_top as text": (without(teacher_top=["x", "y"]), "teacher_top[0] = 'x' must be a list of [text, probability]"),
    "teacher_top of singles": (without(teacher_top=[[["x"]], []]), "teacher_top[0] = [['x']] must be a list of [text, probability]"),
    "teacher_top of numbers": (without(teacher_top=[[[1, 0.5]], []]), "teacher_top[0] = [[1, 0.5]] must be a list of [text, probability]"),
    "teacher_top of lists": (without(teacher_top=[[], [["x", []]]]), "teacher_top[1] = [['x', []]] must be a list of [text, probability]"),
    "teacher_top shorter": (without(teacher_top=[[]]), "teacher_top has 1 values, token_ids has 2"),
}
METRICS = {
    "text": ({"step": 4, "eval/accuracy": "hi"}, "eval/accuracy = 'hi' must be a number"),
    "null": ({"step": 4, "train/loss": None}, "train/loss = None must be a number"),
    "true": ({"step": 4, "time/total_seconds": True}, "time/total_seconds = True must be a number"),
    "list": ({"step": 4, "rollout/tokens_total": [5]}, "rollout/tokens_total = [5] must be a number"),
    "huge": ({"step": 4, "train/loss": HUGE}, f"train/loss = 1{'0' * 99}... must be at most 1e+100 in size"),
    "a step that is too large": ({"step": HUGE}, f"step = 1{'0' * 99}... must be from 0 to 9007199254740992"),
    "half an interval": ({"step": 4, "eval/accuracy": 0.5, "eval/accuracy_low": 0.4}, "eval/accuracy_high is missing, it must be a number"),
    "the other half": ({"step": 4, "eval/accuracy": 0.5, "eval/accuracy_high": 0.6}, "eval/accuracy_low is missing, it must be a number"),
}
CONFIGS = {
    "a numeric path": ({"student": {"path": 5}}, "student.path = 5 must be text"),
    "a textual number": ({"steps": "many"}, "steps = 'many' must be a whole number"),
    "a broken number": ({"steps": 2.5}, "steps = 2.5 must be a whole number"),
    "true for a number": ({"seed": True}, "seed = True must be a whole number"),
    "null": ({"task": {"train_size": None}}, "task.train_size = None must be a whole number"),
    "text for a rate": ({"learner": {"learning_rate": "x"}}, "learner.learning_rate = 'x' must be a number"),
    "a number for a switch": ({"log": {"tensorboard": 1}}, "log.tensorboard = 1 must be true or false"),
    "a value for a block": ({"student": 5}, "student = 5 must be a block of fields"),
    "a block for a value": ({"steps": {"a": 1}}, "steps must be a whole number, not a block"),
    "an empty block for a value": ({"steps": {}}, "steps must be a whole number, not a block"),
    "lists in lists": ({"of_later": [[1]]}, "of_later = [[1]] must be a text, a number, true, false, null or a list of these"),
}


def refused(path, out):
    with pytest.raises(UserError) as error:
        report.write([path], out)
    assert not list(out.parent.glob(out.name + "*"))
    return str(error.value)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make(tmp_path_factory.mktemp("sound") / "run", samples=[GOOD, GOOD])


@pytest.fixture
def run(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "run")


@pytest.mark.parametrize("case", SAMPLES)
def test_samples(run, case):
    line, problem = SAMPLES[case]
    (run / "samples.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(line) + "\n" + json.dumps(GOOD) + "\n")
    assert refused(run, run / "r.html") == f"{run / 'samples.jsonl'}, line 2: {problem}; {LINE}"


@pytest.mark.parametrize("case", METRICS)
def test_metrics(run, case):
    line, problem = METRICS[case]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert refused(run, run / "r.html") == f"{run / 'metrics.jsonl'}, line 5: {problem}; {LINE}"


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(run, case):
    fields, problem = CONFIGS[case]
    (run / "config.json").write_text(json.dumps(fields))
    assert refused(run, run / "r.html") == f"{run / 'config.json'}: {problem}; restore the file, or give another --workdir"


def test_a_config_of_deep_blocks_is_read_or_refused(run):
    refusals = 0
    for depth in (100, *range(880, 1000, 5), 5000):
        (run / "config.json").write_text('{"a":' * depth + "1" + "}" * depth)
        try:
            runs.read_runs([run])
        except UserError as error:
            refusals += "nested too deeply" in str(error)
    assert refusals


def test_the_ends_of_what_is_read_make_a_page(run):
    """The largest numbers, unknown values, fields of other versions, and text that no terminal can write."""
    big = 10**100
    values = [None, -big]
    line = GOOD | {"student_logp": values, "teacher_logp": [big, big], "teacher_entropy": values, "teacher_top": [[["x", None]], []]}
    (run / "samples.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in (line, line, without("tokens"), without(prompt="\ud800\u202e")))
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2**53, "train/loss": big, "rollout/tokens_total": big, "own/metric": -1e100}) + "\n")
    (run / "config.json").write_text(json.dumps({"learner": {"learning_rate": 1}, "later": {"one": ["a", 1, None]}, "steps": 10**300}))
    (run / "environment.json").write_text(json.dumps({"sessions": [{"from_step": 0, "peak_host_bytes": 10**900, "cpu": [1]}]}))
    report.write([run], run / "r.html")
    assert "1e+100" in (run / "r.html").read_text()
    assert (report.text_table([run]) + report.text_samples(run)).encode()
    assert "\u202e" not in report.text_samples(run)


def test_notes_that_are_nested_too_deeply_are_none(run):
    (run / "environment.json").write_text('{"sessions":' + "[" * 100_000 + "]" * 100_000 + "}")
    report.write([run], run / "r.html")
    assert run.name in (run / "r.html").read_text(encoding="utf-8")
