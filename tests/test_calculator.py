"""The calculator, its task, and how a completion falls into turns: hostile calls are refused, solutions verify."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax import config as config_lib
from opd_jax import environments
from opd_jax.config import ConfigError
from opd_jax.data import pipeline, tasks
from opd_jax.data.tasks.calculator import CalculatorTask, worked
from opd_jax.data.tokenizer import byte
from opd_jax.environments import Observation, calculator
from opd_jax.types import UserError

TOOL = calculator.Calculator()


def task(level=3):
    return CalculatorTask(level=level, train_size=0, eval_size=16, seed=0)


@pytest.mark.parametrize(
    "turn, text",
    [
        ("<12+7>", "19;"),
        ("<2+3*4>", "14;"),
        ("<2*3-4*5>", "-14;"),
        ("<-14+4>", "-10;"),
        ("<007+1>", "8;"),
        ("words before < and <1+1>", "2;"),
        ("<5>", "5;"),
    ],
)
def test_what_it_answers(turn, text):
    assert TOOL.answer(turn) == Observation(text)


HOSTILE = [
    "<>",
    ">",
    "1+1>",
    "<1+>",
    "<+1>",
    "<1++1>",
    "<--1>",
    "<1 + 1>",
    "<(1+1)>",
    "<1/0>",
    "<2**9>",
    "<9**9**9**9>",
    "<1_000>",
    "<1e9>",
    "<0x10>",
    "<1.5>",
    "<٣+٤>",  # digits of another script
    "<²+1>",
    "<1+1\n>",
    "<\x001>",
    "<__import__('os').system('false')>",
    f"<{'9' * 19}>",  # too long a number
    f"<{'9' * 18}*10>",  # too large a value
    f"<{'+'.join('1' * 9)}>",  # too many numbers
    "<" + "9" * 100_000 + ">",
    "<" * 10_000 + ">",
]


@pytest.mark.parametrize("turn", HOSTILE, ids=lambda turn: ascii(turn)[:24])
def test_what_it_refuses(turn):
    assert TOOL.answer(turn) == Observation("?;", error=True)


@given(st.text("<>0123456789+-*;? a", max_size=40))
def test_nothing_makes_it_raise_and_answers_hold_no_mark(text):
    found = TOOL.answer(text + ">")
    assert found.text.endswith(";") and ">" not in found.text and len(found.text) <= calculator.MAX_DIGITS + 2


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_values_are_pythons(numbers, rng: random.Random):
    expression = "".join(f"{rng.choice('+-*')}{n}" for n in numbers)[1:]
    value = eval(expression)  # of digits and + - * that the test has made
    assert calculator.evaluate(expression) == (value if abs(value) < 10**18 else None)


# ---- turns


@given(st.lists(st.sampled_from(["<1+1>", "2;", "<2*", "9>", "?;", ";", "7", "<3>", "3;"]), max_size=10).map("".join))
def test_turns_and_the_answers_that_follow_are_the_text(text):
    found = environments.turns(TOOL, text)
    assert "".join(turn.written + (turn.observation.text if turn.answered else "") for turn in found) == text
    assert all((turn.observation is None) == (not turn.written.endswith(">")) for turn in found)
    assert sum(turn.observation is not None for turn in found) >= text.count(">") - sum(turn.answered for turn in found)


def test_turns_by_hand():
    found = environments.turns(TOOL, "<1+1>2;<x>?;3")
    assert [(turn.written, turn.answered) for turn in found] == [("<1+1>", True), ("<x>", True), ("3", False)]
    assert [turn.written for turn in environments.turns(TOOL, "<1+1>2;")] == ["<1+1>", ""]
    assert [(turn.written, turn.answered) for turn in environments.turns(TOOL, "<1+1>3;")] == [("<1+1>", False), ("3;", False)]
    assert [turn.written for turn in environments.turns(TOOL, "<1+1>")] == ["<1+1>"]
    assert environments.turns(TOOL, "") == [environments.Turn("", None)]
    assert environments.counts(TOOL, ["<1+1>2;<x>?;3", "4"]) == (2.0, 0.5)


# ---- the task


def test_a_solution_by_hand():
    assert worked("37+58+21") == "<37+58>95;<95+21>116;116"


@pytest.mark.parametrize("level", [2, 6])
def test_solutions_verify_and_others_do_not(level):
    for split in ("train", "eval"):
        for index in range(8):
            example = task(level).examples(split)[index]
            assert task(level).verify(example, example.solution).reward == 1.0
            assert int(example.answer) == sum(map(int, example.prompt.removesuffix("=").split("+")))
            assert len(environments.turns(TOOL, example.solution)) == level
            wrong = f"{example.solution[:-1]}{(int(example.solution[-1]) + 1) % 10}"
            verdict = task(level).verify(example, wrong)
            assert verdict.reward == 0.0 and verdict.well_formed and f"it should be '{example.answer}'" in verdict.feedback


@pytest.mark.parametrize(
    "text, reward, well_formed",
    [
        ("116", 1.0, True),  # found without a call
        ("<37+58>95;116", 1.0, True),
        ("<37+>?;116", 1.0, False),  # right, but with a call that is none
        ("<37+58>95;<95+21>116;", 0.0, False),  # no number in the end
        ("<37+58>95;<95+21>", 0.0, False),  # the last call is not answered
        ("<37+58>95;<95+21>116;116 ", 0.0, False),
        ("<37+58>95;<95+21>116;-116", 0.0, False),
        ("<37+58>95;<95+21>116;117", 0.0, True),
        ("", 0.0, False),
    ],
)
def test_verdicts(text, reward, well_formed):
    example = tasks.Example(0, "37+58+21=", worked("37+58+21"), "116")
    verdict = task().verify(example, text)
    assert (verdict.reward, verdict.well_formed) == (reward, well_formed) and bool(verdict.feedback) == (not (reward and well_formed))


def test_votes_are_the_number_in_the_end():
    assert [task().vote(text) for text in ("<1+1>2;2", "<1+1>2;", "2x")] == ["2", None, None]


def test_levels_and_splits():
    with pytest.raises(UserError, match="task.level = 7 must be from 2 to 6 numbers for task.name = 'calculator'"):
        task(7)
    prompts = {split: {example.prompt for example in (task(2).examples(split)[i] for i in range(16))} for split in ("train", "eval")}
    assert not prompts["train"] & prompts["eval"]
    assert task(2).example("train", 3).prompt == task(2).example("train", 3).prompt


# ---- solutions as completions


def test_answers_of_a_solution_stand_there_and_are_not_learnt_from():
    text = worked("37+58+21")
    tokens_BT, mask_BT, stopped_B, present_BT = pipeline.encode_turns([text, "116"], TOOL, byte(), max_new_tokens=30)
    assert byte().decode(tokens_BT[0][present_BT[0]].tolist()) == text and stopped_B.all()
    assert byte().decode(tokens_BT[0][mask_BT[0]].tolist()) == "<37+58><95+21>116"
    assert byte().decode(tokens_BT[0][present_BT[0] & ~mask_BT[0]].tolist()) == "95;116;"
    assert tokens_BT[0][mask_BT[0]][-1] == byte().eos_ids[0]
    plain = pipeline.encode_completions(["116"], byte(), max_new_tokens=30)
    for ours, theirs in zip((tokens_BT[1:], mask_BT[1:], stopped_B[1:]), plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_solution_is_cut_off_within_an_answer():
    tokens_BT, mask_BT, stopped_B, present_BT = pipeline.encode_turns([worked("37+58")], TOOL, byte(), max_new_tokens=8)
    assert present_BT.sum() == 8 and mask_BT.sum() == 7 and not stopped_B.any() and chr(tokens_BT[0, 7]) == "9"


def test_a_solution_with_another_answer_is_refused():
    with pytest.raises(UserError, match="call '<37.58>' that is not followed by the answer of the task's environment, '95;'"):
        pipeline.encode_turns(["<37+58>96;96"], TOOL, byte(), max_new_tokens=30)


# ---- what a config may ask


@pytest.mark.parametrize(
    "rollout, message",
    [
        ({"max_turns": 0}, "rollout.max_turns = 0 must be at least 1"),
        (
            {"max_turns": 3, "source": "dagger"},
            "rollout.max_turns = 3 must be 1, because rollout.source = 'dagger' has two writers in a turn",
        ),
        ({"max_turns": 3, "source": "corrected"}, "rollout.source = 'corrected' has two writers in a turn"),
    ],
)
def test_turns_that_cannot_be_are_refused(rollout, message):
    c = config_lib.default()
    c.teacher.path = "somewhere"
    c.rollout.update(rollout)
    with pytest.raises(ConfigError, match=message):
        config_lib.parse(c)


def test_turns_need_an_environment_and_errors_are_injected_without_one():
    settings = dataclasses.replace(config_lib.Config(), rollout=config_lib.Rollout(max_turns=3))
    with pytest.raises(ConfigError, match="rollout.max_turns = 3 is for tasks with an environment, and task.name = 'arithmetic' has none"):
        tasks.check_turns(settings, tasks.from_config(settings))
    c = config_lib.default()
    c.rollout.max_turns, c.eval.inject_error = 3, True
    with pytest.raises(ConfigError, match="eval.inject_error = True goes on without an environment, but rollout.max_turns = 3; use false"):
        config_lib.parse(c)
