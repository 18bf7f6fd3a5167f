"""Runs, as a user starts them: records, resume bit for bit, refusals, interrupts, recipes."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from opd_jax import checkpoint, cost, machine, metrics, model_io, train
from opd_jax import config as config_lib
from opd_jax.types import UserError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]
CLOCK = ("time/", "per_second", "memory")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run directory of a few SFT updates, used as a teacher."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    config = sft_config()
    list(train.run(config, workdir))
    return workdir


def sft_config():
    c = config_lib.default()
    c.task.level = 3
    c.rollout.source, c.rollout.batch_size, c.rollout.max_new_tokens = "dataset", 8, 4
    c.signal.divergence = "nll"
    c.student.init.hidden_size, c.student.init.intermediate_size, c.student.init.num_hidden_layers = 16, 16, 1
    c.steps, c.eval.prompts = 3, 0
    return c


def opd_config(teacher, steps=5):
    c = sft_config()
    c.seed = 7
    c.teacher.path = str(teacher)
    c.signal.divergence, c.rollout.source = "reverse_kl", "student"
    c.steps, c.learner.decay_steps = steps, 5
    c.rollout.group_size = 2
    c.eval.prompts, c.eval.batch_size, c.eval.samples = 4, 8, 2
    c.checkpoint.every, c.log.samples_every = 2, 2
    return c


def without_clock(records):
    return [{k: v for k, v in record.items() if not any(word in k for word in CLOCK)} for record in records]


def test_nothing_is_compiled_after_the_first_steps(teacher, tmp_path):
    """Prompts and completions of many lengths, evaluations and samples of later steps: all shapes have been seen by step 2."""
    c = opd_config(teacher, steps=6)
    c.task.level, c.rollout.max_new_tokens, c.eval.every = 4, 9, 2
    compiled, lengths = [], set()
    listener = lambda event, seconds, **_: compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        counts = []
        for record in train.run(c, tmp_path / "run"):
            counts.append(len(compiled))
            lengths.add(record.get("rollout/length"))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert counts[1] > 0 and counts[2] == counts[-1], counts
    assert len(lengths) > 3


def test_records_files_and_names(teacher, tmp_path):
    records = list(train.run(opd_config(teacher), tmp_path / "run"))
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]
    assert metrics.read(tmp_path / "run" / "metrics.jsonl") == records
    for record in records[1:]:
        assert set(record) <= set(metrics.GLOSSARY)
        for name in ("train/loss", "train/grad_norm", "train/reverse_kl", "train/log_ratio_mean", "rollout/length", "rollout/entropy"):
            assert math.isfinite(record[name])
        assert record["train/loss"] == pytest.approx(record["train/reverse_kl"], rel=1e-5)
    assert sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()) == ["4", "5"]  # every 2, and the last
    evaluated = [record["step"] for record in records if "eval/accuracy" in record and "eval/reverse_kl" in record]
    assert evaluated == [0, 5]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {1, 2, 4, 5}
    assert {"step", "prompt", "completion", "token_ids", "student_logp", "teacher_top"} <= set(samples[0])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rollout"]["batch_size"] == 8


def test_leaving_early_and_resuming_equals_one_run(teacher, tmp_path):
    whole = list(train.run(opd_config(teacher), tmp_path / "whole"))
    for leave_after in (0, 1, 3, 4):
        workdir = tmp_path / f"left_{leave_after}"
        for record in train.run(opd_config(teacher), workdir):
            if record["step"] == leave_after:
                break
        resumed = list(train.run(opd_config(teacher), workdir))
        assert resumed[-1]["step"] == 5
        records = metrics.read(workdir / "metrics.jsonl")
        assert without_clock(records) == without_clock(whole)
        sessions = [0, *(step for s in machine.read(workdir) for step in (s["from_step"], s["to_step"])), 5]
        assert sessions[0::2] == sessions[1::2]  # each goes on where the one before it ended
        assert_same_student(workdir, tmp_path / "whole")
        assert (workdir / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()


def assert_same_student(a, b):
    a, b = (jax.tree.leaves(model_io.open_model(str(path)).params) for path in (a, b))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_run_of_a_version_that_did_not_count_goes_on_from_its_completions(teacher, tmp_path):
    """What prompts cost until then is left out: 2 N of the sampler, 2 N of the teacher and 6 N of the student for each token of them."""
    whole = list(train.run(opd_config(teacher), tmp_path / "whole"))
    for record in train.run(opd_config(teacher), tmp_path / "older"):
        if record["step"] == 2:
            break
    for saved in (tmp_path / "older" / "checkpoints").iterdir():
        info = json.loads((saved / "info.json").read_text())
        (saved / "info.json").write_text(json.dumps({k: v for k, v in info.items() if k not in cost.Work._fields}))
        (saved / "manifest.json").write_text(json.dumps(checkpoint._digests(saved)))
    last = list(train.run(opd_config(teacher), tmp_path / "older"))[-1]
    for name in ("cost/generated_tokens_total", "cost/scored_tokens_total"):
        assert last[name] == whole[-1][name] > 0
    N = cost.active_parameters(model_io.open_model(str(teacher)).config)
    prompts = 2 * 8 * len("123=")
    assert whole[-1]["cost/flops_total"] - last["cost/flops_total"] == 10 * N * prompts
    assert whole[-1]["cost/flops_total"] == 10 * N * (5 * 8 * 4 + whole[-1]["rollout/tokens_total"])


def test_rerun_of_a_finished_run_changes_nothing(teacher, tmp_path):
    list(train.run(opd_config(teacher), tmp_path / "run"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert list(train.run(opd_config(teacher), tmp_path / "run")) == []
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert before == after


def test_steps_may_grow_and_free_fields_may_change(teacher, tmp_path):
    short = opd_config(teacher, steps=3)
    short.eval.every = 1
    list(train.run(short, tmp_path / "grown"))
    list(train.run(opd_config(teacher), tmp_path / "grown"))
    list(train.run(opd_config(teacher), tmp_path / "whole"))
    assert_same_student(tmp_path / "grown", tmp_path / "whole")


def test_a_run_continues_on_another_mesh(teacher, tmp_path):
    c = opd_config(teacher)
    whole = list(train.run(c, tmp_path / "whole"))
    for record in train.run(c, tmp_path / "moved"):
        if record["step"] == 2:
            break
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 2, 2, 2
    resumed = list(train.run(c, tmp_path / "moved"))
    assert resumed[-1]["train/loss"] == pytest.approx(whole[-1]["train/loss"], rel=1e-4)
    assert resumed[-1]["rollout/length"] == whole[-1]["rollout/length"]


def test_another_config_is_refused_with_the_fields(teacher, tmp_path):
    list(train.run(opd_config(teacher, steps=1), tmp_path / "run"))
    other = opd_config(teacher)
    other.seed, other.learner.learning_rate = 8, 0.5
    with pytest.raises(UserError, match=r"learner.learning_rate: 0.001 -> 0.5; seed: 7 -> 8"):
        next(train.run(other, tmp_path / "run"))


def test_another_teacher_in_the_same_place_is_refused(teacher, tmp_path):
    list(train.run(sft_config(), tmp_path / "teacher"))
    list(train.run(opd_config(tmp_path / "teacher", steps=1), tmp_path / "run"))
    shutil.rmtree(tmp_path / "teacher")
    other = sft_config()
    other.seed = 1
    list(train.run(other, tmp_path / "teacher"))
    with pytest.raises(UserError, match="its weights are not those this run began with"):
        next(train.run(opd_config(tmp_path / "teacher"), tmp_path / "run"))


def test_lost_checkpoints_are_never_a_silent_fresh_start(teacher, tmp_path):
    list(train.run(opd_config(teacher, steps=2), tmp_path / "run"))
    for path in sorted((tmp_path / "run" / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="is empty, but metrics.jsonl shows updates"):
        next(train.run(opd_config(teacher), tmp_path / "run"))


def test_a_loss_that_is_not_finite_stops_with_step_and_metric_and_keeps_the_state(teacher, tmp_path):
    c = opd_config(teacher)
    c.learner.learning_rate, c.learner.clip_norm, c.learner.warmup_steps = 1e30, 0.0, 0
    with pytest.raises(FloatingPointError, match=r"step \d: train/\w+ is (nan|inf)") as error:
        list(train.run(c, tmp_path / "run"))
    assert checkpoint.newest_step(tmp_path / "run" / "checkpoints") == int(str(error.value).split()[1].rstrip(":")) - 1
    leaves = jax.tree.leaves(model_io.open_model(str(tmp_path / "run")).params)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
    steps = [record["step"] for record in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(len(steps)))


@pytest.mark.parametrize("source", ["teacher", "dataset"])
def test_sft_and_seqkd_are_the_same_trainer(teacher, tmp_path, source):
    c = opd_config(teacher, steps=2)
    c.rollout.source, c.signal.divergence = source, "nll"
    records = list(train.run(c, tmp_path / "run"))
    assert "train/reverse_kl" not in records[-1]  # a statement about the student's own completions
    assert math.isfinite(records[-1]["eval/reverse_kl"])


def test_training_lowers_the_loss(tmp_path):
    c = sft_config()
    c.steps, c.learner.learning_rate, c.rollout.batch_size, c.learner.schedule = 40, 1e-2, 32, "constant"
    records = list(train.run(c, tmp_path / "run"))
    assert records[-1]["train/loss"] < 0.6 * records[0]["train/loss"]


def test_microbatches_change_memory_and_not_the_run(teacher, tmp_path):
    c = opd_config(teacher, steps=2)
    one = list(train.run(c, tmp_path / "one"))
    c.learner.microbatches = 4
    four = list(train.run(c, tmp_path / "four"))
    assert four[-1]["train/loss"] == pytest.approx(one[-1]["train/loss"], rel=1e-4)


def test_no_compilation_after_warm_up(teacher, tmp_path, caplog):
    """Ragged prompts in one length bucket and ragged completions: the third step and those after it compile nothing."""
    c = opd_config(teacher, steps=6)
    c.learner.decay_steps = 6
    c.eval.prompts, c.checkpoint.every = 0, 100
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for record in train.run(c, tmp_path / "run"):
            if record["step"] == 2:
                caplog.clear()
            if record["step"] == 5:
                break
        compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    assert compiled == []


def script(name, *flags, **kwargs):
    command = [sys.executable, str(ROOT / "experiments" / name), *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **kwargs)


def interrupt_after(flags, workdir, records, signum=signal.SIGTERM):
    """Starts train.py, sends the signal when metrics.jsonl has this many records, returns (status, stderr, steps on record)."""
    process = subprocess.Popen(
        [sys.executable, "experiments/train.py", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    path = workdir / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= records):
        time.sleep(0.1)
    process.send_signal(signum)
    _, errors = process.communicate()
    return process.returncode, errors, [record["step"] for record in metrics.read(path)]


def test_sigterm_and_sigint_save_and_the_same_command_continues(teacher, tmp_path):
    flags = [
        "--config=configs/quickstart.py:sft,tiny",
        f"--workdir={tmp_path}",
        f"--config.teacher.path={teacher}",
        "--config.teacher.recipe=",
    ]
    flags += ["--config.student.recipe=", "--config.steps=1000000", "--config.eval.prompts=0", "--config.checkpoint.every=1000000"]
    status, errors, first = interrupt_after(flags, tmp_path, 3)
    assert status == 143, errors
    assert "Traceback" not in errors
    status, errors, steps = interrupt_after(flags, tmp_path, len(first) + 3, signal.SIGINT)
    assert status == 130, errors
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] > first[-1]
    newest = max(int(entry.name.split(".")[0]) for entry in (tmp_path / "checkpoints").iterdir())
    assert newest == steps[-1]


def test_kill_at_any_moment_continues_bit_for_bit(teacher, tmp_path):
    c = opd_config(teacher)
    list(train.run(c, tmp_path / "whole"))
    (tmp_path / "config.py").write_text(f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({c.to_dict()!r})\n")
    flags = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'killed'}"]
    status, _, _ = interrupt_after(flags, tmp_path / "killed", 4, signal.SIGKILL)
    assert status == -signal.SIGKILL
    finished = script("train.py", *flags)
    assert finished.returncode == 0, finished.stderr
    assert without_clock(metrics.read(tmp_path / "killed" / "metrics.jsonl")) == without_clock(
        metrics.read(tmp_path / "whole" / "metrics.jsonl")
    )
    assert_same_student(tmp_path / "killed", tmp_path / "whole")


def test_a_path_that_is_given_goes_before_a_recipe(teacher, tmp_path):
    c = opd_config(teacher, steps=1)
    c.teacher.recipe = "configs/nothing.py"
    assert [record["step"] for record in train.run(c, tmp_path / "run")] == [0, 1]


def test_a_resumed_student_does_not_need_its_recipe_again(tmp_path):
    recipe = tmp_path / "tiny.py"
    recipe.write_text(f"from ml_collections import ConfigDict\ndef get_config(arg):\n  return ConfigDict({sft_config().to_dict()!r})\n")
    c = sft_config()
    c.student.recipe, c.cache_dir, c.steps, c.learner.decay_steps = str(recipe), str(tmp_path / "cache"), 2, 3
    list(train.run(c, tmp_path / "run"))
    shutil.rmtree(tmp_path / "cache")
    recipe.unlink()
    c.steps = 3
    assert [record["step"] for record in train.run(c, tmp_path / "run")] == [3]


def test_a_recipe_whose_newest_checkpoint_is_damaged_is_trained_to_its_end_again(tmp_path):
    """A directory name is no proof: the bytes are checked, and the run goes on from the last good entry."""
    recipe = tmp_path / "tiny.py"
    recipe.write_text(f"from ml_collections import ConfigDict\ndef get_config(arg):\n  return ConfigDict({sft_config().to_dict()!r})\n")
    made = pathlib.Path(train.make_model(str(recipe), str(tmp_path / "cache")))
    whole = model_io.open_model(str(made)).params
    entry = made / "checkpoints" / "3"
    largest = max((path for path in entry.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    assert train.make_model(str(recipe), str(tmp_path / "cache")) == str(made)
    again = model_io.open_model(str(made)).params
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing.py", None, "there is no file"),
        ("notes.md", "# notes", "is not a Python file"),
        ("broken.py", "import no_such_module", "cannot be loaded .ModuleNotFoundError"),
        ("empty.py", "", "cannot be loaded .AttributeError"),
    ],
)
def test_recipes_that_cannot_be_used_are_named(name, text, words, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        train.load_config(str(tmp_path / name))


def test_a_recipe_of_a_recipe_with_a_wrong_argument_is_refused_before_there_is_a_folder(tmp_path):
    outer = tmp_path / "outer.py"
    outer.write_text(
        "from opd_jax import config\n\n\ndef get_config(arg=None):\n    c = config.default()\n"
        "    c.student.recipe = 'configs/quickstart.py:studnet'\n    return c\n"
    )
    c = sft_config()
    c.student.recipe = str(outer)
    with pytest.raises(UserError, match="'studnet' is not known; valid: .*did you mean student"):
        next(train.run(c, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def jsonl_config(teacher, path):
    c = opd_config(teacher, steps=2)
    c.task.name, c.task.path, c.task.eval_size, c.rollout.group_size = "jsonl", str(path), 1, 1
    return c


def test_what_is_refused_leaves_the_workdir_as_it_was(teacher, tmp_path):
    """A held-out prompt that is too long, a missing solution: found before anything is written, so that the remedy works in place."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "ab"}\n{"prompt": "cd", "solution": "e"}\n{"prompt": "' + "x" * 300 + '"}\n')
    c = jsonl_config(teacher, data)
    with pytest.raises(UserError, match="a prompt has 300 tokens"):
        next(train.run(c, tmp_path / "run"))
    c.rollout.source, c.signal.divergence, c.rollout.overlong = "dataset", "nll", "truncate"
    with pytest.raises(UserError, match="the example with prompt 'ab' has no solution"):
        next(train.run(c, tmp_path / "run"))
    assert not list((tmp_path / "run").iterdir())
    c.rollout.source, c.signal.divergence = "student", "reverse_kl"
    assert [record["step"] for record in train.run(c, tmp_path / "run")] == [0, 1, 2]


def test_another_data_file_in_the_same_place_is_refused(teacher, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "ab"}\n{"prompt": "cd"}\n')
    for record in train.run(jsonl_config(teacher, data), tmp_path / "run"):
        if record["step"] == 1:
            break
    data.write_text('{"prompt": "ab"}\n{"prompt": "ce"}\n')
    with pytest.raises(UserError, match="is not the file this run began with"):
        next(train.run(jsonl_config(teacher, data), tmp_path / "run"))


def test_without_held_out_prompts_there_is_no_evaluation_and_that_is_said(teacher, tmp_path, caplog):
    c = opd_config(teacher, steps=1)
    c.task.eval_size = 0
    assert [record["step"] for record in train.run(c, tmp_path / "run")] == [1]
    assert "holds no prompts out (task.eval_size = 0): there is no evaluation" in caplog.text


def test_a_law_that_is_not_the_policy_is_said(teacher, tmp_path, caplog):
    c = opd_config(teacher, steps=1)
    next(train.run(c, tmp_path / "plain"))
    assert "another law" not in caplog.text
    c.rollout.top_p, c.rollout.temperature = 0.9, 0.7
    next(train.run(c, tmp_path / "other"))
    assert "another law than the policy in the loss (top_p = 0.9, temperature = 0.7, loss.student_temperature = 1.0)" in caplog.text


def test_metrics_are_at_temperature_1_whatever_the_loss(teacher, tmp_path):
    c = opd_config(teacher, steps=1)
    plain = list(train.run(c, tmp_path / "plain"))[-1]
    c.loss.student_temperature = c.loss.teacher_temperature = 3.0
    other = list(train.run(c, tmp_path / "other"))[-1]
    for name in ("train/reverse_kl", "rollout/entropy", "train/log_ratio_mean"):
        assert other[name] == pytest.approx(plain[name], rel=1e-5)
    assert other["train/loss"] < 0.9 * plain["train/loss"]
