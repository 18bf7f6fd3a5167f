"""The report: one self-contained file, what models write is escaped, its size is bounded. test_browser.py looks at it."""

import base64
import hashlib
import html.parser
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from run_directories import annotated, make

from opd_jax.analysis import plots, report, runs
from opd_jax.types import UserError


def test_samples_in_a_terminal_come_from_the_first_and_the_last_step_without_control_characters(tmp_path):
    path = make(tmp_path / "a", completion="one\ntwo \x1b[2J é")
    assert report.text_samples(path) == 'step 1: "p<b>one\\ntwo \\u001b[2J é"\nstep 3: "p<b>one\\ntwo \\u001b[2J é"'


class Checker(html.parser.HTMLParser):
    """Tags that are open and never closed, and addresses outside the file."""

    VOID = ("meta", "link", "br", "path", "use")

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.text, self.tags, self.handlers = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attributes)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self._attributes(attributes)

    def _attributes(self, attributes):
        self.outside += [v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]
        self.handlers += [k for k, _ in attributes if k.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


HOSTILE = '<script>alert(1)</script> & <img src=x onerror=alert(2)> {{ 7 * 7 }} "><svg onload=alert(3)> --> </script> \u2028'


def test_one_file_that_stands_alone_and_escapes_what_models_write(tmp_path):
    out = tmp_path / "new" / "report.html"
    samples = [annotated([HOSTILE, "</script>"], [-1.0, -2.0], prompt=HOSTILE, top=[(HOSTILE, 0.5)])]
    report.write([make(tmp_path / "a", samples=samples), make(tmp_path / "b<i>", completion=HOSTILE, seed=3, cache_dir=HOSTILE)], out)
    checker = Checker()
    checker.feed(out.read_text())
    assert checker.open == [] and checker.outside == [] and checker.handlers == []
    assert checker.tags.count("script") == 2 and not {"img", "b>", "i>", "iframe", "object"} & set(checker.tags)
    text = "".join(checker.text)
    assert HOSTILE.replace("\u2028", "⟨U+2028⟩") in text and "0.90 [0.89, 0.91]" in text and "train/reverse_kl" in text
    assert "prefers-color-scheme: dark" in out.read_text() and "\u2028" not in out.read_text()
    assert not list(out.parent.glob("*.tmp"))


def test_the_policy_of_the_page_allows_its_own_script_alone(tmp_path):
    page = report.render(runs.read_runs([make(tmp_path / "a")]))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page
    assert "default-src 'none'" in page and not re.search(r"https?://(?!www\.w3\.org/)", page)


def test_the_page_says_the_order_of_the_worst_tokens(tmp_path):
    page = report.render(runs.read_runs([make(tmp_path / "a", samples=[annotated(["x", "x", "y"], [-1.0, -0.5, -1.25])])]))
    assert "In the order of the sum of log q − log π" in page
    assert re.search(r'<th scope="col">sum</th>.*<code>x</code></th><td>2</td><td>-1.50</td><td>-0.75</td><td>-1.00</td>', page, re.DOTALL)


def test_every_file_that_the_page_is_made_of_is_installed():
    package = pathlib.Path(report.__file__).parents[1]
    patterns = tomllib.loads((package.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["opd_jax"]
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    assert installed >= {path for path in (package / "analysis").iterdir() if path.is_file() and path.suffix != ".py"}


def test_a_run_that_has_just_begun_has_a_report(tmp_path):
    path = make(tmp_path / "a", session=None)
    (path / "metrics.jsonl").write_text("")
    (path / "samples.jsonl").unlink()
    report.write([path], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count("No samples were logged") == 2 and "0 of 3 updates" in page and "There are no curves yet" in page


def test_folders_and_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="is not a run directory .config.json is missing"):
        report.write([tmp_path], tmp_path / "r.html")
    path = make(tmp_path / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: cannot be written"):
        report.write([path], tmp_path / "folder")
    (path / "config.json").write_text("[")
    with pytest.raises(UserError, match="config.json: cannot be read"):
        report.write([path], tmp_path / "r.html")


@pytest.mark.slow
def test_the_script_takes_workdirs_with_commas_and_repeated_flags(tmp_path):
    paths = [make(tmp_path / name, accuracy=accuracy) for name, accuracy in (("a", 0.5), ("b", 0.6), ("c", 0.7))]
    flags = [f"--workdir={paths[0]},{paths[1]}", f"--workdir={paths[2]}", f"--out={tmp_path / 'r.html'}"]
    script = pathlib.Path(report.__file__).parents[2] / "experiments" / "report.py"
    out = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in out.splitlines()[2:7]] == ["before", "a", "b", "c", "teacher"]
    assert "<title>a, b, c</title>" in (tmp_path / "r.html").read_text()


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    found = runs.read_runs([make(tmp_path / "x" / "run"), make(tmp_path / "y" / "run")])
    assert [run.name for run in found] == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_curves_follow_the_page_and_are_the_same_each_time():
    lines = [
        {"steps": [0, 1, 2], "values": [1.0, 0.5, 0.2], "low": [0.9, 0.4, 0.1], "high": [1.1, 0.6, 0.3]},
        {"steps": [0], "values": [1.0]},
    ]
    svg = plots.curves(lines, title="train/loss", unit="nats")
    assert svg.startswith("<svg") and "currentColor" in svg and plots.INK not in svg
    assert svg == plots.curves(lines, title="train/loss", unit="nats")
    assert plots.colour(0) in svg and plots.colour(1) in svg and "stroke-dasharray" in plots.curves(lines[:1] * 2, title="x", unit="y")
    ids = re.findall(r'id="(\w+)"', svg)
    assert len(ids) == len(set(ids)) and all(f"#{name}" in svg for name in ids)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_the_ground_in_light_and_in_dark(tmp_path):
    """WCAG: 4.5 for text, also on the strongest colours of the viewer, 3 for curves."""
    style = re.findall(r":root \{(.*?)\}", report.render(runs.read_runs([make(tmp_path / "a")])), re.DOTALL)
    assert len(style) == 2
    for theme in style:
        colours = {name: "#" + value[1:] * (2 if len(value) == 4 else 1) for name, value in re.findall(r"--(\w+): (#\w+)", theme)}
        full = {name: "#" + "".join(f"{int(c):02x}" for c in value.split()) for name, value in re.findall(r"--(\w+): (\d+ \d+ \d+)", theme)}
        for ground in (colours["ground"], colours["panel"], colours["raised"]):
            assert min(contrast(colours[name], ground) for name in ("ink", "quiet", "accent")) > 4.5
            assert min(contrast(plots.colour(i), ground) for i in range(8)) > 2.7
        assert set(full) == {"less", "more", "alone"} and min(contrast(colours["ink"], colour) for colour in full.values()) > 4.5


def test_samples_of_2000_tokens_make_no_page_of_20_megabytes(tmp_path):
    samples = [annotated(["東京"] * 2000, [-1.0] * 2000, step=step, prompt="p" * 50_000) for step in range(1, 5) for _ in range(4)]
    (first,) = runs.read_runs([make(tmp_path / "a", samples=samples)])
    for count in (1, 12):
        page = report.render([first] + [runs.Run(f"run {i}", first.config, first.records, first.samples, []) for i in range(1, count)])
        assert len(page.encode()) < 6e6
        assert ("the first 1,000 tokens of samples with up to 2,000" in page) == (count == 1)
