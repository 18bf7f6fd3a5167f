"""A batch is a function of seed and step; every row has a draw of its own; padding, truncation."""

import numpy as np
import pytest

from opd_jax.data import pipeline as lib
from opd_jax.data.tasks import Example
from opd_jax.data.tokenizer import byte
from opd_jax.types import UserError


def examples(count, length=lambda i: 3 + i % 5):
    return [Example(i, chr(97 + i % 26) * length(i)) for i in range(count)]


def make(data=None, **changes):
    settings = {"prompts_per_step": 4, "group_size": 2, "seed": 0}
    encoder = lib.Encoder(byte(), changes.pop("max_prompt_length", 32), changes.pop("overlong", "refuse"))
    return lib.Pipeline(examples(20) if data is None else data, encoder, **(settings | changes))


def equal(a, b):
    return a.examples == b.examples and all(
        np.array_equal(x, y) for x, y in zip((a.prompts.tokens_BS, a.prompts.id_B), (b.prompts.tokens_BS, b.prompts.id_B), strict=True)
    )


def test_a_batch_is_a_function_of_seed_and_step():
    one, two = make(), make()
    late = two.batch(7)
    assert equal(one.batch(3), two.batch(3)) and equal(one.batch(7), late)
    assert not equal(one.batch(3), make(seed=1).batch(3))


def test_an_epoch_sees_every_prompt_once_in_an_order_of_its_own():
    pipeline = make()
    epochs = [[e.id for step in range(start, start + 5) for e in pipeline.batch(step).examples] for start in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(20))


@pytest.mark.parametrize("count", [1, 3, 20])
def test_rows_of_a_step_have_different_ids_even_when_prompts_repeat(count):
    batch = make(examples(count), prompts_per_step=8, group_size=3).batch(0)
    assert len(set(batch.prompts.id_B.tolist())) == 24 and batch.prompts.id_B.dtype == np.uint32


def test_groups_stand_together():
    batch = make(group_size=3).batch(0)
    for p, example in enumerate(batch.examples):
        for g in range(3):
            row = 3 * p + g
            assert bytes(batch.prompts.tokens_BS[row][batch.prompts.mask_BS[row]].tolist()).decode() == example.prompt
            assert batch.prompts.id_B[row] == example.id * 3 + g


def test_prompts_are_padded_on_the_left_to_a_bucket():
    prompts, _ = lib.encode_prompts(["ab", "c" * 17], byte(), ids=[5, 2**32 + 1], max_prompt_length=32, overlong="refuse")
    assert prompts.tokens_BS.shape == (2, 32) and prompts.mask_BS[:, -1].all()
    assert prompts.mask_BS.sum(1).tolist() == [2, 17]
    assert prompts.tokens_BS[0, -2:].tolist() == [97, 98] and set(prompts.tokens_BS[0, :-2]) == {byte().pad_id}
    assert prompts.id_B.tolist() == [5, 1]


def test_overlong_prompts_are_refused_before_the_first_step_or_truncated_and_counted():
    data = examples(4, length=lambda i: 40 if i == 2 else 5)
    with pytest.raises(UserError, match="a prompt has 40 tokens, at most 32 fit.*rollout.overlong=truncate"):
        make(data)
    batch = make(data, overlong="truncate").batch(0)
    assert batch.truncated == 1 and batch.prompts.mask_BS.sum(1).max() == 32
    assert lib.encode_prompt("head" + "t" * 32, byte(), max_prompt_length=32, overlong="truncate") == ([116] * 32, True)


def test_empty_data_and_empty_prompts_are_refused():
    with pytest.raises(UserError, match="the task has no training examples"):
        make([])
    with pytest.raises(UserError, match="has no tokens, and the tokenizer has no beginning-of-sequence token"):
        make([Example(0, "")])


def test_completions_end_with_the_stop_token_or_are_cut():
    tokens_BT, mask_BT, stopped_B = lib.encode_completions(["ab", "abcdef", ""], byte(), max_new_tokens=4)
    assert tokens_BT.tolist() == [[97, 98, 257, 258], [97, 98, 99, 100], [257, 258, 258, 258]]
    assert mask_BT.sum(1).tolist() == [3, 4, 1] and stopped_B.tolist() == [True, False, True]


@pytest.mark.parametrize("length, width", [(1, 16), (16, 16), (17, 32), (40, 64), (65, 128), (129, 144), (140, 144)])
def test_coarse_widths_are_few(length, width):
    """Powers of two up to the longest prompt allowed, whatever other steps had."""
    encoder = lib.Encoder(byte(), 140, "refuse")
    prompts, _ = encoder.encode(["a" * length, "b"], [0, 1], coarse=True)
    fine, _ = encoder.encode(["a" * length, "b"], [0, 1])
    assert prompts.tokens_BS.shape == (2, width) and prompts.mask_BS.sum(1).tolist() == fine.mask_BS.sum(1).tolist()
    assert (prompts.tokens_BS[0][prompts.mask_BS[0]] == fine.tokens_BS[0][fine.mask_BS[0]]).all()
