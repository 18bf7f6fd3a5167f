"""Sweeps: points are checked before anything runs, processes keep to their budget and survive kills, the table says what was measured."""

import dataclasses
import doctest
import io
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.console
import run_directories
import scipy.stats
from absl import flags
from ml_collections import config_flags

from opd_jax import cli, glossary, metrics, sweeps, train
from opd_jax import config as config_lib
from opd_jax.analysis import stats
from opd_jax.config import ConfigError
from opd_jax.sweeps import board, combinators, plan, pool, slots, status, sweep, table
from opd_jax.sweeps.plan import Base
from opd_jax.sweeps.pool import Job, Outcome, Pool
from opd_jax.sweeps.slots import Slot
from opd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
READY = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
QUICK = Base("configs/quickstart.py:tiny", {})
KL = ("eval/reverse_kl",)

# A run of about a second beyond its start-up: no teacher, supervised on random arithmetic. "base" is the recipe of its student.
SMALL = """
from opd_jax import config

def get_config(arg=None):
    arg = config.parse_arg(arg, role=("run", "base"), seed=0)
    c = config.default()
    c.seed = arg.seed
    c.rollout.source, c.signal.divergence = "dataset", "nll"
    c.task.level, c.rollout.max_new_tokens = 2, 3
    c.rollout.batch_size = c.eval.batch_size = c.eval.prompts = c.task.eval_size = 8
    c.log.samples_every = 0
    c.student.init.hidden_size = c.student.init.intermediate_size = 16
    c.student.init.num_hidden_layers = 1
    c.steps = 2 if arg.role == "base" else 60
    c.eval.samples = 1
    c.checkpoint.every = 2
    if arg.role == "run":
        c.student.recipe = __file__ + f":base,seed={arg.seed}"
    return c
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    return Base(str(tmp_path / "small.py"), {"cache_dir": str(tmp_path / "cache")})


# Combinators and points


def test_the_examples_of_the_combinators():
    assert doctest.testmod(combinators).attempted >= 4
    assert doctest.testmod(combinators).failed == 0


def test_combinators_refuse_what_has_no_meaning():
    with pytest.raises(ConfigError, match="2, 1 points"):
        sweeps.zip(sweeps.over("steps", 1, 2), sweeps.over("seed", 1))
    for join in (sweeps.product, sweeps.zip):
        with pytest.raises(ConfigError, match="steps is swept twice"):
            join(sweeps.over("steps", 1), sweeps.over("steps", 2))
    with pytest.raises(ConfigError, match="0 seeds"):
        sweeps.seeds(0)
    given = sweeps.over("steps", 1, 2)
    sweeps.product(given, sweeps.over("seed", 1))
    assert given == [{"steps": 1}, {"steps": 2}] and sweeps.product() == [{}] and sweeps.chain() == []


MISTAKES = {
    "unknown field": ("estimator.gama=0.5", ["estimator.gama does not exist", "estimator.gamma"]),
    "block": ("estimator=0.5", ["estimator is a block", "estimator.credit", "estimator.gamma"]),
    "text for a number": ("estimator.gamma=0.5,much", ["'much' must be float"]),
    "fraction for a whole number": ("steps=2.5", ["'2.5' must be int"]),
    "not a truth value": ("student.init.tie_word_embeddings=1", ["'1' must be true or false"]),
    "no value": ("estimator.gamma=", ["'' must be float"]),
    "no field": ("0.5", ["must be FIELD=v1,v2"]),
    "out of range": ("estimator.gamma=0.5,1.5", ["estimator.gamma = 1.5", "between 0 and 1"]),
    "unknown choice": ("signal.divergence=reverse_kl,revers_kl", ["'revers_kl' is not known", "reverse_kl"]),
    "two that contradict": ("estimator.credit=sequence", ["estimator.credit = 'sequence' does not go with"]),
    "twice the same value": ("estimator.gamma=0.5,0.50", ["gamma=0.5", "are the same run"]),
    "argument of no such name": (":prompt=3", ["'prompt=3' is not known", "prompts=..."]),
    "argument of another type": (":prompts=few", ["prompts = 'few' must be int"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_point_is_refused_by_name(case):
    text, words = MISTAKES[case]
    with pytest.raises(ConfigError) as error:
        plan.make(QUICK, sweeps.Sweep(plan.parse_flag(text), metrics=KL))
    for word in words:
        assert word in str(error.value)


def test_values_have_the_type_of_their_field():
    assert plan.parse_flag("learner.learning_rate=1e-3,2") == [{"learner.learning_rate": 1e-3}, {"learner.learning_rate": 2.0}]
    assert plan.parse_flag("model.remat=true,false") == [{"model.remat": True}, {"model.remat": False}]
    assert plan.parse_flag('student.recipe="a.py:b,c",d') == [{"student.recipe": "a.py:b,c"}, {"student.recipe": "d"}]
    assert plan.parse_flag(":prompts=48,0") == [{":prompts": 48}, {":prompts": 0}]
    assert plan.parse_flag(":role=sft") == [{":role": "sft"}]


def test_contradicting_requests_are_refused():
    over = sweeps.over("estimator.gamma", 0.1, 0.2)
    cases = [
        (QUICK, sweeps.Sweep([], metrics=KL), "no points"),
        (QUICK, sweeps.Sweep(over), "no metric"),
        (QUICK, sweeps.Sweep(over, metrics=("eval/revers_kl",)), "did you mean eval/reverse_kl"),
        (Base(QUICK.name, {"estimator.gamma": 0.3}), sweeps.Sweep(over, metrics=KL), "is swept, and set by --config.estimator.gamma"),
        (QUICK, sweeps.Sweep(sweeps.over("seed", 0, 1), seeds=2, metrics=KL), "have seeds of their own"),
        (QUICK, sweeps.Sweep(over, seeds=0, metrics=KL), "0 seeds"),
        (QUICK, sweeps.Sweep([{"steps": "4"}], metrics=KL), "steps = '4' has type str"),
    ]
    for base, asked, words in cases:
        with pytest.raises(ConfigError, match=words):
            plan.make(base, asked)


def test_seeds_of_the_quickstart_draw_prompts_student_and_samples():
    made = plan.make(QUICK, sweeps.Sweep(sweeps.over("estimator.gamma", 0.1, 0.2), seeds=3, metrics=KL))
    assert made.seed_fields == ("seed", "student.recipe", "task.seed")
    assert [(t.setting["estimator.gamma"], t.seed) for t in made.trials] == [(g, s) for s in range(3) for g in (0.1, 0.2)]
    assert [t.config.task.seed for t in made.trials[::2]] == [0, 1, 2]
    recipes = [t.config.student.recipe for t in made.trials[::2]]
    assert recipes == ["configs/quickstart.py:student,tiny" + end for end in ("", ",seed=1", ",seed=2")]
    student = config_lib.parse(config_lib.load_config(recipes[2]))
    assert student.seed == student.task.seed == 2
    assert {t.config.teacher.recipe for t in made.trials} == {"configs/quickstart.py:teacher,tiny"}


def test_seeds_start_at_the_configs_own_and_leave_alone_what_is_set():
    base = Base(QUICK.name, {"seed": 7, "task.seed": 3})
    made = plan.make(base, sweeps.Sweep([{}], seeds=2, metrics=KL))
    assert [t.seed for t in made.trials] == [7, 8] and {t.config.task.seed for t in made.trials} == {3}
    assert [t.config.student.recipe[-7:] for t in made.trials] == [",seed=7", ",seed=8"]
    assert made.seed_fields == ("seed", "student.recipe")


def test_a_config_without_the_argument_has_its_field_set(tmp_path):
    for body in ("return config.default()", "assert arg is None; return config.default()"):
        (tmp_path / "plain.py").write_text(f"from opd_jax import config\n\ndef get_config(arg=None):\n    {body}\n")
        base = Base(str(tmp_path / "plain.py"), {"signal.divergence": "nll", "rollout.source": "dataset"})
        made = plan.make(base, sweeps.Sweep([{}], seeds=2, metrics=KL))
        assert [t.seed for t in made.trials] == [0, 1] and made.seed_fields == ("seed",)


def test_the_field_seed_alone_may_be_swept():
    made = plan.make(QUICK, sweeps.Sweep(plan.parse_flag("seed=4,5,6"), metrics=KL))
    assert made.seed_fields == ("seed",) and [t.seed for t in made.trials] == [4, 5, 6]
    assert made.settings == [{}] and made.fields == []


def parsed_from_flags(given, monkeypatch):
    """The config that experiments/train.py makes of these flags."""
    values = flags.FlagValues()
    monkeypatch.setattr(sys, "argv", ["train.py", *given])  # where ml_collections looks for the fields
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    values(sys.argv)
    return config_lib.parse(values.config)


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_made_sweeps_expand_to_runs_that_their_flags_repeat(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arg in ("", ":tiny"):
        name = f"configs/sweeps/{path.name}{arg}"
        asked = plan.read_file(name)
        made = plan.make(Base(name, {"learner.eps": 1e-5, "model.remat": True}), asked)
        assert asked.seeds in ((2,) if arg else (3, 5)) and made.seed_fields == ("seed", "student.recipe", "task.seed")
        assert len(made.trials) == asked.seeds * len(made.settings)
        assert len(made.settings) == 2 if arg else len(made.settings) >= 4
        assert len({trial.name for trial in made.trials}) == len(made.trials)
        for trial in (made.trials[0], made.trials[-1]):
            assert parsed_from_flags(trial.flags(), monkeypatch) == trial.config
            assert trial.config.learner.eps == 1e-5 and trial.config.model.remat


def test_names_tell_apart_what_their_readable_part_does_not():
    points = sweeps.over("student.path", "a/b", "a-b", "x" * 200, "x" * 201)
    made = plan.make(QUICK, sweeps.Sweep(points, metrics=KL))
    names = [trial.name for trial in made.trials]
    assert len(set(names)) == 4 and all(len(name) <= 90 and "/" not in name and "," not in name for name in names)


def test_a_sweep_file_must_give_a_sweep(tmp_path):
    (tmp_path / "bad.py").write_text("def get_sweep(arg=None):\n    return [{'steps': 1}]\n")
    with pytest.raises(ConfigError, match="gives a list, it must give opd_jax.sweeps.Sweep"):
        plan.read_file(str(tmp_path / "bad.py"))
    assert plan.read_file("configs/quickstart.py:tiny") is None


# Statistics


def by_hand(values):
    """Mean, 95% interval and p of the bootstrap-t, by loops over all resamples."""
    n, mean = len(values), sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    ts = []
    for rows in itertools.product(values, repeat=n):
        m = sum(rows) / n
        e = math.sqrt(sum((v - m) ** 2 for v in rows) / (n - 1) / n)
        ts.append((m - mean) / e if len(set(rows)) > 1 else math.copysign(math.inf, m - mean))
    p = sum(abs(t) >= abs(mean) / error - 1e-9 for t in ts) / len(ts)
    ts.sort()
    # Quantiles on the outer side: with N sorted values the share q lies at index (N - 1) q.
    ends = [mean - error * ts[i] for i in (math.ceil((len(ts) - 1) * 0.975), math.floor((len(ts) - 1) * 0.025))]
    return mean, *(end if math.isfinite(end) else None for end in ends), p


def test_the_paired_bootstrap_is_the_one_of_the_textbook():
    for values in ([0.5, 1.0, 0.2, 2.0], [0.5, -1.0, 0.2, 2.0, 0.7], [3.0, 3.0, 3.0, 3.5, 1.0]):
        for ours, expected in zip(stats.paired_bootstrap(values), by_hand(values), strict=True):
            assert ours == (None if expected is None else pytest.approx(expected, rel=1e-9))


def test_the_paired_bootstrap_covers_and_rarely_cries_wolf():
    """Of 1000 samples of 5 normal differences with mean 0, the interval holds 0 in about 95%, and p <= 0.05 in at most about 5%."""
    rng = np.random.default_rng(5)
    found = [stats.paired_bootstrap(rng.normal(size=5)) for _ in range(1000)]
    assert 0.92 < np.mean([low <= 0 <= high for _, low, high, _ in found]) < 0.985
    assert np.mean([p <= 0.05 for *_, p in found]) < 0.065
    strong = [stats.paired_bootstrap(3 + rng.normal(size=5))[3] for _ in range(200)]
    assert np.mean([p <= 0.05 for p in strong]) > 0.75


def test_the_paired_bootstrap_says_what_it_cannot_know():
    assert stats.paired_bootstrap([0.0, 0.0, 0.0]) == (0.0, None, None, 1.0)
    assert stats.paired_bootstrap([0.25, 0.25]) == (0.25, None, None, None)
    mean, low, high, p = stats.paired_bootstrap([1.0, 1.1, 0.9])
    assert (mean, low, high) == (pytest.approx(1.0), None, None) and p >= 1 / 9
    many = np.random.default_rng(0).normal(0.3, 1, 40)
    mean, low, high, p = stats.paired_bootstrap(many)
    assert (low, high) == pytest.approx([x.item() for x in stats.t_interval(many)[1:]], abs=0.05)
    assert p == pytest.approx(scipy.stats.ttest_1samp(many, 0).pvalue, abs=0.03)
    assert stats.paired_bootstrap(many) == (mean, low, high, p)  # drawn with a seed of its own


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0] and stats.holm([]) == [] and stats.holm([0.2]) == [0.2]


# The table


def planned(*gammas, seeds=1, metrics=("eval/accuracy",)):
    return plan.make(QUICK, sweeps.Sweep(sweeps.over("estimator.gamma", *gammas), seeds=seeds, metrics=metrics))


def test_the_accuracy_of_a_domain_is_a_metric():
    assert planned(0.1, metrics=("eval/accuracy/algebra",)).trials
    with pytest.raises(ConfigError, match="eval/accuracy/: no run writes it"):
        planned(0.1, metrics=("eval/accuracy/",))


def finished(made, folder, accuracies):
    """Run directories with these accuracies, None for one that failed; the trials beyond are not finished."""
    for trial, accuracy in zip(made.trials, accuracies, strict=False):
        if accuracy is not None:
            run_directories.make(folder.run(trial), accuracy=accuracy)
        folder.note(trial, Outcome(0, 2.0, 10**9) if accuracy is not None else Outcome(3, 1.0, 0, ("it <broke>",)))
    return table.read(folder, made)


def test_rows_are_means_and_t_intervals_over_seeds(tmp_path):
    made, folder = planned(0.1, 0.2, seeds=3, metrics=("eval/accuracy", "eval/reverse_kl")), status.Folder(tmp_path)
    results = finished(made, folder, [0.5, 0.9, 0.6, 0.95, 0.4, 1.0])
    found = table.write_all(folder, made, results)
    assert json.loads((tmp_path / "table.json").read_text()) == found
    row = found[0]
    low, high = scipy.stats.t.interval(0.95, 2, loc=0.5, scale=scipy.stats.sem([0.5, 0.6, 0.4]))
    assert row["estimator.gamma"] == 0.1 and row["metric"] == "eval/accuracy" and row["n"] == 3
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((0.5, low, high))
    assert row["values"] == {"0": 0.5, "1": 0.6, "2": 0.4} and row["note"] == ""
    assert found[1]["estimator.gamma"] == 0.2 and found[1]["high"] == 1.0  # a share: Student's t would end beyond 1
    assert [r["metric"] for r in found] == ["eval/accuracy"] * 2 + ["eval/reverse_kl"] * 2
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == "estimator.gamma,metric,n,mean,low,high" and len(lines) == 5
    assert lines[1].split(",")[:4] == ["0.1", "eval/accuracy", "3", "0.5"]


def test_comparisons_are_paired_by_seed_and_corrected_per_metric(tmp_path):
    made, folder = planned(0.1, 0.2, 0.3, seeds=4), status.Folder(tmp_path)
    a, b, c = [0.5, 0.6, 0.4, 0.7], [0.6, 0.75, 0.48, 0.82], [0.1, 0.9, None, 0.3]
    results = finished(made, folder, [value for seed in zip(a, b, c, strict=True) for value in seed])
    table.write_all(folder, made, results)
    pairs = json.loads((tmp_path / "comparisons.json").read_text())
    assert [(p["a"]["estimator.gamma"], p["b"]["estimator.gamma"], p["n"]) for p in pairs] == [(0.1, 0.2, 4), (0.1, 0.3, 3), (0.2, 0.3, 3)]
    differences = [y - x for x, y in zip(a, b, strict=True)]
    assert [pairs[0][name] for name in ("difference", "low", "high", "p")] == pytest.approx(by_hand(differences))
    assert [p["p_holm"] for p in pairs] == pytest.approx(stats.holm([p["p"] for p in pairs]))
    assert pairs[1]["difference"] == pytest.approx((0.1 - 0.5 + 0.9 - 0.6 + 0.3 - 0.7) / 3)  # without seed 2
    assert "3 seeds are too few" in pairs[1]["note"] and pairs[0]["note"] == ""


@pytest.mark.parametrize(
    "numbers, sign, text",
    [
        ((0.204, 0.09582, 0.3122), "", "0.20 [0.10, 0.31]"),
        ((1.25, 1.248, 1.2521), "", "1.2500 [1.2480, 1.2521]"),
        ((0.0002228, None, None), "+", "+0.00022 [-∞, ∞]"),
        ((0.19, 0.0562, None), "+", "+0.19 [+0.06, ∞]"),
        ((-3.2, -104.0, 97.6), "+", "-3 [-104, +98]"),
        ((2.5e-9, 1.5e-9, 3.5e-9), "", "2.50e-09 [1.50e-09, 3.50e-09]"),
        ((3.2e24, 1e23, 6e24), "", "3.20e+24 [1.00e+23, 6.00e+24]"),
    ],
)
def test_a_cell_has_one_precision_that_of_its_width(numbers, sign, text):
    assert table.interval(*numbers, sign=sign) == text


def test_the_page_has_the_command_and_links_to_the_reports_that_there_are(tmp_path):
    made, folder = plan.make(dataclasses.replace(QUICK, command="python s.py '<x>'"), sweeps.Sweep([{}], 3, KL)), status.Folder(tmp_path)
    results = finished(made, folder, [0.5, None])
    reported, failed, _ = (folder.run(trial) for trial in made.trials)
    (reported / "report.html").write_text("")
    table.write_all(folder, made, results)
    page = (tmp_path / "table.html").read_text()
    assert "python s.py &#39;&lt;x&gt;&#39;" in page
    assert f'<a href="runs/{reported.name}/report.html">runs/{reported.name}</a>' in page and page.count("<a ") == 1
    assert f"<td>failed</td><td>runs/{failed.name}</td>" in page and page.count("<td>not finished</td>") == 1


def test_what_is_missing_is_said(tmp_path):
    made, folder = planned(0.1, 0.2, 0.3, 0.4, seeds=2), status.Folder(tmp_path)
    results = finished(made, folder, [0.5, 0.25, 0.5, None, None, 0.25])
    path = folder.run(made.trials[2]) / "metrics.jsonl"
    path.write_text('{"step": 0, "train/loss": 1.0}\n')
    results = table.read(folder, made)
    rows = table.write_all(folder, made, results)
    assert [(r["n"], r["mean"], r["low"], r["high"]) for r in rows] == [
        (1, 0.5, None, None),
        (2, 0.25, None, None),
        (0, None, None, None),
        (0, None, None, None),
    ]
    assert rows[0]["note"] == "one seed: no interval" and rows[0]["failed"] == [1]
    assert "same value" in rows[1]["note"]
    assert rows[2]["without_metric"] == [0] and rows[2]["unfinished"] == [1] and rows[2]["note"] == "no run has this metric"
    assert rows[3]["failed"] == [0] and rows[3]["unfinished"] == [1]
    page = (tmp_path / "table.html").read_text()
    assert "it &lt;broke&gt;" in page and "exit status 3" in page and "one seed: no interval" in page and "4 of 8 runs are done" in page
    text = table.text(made, rows)
    assert "1, 1 failed" in text and "0, 1 unfinished, 1 without a metric" in text
    assert json.loads((tmp_path / "comparisons.json").read_text())[0]["note"].startswith("fewer than two common seeds")


def test_equal_results_are_no_difference_and_have_no_interval(tmp_path):
    made, folder = planned(0.1, 0.2, seeds=3), status.Folder(tmp_path)
    table.write_all(folder, made, finished(made, folder, [0.5, 0.5, 0.25, 0.25, 0.75, 0.75]))
    (pair,) = json.loads((tmp_path / "comparisons.json").read_text())
    assert (pair["difference"], pair["low"], pair["high"], pair["p"], pair["p_holm"]) == (0.0, None, None, 1.0, 1.0)
    assert "<td>+0</td><td>1</td>" in (tmp_path / "table.html").read_text()


def test_points_with_other_fields_are_filled_in_from_their_configs(tmp_path):
    points = sweeps.chain(sweeps.over("estimator.gamma", 0.1), sweeps.over(":prompts", 3))
    made = plan.make(QUICK, sweeps.Sweep(points, metrics=("eval/accuracy",)))
    rows = table.rows(made, finished(made, status.Folder(tmp_path), [0.5, 0.6]))
    assert [(r["estimator.gamma"], r[":prompts"]) for r in rows] == [(0.1, None), (0.9, 3)]


def test_the_last_value_counts(tmp_path):
    made, folder = planned(0.1), status.Folder(tmp_path)
    finished(made, folder, [0.5])
    path = folder.run(made.trials[0]) / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "eval/accuracy": s / 8}) + "\n" for s in range(4)) + '{"step": 4}\n')
    assert table.read(folder, made)[0].values == {"eval/accuracy": 3 / 8}


# The folder


def test_points_may_be_added_to_a_sweep_and_not_changed(tmp_path):
    first = planned(0.1, 0.2)
    status.begin(tmp_path, first)
    before = (tmp_path / "sweep.json").read_bytes()
    status.begin(tmp_path, first)
    status.begin(tmp_path, planned(0.1, 0.2, metrics=("eval/reverse_kl",)))
    logging = Base(QUICK.name, {"log.samples": 2, "cache_dir": "elsewhere"})
    status.begin(tmp_path, plan.make(logging, sweeps.Sweep(sweeps.over("estimator.gamma", 0.1, 0.2), metrics=KL)))
    status.begin(tmp_path, first)
    assert (tmp_path / "sweep.json").read_bytes() == before
    steps = Base(QUICK.name, {"steps": 9})
    with pytest.raises(UserError, match=r"its sweep is another one \(steps: 4 -> 9\)"):
        status.begin(tmp_path, plan.make(steps, sweeps.Sweep(sweeps.over("estimator.gamma", 0.1, 0.2), metrics=KL)))
    with pytest.raises(UserError, match=r"no longer asked for: estimator.gamma=0.2, seed=0"):
        status.begin(tmp_path, planned(0.1, 0.3))
    assert (tmp_path / "sweep.json").read_bytes() == before
    status.begin(tmp_path, planned(0.1, 0.3, 0.2, seeds=2))
    with pytest.raises(UserError, match="no longer asked for"):
        status.begin(tmp_path, first)


def test_folders_with_something_else_in_them_are_refused(tmp_path):
    run_directories.make(tmp_path / "run")
    with pytest.raises(UserError, match="but no sweep.json"):
        sweep.run(QUICK, sweeps.Sweep([{}], metrics=KL), tmp_path / "run")
    assert not (tmp_path / "run" / "sweep.lock").exists()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "sweep.json").write_text('{"trials": [1]}')
    with pytest.raises(UserError, match="is not the definition of a sweep"):
        sweep.run(QUICK, sweeps.Sweep([{}], metrics=KL), tmp_path / "damaged")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        sweep.run(QUICK, sweeps.Sweep([{}], metrics=KL), tmp_path / "file")
    with status.alone(tmp_path / "busy"), pytest.raises(UserError, match="another sweep is running"):
        sweep.run(QUICK, sweeps.Sweep([{}], metrics=KL), tmp_path / "busy")


def test_a_note_that_is_damaged_or_without_its_run_is_no_result(tmp_path):
    made, folder = planned(0.1), status.Folder(tmp_path)
    (trial,) = made.trials
    finished(made, folder, [0.5])
    assert folder.outcome(trial) == Outcome(0, 2.0, 10**9)
    note = folder.point(trial.name).with_name(f"{trial.name}.json")
    (folder.run(trial) / "metrics.jsonl").unlink()
    assert folder.outcome(trial) is None
    note.write_text('{"exit": 0, "sec')
    assert folder.outcome(trial) is None


# Processes


def job(tmp_path, name, code, needs=()):
    """A Python process; `code` sees `say(text)`, which appends a line to the file `log`."""
    prelude = f"import os, signal, sys, time\ndef say(text):\n    open({str(tmp_path / 'log')!r}, 'a').write(text + chr(10))\n"
    return Job(name, (sys.executable, "-S", "-c", prelude + code), tmp_path / "points" / name, tmp_path / f"{name}.lock", needs)


def run_all(made, stop=lambda: False, seconds=60):
    """Runs a pool to its end; the outcomes in the order in which they came."""
    ended, limit = {}, time.monotonic() + seconds

    def on_wait():
        assert time.monotonic() < limit, "the pool does not come to an end"

    pool.run(made, on_end=lambda job, outcome: ended.update({job.name: outcome}), on_wait=on_wait, stop=stop, pause=0.02)
    return ended


def said(tmp_path):
    return (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []


def most_at_once(lines):
    alive = itertools.accumulate(1 if line.startswith("+") else -1 for line in lines)
    return max(alive)


SPELL = "say('+' + sys.argv[0]); time.sleep(0.3); say('-')"


def test_workers_run_side_by_side_and_no_more_than_there_are(tmp_path):
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        ended = run_all(Pool([job(folder, f"j{i}", SPELL) for i in range(4)], [Slot()] * workers))
        assert len(ended) == 4 and not any(outcome.exit for outcome in ended.values())
        assert most_at_once(said(folder)) == workers
        assert all(outcome.peak_bytes > 10**6 and outcome.seconds >= 0.3 for outcome in ended.values())


def test_a_job_waits_for_what_it_needs_and_is_not_started_without_it(tmp_path):
    jobs = [
        job(tmp_path, "late", "say('late')", ("early",)),
        job(tmp_path, "never", "say('never')", ("broken",)),
        job(tmp_path, "broken", "sys.exit('no bread')"),
        job(tmp_path, "early", "time.sleep(0.2); say('early')"),
    ]
    ended = run_all(Pool(jobs, [Slot()] * 3))
    assert said(tmp_path) == ["early", "late"]
    assert {name: outcome.exit for name, outcome in ended.items()} == {"late": 0, "never": 1, "broken": 1, "early": 0}
    assert ended["broken"].stderr == ("no bread",) and "broken failed" in ended["never"].stderr[0]


def test_failures_keep_their_status_and_last_words_and_others_go_on(tmp_path):
    words = "for i in range(30): print('line', i, file=sys.stderr)\nprint(file=sys.stderr)\n"
    jobs = [
        job(tmp_path, "status", words + "sys.exit(7)"),
        job(tmp_path, "killed", "os.kill(os.getpid(), signal.SIGKILL)"),
        job(tmp_path, "fine", "say('fine')"),
    ]
    ended = run_all(Pool(jobs, [Slot()]))
    assert (ended["status"].exit, ended["killed"].exit, ended["fine"].exit) == (7, -9, 0)
    assert ended["status"].stderr == tuple(f"line {i}" for i in range(22, 30))


HUNGRY = "say('+'); block = b'x' * {size}; time.sleep(0.4); say('-')"


def test_no_run_is_started_that_the_memory_has_no_room_for(tmp_path):
    """Each takes about 130 MB; three slots, but memory for two. The first runs alone, because nothing is known before."""
    jobs = [job(tmp_path, f"j{i}", HUNGRY.format(size=120 * 10**6)) for i in range(5)]
    run_all(Pool(jobs, [Slot()] * 3, memory_bytes=300 * 10**6))
    lines = said(tmp_path)
    assert lines[:2] == ["+", "-"] and most_at_once(lines) == 2


def test_what_is_known_of_earlier_runs_counts(tmp_path):
    made = Pool([job(tmp_path, f"j{i}", HUNGRY.format(size=10)) for i in range(3)], [Slot()] * 3, memory_bytes=10**9, peak_bytes=4 * 10**8)
    run_all(made)
    assert most_at_once(said(tmp_path)) == 2
    with pytest.raises(UserError, match="--memory_gb=0.3: one run needs 0.40 GB"):
        run_all(Pool([job(tmp_path, "j", "say('no')")], [Slot()], memory_bytes=3 * 10**8, peak_bytes=4 * 10**8))
    assert "no" not in said(tmp_path)


def test_what_runs_now_counts(tmp_path):
    """Beside a run that has grown beyond all before it nothing is started that would need as much."""
    grow = "block = b'x' * (120 * 10**6); time.sleep(1.5); say('-big')"
    jobs = [
        job(tmp_path, "a", "time.sleep(0.3)"),
        job(tmp_path, "big", grow),
        job(tmp_path, "b", "time.sleep(0.5)"),
        job(tmp_path, "c", "say('c')"),
    ]
    run_all(Pool(jobs, [Slot()] * 2, memory_bytes=200 * 10**6))
    assert said(tmp_path) == ["-big", "c"]


PATIENT = """
def save(*_):
    say('saved'); sys.exit(143)
signal.signal(signal.SIGTERM, save)
say('ready')
time.sleep(60)
"""


def test_stop_asks_once_waits_and_starts_nothing_more(tmp_path):
    jobs = [job(tmp_path, f"j{i}", PATIENT) for i in range(3)]
    ended = run_all(Pool(jobs, [Slot()] * 2), stop=lambda: said(tmp_path).count("ready") == 2)
    assert sorted(said(tmp_path)) == ["ready", "ready", "saved", "saved"]
    assert [outcome.exit for outcome in ended.values()] == [143, 143]


def test_an_interrupted_pool_leaves_no_process_behind(tmp_path):
    """A second Ctrl-C, or an error in the sweep itself. The worker has a child of its own."""
    child = (
        "import subprocess; p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)']); say(str(p.pid)); p.wait()"
    )

    def interrupted():
        if said(tmp_path):
            raise KeyboardInterrupt
        return False

    made = Pool([job(tmp_path, "j", child)], [Slot()])
    with pytest.raises(KeyboardInterrupt):
        run_all(made, stop=interrupted)
    (pid,) = map(int, said(tmp_path))
    for _ in range(100):
        if not pathlib.Path(f"/proc/{pid}").exists() or pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is still there")


def test_a_process_that_outlived_its_sweep_is_waited_for(tmp_path):
    """The first pool is forgotten, as after kill -9; the second one must not start the job beside it."""
    forgotten = Pool([job(tmp_path, "j", "say('+'); time.sleep(1); say('-')")], [Slot()])
    forgotten.step()
    ended = run_all(Pool([job(tmp_path, "j", "say('+'); say('-')")], [Slot()]))
    assert ended["j"].exit == 0
    assert said(tmp_path) == ["+", "-", "+", "-"]
    forgotten.close()


def test_workers_get_their_share_of_the_cores(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    made = slots.make(2, [config_lib.Config()])
    assert [slot.cores for slot in made] == slots.share_cores(cores, 2)
    (tmp_path / "a").mkdir()
    run_all(Pool([job(tmp_path, "j", "time.sleep(0.3); say(','.join(map(str, sorted(os.sched_getaffinity(0)))))")], made))
    assert said(tmp_path) == [",".join(map(str, sorted(made[0].cores)))]


def test_cores_are_shared_out_without_overlap():
    assert slots.share_cores(range(8), 3) == [{0, 1}, {2, 3, 4}, {5, 6, 7}]
    assert slots.share_cores([3, 5], 2) == [{3}, {5}]
    assert slots.share_cores([3, 5], 3) == [{3}, {5}, {3}]
    assert slots.share_cores([], 2) == [frozenset(), frozenset()]
    assert slots.make(1, []) == [Slot()]
    with pytest.raises(UserError, match="--workers=0: must be at least 1"):
        slots.make(0, [])


def test_accelerators_are_shared_out_by_environment(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = slots.accelerators("gpu", 4, 4, workers=2, each=2)
    assert [dict(slot.environment) for slot in found] == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    found = slots.accelerators("gpu", 2, 2, workers=2, each=1)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in found] == ["5", "GPU-7"]
    assert slots.accelerators("rocm", 1, 1, workers=1, each=1)[0].environment == {"HIP_VISIBLE_DEVICES": "0"}
    with pytest.raises(UserError, match="there are 2 gpu devices, and each worker needs 1"):
        slots.accelerators("gpu", 2, 2, workers=3, each=1)
    chips = slots.accelerators("tpu", 4, 4, workers=4, each=1)
    assert [slot.environment["TPU_VISIBLE_CHIPS"] for slot in chips] == ["0", "1", "2", "3"]
    for devices, workers, each in ((8, 4, 1), (4, 2, 2), (4, 5, 1)):
        with pytest.raises(UserError, match="TPU"):
            slots.accelerators("tpu", devices, 4, workers=workers, each=each)


# The live table


def test_the_live_table_shows_progress_and_what_is_left(tmp_path):
    made, folder = planned(0.1, 0.2, seeds=2), status.Folder(tmp_path)
    results = finished(made, folder, [0.5, None])
    path = folder.run(made.trials[3]) / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b'{"step": 0, "eval/accuracy": 0.125}\n{"step": 2, "train/loss": 1}\n{"step": 3, "eval/accu')
    waiting = [Job(t.name, (), tmp_path, tmp_path) for t in made.trials]
    current = Pool(waiting[2:3], [Slot()] * 2)
    current.running = {made.trials[3].name: pool.Running(waiting[3], Slot(), None, time.monotonic())}
    live = board.Board(made, folder)
    console = rich.console.Console(record=True, width=120, file=io.StringIO())
    console.print(live._table(results, current))
    text = console.export_text()
    assert "1/4 done, 1 running, 1 failed, 1 waiting, about 2 s left" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [["0.1", "1/2", "", "", "0.5"], ["0.2", "0/2", "2/4", "1", "~0.125"]]
    assert board.remaining_seconds(results[1:], current) is None
    assert board.last_record(folder, made.trials[0])["step"] == 3


def test_lines_about_runs_that_ended(tmp_path):
    made, folder = planned(0.1, 0.2), status.Folder(tmp_path)
    done, failed = finished(made, folder, [0.5, None])
    assert board.ended(done.trial, done) == "done    estimator.gamma=0.1, seed=0  eval/accuracy 0.5 (2 s, 1.00 GB)"
    assert board.ended(failed.trial, failed) == "FAILED  estimator.gamma=0.2, seed=0  exit status 3: it <broke>"
    said = sweep.failures("there", [done, failed])
    assert "it <broke>" in said and f"there/points/{failed.trial.name}.stderr" in said and "--retry_failed" in said
    assert sweep.failures("there", [done]) == ""


# The script


def script(*given, **kwargs):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), *map(str, given)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finish(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(tmp_path):
    flags = ["--config=configs/quickstart.py:tiny", f"--workdir={tmp_path / 'out'}", "--metric=eval/accuracy"]
    code, _, err = finish(script(*flags, "--sweep=learner.learning_rat=1e-3", "--seeds=2"))
    assert code == 2 and len(err.splitlines()) == 1 and "did you mean learner.learning_rate?" in err
    assert not (tmp_path / "out").exists()


def wait_until(condition, seconds=240):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def reproducible(path):
    """The records of a run without what depends on the clock."""
    return [{k: v for k, v in record.items() if not glossary.depends_on_clock(k)} for record in metrics.read(path)]


def worker_of(sweep_pid, name):
    """The process that makes the run of this name."""
    pids = pathlib.Path(f"/proc/{sweep_pid}/task/{sweep_pid}/children").read_text().split()
    (found,) = [int(pid) for pid in pids if name in pathlib.Path(f"/proc/{pid}/cmdline").read_text()]
    return found


@pytest.mark.slow
def test_killed_at_any_moment_the_sweep_goes_on(small, tmp_path, monkeypatch):
    """kill -9 of the sweep and of one of two workers, of which the other lives on; SIGTERM; a new point, which fails and is made again."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out, rates = tmp_path / "out", "learner.learning_rate=1e-3,2e-3"
    command = [f"--config={small.name}", f"--workdir={out}", f"--config.cache_dir={tmp_path / 'cache'}", "--metric=eval/accuracy"]
    command += [f"--sweep={rates}", "--workers=2"]
    asked = sweeps.Sweep(plan.parse_flag(rates), metrics=("eval/accuracy",))
    lived, killed = plan.make(small, asked).trials
    path = out / "runs" / killed.name / "metrics.jsonl"

    first = script(*command)
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") > 3)
    worker = worker_of(first.pid, killed.name)
    first.kill()
    os.kill(worker, signal.SIGKILL)
    assert finish(first)[1].count("recipe_") == 1  # made once, before the runs
    lines = path.read_bytes().count(b"\n")

    second = script(*command)
    wait_until(lambda: path.read_bytes().count(b"\n") > lines + 2)
    second.terminate()
    code, text, err = finish(second)
    assert code == 143 and "the state is saved" in err and "recipe_" not in text
    assert path.read_bytes().count(b"\n") < killed.config.steps + 1

    _, results = sweep.run(small, asked, out, quiet=True)
    assert [r.done for r in results] == [True, True]
    table_before, note_before = ((out / "table.json").read_bytes(), (out / "points" / f"{lived.name}.json").stat().st_mtime_ns)
    sweep.run(small, asked, out, quiet=True)
    assert (out / "table.json").read_bytes() == table_before
    config = config_lib.load_config(killed.source)
    config.cache_dir, config.learner.learning_rate = str(tmp_path / "cache"), 2e-3
    for _ in train.run(config, tmp_path / "never_killed"):
        pass
    assert reproducible(path) == reproducible(tmp_path / "never_killed" / "metrics.jsonl")

    more = sweeps.Sweep(plan.parse_flag(rates + ",1e38"), metrics=("eval/accuracy",))
    _, results = sweep.run(small, more, out, quiet=True)
    assert results[2].outcome.exit == 1 and "FloatingPointError" in results[2].outcome.stderr[-1]
    stderr = out / "points" / f"{results[2].trial.name}.stderr"
    failed_at = stderr.stat().st_mtime_ns
    assert not sweep.run(small, more, out, quiet=True)[1][2].done and stderr.stat().st_mtime_ns == failed_at
    assert not sweep.run(small, more, out, quiet=True, retry_failed=True)[1][2].done and stderr.stat().st_mtime_ns > failed_at
    assert (out / "points" / f"{lived.name}.json").stat().st_mtime_ns == note_before
    rows = json.loads((out / "table.json").read_text())
    assert [(row["learner.learning_rate"], row["n"], row["failed"]) for row in rows] == [(1e-3, 1, []), (2e-3, 1, []), (1e38, 0, [0])]


def test_a_config_file_that_changes_under_a_sweep_is_noticed(tmp_path):
    made, folder = planned(0.1), status.Folder(tmp_path)
    (trial,) = made.trials
    folder.run(trial).mkdir(parents=True)
    config = dataclasses.asdict(trial.config)
    (folder.run(trial) / "config.json").write_text(json.dumps(config))
    assert status.config_changed(folder, trial) == ""
    (folder.run(trial) / "config.json").write_text(json.dumps(config | {"steps": 5}))
    assert status.config_changed(folder, trial) == "steps: 4 -> 5"


def test_a_stop_request_is_true_once_it_came():
    stop = cli.StopRequest()
    assert not stop
    stop.signum = signal.SIGTERM
    assert stop
