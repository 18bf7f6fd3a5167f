"""Whole runs with a teacher bank, privileged prompts and rewards: resumed bit for bit, refused before any work."""

import json

import jax
import numpy as np
import pytest
from test_train import assert_same_student, sft_config, without_clock

from opd_jax import checkpoint, metrics, train
from opd_jax import config as config_lib
from opd_jax.data.tasks import Example, Verdict
from opd_jax.types import UserError

pytestmark = pytest.mark.slow


class Even:
    """A task that a model of random weights solves every other time: a completion of an even number of characters."""

    name, verifiable, digest = "even", True, ""

    def examples(self, split):
        return [Example(i, f"{i}=", solution="ab") for i in range(20)]

    def verify(self, example, text):
        return Verdict(1.0) if len(text) % 2 == 0 else Verdict(0.0, f"{len(text)} is odd")


def run(config, workdir):
    return train.run(config, workdir, task=Even())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "run"
    list(train.run(sft_config(), workdir))
    return workdir


def sdpo(base):
    """Groups, siblings and feedback, an average as the teacher, rewards beside it."""
    c = sft_config()
    c.student.path, c.teacher.path = str(base), "student_init"
    c.rollout.max_new_tokens, c.seed = 3, 5
    c.teacher.update, c.teacher.rate = "ema", 0.2
    c.context.privileged.reads, c.context.privileged.layout = "sibling,feedback", "compact"
    c.rollout.source, c.rollout.batch_size, c.rollout.group_size = "student", 8, 4
    c.signal.divergence, c.signal.support, c.signal.tail, c.signal.k = "reverse_kl", "topk_student", "bucket", 4
    c.reward.weight, c.reward.advantage = 0.5, "grpo"
    c.learner.microbatches, c.steps, c.learner.decay_steps = 2, 5, 5
    c.checkpoint.every, c.log.samples_every = 2, 2
    return c


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, list(run(sdpo(base), workdir))


def test_a_run_of_all_parts_resumes_bit_for_bit(whole, base, tmp_path):
    for leave_after in (1, 3):
        workdir = tmp_path / f"left_{leave_after}"
        for record in run(sdpo(base), workdir):
            if record["step"] == leave_after:
                break
        list(run(sdpo(base), workdir))
        assert without_clock(metrics.read(workdir / "metrics.jsonl")) == without_clock(whole[1])
        assert_same_student(workdir, whole[0])
        assert (workdir / "samples.jsonl").read_text() == (whole[0] / "samples.jsonl").read_text()


def test_records_tell_of_contexts_and_rewards(whole):
    for record in whole[1][1:]:
        assert set(record) <= set(metrics.GLOSSARY)
        assert record["train/loss"] == pytest.approx(record["train/loss_distillation"] + record["train/loss_reward"], rel=1e-5, abs=1e-7)
        assert 0 < record["context/present"] <= 1 and record["reward/verifier_errors"] == 0
    assert any(record["rollout/reward"] > 0 for record in whole[1][1:])


def test_what_follows_the_student_is_in_the_checkpoint_and_what_is_frozen_is_not(whole, base):
    saved = checkpoint._saved(whole[0] / "checkpoints" / "5" / "state")
    assert jax.tree.structure(saved["kept"]) == jax.tree.structure(saved["params"])
    c = sdpo(base)
    c.teacher.update = "frozen"
    list(run(c, whole[0].parent / "frozen"))
    assert not checkpoint._saved(whole[0].parent / "frozen" / "checkpoints" / "5" / "state").get("kept")


def test_an_adapter_has_an_average_of_its_own(base, tmp_path):
    c = sdpo(base)
    c.student.lora.rank = 2
    left = tmp_path / "left"
    for record in run(c, left):
        if record["step"] == 3:
            break
    list(run(c, left))
    records = list(run(c, tmp_path / "whole"))
    assert without_clock(metrics.read(left / "metrics.jsonl")) == without_clock(records)
    assert_same_student(left, tmp_path / "whole")


@pytest.mark.parametrize("update", ["frozen", "live", "sync", "trust_region"])
@pytest.mark.parametrize("reads", ["", "solution"])
def test_other_self_teachers_run(update, reads, base, tmp_path):
    """Where student and teacher begin as one and read the same there is nothing to learn, and nothing moves."""
    c = sdpo(base)
    c.teacher.update, c.steps = update, 2
    c.reward.weight, c.context.privileged.reads = 0.0, reads
    c.signal.support, c.signal.tail, c.signal.k = "full", "renormalise", 0
    loss = list(run(c, tmp_path / "run"))[-1]["train/loss"]
    assert loss > 1e-5 if reads else abs(loss) < 1e-6, loss


def test_a_changed_layout_file_is_noticed(base, tmp_path):
    c, layout = sdpo(base), tmp_path / "layout.jinja"
    layout.write_text("{{ sibling or feedback }} {{ prompt }} {{ feedback or '' }}")
    c.context.privileged.layout, c.steps = str(layout), 1
    list(run(c, tmp_path / "run"))
    assert list(run(c, tmp_path / "run")) == []
    layout.write_text("{{ sibling or feedback }}, {{ prompt }} {{ feedback or '' }}")
    with pytest.raises(UserError, match="a file of context.privileged.layout"):
        list(run(c, tmp_path / "run"))


def merging(base, other):
    c = sft_config()
    c.student.path = str(base)
    c.task.name, c.task.skills, c.task.level, c.rollout.max_new_tokens = "skills", "chain,reverse", 2, 3
    c.teacher.members.chain = config_lib.member(path=str(base))
    c.teacher.members.other = config_lib.member(path=str(other), tag="reverse")
    c.rollout.source, c.signal.divergence, c.steps, c.rollout.group_size = "student", "reverse_kl", 2, 2
    return c


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("other") / "run"
    c = sft_config()
    c.student.init.hidden_size = 24
    list(train.run(c, workdir))
    return workdir


@pytest.mark.parametrize("combine", ["route", "geometric", "arithmetic"])
def test_several_teachers(combine, base, other, tmp_path):
    c = merging(base, other)
    c.teacher.combine = combine
    records = list(train.run(c, tmp_path / "run"))
    assert np.isfinite(records[-1]["train/loss"])
    assert list(train.run(c, tmp_path / "run")) == []
    assert json.loads((tmp_path / "run" / "config.json").read_text())["teacher"]["members"]["other"]["tag"] == "reverse"
    c.teacher.members.other.weight = 2.0
    with pytest.raises(UserError, match="teacher.members.other.weight: 1.0 -> 2.0"):
        list(train.run(c, tmp_path / "run"))


def test_an_unknown_tag_is_refused_before_any_work(base, other, tmp_path):
    c = merging(base, other)
    c.teacher.members.other.tag = "sort"
    with pytest.raises(UserError, match="no member has the tag 'reverse'"):
        list(train.run(c, tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_extrapolation_beyond_the_teacher_and_a_regulariser(base, other, tmp_path):
    c = merging(base, other)
    c.extrapolation.scale, c.regulariser.kl, c.regulariser.entropy = 1.25, 0.1, 0.01
    records = list(train.run(c, tmp_path / "run"))
    assert {"train/loss_distillation", "train/loss_reference", "train/loss_entropy"} <= set(records[-1])
    again = merging(base, other)
    again.extrapolation.scale, again.reference.path = 1.0, str(tmp_path / "nowhere")  # scale 1 does not ask for it
    assert np.isfinite(list(train.run(again, tmp_path / "plain"))[-1]["train/loss"])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reward.advantage": "grppo"}, "did you mean grpo?"),
        ({"rollout.source": "teacher", "context.privileged.reads": ""}, "must be 'student'"),
        ({"context.privileged.reads": "sibbling"}, "did you mean sibling?"),
        ({"rollout.group_size": 1, "reward.weight": 0.0}, "needs rollout.group_size of at least 2"),
        ({"task.name": "unconditional"}, "verifier"),
        ({"masking.solved": "no"}, "masking.solved = 'no' is not known"),
        ({"signal.weight": 0.0, "reward.weight": 0.0}, "leaves no loss"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(changes, words, base, tmp_path):
    with pytest.raises(UserError) as error:
        c = sdpo(base)
        for name, value in changes.items():
            block = c
            *path, last = name.split(".")
            for one in path:
                block = block[one]
            block[last] = value
        list(train.run(c, tmp_path / "run", task=None if "task.name" in changes else Even()))
    assert words in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()
