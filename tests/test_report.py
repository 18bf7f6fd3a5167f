"""The report: numbers as recorded, one self-contained file, what models write is escaped."""

import html.parser
import json

import pytest

from opd_jax import config as config_lib
from opd_jax.analysis import plots, report
from opd_jax.config import Config
from opd_jax.types import UserError


def evaluation(accuracy, kl):
    values = {"eval/accuracy": accuracy, "eval/sampled_accuracy": accuracy / 2, "eval/reverse_kl": kl, "eval/forward_kl": kl / 3}
    ends = {f"{name}_{end}": value + shift for name, value in values.items() for end, shift in (("low", -0.01), ("high", 0.01))}
    return values | ends | {"eval/entropy": 0.5, "eval/prompts": 256}


def run_directory(path, *, accuracy=0.9, seed=0, completion="123", steps=3, before=0.3):
    path.mkdir(parents=True)
    fields = config_lib.dataclasses.asdict(Config(seed=seed, steps=steps))
    fields["task"]["train_size"] = 48
    (path / "config.json").write_text(json.dumps(fields))
    records = [{"step": 0, **evaluation(before, 1.2)}]
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "train/loss": 1 / step,
            "train/reverse_kl": 1 / step,
            "rollout/tokens_total": 500 * step,
            "time/total_seconds": 2.0 * step,
        }
        records.append(record | (evaluation(accuracy, 0.1) | {"eval/teacher_sampled_accuracy": 0.98} if step == steps else {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    samples = [{"step": s, "prompt": "p<b>", "completion": completion, "token_ids": [1]} for s in (1, 3)]
    (path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return path


def test_the_table_says_what_was_recorded(tmp_path):
    runs = report.read_runs([run_directory(tmp_path / "opd"), run_directory(tmp_path / "sft", accuracy=0.5)])
    header, *rows = report.table(runs)
    assert header == [
        "student",
        "updates",
        "accuracy, greedy",
        "accuracy, sampled",
        "reverse KL",
        "forward KL",
        "entropy",
        "tokens",
        "time",
    ]
    assert [row[0] for row in rows] == ["before training", "opd", "sft", "teacher"]
    assert rows[0][2] == "0.30 [0.29, 0.31]" and rows[0][4] == "1.20 [1.19, 1.21]"
    assert rows[1][1:4] == ["3", "0.90 [0.89, 0.91]", "0.45 [0.44, 0.46]"] and rows[1][-2:] == ["1,500", "6 s"]
    assert rows[2][2] == "0.50 [0.49, 0.51]" and rows[3][3] == "0.98"


def test_students_that_began_elsewhere_have_rows_of_their_own(tmp_path):
    runs = report.read_runs([run_directory(tmp_path / "a"), run_directory(tmp_path / "b", before=0.1)])
    assert [row[0] for row in report.table(runs)[1:3]] == ["a, before", "b, before"]


def test_the_caption_names_prompts_samples_seeds_and_the_fixed_set(tmp_path):
    caption = report.caption(report.read_runs([run_directory(tmp_path / "a"), run_directory(tmp_path / "b", seed=4)]))
    for words in (
        "over the 256 held-out evaluation prompts, not over seeds (seed 0 or 4)",
        "samples at temperature 1, 4 per prompt",
        "Training prompts: 48",
    ):
        assert words in caption


class Checker(html.parser.HTMLParser):
    """Tags that are open and never closed, and addresses outside the file."""

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.text, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in ("meta", "link", "br", "path", "use"):
            self.open.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith(("#", "data:"))]

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith(("#", "data:"))]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_one_file_that_stands_alone_and_escapes_what_models_write(tmp_path):
    hostile = "<script>alert(1)</script> & <img src=x onerror=alert(2)> {{ 7 * 7 }}"
    out = tmp_path / "new" / "report.html"
    report.write([run_directory(tmp_path / "a", completion=hostile), run_directory(tmp_path / "b")], out)
    checker = Checker()
    checker.feed(out.read_text())
    assert checker.open == [] and checker.outside == []
    assert not {"script", "img", "b>"} & checker.tags
    text = "".join(checker.text)
    assert hostile in text and "0.90 [0.89, 0.91]" in text and "train/reverse_kl" in text
    assert "prefers-color-scheme: dark" in out.read_text()
    assert not list(out.parent.glob("*.tmp"))


def test_fields_that_differ_from_their_defaults_come_first(tmp_path):
    changed, same = report.config_table(report.read_runs([run_directory(tmp_path / "a"), run_directory(tmp_path / "b", seed=4)]))
    assert dict(changed) == {"seed": [0, 4], "steps": [3, 3], "task.train_size": [48, 48]}
    assert len(changed) + len(same) == len(config_lib.flatten(Config()))


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    path = run_directory(tmp_path / "a")
    (path / "metrics.jsonl").write_text("")
    (path / "samples.jsonl").unlink()
    report.write([path], tmp_path / "r.html")
    assert "No samples were logged" in (tmp_path / "r.html").read_text()
    assert "0 of 3 updates" in (tmp_path / "r.html").read_text()


def test_folders_and_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="is not a run directory .config.json is missing"):
        report.write([tmp_path], tmp_path / "r.html")
    path = run_directory(tmp_path / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: cannot be written"):
        report.write([path], tmp_path / "folder")


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    runs = report.read_runs([run_directory(tmp_path / "x" / "run"), run_directory(tmp_path / "y" / "run")])
    assert [run.name for run in runs] == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_samples_in_a_terminal_come_from_the_first_and_the_last_step_without_control_characters(tmp_path):
    path = run_directory(tmp_path / "a", completion="one\ntwo \x1b[2J é")
    assert report.text_samples(path) == 'step 1: "p<b>one\\ntwo \\u001b[2J é"\nstep 3: "p<b>one\\ntwo \\u001b[2J é"'


def test_curves_follow_the_page_and_are_the_same_each_time():
    series = [
        {"steps": [0, 1, 2], "values": [1.0, 0.5, 0.2], "low": [0.9, 0.4, 0.1], "high": [1.1, 0.6, 0.3]},
        {"steps": [0], "values": [1.0]},
    ]
    svg = plots.curves(series, title="train/loss", unit="nats")
    assert svg.startswith("<svg") and "currentColor" in svg and plots.INK not in svg
    assert svg == plots.curves(series, title="train/loss", unit="nats")
    assert plots.colour(0) in svg and plots.colour(1) in svg
