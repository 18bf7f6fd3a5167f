"""metrics.jsonl and samples.jsonl: flushed, repaired, cut back byte for byte; the progress display."""

import pytest

from opd_jax import metrics
from opd_jax.metrics import MetricsWriter, Progress
from opd_jax.types import UserError


def write(tmp_path, steps):
    writer = MetricsWriter(tmp_path)
    for step in steps:
        writer.write({"step": step, "train/loss": 1 / (step + 3)})
        writer.samples([{"step": step, "prompt": "é", "completion": "line\nend", "token_ids": [1, 2]}])
    return writer, tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"


def test_what_is_written_is_read_at_once_without_closing(tmp_path):
    _, path, samples = write(tmp_path, range(3))
    assert metrics.read(path) == [{"step": s, "train/loss": 1 / (s + 3)} for s in range(3)]
    assert metrics.read(samples)[1] == {"step": 1, "prompt": "é", "completion": "line\nend", "token_ids": [1, 2]}


def test_cut_back_to_a_step_keeps_the_rest_byte_for_byte(tmp_path):
    writer, path, samples = write(tmp_path, range(6))
    before = path.read_bytes(), samples.read_bytes()
    writer.truncate_after(3)
    for file, old in zip((path, samples), before, strict=True):
        assert old.startswith(file.read_bytes()) and metrics.read(file)[-1]["step"] == 3
    writer.truncate_after(3)
    assert [r["step"] for r in metrics.read(path)] == [0, 1, 2, 3]
    writer.truncate_after(-1)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"step": 3, "tr', b'{"step": 3}', b"\xff\xfe", b"[]\n", b"{}\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    writer, path, _ = write(tmp_path, range(3))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    writer.truncate_after(10)
    assert path.read_bytes() == whole


def test_read_leaves_a_torn_last_line_out_and_names_a_broken_one_before_it(tmp_path):
    _, path, _ = write(tmp_path, range(2))
    path.write_bytes(path.read_bytes() + b'{"step": 2, "tr')
    assert len(metrics.read(path)) == 2
    path.write_bytes(b"{\n" + path.read_bytes())
    with pytest.raises(UserError, match="metrics.jsonl, line 1: is not JSON"):
        metrics.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_written(tmp_path, value):
    writer, path, _ = write(tmp_path, range(1))
    with pytest.raises(ValueError, match="step 1: metric train/loss is"):
        writer.write({"step": 1, "train/loss": value})
    assert len(metrics.read(path)) == 1


def test_has_record(tmp_path):
    assert not MetricsWriter(tmp_path).has_record(0)
    writer, _, _ = write(tmp_path, [0, 2])
    assert writer.has_record(2) and not writer.has_record(1)


def test_progress_prints_evaluations_and_says_nothing_when_quiet(capsys):
    for quiet in (True, False):
        progress = Progress(quiet=quiet)
        progress.begin(10, done=0)
        progress.phase("loading")
        progress.update({"step": 0, "eval/accuracy": 0.25})
        progress.update({"step": 1, "train/loss": 2.0})
        progress.update({"step": 10, "train/loss": 1.0})
        progress.close()
        out = capsys.readouterr().out
        assert out == ("" if quiet else "loading\nstep 0/10  eval accuracy 0.250\nstep 10/10  loss 1.0000\n")
