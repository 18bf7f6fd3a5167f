"""Texts that the first teacher writes for itself to read: what it is asked, what stands in its prompt, what it costs, and resumed runs."""

import jax
import numpy as np
import pytest
from test_self_teachers import Even
from test_train import assert_same_student, sft_config, without_clock

from opd_jax import config as config_lib
from opd_jax import job, metrics, parallel, rollout, train
from opd_jax.data import privileged
from opd_jax.types import UserError


def test_what_a_teacher_is_asked():
    asked = lambda kind, layout="compact", attempt="41", solution="42": privileged.writing_prompt(
        kind, layout, "6*7=", attempt=attempt, solution=solution
    )
    assert asked("critique") == "=42\n6*7=41?" and asked("critique", solution=None) == "6*7=41?"
    assert asked("analysis") == "=42\n6*7=~" and asked("analysis", attempt=None) == "=42\n6*7=~"
    assert asked("critique", attempt=" ") is None and asked("analysis", solution=None) is None
    words = asked("critique", "words")
    assert words.index("6*7=") < words.index("41") < words.index("42") and "Say what is wrong" in words
    assert "known to be right" not in asked("critique", "words", solution=None)


def config_of(base, reads, **changes):
    c = sft_config()
    c.student.path, c.teacher.path, c.seed = str(base), "student_init", 5
    c.context.privileged.update(reads=reads, layout="compact", write_tokens=5, **changes)
    c.rollout.source, c.rollout.batch_size, c.rollout.group_size, c.rollout.max_new_tokens = "student", 4, 2, 3
    c.signal.divergence, c.teacher.update, c.teacher.rate = "reverse_kl", "ema", 0.5
    c.steps, c.learner.decay_steps, c.checkpoint.every, c.log.samples_every = 4, 4, 2, 0
    return c


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "run"
    list(train.run(sft_config(), workdir))
    return workdir


def text_rows(tokens_BS, mask_BS, tokenizer):
    return [tokenizer.decode(tokens[mask].tolist()) for tokens, mask in zip(np.asarray(tokens_BS), np.asarray(mask_BS), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("reads, temperature", [("critique", 0.0), ("solution,analysis", 1.0)])
def test_what_stands_in_the_teachers_prompt_is_what_sample_gives(reads, temperature, base, tmp_path):
    """With the texts asked for by hand, the keys of the step, and the parameters of the teacher as it is."""
    parsed = config_lib.parse(config_of(base, reads, write_temperature=temperature))
    one = job.setup(
        parsed, tmp_path / "run", make_model=None, make_store=None, progress=metrics.Progress(quiet=True), own_task=Even(), own_judge=None
    )
    tokenizer, kind = one.student.tokenizer, reads.split(",")[-1]
    with jax.set_mesh(one.mesh):
        prompts, scorer, step = one.pipeline.batch(3), one.scorer(one.state), 3
        completions = one.rollouts(one.policy(one.state.params), scorer, prompts, step)
        made = one.make_batch(prompts, completions, scorer, step=step)
        answers = one.make_batch.texts(completions)
        examples = [example for example in prompts.examples for _ in range(2)]
        asked = [f"{e.prompt}{a}?" if kind == "critique" else f"=ab\n{e.prompt}~" for e, a in zip(examples, answers, strict=True)]
        encoder = one.make_batch._writer.encoder
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0x7E87), privileged.WRITTEN.index(kind))
        rows, _ = encoder.encode(asked, prompts.prompts.id_B.tolist(), coarse=True)
        written = rollout.sample(
            scorer,
            one.teacher.config,
            parallel.shard_batch(rows, one.mesh),
            key=jax.random.fold_in(key, step),
            max_new_tokens=5,
            temperature=temperature,
            stop_ids=tokenizer.eos_ids,
        )
    texts = [text.strip() for text in text_rows(written.tokens_BT, written.mask_BT, tokenizer)]
    has = [bool(answer.strip()) for answer in answers] if kind == "critique" else [True] * 4
    mark, before = ("?", "") if kind == "critique" else ("~", "=ab\n")
    expected = [
        f"{before}{mark}{text}\n{e.prompt}" if text and there else f"{before}{e.prompt}"
        for text, there, e in zip(texts, has, examples, strict=True)
    ]
    found = text_rows(made.teacher_prompts.tokens_BS, made.teacher_prompts.mask_BS, tokenizer)
    assert found == expected and any(mark in text for text in found)
    assert made.written == (int(rows.mask_BS.sum()), int(np.asarray(written.mask_BT).sum()))
    assert made.counts["context/written_length"] == made.written[1] / 4


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_counts_what_was_written(base, tmp_path):
    c = config_of(base, "critique,analysis", write_temperature=1.0)
    for record in train.run(c, tmp_path / "left", task=Even()):
        if record["step"] == 3:
            break
    list(train.run(c, tmp_path / "left", task=Even()))
    whole = list(train.run(c, tmp_path / "whole", task=Even()))
    assert without_clock(metrics.read(tmp_path / "left" / "metrics.jsonl")) == without_clock(whole)
    assert_same_student(tmp_path / "left", tmp_path / "whole")
    assert set(whole[-1]) <= set(metrics.GLOSSARY) and np.isfinite(whole[-1]["train/loss"])
    written = sum(record["context/written_length"] * 2 * 4 for record in whole)  # two kinds, four rows
    assert whole[-1]["cost/generated_tokens_total"] == pytest.approx(whole[-1]["rollout/tokens_total"] + written) and written > 0


@pytest.mark.slow
def test_a_text_longer_than_the_teachers_context_is_refused(base, tmp_path):
    c = config_of(base, "analysis")
    c.context.privileged.write_tokens = 256
    with pytest.raises(UserError, match="context.privileged.write_tokens = 256 must be below the teacher's context, 256 tokens"):
        list(train.run(c, tmp_path / "run", task=Even()))
