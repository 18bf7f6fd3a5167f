"""Intervals, what is read off samples, and recovery after an error against a model of one line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import evaluate, parallel
from opd_jax.data import pipeline
from opd_jax.data.tasks import Example
from opd_jax.data.tasks.jsonl import Jsonl
from opd_jax.data.tokenizer import byte
from opd_jax.model_io import LoadedModel
from opd_jax.rollout import from_completions
from opd_jax.types import UserError


def test_interval_of_a_mean_covers_at_the_stated_rate():
    """Bootstrap over 60 prompts: 95% nominal; n = 200 repetitions, so 3 standard errors are 4.6%."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        result = evaluate.with_interval("x", rng.normal(size=60))
        hits += result["x_low"] <= 0.0 <= result["x_high"]
    assert abs(hits / 200 - 0.95) < 0.046


def test_interval_of_greedy_accuracy_is_wilsons():
    result = evaluate.proportion("x", np.array([1.0] * 20))
    assert result["x"] == 1.0 and result["x_low"] == pytest.approx(20 / (20 + 1.959964**2), rel=1e-6) and result["x_high"] == 1.0


def test_ratio_is_per_token_not_per_sequence():
    result = evaluate.ratio_with_interval("x", np.array([1.0, 9.0]), np.array([1.0, 3.0]))
    assert result["x"] == pytest.approx(2.5)
    assert result["x_low"] == pytest.approx(1.0) and result["x_high"] == pytest.approx(3.0)


T = 6
EXAMPLES = (
    Example(0, "a=", "12341", "12341", tag="sums"),
    Example(1, "bc=", None, "x", tag="words"),
    Example(2, "d=", "332", "332", tag="sums"),
    Example(3, "eee=", "414", "414"),
)


STOP = 257
WRITES = (*b"1243", STOP)


@dataclasses.dataclass(frozen=True)
class Adder:
    """Writes what the sum of all tokens so far says. Its context is that of the widest prompt and its completion, no more."""

    vocab_size: int = 259
    max_position_embeddings: int = 4 + T
    pad_token_id: int = 258
    valid_vocab_size: int | None = None

    def prefill(self, params, tokens_BS, mask_BS, *, cache_length):
        return self.decode_step(params, jnp.where(mask_BS, tokens_BS, 0).sum(1), jnp.int32(0))

    def decode_step(self, params, tokens_B, cache):
        state_B = cache + tokens_B
        return jax.nn.one_hot(jnp.asarray(WRITES)[state_B % len(WRITES)], 259), state_B


@pytest.fixture(scope="module")
def evaluator():
    """2 rows at once, so that one of 3 stands there twice."""
    student = LoadedModel(params={}, config=Adder(), tokenizer=byte())
    return evaluate.Evaluator(
        student=student,
        teacher=None,
        task=Jsonl((), (), "", verifiable=True),
        examples=EXAMPLES,
        samples=3,
        batch_size=2,
        max_new_tokens=T,
        student_prompts=pipeline.Encoder(byte(), 16, "refuse"),
        teacher_prompts=None,
        seed=14,
        mesh=parallel.make_mesh(1, 1, 1),
        inject_error=True,
    )


def test_recovery_is_the_share_of_the_solution_that_greedy_decoding_gives(evaluator):
    made, right = evaluator._injected, [0, 0, 0]
    for row in range(3):
        state = int(made.prompts.tokens_BS[row][made.prompts.mask_BS[row]].sum())
        for token in made.gold_NT[row][made.mask_NT[row]].tolist():
            written = WRITES[state % len(WRITES)]
            right[row], state = right[row] + (written == token), state + written
            if written == STOP:  # what was not written is not right
                break
    assert sorted(right) == [0, 1, 2] and made.mask_NT.sum(1).tolist() == [4, 3, 2]  # rows that can be told apart
    with jax.set_mesh(evaluator.mesh):
        found = evaluator._recovery({})
    assert found["eval/recovery"] == pytest.approx(3 / 9)
    assert found["eval/recovery_low"] <= 3 / 9 <= found["eval/recovery_high"]


def rollouts(evaluator, texts):
    """As _sample gives them: batches of 2 rows, the last filled up."""
    batches = []
    for start in range(0, len(texts), 2):
        rows = (texts[start : start + 2] * 2)[:2]
        arrays = pipeline.encode_completions(rows, evaluator.student.tokenizer, max_new_tokens=T)
        batches.append(((None, None), from_completions(*arrays, np.arange(2)), min(2, len(texts) - start)))
    return batches


def test_samples_are_read_by_prompt_and_by_domain(evaluator):
    texts = ["12341", "99", "99", "x", "x", "y", "332", " ", "1", "wait", "a", "b"]
    evaluator = dataclasses.replace(evaluator, samples=3)
    found = evaluator._read_samples(rollouts(evaluator, texts))
    assert found["eval/sampled_accuracy"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 3 + 0) / 4) and found["eval/pass_at_k"] == 0.75
    assert found["eval/maj_at_k"] == pytest.approx((0 + 1 + 1 / 2 + 0) / 4)  # the blank completion does not vote
    domains = {name: value for name, value in found.items() if name.startswith("eval/sampled_accuracy/")}
    assert domains == {"eval/sampled_accuracy/sums": pytest.approx(1 / 3), "eval/sampled_accuracy/words": pytest.approx(2 / 3)}
    assert found["eval/reflection"] == pytest.approx(1 / 12)
    assert found["eval/distinct_2"] == pytest.approx((5 / 6 + 1 + 1) / 3)  # the second prompt's completions have no pair
    odd = dataclasses.replace(evaluator, examples=EXAMPLES[:3])  # 9 completions: the last batch has a row that does not count
    assert odd._read_samples(rollouts(odd, texts[:9]))["eval/sampled_accuracy"] == pytest.approx(4 / 9)


def test_an_error_needs_a_solution(evaluator):
    without = dataclasses.replace(evaluator, examples=[Example(0, "a=", None, "x")])
    with pytest.raises(UserError, match="eval.inject_error = True needs solutions .* the 1 held-out examples have none"):
        without.check()
    dataclasses.replace(without, inject_error=False).check()
    evaluator.check()
