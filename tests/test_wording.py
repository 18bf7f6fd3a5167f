"""Words of reflection, distinct n-grams and repetition, by hand."""

import pytest

from opd_jax import wording


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so x = 3. Wait, no.", True),
        ("HMMM", True),
        ("let me double-check this", True),
        ("Let me recheck", True),
        ("let me re-check", True),
        ("I made a mistake", True),
        ("the waiter waited", False),
        ("let me see", False),
        ("hm", False),
        ("", False),
    ],
)
def test_reflection_is_seen_as_whole_words(text, expected):
    assert wording.reflects(text) == expected


def test_distinct_is_over_the_samples_of_a_prompt_together():
    assert wording.distinct([[1, 2, 3], [1, 2, 3]]) == 0.5  # the same twice
    assert wording.distinct([[1, 2], [2, 1]]) == 1.0
    assert wording.distinct([[1, 1, 1, 1]]) == pytest.approx(1 / 3)
    assert wording.distinct([[1, 2], [3, 4]], n=1) == 1.0  # no pair goes from one completion to the next
    assert wording.distinct([[1], []]) is None


def test_metrics_are_means_over_what_is_long_enough_without_stop_tokens():
    ids = [[5, 6, 5, 6, 5, 6, 5, 9], [5, 6, 9], [9], [7, 9]]  # 9 stops
    found = wording.metrics(ids, ["Wait!", "a", "b", "c"], samples=2, stop_ids=(9,))
    # 4-grams of the first completion: 5656 6565 5656 6565. Pairs of the first prompt: 56 or 65, seven; the second has none.
    assert found == {"eval/repetition": 0.5, "eval/distinct_2": pytest.approx(2 / 7), "eval/reflection": 0.25}
    assert wording.metrics([[9], [7, 9]], ["", ""], samples=1, stop_ids=(9,)) == {"eval/reflection": 0.0}
