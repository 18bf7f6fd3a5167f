"""Samples for the page: values in their places, nothing hidden in text, bounded, and the tokens that the teacher likes least."""

import json

import numpy as np
import pytest
from run_directories import annotated, make

from opd_jax.analysis import report, runs, token_view


def test_text_is_made_visible_and_json_fits_into_a_script_element():
    hostile = "a\tb\n\x00\x1b\x7f\x85\u202e\u200b\u2028\ufeff\ud800\U000e0041é東🙂"
    assert token_view.visible(hostile, breaks="⏎\n") == ("a\tb⏎\n␀␛⟨U+007F⟩⟨U+0085⟩⟨U+202E⟩⟨U+200B⟩⟨U+2028⟩⟨U+FEFF⟩⟨U+D800⟩⟨U+E0041⟩é東🙂")
    assert [token_view.token_text(text) for text in ("\u0301\u0300", "e\u0301", "", "\n")] == ["◌\u0301\u0300", "e\u0301", "", "⏎"]
    value = ["</script><!--<script>", "]]>&amp;", hostile]
    text = token_view.script_json(value)
    assert text.isascii() and not set("<>&") & set(text) and json.loads(text) == value


def test_tokens_keep_their_values_and_places(tmp_path):
    sample = annotated(["a", "", "東", "<eos>"], [-2.0, 0.5, 0.25, -1.0], special=[3], prompt="p\u202e")
    sample["student_logp"][1] = None
    (run,) = runs.read_runs([make(tmp_path / "a", samples=[sample, annotated(["x"], None, step=2)])])
    data = token_view.page_data([run])["runs"][0]
    assert [step["step"] for step in data["steps"]] == [1, 2]
    entry = data["steps"][0]["samples"][0]
    assert entry["t"] == ["a", "", "東", "<eos>"] and entry["special"] == [3] and entry["prompt"] == "p⟨U+202E⟩"
    assert entry["s"] == [-1.386, None, -1.386, -1.386] and entry["q"] == [-3.386, -0.8863, -1.136, -2.386]
    assert entry["h"] == [1.25] * 4 and entry["g"] == [0.75] * 4
    first = entry["top"][0]
    assert [(data["texts"][first[i]], first[i + 1]) for i in range(0, 10, 2)] == [
        ("a", 0.5),
        ("x", 0.25),
        ("y", 0.1),
        ("z", 0.05),
        ("<eos>", 0.01),
    ]
    alone = data["steps"][1]["samples"][0]
    assert "q" not in alone and "top" not in alone and alone["s"] == [-1.386]
    assert token_view.log_ratios(sample) == [pytest.approx(-2.0), None, pytest.approx(0.25), pytest.approx(-1.0)]


def test_old_lines_without_values_are_text(tmp_path):
    (run,) = runs.read_runs([make(tmp_path / "a", completion="12\x07")])
    assert token_view.page_data([run])["runs"][0]["steps"][0]["samples"] == [{"prompt": "p<b>", "text": "12␇"}]


def test_what_is_shown_is_bounded_evenly_spaced_and_said(tmp_path):
    samples = [annotated(["ab"] * 20, [-1.0] * 20, step=step) for step in range(1, 101) for _ in range(6)]
    (run,) = runs.read_runs([make(tmp_path / "a", samples=samples)])
    shown, limit, left_out = token_view.choose(run, 1)
    steps = list(shown)
    assert len(steps) == token_view.STEPS and (steps[0], steps[-1]) == (1, 100) and limit == 1000
    assert max(np.diff(steps)) - min(np.diff(steps)) <= 1 and {len(s) for s in shown.values()} == {4}
    assert left_out.startswith("Shown: 24 of 100 logged steps, 4 of up to 6 samples of each step;")
    assert list(token_view.choose(run, 500)[0]) == [1, 100]


def test_worst_tokens_are_by_the_sum_of_log_ratios_over_all_samples(tmp_path):
    samples = [
        annotated(["good", "bad", "bad", "<eos>"], [0.5, -3.0, -1.0, -0.5], special=[3], step=1),
        annotated(["bad", "odd\n", "", "good"], [-0.5, -4.0, -9.0, -0.25], step=3, prompt="x"),
        annotated(["bad"], None, step=3),
    ]
    (run,) = runs.read_runs([make(tmp_path / "a", samples=samples)])
    rows = token_view.worst_tokens(run)
    assert [(row["token"], row["count"], *(round(row[name], 6) for name in ("total", "mean", "lowest"))) for row in rows] == [
        ("bad", 3, -4.5, -1.5, -3.0),
        ("odd⏎", 1, -4.0, -4.0, -4.0),
        ("<eos>", 1, -0.5, -0.5, -0.5),
    ]
    assert (rows[0]["before"], rows[0]["after"], rows[0]["step"]) == ("12=good", "bad<eos>", 1)
    assert [row["special"] for row in rows] == [False, False, True]
    assert len(token_view.worst_tokens(runs.Run("b", run.config, [], [annotated([str(i) for i in range(30)], [-1.0] * 30)], []))) == 12


def test_single_draws_do_not_fill_the_worst_tokens(tmp_path):
    samples = [annotated([f"once{i}" for i in range(20)] + ["often"] * 50, [-5.0] * 20 + [-0.5] * 50)]
    (run,) = runs.read_runs([make(tmp_path / "a", samples=samples)])
    assert [row["token"] for row in token_view.worst_tokens(run)][:2] == ["often", "once0"]


def test_that_the_student_read_a_chat_template_is_said(tmp_path):
    samples = [annotated(["a"], [-1.0])]
    plain = make(tmp_path / "plain", samples=samples)
    chat, own = (make(tmp_path / f"t{i}", samples=samples, context__student__template=t) for i, t in enumerate(("chat", "/x/<b>.jinja")))
    empty = make(tmp_path / "empty", samples=[], context__student__template="chat")
    read = runs.read_runs([plain, chat, own, empty])
    notes = [run["note"] for run in token_view.page_data(read)["runs"]]
    said = "Prompts are the task's; the student read each of them inside a chat template (context.student.template: "
    assert notes == ["", f"{said}chat).", f"{said}<b>.jinja).", ""]
    page = report.render(read)
    assert page.count("chat template (context.student.template: chat)") == 2  # for the script, and for readers without it
