"""samples.jsonl: the values are those of the student that wrote the tokens, and logging them changes nothing else."""

import dataclasses
import json

import jax
import models
import numpy as np
import pytest

from opd_jax import config as config_lib
from opd_jax import metrics, parallel, train
from opd_jax.config import Config, Log
from opd_jax.data import tokenizer
from opd_jax.data.pipeline import Batch
from opd_jax.data.tasks import Example
from opd_jax.samples import SampleLog, _short

CLOCK = ("time/", "per_second", "memory")
VALUES = ("student_logp", "student_entropy", "teacher_logp", "teacher_entropy", "teacher_top")


def config_of(teacher="", steps=3):
    c = config_lib.default()
    c.seed, c.steps, c.learner.decay_steps, c.task.level = 7, steps, 3, 3
    c.rollout.batch_size, c.rollout.group_size, c.rollout.max_new_tokens = 8, 2, 5
    c.student.init.hidden_size, c.student.init.intermediate_size, c.student.init.num_hidden_layers = 16, 16, 1
    c.learner.learning_rate, c.eval.prompts = 0.05, 0
    c.teacher.path = str(teacher)
    if not teacher:
        c.rollout.source, c.signal.divergence = "dataset", "nll"
    c.log.samples_every, c.log.samples = 2, 8  # the whole batch
    return c


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(run directory of a teacher, SFT; run directory of a student, on-policy, all of whose rollouts are logged)."""
    folder = tmp_path_factory.mktemp("runs")
    list(train.run(config_of(), folder / "teacher"))
    list(train.run(config_of(folder / "teacher"), folder / "student"))
    return folder / "teacher", folder / "student"


def lines(workdir, step=None):
    return [line for line in metrics.read(workdir / "samples.jsonl") if step in (None, line["step"])]


@pytest.mark.slow
def test_the_values_are_those_of_the_student_that_wrote_the_tokens(runs):
    """Over the whole batch they give the metrics of the same step, which the update measured before it changed anything."""
    records = {record["step"]: record for record in metrics.read(runs[1] / "metrics.jsonl")}
    previous = None
    for step in (1, 2, 3):
        columns = {name: np.concatenate([line[name] for line in lines(runs[1], step)]) for name in VALUES[:4]}
        assert len(columns["student_logp"]) == records[step]["train/tokens"]
        ratio = columns["teacher_logp"] - columns["student_logp"]
        assert ratio.mean() == pytest.approx(records[step]["train/log_ratio_mean"], abs=1e-4)
        assert columns["student_entropy"].mean() == pytest.approx(records[step]["rollout/entropy"], rel=1e-4)
        assert previous is None or abs(ratio.mean() - previous) > 1e-3  # so that the values of another step would be seen
        previous = ratio.mean()


@pytest.mark.slow
def test_a_line_has_a_value_for_every_token(runs):
    text = (runs[1] / "samples.jsonl").read_text()
    assert text.count("\n") == 24 and {line["step"] for line in lines(runs[1])} == {1, 2, 3}
    for line in lines(runs[1]):
        assert set(line) == {"step", "prompt", "completion", "token_ids", "tokens", "special", *VALUES}
        assert {len(line[name]) for name in ("token_ids", "tokens", *VALUES)} == {len(line["token_ids"])}
        assert "".join(p for i, p in enumerate(line["tokens"]) if i not in line["special"]).startswith(line["completion"][:1])
        assert [line["token_ids"][i] >= 256 for i in line["special"]] == [True] * len(line["special"])
        for token, logp, top in zip(line["tokens"], line["teacher_logp"], line["teacher_top"], strict=True):
            assert len(top) == 5 and [p for _, p in top] == sorted((p for _, p in top), reverse=True)
            assert all(isinstance(name, str) and 0 < p < 1 for name, p in top)
            assert all(p == pytest.approx(np.exp(logp), rel=1e-3) for name, p in top if name == token != "")


@pytest.mark.slow
def test_samples_of_a_group_stand_behind_their_prompt(runs):
    prompts = [line["prompt"] for line in lines(runs[1], 1)]
    assert prompts[0::2] == prompts[1::2] and len(set(prompts)) == 4


@pytest.mark.slow
def test_without_a_teacher_the_student_alone_is_logged(runs):
    assert set(lines(runs[0])[0]) == {"step", "prompt", "completion", "token_ids", "tokens", "special", *VALUES[:2]}


@pytest.mark.slow
def test_logging_changes_no_number_of_the_run(runs, tmp_path):
    silent = config_of(runs[0])
    silent.log.samples_every = 0
    list(train.run(silent, tmp_path / "silent"))
    assert not (tmp_path / "silent" / "samples.jsonl").exists()
    ours, theirs = (
        [{k: v for k, v in record.items() if not any(word in k for word in CLOCK)} for record in metrics.read(path / "metrics.jsonl")]
        for path in (runs[1], tmp_path / "silent")
    )
    assert ours == theirs and len(ours) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "samples"), [(8, 3), (3, 3), (8, 20)])
def test_on_a_mesh_a_few_rows_have_the_values_that_they_have_on_one_device(rows, samples, caplog):
    """Four ways of the batch and two of the tensors. Rows are filled up to what the ways divide, without a word of replicated axes."""
    rng = np.random.default_rng(0)
    params, model = models.tiny_model(vocab_size=259)
    teacher, _ = models.tiny_model(seed=1, vocab_size=259)
    prompts = models.ragged_prompts(rng, rows=rows)
    batch = Batch([Example(i, f"prompt {i}", "", None) for i in range(rows)], *[jax.tree.map(np.asarray, prompts)] * 2, 0)
    rollout = models.ragged_rollout(rng, rows=rows)
    found = []
    for mesh in (parallel.make_mesh(), parallel.make_mesh(2, 2, 2)):
        log = sample_log(rows, mesh, model, samples=samples)
        with jax.set_mesh(mesh):
            completions = parallel.shard_batch(rollout, mesh)
            caplog.clear()
            placed = parallel.replicate((params, teacher), mesh)
            annotated = log.annotate(*placed, (batch.prompts, batch.teacher_prompts), completions)
        assert rows % 4 or "replicated" not in caplog.text
        found.append(list(log.lines(5, batch, annotated)))
    assert len(found[0]) == min(samples, rows)
    for one, many in zip(*found, strict=True):
        for name in VALUES[:4]:
            np.testing.assert_allclose(many.pop(name), one.pop(name), atol=1e-3)
        for ours, theirs in zip(many.pop("teacher_top"), one.pop("teacher_top"), strict=True):
            np.testing.assert_allclose([p for _, p in ours], [p for _, p in theirs], rtol=1e-3)
        assert many == one and one["step"] == 5


def sample_log(rows=4, mesh=None, model=None, steps=7, **settings):
    config = dataclasses.replace(Config(), steps=steps, log=Log(**settings))
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, batch_size=rows))
    return SampleLog(config, tokenizer.byte(), model, model, mesh or parallel.make_mesh())


def test_samples_are_due_at_the_first_the_last_and_the_steps_of_the_interval():
    assert [step for step in range(1, 8) if sample_log(samples_every=3).due(step)] == [1, 3, 6, 7]
    assert not any(sample_log(samples_every=0).due(step) for step in range(1, 8))


def test_numbers_are_short_and_what_is_not_finite_is_null():
    assert json.dumps(_short(np.array([-1.23456789, 1e-12 / 3, np.nan, -np.inf], np.float32))) == "[-1.2346, 3.3333e-13, null, null]"
