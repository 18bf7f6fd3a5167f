"""What the report says in words and tables: numbers as recorded, seeds as one observation each."""

import json

import numpy as np
import pytest
import run_directories
import scipy.stats
from run_directories import make

from opd_jax import config as config_lib
from opd_jax import metrics
from opd_jax.analysis import formats, report, run_tables, runs, stats, summary
from opd_jax.config import Config


def groups(*paths):
    return runs.group_by_seed(runs.read_runs(paths))


def seeds(folder, accuracies=(0.9, 0.8, 0.85), **changes):
    losses = {"loss": 1.0} | changes
    return [make(folder / f"opd_seed{i}", seed=i, accuracy=a, **losses) for i, a in enumerate(accuracies)]


# ---- before and after


def test_the_table_says_what_was_recorded(tmp_path):
    header, *rows = summary.table(groups(make(tmp_path / "opd"), make(tmp_path / "sft", accuracy=0.5, rollout__source="dataset")))
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
    assert rows[1][5] == "0.033 [0.023, 0.043]"  # three decimals below 0.1
    assert rows[2][2] == "0.50 [0.49, 0.51]" and rows[3][3] == "0.98"


def test_small_numbers_keep_two_digits():
    assert [formats.number(x) for x in (0.5, -0.5, 0.096, 0.0333, 0.004, 0.00042, -0.00042)] == [
        *("0.50", "-0.50", "0.10", "0.033", "0.0040", "0.00042", "-0.00042")
    ]
    assert [formats.number(x) for x in (0, 1.5, 12345.678, 0.0000034, 1e-30)] == ["0.00", "1.50", "12345.68", "3.4e-06", "1e-30"]
    assert formats.estimate((0.00042, 0.0001, 0.0123)) == "0.00042 [0.00010, 0.01230]"
    assert formats.estimate((3e-6, 0, 0.5)) == "3e-06 [0, 0.5]" and formats.estimate((0, 0, 0.00012)) == "0.00 [0.00, 0.00012]"


def test_a_change_below_the_thousandth_is_told_in_numbers_that_differ(tmp_path):
    path = make(tmp_path / "a", loss=0.0004)
    records = [{"step": r["step"], "train/loss": r["train/loss"]} for r in metrics.read(path / "metrics.jsonl")[1:]]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "The loss fell from 0.00040 to 0.00013." in summary.sentences(groups(path))[0]
    records[-1]["train/loss"] = 0.000401
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "The loss stayed at 0.00040." in summary.sentences(groups(path))[0]


def test_rewards_between_0_and_1_are_named_by_their_metric(tmp_path):
    rouge = make(tmp_path / "r", task__name="text", steps=4)
    assert summary.table(groups(rouge))[0][2:4] == ["exact, greedy", "mean rouge, sampled"]
    said = "Exact: the share of completions that equal their reference."
    assert said in summary.caption(groups(rouge)) and said not in summary.caption(groups(make(tmp_path / "d")))
    (text,) = summary.sentences(groups(rouge))
    assert "The share of exact greedy completions rose from 0.30" in text and "; the mean rouge of samples rose from 0.15" in text
    assert "accuracy" not in text
    found = groups(rouge, make(tmp_path / "b", task__name="text", task__metric="bleu"), make(tmp_path / "a"))
    assert summary.table(found)[0][2:4] == [
        "exact, greedy or accuracy, greedy",
        "mean rouge, sampled or mean bleu, sampled or accuracy, sampled",
    ]
    worse = make(tmp_path / "c", task__name="text", accuracy=0.5)
    assert summary.sentences(groups(rouge, worse))[-1].startswith("r ends with the highest share of exact greedy completions, 0.90")
    assert "end with the same reverse KL" in summary.sentences(found)[-1]  # shares of exact text and accuracies are not compared


def test_students_that_began_elsewhere_have_rows_of_their_own(tmp_path):
    rows = summary.table(groups(make(tmp_path / "a"), make(tmp_path / "b", before=0.1)))
    assert [row[0] for row in rows[1:3]] == ["a, before", "b, before"]


def test_the_caption_names_prompts_samples_seeds_and_the_fixed_set(tmp_path):
    caption = summary.caption(groups(make(tmp_path / "a"), make(tmp_path / "b", seed=4, log__samples=2)))
    for words in (
        "In brackets: 95% intervals over the 256 held-out evaluation prompts, not over seeds (seed 0 or 4)",
        "samples at temperature 1, 4 per prompt",
        "Training prompts: 48",
    ):
        assert words in caption
    assert "t-interval" not in caption


# ---- several seeds


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path):
    other = make(tmp_path / "opd_fast", learner__learning_rate=0.1)
    again = make(tmp_path / "opd_again")  # the config and seed of opd_seed0
    found = groups(*seeds(tmp_path), other, again)
    assert [(group.name, group.seeds) for group in found] == [("opd_seed (3 seeds)", [0, 1, 2]), ("opd_fast", [0]), ("opd_again", [0])]


def test_seeds_may_draw_the_prompts_and_the_models_of_recipes_too(tmp_path):
    recipes = [f"configs/quickstart.py:student{end}" for end in ("", ",seed=1", ",seed=2")]
    paths = [make(tmp_path / f"a{i}", seed=i, task__seed=i, student__recipe=recipe) for i, recipe in enumerate(recipes)]
    wider = make(tmp_path / "wider", seed=3, task__seed=3, student__recipe="configs/quickstart.py:student,width=96,seed=3")
    assert [group.seeds for group in groups(*paths, wider)] == [[0, 1, 2], [3]]


def test_several_seeds_are_a_mean_with_students_t_interval(tmp_path):
    accuracies = (0.9, 0.8, 0.85)
    rows = summary.table(groups(*seeds(tmp_path, accuracies)))
    expected = scipy.stats.ttest_1samp(accuracies, 0).confidence_interval(0.95)
    assert rows[2][:3] == ["opd_seed (3 seeds)", "3", f"0.85 [{expected.low:.2f}, {expected.high:.2f}]"]
    assert rows[2][4] == "0.10"  # equal over the seeds: there is no interval to tell
    caption = summary.caption(groups(*seeds(tmp_path / "b")))
    assert caption.startswith("Rows of several seeds: means, in brackets 95% t-intervals over the 3 seeds") and "Wilson" not in caption


def test_an_interval_stays_within_what_its_metric_can_be(tmp_path):
    (group,) = groups(*seeds(tmp_path, (1.0, 0.98)))
    value, low, high = group.estimate("eval/accuracy", [run.records[-1] for run in group.runs])
    assert value == 0.99 and high == 1.0 and low < 0.9
    for name in ("eval/reverse_kl", "eval/reverse_kl_on_teacher"):
        assert group.estimate(name, [{name: 0.01}, {name: 2.0}])[1] == 0
    domain = "eval/accuracy/algebra"
    assert group.estimate(domain, [{domain: 0.0}, {domain: 1.0}])[1:] == (0, 1)
    low, high = group.estimate("train/log_ratio_mean", [{"train/log_ratio_mean": -0.1}, {"train/log_ratio_mean": 2.0}])[1:]
    assert low < -10 and high > 10


@pytest.mark.parametrize("shape", [(2,), (5, 3)])
def test_t_intervals_equal_scipys(shape):
    values = np.random.default_rng(0).normal(size=shape)
    mean, low, high = stats.t_interval(values)
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(low, expected.low)
    np.testing.assert_allclose(high, expected.high)


def curve(found, name):
    return runs.series(found[0], name)


def test_bands_are_over_seeds_and_of_a_single_run_its_own_intervals(tmp_path):
    paths = [*seeds(tmp_path), *seeds(tmp_path / "other", (0.5,), loss=2.0)]
    three = curve(groups(*paths[:3]), "eval/accuracy")
    expected = scipy.stats.ttest_1samp((0.9, 0.8, 0.85), 0).confidence_interval(0.95)
    assert three["steps"] == [0, 3] and three["values"] == pytest.approx([0.3, 0.85]) and three["band"] == "95% t-interval over 3 seeds"
    np.testing.assert_allclose([three["low"][1], three["high"][1]], [expected.low, expected.high])
    two = curve(groups(*paths[:2]), "eval/accuracy")
    assert two["band"] == "lowest to highest of 2 seeds" and (two["low"][1], two["high"][1]) == (0.8, 0.9)
    one = curve(groups(paths[0]), "eval/accuracy")
    assert one["band"] == "95% interval over the evaluation prompts" and one["low"] == pytest.approx([0.29, 0.89])
    assert "band" not in curve(groups(paths[0]), "train/loss")
    assert curve(groups(paths[0]), "rollout/reward")["steps"] == []


def test_a_curve_over_seeds_has_the_steps_that_all_have(tmp_path):
    paths = seeds(tmp_path)
    (paths[1] / "metrics.jsonl").write_text("".join((paths[1] / "metrics.jsonl").read_text().splitlines(keepends=True)[:3]))
    assert curve(groups(*paths), "train/loss")["steps"] == [1, 2]
    assert "2 to 3 of 3 updates" in summary.sentences(groups(*paths))[0]


def test_long_curves_are_averaged_between_neighbours(tmp_path):
    path = make(tmp_path / "long", steps=1000)
    found = curve(groups(path), "rollout/tokens_total")
    assert len(found["steps"]) == runs.POINTS
    assert np.allclose(np.array(found["values"]), 500 * np.array(found["steps"])) and found["steps"][0] < 3 and found["steps"][-1] > 997
    assert "a curve has 300 points" in report.render(runs.read_runs([path]))


# ---- sentences


def test_sentences_say_what_was_trained_what_changed_and_what_it_cost(tmp_path):
    path = make(tmp_path / "opd", teacher__path="/home/someone/models/big", student__recipe="configs/quickstart.py:student")
    (text,) = summary.sentences(groups(path))
    assert text == (
        "opd: on-policy distillation of quickstart.py:student from big on arithmetic (48 training prompts), by the reverse KL over the "
        "whole vocabulary; 3 of 3 updates of 64 completions of at most 64 tokens. Greedy accuracy rose from 0.30 [0.29, 0.31] to "
        "0.90 [0.89, 0.91]; "
        "sampled accuracy rose from 0.15 [0.14, 0.16] to 0.45 [0.44, 0.46]; the reverse KL to the teacher fell from 1.20 [1.19, 1.21] to "
        "0.10 [0.09, 0.11]; the forward KL fell from 0.40 [0.39, 0.41] to 0.033 [0.023, 0.043]. "
        "It took 6 s of training on 2 cores of A Processor, 1,500 completion tokens (250 per second)."
    )


def test_sentences_of_other_methods_seeds_and_accelerators(tmp_path):
    accelerator = run_directories.SESSION | {"platform": "gpu", "device_kind": "NVIDIA H200", "devices": 4}
    sft = {"rollout__source": "dataset", "signal__divergence": "nll", "teacher__path": "big", "session": accelerator}
    (text,) = summary.sentences(groups(make(tmp_path / "sft", before=0.9, **sft)))
    assert "fine-tuning on the task's solutions (SFT) of a new llama on arithmetic" in text and "by the negative log-likelihood;" in text
    assert "Greedy accuracy stayed at 0.90" in text and "on 4 × NVIDIA H200" in text
    told = {"signal__support": "topk_teacher", "signal__k": 16, "signal__tail": "bucket", "teacher__path": "big"}
    assert "by the reverse KL (topk_teacher support, k = 16, tail bucket);" in summary.sentences(groups(make(tmp_path / "topk", **told)))[0]
    told = {"estimator__credit": "to_go", "signal__support": "sampled", "teacher__path": "big"}
    (text,) = summary.sentences(groups(*seeds(tmp_path, **told)))
    assert (
        "by the reverse KL (sampled support), credit to_go; 3 of 3 updates of 64 completions of at most 64 tokens, seeds 0, 1, 2." in text
    )
    assert (
        "rose from 0.30 to 0.85 [0.73, 0.97]" in text and "(means of 3 seeds, 95% t-intervals)" in text and "6 s of training each" in text
    )


def test_a_run_without_distillation_is_not_called_one(tmp_path):
    rewarded = make(tmp_path / "grpo", signal__weight=0.0, reward__weight=1.0, reward__advantage="grpo")
    told = summary.sentences(groups(rewarded))[0]
    assert "grpo: reinforcement learning of" in told and "by its rewards, advantages grpo;" in told and "distillation" not in told
    preferring = summary.sentences(groups(make(tmp_path / "dpo", signal__weight=0.0, preference__weight=1.0)))[0]
    assert "dpo: preference optimisation of" in preferring and "by the rankings of teacher" in preferring


def test_changes_within_the_intervals_are_called_so_and_without_evaluations_training_is_told(tmp_path):
    (text,) = summary.sentences(groups(make(tmp_path / "a", before=0.89)))
    assert "accuracy rose from 0.89 [0.88, 0.90] to 0.90 [0.89, 0.91], within the intervals;" in text
    path = make(tmp_path / "b")
    records = [record for record in metrics.read(path / "metrics.jsonl") if record["step"]]
    kept = [{name: v for name, v in record.items() if not name.startswith("eval/")} for record in records]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert (
        "The reverse KL on its own completions fell from 1.00 to 0.33; the loss fell from 1.00 to 0.33."
        in summary.sentences(groups(path))[0]
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [(0.5, "intervals do not overlap"), (0.885, "intervals overlap"), (0.9, "b and a end with the same greedy accuracy, 0.90")],
)
def test_groups_are_compared(tmp_path, other, words):
    told = summary.sentences(groups(make(tmp_path / "b", accuracy=other), make(tmp_path / "a", steps=4)))
    assert words in told[-1] and (other == 0.9 or told[-1].startswith("a ends with the highest greedy accuracy, 0.90 [0.89, 0.91], then b"))


def shorten(path, steps):
    """Leaves the records up to this step: a run that goes on, or was stopped."""
    kept = [record for record in metrics.read(path / "metrics.jsonl") if record["step"] <= steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return path


def evaluate(path, step, accuracy):
    """Adds an evaluation in the middle of a run."""
    records = metrics.read(path / "metrics.jsonl")
    records[step] |= run_directories.evaluation(accuracy, 0.5)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_run_that_has_only_begun_ends_with_nothing(tmp_path):
    begun = shorten(make(tmp_path / "b", before=0.95), 1)
    found = groups(make(tmp_path / "a", accuracy=0.9), begun)
    assert summary.sentences(found)[2:] == []
    found = groups(make(tmp_path / "c", accuracy=0.9), make(tmp_path / "d", accuracy=0.5), begun)
    *_, compared, left_out = summary.sentences(found)
    assert compared.startswith("c ends with the highest greedy accuracy, 0.90 [0.89, 0.91], then d, 0.50")
    assert left_out == "Not finished, and not compared: b (evaluated at update 0 of 3)."


def test_runs_that_are_not_finished_are_compared_so_far_and_with_their_steps(tmp_path):
    going = shorten(evaluate(make(tmp_path / "b"), 2, 0.95), 2)
    found = groups(make(tmp_path / "a", accuracy=0.9), going)
    assert summary.sentences(found)[-1] == (
        "So far b has the highest greedy accuracy, 0.95 [0.94, 0.96] (update 2 of 3), then a, 0.90 [0.89, 0.91] (update 3 of 3); "
        "their intervals do not overlap."
    )
    assert " So far, at update 2 of 3: greedy accuracy rose from 0.30 [0.29, 0.31] to 0.95" in summary.sentences(found)[1]
    rows = summary.table(found)
    assert [row[:2] for row in rows[2:4]] == [["a", "3"], ["b", "2 of 3"]] and rows[3][-2:] == ["1,000", "4 s"]


def test_tokens_and_time_are_those_until_the_evaluation(tmp_path):
    going = shorten(evaluate(make(tmp_path / "a", steps=9), 2, 0.5), 7)
    (row,) = [row for row in summary.table(groups(going)) if row[0] == "a"]
    assert row[1] == "2 of 9" and row[-2:] == ["1,000", "4 s"]


def test_seeds_that_stopped_at_different_steps_stand_together_at_the_last_that_all_have(tmp_path):
    paths = [evaluate(path, 2, 0.6 + i / 10) for i, path in enumerate(seeds(tmp_path, (0.9, 0.8)))]
    shorten(paths[1], 2)
    found = groups(*paths)
    (row,) = [row for row in summary.table(found) if row[0].startswith("opd_seed")]
    assert row[1] == "2 of 3" and row[2].startswith("0.65 [") and row[-2:] == ["1,000", "4 s"]
    assert "So far, at update 2 of 3: greedy accuracy rose from 0.30 to 0.65 [" in summary.sentences(found)[0]
    said = "Seeds that stopped at different updates stand at the last one that all of them evaluated."
    assert said in summary.caption(found) and said not in summary.caption(groups(*seeds(tmp_path / "whole")))
    shorten(paths[1], 0)
    assert [row[0] for row in summary.table(groups(*paths))] == ["student", "before training"]
    (paths[1] / "metrics.jsonl").write_text("")
    assert len(summary.table(groups(*paths))) == 1 and "rose" not in summary.sentences(groups(*paths))[0]


def test_losses_of_seeds_are_told_at_updates_that_all_have(tmp_path):
    paths = seeds(tmp_path, (0.9, 0.8))
    for path, steps in zip(paths, (3, 2), strict=True):
        records = [{k: v for k, v in r.items() if k in ("step", "train/loss")} for r in metrics.read(path / "metrics.jsonl")[1:]]
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:steps]))
    assert "So far, at update 2 of 3: the loss fell from 1.00 to 0.50 (means of 2 seeds" in summary.sentences(groups(*paths))[0]


def test_of_divergences_the_lowest_is_best(tmp_path):
    paths = [make(tmp_path / "near", accuracy=0.5), make(tmp_path / "far")]
    for path, kl in zip(paths, (0.1, 0.7), strict=True):
        records = [{k: v for k, v in record.items() if "accuracy" not in k} for record in metrics.read(path / "metrics.jsonl")]
        records[-1] |= {"eval/reverse_kl": kl, "eval/reverse_kl_low": kl - 0.01, "eval/reverse_kl_high": kl + 0.01}
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    told = summary.sentences(groups(*reversed(paths)))[-1]
    assert told.startswith(
        "near ends with the lowest reverse KL to the teacher, 0.10 [0.09, 0.11], then far, 0.70 [0.69, 0.71]; their intervals do"
    )


# ---- configuration, environment, cost


def test_fields_that_differ_between_runs_come_first_then_those_that_differ_from_their_defaults(tmp_path):
    between, changed, same = run_tables.config_tables(runs.read_runs([make(tmp_path / "a"), make(tmp_path / "b", seed=4)]))
    assert between == [("seed", [0, 4])]
    assert dict(changed) == {"steps": [3], "task.train_size": [48]}
    assert len(between) + len(changed) + len(same) == len(config_lib.flatten(Config()))


def test_a_run_of_an_older_version_lacks_fields_and_environment(tmp_path):
    path = make(tmp_path / "old", session=None)
    config = json.loads((path / "config.json").read_text())
    del config["loss"], config["cache_dir"]
    (path / "config.json").write_text(json.dumps(config))
    (run,) = runs.read_runs([path])
    assert run.config["loss.normaliser"] == "token_mean"
    rows = dict(run_tables.environment_table([run]))
    assert set(rows) == {"updates", "training", "evaluations", "completion tokens", "tokens per second"}
    assert rows["training"] == ["6.0 s"] and rows["tokens per second"] == ["250"] and rows["evaluations"] == ["3.0 s"]


def test_environment_and_cost_of_each_run(tmp_path):
    moved = make(tmp_path / "b", seed=1)
    sessions = [
        run_directories.SESSION,
        run_directories.SESSION | {"from_step": 2, "devices": 8, "device_kind": "TPU v5e", "platform": "tpu"},
    ]
    sessions[1]["peak_device_bytes"] = 2**30
    (moved / "environment.json").write_text(json.dumps({"sessions": sessions}))
    rows = dict(run_tables.environment_table(runs.read_runs([make(tmp_path / "a"), moved])))
    assert rows["device"] == ["1 × cpu (cpu)", "8 × TPU v5e (tpu)"]
    assert rows["sessions"] == ["from update 0: 1 × cpu", "from update 0: 1 × cpu; from update 2: 8 × TPU v5e"]
    assert rows["software"][0] == "opd_jax 0.1.0, Python 3.11.9" and rows["libraries"][0] == "jax 0.10.2, numpy 2.3.0"
    assert rows["peak memory of the process"][0] == "1.50 GiB" and rows["peak memory of a device"] == ["", "1.00 GiB"]


# ---- teachers that read more


def measured(path, gain=0.5, **fields):
    """A run of a self-teacher whose first record says what a solution to read adds."""
    folder = make(path, teacher__path="student_init", context__privileged__reads="solution", **fields)
    first, *others = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    gains = {f"context/gold_gain{end}/solution": gain + shift for end, shift in (("", 0), ("_low", -0.2), ("_high", 0.2))}
    accuracies = {"context/accuracy": 0.03, "context/accuracy/solution": 1.0}
    (folder / "metrics.jsonl").write_text("".join([json.dumps(json.loads(first) | gains | accuracies) + "\n", *others]))
    return folder


def test_what_the_context_adds_is_told(tmp_path):
    [text] = summary.sentences(groups(measured(tmp_path / "opsd")))
    assert "the teacher gains 0.50 [0.30, 0.70] by reading the solution (accuracy 0.030 -> 1.00)." in text
    [text] = summary.sentences(groups(measured(tmp_path / "vacuous", gain=0.1)))
    assert "gains 0.10 [-0.10, 0.30], which may be nothing, by reading the solution" in text
    [text] = summary.sentences(groups(*(measured(tmp_path / f"opsd{i}", gain=0.1 * i, seed=i) for i in range(3))))
    low, high = scipy.stats.t.interval(0.95, 2, 0.1, scipy.stats.sem([0, 0.1, 0.2]))
    assert f"gains 0.10 [{low:.2f}, {high:.2f}], which may be nothing, by reading" in text


def test_a_kl_that_grows_with_what_a_student_learns_is_not_told_as_a_failure(tmp_path):
    [text] = summary.sentences(groups(measured(tmp_path / "opsd")))
    assert "the reverse KL to itself before training, which grows with what it learns, fell from" in text
    [text] = summary.sentences(groups(make(tmp_path / "told", context__privileged__reads="solution")))
    assert "the forward KL to the teacher without its context fell from" in text and "gains" not in text
