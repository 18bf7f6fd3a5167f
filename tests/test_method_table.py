"""The comparison of methods: what is read off a run, the tables, equal budgets, and that methods are the same in every setting."""

import json
import pathlib

import numpy as np
import pytest

from opd_jax import config as config_lib
from opd_jax import cost, method_table, train
from opd_jax.config.loading import call, load_config
from opd_jax.method_table import Column, Row
from opd_jax.models import config as model_config_lib
from opd_jax.sweeps import plan, sweep

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILE = str(ROOT / "configs" / "sweeps" / "methods.py")
COSTS = {"cost/flops_total": 5e12, "cost/generated_tokens_total": 7000}


def parsed(arg):
    return config_lib.parse(load_config(f"{FILE}:{arg}"))


def test_what_a_run_says():
    records = [
        {"step": 0, "eval/accuracy": 0.2, "eval/sampled_accuracy": 0.1, "eval/accuracy/sort": 0.0, "eval/accuracy/shift": 1.0},
        {"step": 10, "eval/sampled_accuracy/sort": 0.49, "eval/sampled_accuracy": 0.3},
        {"step": 20, "eval/sampled_accuracy/sort": 0.5, "eval/sampled_accuracy": 0.4},
        {"step": 30, "eval/accuracy": 0.9, "eval/sampled_accuracy": 0.7, "eval/teacher_sampled_accuracy": 0.9, "eval/accuracy/shift": 0.5}
        | {"eval/accuracy/sort": 0.8, "eval/sampled_accuracy/sort": 0.7}
        | COSTS,
    ]
    config = parsed("section=sdpo,tiny")
    found = method_table.measured(records, config)
    assert found["attempts"] == 20 * config.rollout.batch_size and found["recovery"] == pytest.approx(0.6 / 0.8)
    assert (found["accuracy"], found["accuracy/sort"], found["accuracy_before/shift"], found["old"]) == (0.9, 0.8, 1.0, 0.5)
    assert (found["flops"], found["generated_tokens"]) == (5e12, 7000)
    never = [{name: value for name, value in record.items() if name != "eval/sampled_accuracy/sort"} for record in records]
    assert method_table.measured(never, config)["attempts"] == float("inf")


def test_a_sequence_is_read_off_all_its_runs(tmp_path):
    """Stage i's accuracies are in the folder of its recipe; the matrix of scores.forgetting is made of them."""
    reached = {1: (0.9, 0.0, 0.0), 2: (0.6, 0.8, 0.1), 3: (0.5, 0.6, 1.0)}  # of sort, add, chain

    def record(step, new, old):
        values = dict(zip(("sort", "add", "chain", "reverse", "shift"), (*new, old, old), strict=True))
        return {"step": step, "eval/sampled_accuracy": 0.5} | {f"eval/accuracy/{skill}": value for skill, value in values.items()}

    runs = {stage: [record(0, (0.0, 0.0, 0.0), 1.0), record(4, new, 1.1 - stage / 10) | COSTS] for stage, new in reached.items()}
    for stage in (1, 2):
        _, folder = train.locate_recipe(f"{method_table.FILE}:section=sequence,row=sft,stage={stage},seed=0,tiny", str(tmp_path))
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in runs[stage]))
    c = load_config(f"{FILE}:section=sequence,row=sft,tiny")
    c.cache_dir = str(tmp_path)
    found = method_table.measured(runs[3], config_lib.parse(c))
    assert found["learnt"] == pytest.approx((0.9 + 0.8 + 1.0) / 3) and found["kept"] == pytest.approx((0.5 + 0.6 + 1.0) / 3)
    assert found["forgetting"] == pytest.approx((0.4 + 0.2) / 2) and found["backward_transfer"] == pytest.approx(-(0.4 + 0.2) / 2)
    assert (found["old"], found["old_before"]) == (pytest.approx(0.8), 1.0)


def test_estimates_in_words():
    length, accuracy = Column("length", "length"), Column("sort before", "accuracy_before/sort")
    assert method_table.estimate(length, []) == "-" and method_table.estimate(length, [float("inf")]) == "never"
    thousands = Column("attempts, k", "attempts", 1e3)
    assert method_table.estimate(thousands, [2000.0, float("inf"), 4000.0]) == "3 in 2 of 3, the others never"
    assert method_table.estimate(length, [0.5]) == "0.5" and method_table.estimate(length, [0.5, 0.5]) == "0.5"
    mean, half = 0.5, 4.302652729911275 * 0.1 / np.sqrt(3)  # Student's t for 2 degrees of freedom
    assert method_table.estimate(length, [0.4, 0.5, 0.6]) == f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"
    assert method_table.estimate(accuracy, [0.0, 0.5, 1.0]) == "0.5 [0.0, 1.0]"  # a share is within 0 and 1
    assert "[-" in method_table.estimate(Column("recovered", "recovery"), [-0.3, 0.1, 0.2])
    assert method_table.estimate(Column("old", "old"), [0.9, 1.0, 1.0]).endswith(", 1.00]")
    assert method_table.estimate(Column("TFLOPs", "flops", 1e12, certain=True), [1.0e12, 1.2e12]) == "1.1"


def test_tables_have_every_row_and_the_paired_differences():
    rows = [
        Row("mismatch", "a", {"accuracy": {0: 0.2, 1: 0.4, 2: 0.9}}, 0),
        Row("mismatch", "b", {"accuracy": {0: 0.3, 1: 0.6, 2: 1.0}, "length": {0: float("inf")}}, 1),
    ]
    text = method_table.markdown(rows)
    assert "| `a` |" in text and "| `b` (1 failed or unfinished) |" in text and text.count("### mismatch") == 1
    mean, half = 0.4 / 3, 4.302652729911275 * np.std([0.1, 0.2, 0.1], ddof=1) / np.sqrt(3)
    assert f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}], p = " in text
    assert method_table.difference(rows[0], rows[0], "accuracy") == ""


def test_rows_come_back_from_their_file(tmp_path):
    row = Row("sdpo", "grpo", {"attempts": {0: 640.0, 1: float("inf")}}, 0)
    method_table.write_json(tmp_path / "table.json", [method_table._plain(row)])
    assert method_table.read(tmp_path / "table.json") == [row]


@pytest.mark.parametrize("section", list(method_table.COLUMNS))
def test_sections_expand(section, monkeypatch):
    monkeypatch.chdir(ROOT)
    name = f"{method_table.FILE}:section={section},tiny"
    made = plan.make(plan.Base(name, {}), plan.read_file(name))
    assert len(made.trials) == 4 and all(isinstance(column, Column) for column in method_table.COLUMNS[section])
    assert set(method_table.COLUMNS) == set(call(FILE, lambda module: module.SECTIONS))


def test_rows_with_flops_cost_as_much_as_the_first():
    """Updates times FLOPs per token, by the accounting of cost.py for the quickstart's two models."""
    sizes = {}
    for role in ("teacher", "student"):
        c = load_config(f"configs/quickstart.py:{role}")
        shape = {name: value for name, value in c.student.init.to_dict().items() if value or isinstance(value, bool)}
        shape |= {"vocab_size": 259, "head_dim": shape["hidden_size"] // shape["num_attention_heads"]}
        sizes[role] = cost.active_parameters(model_config_lib.from_hf(shape, where="test"))

    def per_update(writer, scored):
        scorers = (sizes["teacher"],) if scored else ()
        account = cost.account(writer, sizes["student"], sizes["student"], sizes["teacher"], scorers=scorers)
        return account.work(prompt=13, teacher_prompt=13, completion=13).flops

    whole = 100 * per_update("student", True)
    writers = {"sft": "dataset", "seq_kd": "teacher", "grpo": "student"}
    for name, steps in call(FILE, lambda module: module.AT_EQUAL_FLOPS).items():
        assert steps * per_update(writers[name], False) == pytest.approx(whole, rel=0.03), name


def test_a_method_brings_its_axes_into_another_setting():
    c = parsed("section=sdpo,row=grpo")
    own = config_lib.parse(load_config("configs/methods/grpo.py:dr_grpo"))
    for block in ("reward", "loss", "signal", "estimator"):
        assert getattr(c, block) == getattr(own, block)
    assert c.rollout.group_size == 8 and c.task.learn == "sort" and not config_lib.has_teacher(c) and not c.context.privileged.reads
    assert parsed("section=sequence,row=sft,stage=1").rollout.source == "dataset"


@pytest.mark.slow
def test_the_command_makes_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = Row("scale", "1", {"accuracy": {0: 0.5}}, 0)  # of a section that was made earlier
    method_table.write_json(tmp_path / "method_table.json", [method_table._plain(before)])
    rows = method_table.run(tmp_path, ["mismatch"], quick=True, tiny=True, budget=sweep.Budget(2))
    assert rows[0] == before and [row.name for row in rows[1:]] == ["full_T1", "sampled_T1"] and not any(row.failed for row in rows)
    assert method_table.read(tmp_path / "method_table.json") == rows
    assert method_table.markdown(rows) == (tmp_path / "method_table.md").read_text()
