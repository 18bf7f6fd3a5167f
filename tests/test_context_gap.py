"""What a teacher makes of its context: against plain scoring, with and without use, in a run's first record."""

import dataclasses
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import config as config_lib
from opd_jax import context_gap, model_io, parallel, train
from opd_jax.data import contexts, tasks
from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.data.pipeline import Encoder
from opd_jax.data.tasks import Verdict
from opd_jax.model_io import LoadedModel
from opd_jax.models import config as model_config_lib
from opd_jax.models import transformer
from opd_jax.rewards import OwnJudge


@pytest.fixture(scope="module")
def teacher():
    tokenizer = tokenizer_lib.load("byte")
    fields = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "vocab_size": tokenizer.vocab_size}
    fields |= {"tie_word_embeddings": True, "initializer_range": 0.3, "eos_token_id": list(tokenizer.eos_ids)}
    fields |= {"pad_token_id": tokenizer.pad_id}
    config = model_config_lib.from_hf(fields, where="test")
    return LoadedModel(transformer.init(jax.random.key(0), config, mesh=parallel.make_mesh(1, 1, 1)), config, tokenizer)


def gap(teacher, reads="solution,feedback", batch_size=4, count=6):
    c = config_lib.default()
    c.task.name, c.task.level, c.task.skills, c.task.eval_size = "skills", 3, "reverse", count
    c.teacher.path = "student_init"
    c.context.privileged.reads, c.context.privileged.layout, c.eval.batch_size, c.rollout.max_new_tokens = reads, "compact", batch_size, 5
    parsed = config_lib.parse(c)
    encoder = Encoder(contexts.Reader(teacher.tokenizer), 100, "refuse")
    return context_gap.make(parsed, teacher, encoder, tasks.from_config(parsed), parallel.make_mesh(1, 1, 1))


def logp_of(teacher, prompt, solution):
    """Mean log-prob of the solution's tokens, its stop token included, by one plain pass over the whole text."""
    start, end = teacher.tokenizer.encode_prompt(prompt), [*teacher.tokenizer.encode(solution), teacher.tokenizer.eos_ids[0]]
    logits = transformer.apply(teacher.params, teacher.config, jnp.array([start + end]))[0]
    logp = jax.nn.log_softmax(logits)[len(start) - 1 : -1]
    return float(np.mean([logp[i, token] for i, token in enumerate(end)]))


def test_log_probs_are_those_of_the_texts(teacher):
    measured = gap(teacher)
    values = measured()
    plain = [logp_of(teacher, e.prompt, e.solution) for e in measured.examples]
    read = [logp_of(teacher, f"={e.solution}\n{e.prompt}", e.solution) for e in measured.examples]
    np.testing.assert_allclose(values["context/gold_logp"], np.mean(plain), rtol=1e-5)
    np.testing.assert_allclose(values["context/gold_logp/solution"], np.mean(read), rtol=1e-5)
    np.testing.assert_allclose(values["context/gold_gain/solution"], np.mean(np.subtract(read, plain)), rtol=1e-4)
    assert values["context/gold_gain_low/feedback"] <= values["context/gold_gain/feedback"] <= values["context/gold_gain_high/feedback"]
    assert 0 <= values["context/accuracy/solution"] <= 1


def test_rows_that_fill_a_batch_up_do_not_count(teacher):
    assert gap(teacher, batch_size=4)() == pytest.approx(gap(teacher, batch_size=6)(), rel=1e-5)


def test_a_model_without_use_for_its_context_is_warned_of(teacher, caplog):
    """A model of embeddings alone cannot see what stands before: its gain is 0 to rounding."""
    blind = dataclasses.replace(teacher, params=jax.tree.map(jnp.zeros_like, teacher.params) | {"embed": teacher.params["embed"]})
    with caplog.at_level(logging.WARNING):
        values = gap(blind)()
        context_gap.warn(values)
        assert abs(values["context/gold_gain/solution"]) < 1e-5
        assert "the teacher makes no use of context.privileged.reads = solution" in caplog.text
        caplog.clear()
        context_gap.warn({"context/gold_gain/solution": 1.0, "context/gold_gain_low/solution": 0.5, "context/gold_gain_high/solution": 1.5})
        assert not caplog.text


def test_feedback_is_that_of_whoever_judges_the_updates(teacher):
    """Of a task without a verifier too, and whatever the judge stumbles over."""

    def judge(example, text):
        if example.id % 2:
            raise KeyError(text)
        return Verdict(0.0, f"{text} is wrong")

    without = types.SimpleNamespace(verifiable=False, verify=None)
    measured = dataclasses.replace(gap(teacher, reads="feedback"), judge=OwnJudge(judge), task=without)
    texts = [measured._informed(example, "feedback") for example in measured.examples]
    odd = [example.id % 2 == 1 for example in measured.examples]
    assert [text is None for text in texts] == odd and {True, False} == set(odd)
    assert all(" is wrong\n" in text for text in texts if text)
    values = measured()
    assert "context/gold_gain/feedback" in values and "context/accuracy" not in values


def test_nothing_is_measured_where_nothing_is_read(teacher):
    assert gap(teacher, reads="") is None
    assert context_gap.make(config_lib.parse(config_lib.default()), None, None, None, None) is None


@pytest.mark.slow
def test_the_first_record_of_a_run_has_it_and_a_resumed_run_does_not_repeat_it(tmp_path):
    c = config_lib.load_config("configs/base.py:tiny")
    c.student.recipe, c.steps, c.checkpoint.every = "", 2, 1
    c.student.init.hidden_size = c.student.init.intermediate_size = 16
    records = list(train.run(c, tmp_path / "run"))
    assert {"context/gold_gain/solution", "context/gold_gain_low/solution", "context/accuracy"} <= records[0].keys()
    assert not any(name.startswith("context/gold") for record in records[1:] for name in record)
    again = list(train.run(c, tmp_path / "run"))
    assert again == [] and model_io.is_run_directory(tmp_path / "run")
