"""Open-ended text: rewards from 0 to 1, equal to what the metrics' libraries and a count by hand say."""

import json

import pytest
import sacrebleu

from opd_jax import config as config_lib
from opd_jax.data import tasks
from opd_jax.data.tasks import Example
from opd_jax.types import UserError

CAT = "the cat sat on the mat"


def make(tmp_path, metric, rows=({"prompt": "a", "answer": CAT}, {"prompt": "b", "answer": "x", "solution": "y"})):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return tasks.make("text", path=str(path), level=2, metric=metric, train_size=0, eval_size=1, seed=0)


def reward(task, text, answer=CAT):
    return task.verify(Example(0, "", answer=answer), text).reward


def test_rouge_is_the_f1_of_the_longest_common_subsequence(tmp_path):
    task = make(tmp_path, "rouge")
    # "the cat on mat" has 4 words, all of them in order in the reference's 6: P = 1, R = 4 / 6.
    assert reward(task, "the cat on mat") == pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6))
    # In another order the subsequence is shorter: "the mat" of 6 and 5 words.
    assert reward(task, "mat on sat the cat") == pytest.approx(2 * (2 / 5) * (2 / 6) / (2 / 5 + 2 / 6))
    assert reward(task, "a dog ran") == 0 and reward(task, "") == 0
    assert reward(task, "the cats sat on the mats") == 1  # stemmed


@pytest.mark.parametrize("text", ["the cat sat on a mat", "the cat", "a dog ran", "", "on the mat sat the cat today"])
def test_bleu_is_that_of_sacrebleu(tmp_path, text):
    expected = sacrebleu.sentence_bleu(text, [CAT]).score / 100
    assert reward(make(tmp_path, "bleu"), text) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", ["rouge", "bleu"])
def test_equal_texts_have_1_and_others_stay_within_0_and_1(tmp_path, metric):
    task = make(tmp_path, metric)
    for answer in (CAT, "x", "東京", "!", ""):
        assert reward(task, f" {answer}\n", answer) == 1
    for text in ("東京", "\x00", "a " * 1000):
        assert 0 <= reward(task, text) < 1


def test_solutions_default_to_the_answer(tmp_path):
    task = make(tmp_path, "bleu")
    assert task.examples("train")[0].solution == CAT and task.examples("eval")[0].solution == "y"
    assert task.verify(task.examples("train")[0], "the cat").feedback.startswith("bleu 0.1")


def test_unknown_metrics_are_refused():
    c = config_lib.default()
    c.task.metric = "rogue"
    with pytest.raises(UserError, match="task.metric = 'rogue' is not known; valid: rouge, bleu; did you mean rouge?"):
        config_lib.parse(c)
