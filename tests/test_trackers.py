"""TensorBoard and Weights & Biases show what metrics.jsonl has, each step once, and never stop a run. Files are read back byte by byte."""

import json
import os
import pathlib
import resource
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from opd_jax import config as config_lib
from opd_jax import metrics, trackers, train
from opd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        yield


def tiny_config(*, tensorboard=True, wandb=True):
    c = config_lib.default()
    c.task.level, c.rollout.source, c.rollout.batch_size, c.rollout.max_new_tokens = 3, "dataset", 8, 4
    c.signal.divergence, c.student.init.num_hidden_layers = "nll", 1
    c.student.init.hidden_size = c.student.init.intermediate_size = 16
    c.steps, c.eval.prompts, c.eval.batch_size, c.eval.samples = 5, 4, 8, 2
    c.checkpoint.every, c.checkpoint.keep = 2, 5
    c.log.tensorboard, c.log.wandb = tensorboard, wandb
    return c


def some_trackers(workdir, *, kept=-1, **switches):
    return trackers.make(config_lib.parse(tiny_config(**switches)), workdir, kept=kept)


def records(*steps):
    return [{"step": step, "train/loss": 1 / (step + 3), "rollout/tokens_total": 7 * step} for step in steps]


def events(workdir):
    """All events of a folder in the order in which TensorBoard reads them: file after file by name, TFRecord framing."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def displayed(workdir):
    """{step: {tag: [values]}} as TensorBoard shows it: a session mark at a step hides all that came before it from that step on."""
    from tensorboardX.proto.event_pb2 import SessionLog

    shown = {}
    for event in events(workdir):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            shown = {step: tags for step, tags in shown.items() if step < event.step}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                shown.setdefault(event.step, {}).setdefault(value.tag, []).append(value.simple_value)
    return shown


def as_tensorboard(rows):
    """What `displayed` should give: every number once, in the float32 of the file format."""
    return {row["step"]: {name: [float(np.float32(x))] for name, x in row.items() if name != "step"} for row in rows}


def wandb_records(workdir):
    """The records of all .wandb files, those of a run together. wandb's own process may still write when a run has been finished."""
    files = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
    end = time.monotonic() + 60
    while True:
        each = [records_of(path) for path in files]
        if all(any(record.HasField("exit") for record in one) for one in each) or time.monotonic() > end:
            return [record for one in each for record in one]
        time.sleep(0.2)


def records_of(path):
    """LevelDB's log format: blocks of 32 KiB, chunks of (crc, length, type) and data."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, data, position, parts = [], path.read_bytes(), 7, []  # 7 bytes of file header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of a block is padding
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4) and position <= len(data):  # a whole record, or the last piece of one
            found.append(Record.FromString(b"".join(parts)))
            parts = []
    return found


def wandb_history(workdir):
    """[(step, {name: value})] in the order of writing, without what wandb adds."""
    rows = []
    for record in wandb_records(workdir):
        if record.HasField("history"):
            values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append((record.history.step.num, {name: value for name, value in values.items() if not name.startswith("_")}))
    return rows


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run of 5 steps that lost its checkpoints from step 4 on, started again: (workdir, the records of its first start)."""
    workdir = tmp_path_factory.mktemp("tracked") / "run"
    first = list(train.run(tiny_config(), workdir))
    for step in (4, 5):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert [record["step"] for record in train.run(tiny_config(), workdir)] == [3, 4, 5]
    return workdir, first


@pytest.mark.slow
def test_tensorboard_shows_the_records_of_metrics_jsonl_each_step_once(resumed):
    workdir, first = resumed
    assert [event.step for event in events(workdir) if event.HasField("session_log")] == [0, 3]
    assert displayed(workdir) == as_tensorboard(metrics.read(workdir / "metrics.jsonl"))
    assert displayed(workdir)[3]["time/step_seconds"] != as_tensorboard(first)[3]["time/step_seconds"]  # the second start's


@pytest.mark.slow
def test_tensorboard_has_the_config_of_each_start(resumed):
    workdir, _ = resumed
    texts = []
    for event in events(workdir):
        texts += [(event.step, v.tensor.string_val[0].decode()) for v in event.summary.value if v.tag == "config/text_summary"]
    assert [step for step, _ in texts] == [0, 3]
    for _, text in texts:
        assert all(line.startswith("    ") for line in text.splitlines())  # a code block in Markdown
        assert json.loads(text) == json.loads((workdir / "config.json").read_text())


@pytest.mark.slow
def test_wandb_has_the_records_each_step_once_under_one_id(resumed):
    """Steps 3 to 5 went out before the run went back to step 2: they are not sent again, and differ in the clock alone."""
    workdir, first = resumed
    assert wandb_history(workdir) == [(record["step"], trackers.numbers(record)) for record in first]
    started = [record.run for record in wandb_records(workdir) if record.HasField("run")]
    assert len({run.run_id for run in started}) == 1
    assert {run.project for run in started} == {"opd_jax"} and {run.display_name for run in started} == {"run"}
    config = {item.key: json.loads(item.value_json) for item in started[0].config.update if not item.key.startswith("_")}
    assert config == json.loads((workdir / "config.json").read_text())
    assert json.loads((workdir / "wandb.json").read_text()) == {"id": started[0].run_id, "step": 5}


def times(workdir):
    """When each file and folder was written; wandb's own process may still write its logs after a run."""
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if "logs" not in path.parts}


@pytest.mark.slow
def test_what_is_added_to_a_finished_run_goes_on_and_a_rerun_changes_nothing(resumed, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(resumed[0], workdir, symlinks=True)
    c = tiny_config()
    c.steps = 6
    assert [record["step"] for record in train.run(c, workdir)] == [6]
    assert displayed(workdir) == as_tensorboard(metrics.read(workdir / "metrics.jsonl"))
    assert [step for step, _ in wandb_history(workdir)] == [0, 1, 2, 3, 4, 5, 6]
    before = times(workdir)
    assert list(train.run(c, workdir)) == []
    assert times(workdir) == before
    c.log.tensorboard = c.log.wandb = False  # free on resume, as all of log
    c.steps = 7
    assert [record["step"] for record in train.run(c, workdir)] == [7]
    assert 7 not in displayed(workdir)


@pytest.mark.slow
def test_what_precedes_a_checkpoint_is_on_disk_before_it(tmp_path):
    """So that a kill after it leaves no gap in what TensorBoard shows."""
    c = tiny_config(wandb=False)
    c.eval.prompts = 0
    for record in train.run(c, tmp_path / "run"):
        if record["step"] == 2:
            assert (tmp_path / "run" / "checkpoints" / "2").exists()
            assert displayed(tmp_path / "run") == as_tensorboard(metrics.read(tmp_path / "run" / "metrics.jsonl"))
            assert set(displayed(tmp_path / "run")) == {1, 2}
            break


@pytest.mark.slow
def test_a_tracker_that_cannot_write_stops_nothing_and_is_said_once(tmp_path, caplog):
    """A file stands where the event files should go."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("mine")
    c = tiny_config(wandb=False)
    c.steps, c.eval.prompts = 3, 0
    found = list(train.run(c, tmp_path / "run"))
    assert metrics.read(tmp_path / "run" / "metrics.jsonl") == found and len(found) == 3
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "opd_jax.trackers"]
    assert warning.startswith("log.tensorboard failed (FileExistsError: ")
    assert warning.endswith("and is off until the run is started again; metrics.jsonl has every step")
    assert (tmp_path / "run" / "tensorboard").read_text() == "mine"


@pytest.mark.slow
def test_without_a_switch_there_is_no_tracker(tmp_path):
    c = tiny_config(tensorboard=False, wandb=False)
    c.steps, c.eval.prompts = 1, 0
    list(train.run(c, tmp_path / "run"))
    assert not {"tensorboard", "wandb", "wandb.json"} & {entry.name for entry in (tmp_path / "run").iterdir()}


def test_numbers_leave_out_the_step_texts_and_absent_values():
    assert trackers.numbers({"step": 3, "a": 1, "b": 0.5, "c": "text", "d": None, "e": [1]}) == {"a": 1, "b": 0.5}


def test_what_precedes_a_flush_is_on_disk_before_closing(tmp_path):
    tracked = some_trackers(tmp_path, wandb=False)
    rows = records(0, 1, 2)
    for row in rows[:2]:
        tracked.write(row)
    tracked.flush()
    assert displayed(tmp_path) == as_tensorboard(rows[:2])
    tracked.write(rows[2])
    tracked.close()
    assert displayed(tmp_path) == as_tensorboard(rows)


def test_two_starts_within_one_second_write_two_files(tmp_path):
    for kept, step in ((-1, 0), (0, 1), (0, 1)):
        tracked = some_trackers(tmp_path, kept=kept, wandb=False)
        tracked.write(records(step)[0])
        tracked.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    assert displayed(tmp_path) == as_tensorboard(records(0, 1))


def test_a_fresh_start_hides_what_an_older_run_left(tmp_path):
    for steps in ((0, 1, 2), (0, 1)):
        tracked = some_trackers(tmp_path)
        for row in records(*steps):
            tracked.write(row)
        tracked.close()
    assert displayed(tmp_path) == as_tensorboard(records(0, 1))
    started = [record.run.run_id for record in wandb_records(tmp_path) if record.HasField("run")]
    assert len(set(started)) == 2  # another run of wandb
    assert sorted(step for step, _ in wandb_history(tmp_path)) == [0, 0, 1, 1, 2]


def test_a_full_disk_in_mid_run_gives_up_one_tracker_with_one_warning(tmp_path, caplog):
    """The limit on the size of files is the kernel's: a flush fails as on a full disk."""
    tracked = some_trackers(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = records(*range(6))
    tracked.write(rows[0])
    tracked.flush()
    (path,) = (tmp_path / "tensorboard").iterdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    try:
        for row in rows[1:4]:
            tracked.write(row)
            tracked.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for row in rows[4:]:
        tracked.write(row)
    tracked.close()
    warnings = [r.getMessage() for r in caplog.records if r.name == "opd_jax.trackers"]
    assert len(warnings) == 1 and "log.tensorboard failed (OSError: [Errno 27] File too large" in warnings[0]
    assert wandb_history(tmp_path) == [(row["step"], trackers.numbers(row)) for row in rows]


def without_wandb():
    """The environment of a new process: no key, mode or running service of this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {"JAX_PLATFORMS": "cpu"}


KILLED = """
import json, os, pathlib, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import test_trackers as t

workdir = pathlib.Path({workdir!r})
tracked = t.some_trackers(workdir)
tracked.write(t.records(0)[0])
parent = lambda stat: stat.read_text().rpartition(")")[2].split()[1]
services = [stat.parent.name for stat in pathlib.Path("/proc").glob("[0-9]*/stat") if parent(stat) == str(os.getpid())]
assert len(services) == 1, services
os.kill(int(services[0]), signal.SIGKILL)
time.sleep(0.5)
for row in t.records(1, 2, 3):
    tracked.write(row)
tracked.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="finds wandb's process in Linux's /proc")
def test_wandb_dying_in_mid_run_stops_nothing(tmp_path):
    """In a process of its own, whose wandb service is killed."""
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), workdir=str(tmp_path))
    environment = without_wandb() | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("log.wandb failed (ConnectionResetError") == 1
    assert displayed(tmp_path) == as_tensorboard(records(0, 1, 2, 3))


@pytest.mark.parametrize(("switch", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_refused_before_any_work(switch, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # an import of it raises ModuleNotFoundError
    c = tiny_config(tensorboard=switch == "tensorboard", wandb=switch == "wandb")
    with pytest.raises(UserError) as caught:
        next(train.run(c, tmp_path / "run"))
    message = str(caught.value)
    assert message.startswith(f"config field log.{switch} = True needs the package {package} (") and f"pip install {package}, or" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("project", "words"), [("", "must name a project"), ("a/b", "cannot be used .*cannot contain.*give another name")])
def test_a_wandb_project_that_cannot_be_is_refused(project, words, tmp_path):
    c = tiny_config()
    c.log.wandb_project = project
    with pytest.raises(UserError, match=f"config field log.wandb_project = '{project}' {words}"):
        next(train.run(c, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_wandb_without_a_login_is_refused_before_any_work(tmp_path):
    environment = without_wandb() | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    flags = ["--config=configs/quickstart.py:sft,tiny", f"--workdir={tmp_path / 'run'}", "--config.log.wandb=true"]
    command = [sys.executable, "experiments/train.py", *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert result.returncode == 2
    assert "error: config field log.wandb = True cannot log in (" in result.stderr and "WANDB_MODE=offline" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
