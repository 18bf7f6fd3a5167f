"""Errors in solutions: where they stand, what follows them, and what is left out."""

import numpy as np
import pytest

from opd_jax import injected
from opd_jax.data import pipeline
from opd_jax.data.tasks import Example
from opd_jax.data.tokenizer import byte

SOLUTIONS = ("abcdef", None, "ca", "", "fedcba987")
T = 8


def prompts_of(examples):
    texts, ids = [example.prompt for example in examples], [example.id for example in examples]
    return pipeline.encode_prompts(texts, byte(), ids=ids, max_prompt_length=32, overlong="refuse")[0]


def made(solutions=SOLUTIONS, seed=0):
    examples = [Example(i, "?" * (i + 1), solution) for i, solution in enumerate(solutions)]
    return injected.inject(prompts_of(examples), examples, byte(), max_new_tokens=T, seed=seed)


def test_one_token_is_another_and_what_follows_is_the_solution():
    """The last solution is cut off after 8 tokens, the empty one has its stop token alone."""
    golds = {i: [*SOLUTIONS[i].encode(), 257][:T] for i in (0, 2, 4)}
    places = {i: set() for i in golds}
    for seed in range(60):
        found = made(seed=seed)
        assert found.prompts.id_B.tolist() == [0, 2, 4]
        for row, (i, gold) in enumerate(golds.items()):
            start = found.prompts.tokens_BS[row][found.prompts.mask_BS[row]].tolist()
            rest = found.gold_NT[row][found.mask_NT[row]].tolist()
            place = len(gold) - len(rest) - 1
            assert start[: i + 1] == [ord("?")] * (i + 1) and start[i + 1 : -1] == gold[:place] and rest == gold[place + 1 :]
            assert len(rest) >= 1 and start[-1] != gold[place] and chr(start[-1]) in "abcdef987"
            assert found.prompts.mask_BS[row, -1] and found.mask_NT[row, 0]
            places[i].add(place)
    assert places == {0: set(range(6)), 2: {0, 1}, 4: set(range(7))}  # all of them: 60 draws miss one of 7 with a chance below 1e-3


def test_the_error_is_a_function_of_seed_and_id_alone():
    alone = injected.inject(
        prompts_of([Example(4, "?" * 5, "fedcba987")]), [Example(4, "?" * 5, "fedcba987")], byte(), max_new_tokens=T, seed=3
    )
    np.testing.assert_array_equal(alone.mask_NT[0], made(seed=3).mask_NT[2])
    assert any((made(seed=s).gold_NT != made(seed=3).gold_NT).any() for s in range(4))


@pytest.mark.parametrize("solutions", [(None, None), ("", None), ("aa", "a")], ids=["none", "stop tokens alone", "no other token"])
def test_nothing_is_left_where_no_solution_can_have_an_error(solutions):
    assert made(solutions) is None


def test_matches_are_counted_place_by_place_within_both_masks():
    gold_NT, mask_NT = np.array([[1, 2, 3, 0], [4, 5, 0, 0]]), np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    one = injected.Injected(None, gold_NT, mask_NT)
    tokens_NT = np.array([[1, 9, 3, 0], [4, 5, 0, 0]])
    np.testing.assert_array_equal(one.matches(tokens_NT, np.ones((2, 4), bool)), [2, 2])  # padding after the solution is no match
    np.testing.assert_array_equal(one.matches(tokens_NT, np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)), [1, 1])
