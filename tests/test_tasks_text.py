"""text: similarities by the libraries, against their corpus functions and values worked out by hand."""

import json
import math

import pytest

from opd_jax import config as config_lib
from opd_jax.data import tasks
from opd_jax.data.tasks import text
from opd_jax.types import UserError

REFERENCE = "the cat sat on the mat"


def make(tmp_path, metric, lines=({"prompt": "p", "answer": REFERENCE},)):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tasks.make("text", path=str(path), metric=metric, level=1, train_size=0, eval_size=0, seed=0)


def reward(task, completion, index=0):
    return task.verify(task.examples("train")[index], completion).reward


def test_rouge_by_hand(tmp_path):
    """ROUGE-L of "the cat on a mat": the longest common subsequence is the cat on mat, 4 of 5 and of 6 words; F1 = 2*4 / (5+6)."""
    task = make(tmp_path, "rouge")
    assert reward(task, "the cat on a mat") == pytest.approx(8 / 11)
    assert reward(task, "The CAT, on a mat!") == pytest.approx(8 / 11)  # lower case, no punctuation
    assert reward(task, "the cats sat on the mats") == pytest.approx(4 / 6)  # no stemmer
    assert reward(task, "dogs bark") == reward(task, "") == 0.0


def test_bleu_by_hand(tmp_path):
    """ "the cat sat on a mat": 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; equal lengths, so no brevity penalty."""
    task = make(tmp_path, "bleu")
    assert reward(task, "the cat sat on a mat") == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # effective order: "the cat" has no triples, so words and pairs alone count; the brevity penalty is exp(1 - 6 / 2)
    assert reward(task, "the cat") == pytest.approx(math.exp(1 - 6 / 2))
    assert reward(task, "dogs bark") == pytest.approx(0.0, abs=1e-9)


def test_against_the_corpus_functions(tmp_path):
    """One sentence is a corpus of one; where all four orders are there, effective order changes nothing."""
    import sacrebleu

    task = make(tmp_path, "bleu")
    for completion in ("the cat sat on the red mat", "a cat sat on the mat today", REFERENCE):
        assert reward(task, completion) == pytest.approx(min(1.0, sacrebleu.corpus_bleu([completion], [[REFERENCE]]).score / 100))


@pytest.mark.parametrize("metric", ["rouge", "bleu"])
def test_equal_text_is_a_success(tmp_path, metric):
    answers = [REFERENCE, "東京", "🙂", " padded\n", "one"]
    task = make(tmp_path, metric, [{"prompt": "p", "answer": answer} for answer in answers])
    for index, answer in enumerate(answers):
        verdict = task.verify(task.examples("train")[index], answer)
        assert verdict == tasks.Verdict(1.0)
    assert 0 < reward(task, "the cat sat") < 1
    assert task.verify(task.examples("train")[0], "the mat").feedback.startswith(f"{metric} 0.")


def test_solutions_and_broken_lines(tmp_path):
    task = make(tmp_path, "rouge", [{"prompt": "p", "answer": "a", "solution": "b"}, {"prompt": "p", "answer": "a"}])
    assert [example.solution for example in task.examples("train")] == ["b", "a"]
    for line in ({"prompt": "p"}, {"answer": "a"}, {"prompt": "p", "answer": ""}):
        with pytest.raises(UserError, match="line 1: has no `"):
            make(tmp_path, "rouge", [line])


def test_metrics_are_those_of_the_config():
    for metric in text.METRICS:
        c = config_lib.default()
        c.task.metric = metric
        config_lib.parse(c)
    c.task.metric = "rogue"
    with pytest.raises(UserError, match="task.metric = 'rogue' is not known; valid: rouge, bleu; did you mean rouge"):
        config_lib.parse(c)
