"""Verdicts of verifiers that fail, advantages against formulas written as loops, masks and metrics of groups."""

import dataclasses
import logging
import math
import statistics
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax import rewards
from opd_jax.data.privileged import Attempt
from opd_jax.data.tasks import Example, Verdict, gsm8k, make
from opd_jax.glossary import GLOSSARY
from opd_jax.rewards import Judge, Judged, group_advantages, informative_B, judge, term_mask
from opd_jax.types import UserError

EXAMPLES = [Example(id=i, prompt=str(i), answer=str(i)) for i in range(6)]


@dataclasses.dataclass(frozen=True)
class Own:
    """A text is what the verifier does: a number, an exception, or something else that is no verdict."""

    answers: dict
    parallel: bool = False
    name = "mine"
    verifiable = True

    def verify(self, example, text):
        answer = self.answers.get(text)
        if isinstance(answer, BaseException):
            raise answer
        return answer if text in self.answers else Verdict(float(text == example.answer), f"{text} is not {example.answer}", text != "?")


# ---- the verifier


@pytest.mark.parametrize("parallel", [False, True])
def test_completions_are_judged_each_by_its_own_example(parallel):
    judged = judge(Own({}, parallel), EXAMPLES[:3], ["0", "2", "?"])
    assert judged.attempts == [Attempt("0", 1.0, "0 is not 0"), Attempt("2", 0.0, "2 is not 1"), Attempt("?", 0.0, "? is not 2", False)]
    assert judged.reward_B.tolist() == [1.0, 0.0, 0.0] and judged.reward_B.dtype == np.float64
    assert (judged.errors, judged.reason) == (0, "")


def test_a_thread_safe_task_is_still_asked_from_threads():
    barrier = threading.Barrier(2)

    class Waits(Own):
        def verify(self, example, text):
            barrier.wait(timeout=30)  # broken, hence an error, unless two are here at once
            return Verdict(1.0)

    assert judge(Waits({}, parallel=True), EXAMPLES[:2], ["a", "b"]).errors == 0


@pytest.mark.parametrize(
    "answer, reason",
    [
        (ValueError("no such thing"), "ValueError: no such thing"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (KeyError("answer"), "KeyError: there is no 'answer'"),
        (OSError("line\nbreak \x1b[2J"), "OSError: line break \\x1b[2J"),
        (Verdict(math.nan, "a"), "ValueError: the reward is nan"),
        (Verdict(-math.inf), "ValueError: the reward is -inf"),
        (Verdict(10**400), "OverflowError: int too large to convert to float"),
        (Verdict("1"), "TypeError: must be real number, not str"),
        (Verdict(1.0, None), "TypeError: the feedback is a NoneType, it must be text"),
        (None, "AttributeError: 'NoneType' object has no attribute 'reward'"),
        (1.0, "AttributeError: 'float' object has no attribute 'reward'"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_verifier_that_fails_gives_reward_0_and_is_counted(answer, reason, parallel):
    judged = judge(Own({"bad": answer}, parallel), EXAMPLES[:4], ["0", "bad", "2", "bad"])
    assert judged.attempts[1::2] == [Attempt("bad", 0.0, "", well_formed=False)] * 2
    assert judged.attempts[0].reward == judged.attempts[2].reward == 1.0
    assert judged.reward_B.tolist() == [1, 0, 1, 0]
    assert (judged.errors, judged.reason) == (2, reason)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_stop_is_not_held_up(stop, parallel):
    with pytest.raises(stop):
        judge(Own({"stop": stop()}, parallel), EXAMPLES[:2], ["0", "stop"])


def test_the_first_error_of_a_run_is_logged_and_no_other(caplog):
    task = Own({"bad": ValueError("first"), "worse": ValueError("second")})
    for _ in range(2):  # two runs
        caplog.clear()
        one = Judge(task)
        with caplog.at_level(logging.WARNING):
            assert one(EXAMPLES[:1], ["0"]).errors == 0 and not caplog.records
            assert one(EXAMPLES[:3], ["bad", "1", "worse"]).errors == 2
            assert one(EXAMPLES[:1], ["worse"]).errors == 1
        assert [record.getMessage() for record in caplog.records] == [
            "the verifier of task mine fails (ValueError: first); such completions get reward 0"
        ]


def test_completions_and_examples_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        judge(Own({}), EXAMPLES[:2], ["0"])


def test_an_answer_in_no_form_is_not_well_formed():
    attempts = judge(gsm8k.Gsm8k(EXAMPLES, [], ""), EXAMPLES[:3], ["none", "#### 7", "#### 2"]).attempts
    assert [(one.reward, one.well_formed) for one in attempts] == [(0.0, False), (0.0, True), (1.0, True)]


def test_a_task_of_the_house_is_judged():
    task = make("arithmetic", path="", level=3, train_size=0, eval_size=1, seed=0)
    example = task.examples("train")[0]
    attempts = judge(task, [example] * 2, [example.solution, "x"]).attempts
    assert [one.reward for one in attempts] == [1.0, 0.0] and "'x'" in attempts[1].feedback and not attempts[1].well_formed


# ---- advantages


def by_hand(group, kind, eps):
    """One group, in the words of the papers."""
    n, mean = len(group), math.fsum(group) / len(group)
    if kind == "none" or len(set(group)) == 1:
        return group if kind == "none" else [0.0] * n
    if kind == "centred":
        return [r - mean for r in group]
    if kind == "grpo":
        return [(r - mean) / (statistics.stdev(group) + eps) for r in group]
    return [r - math.fsum(group[:i] + group[i + 1 :]) / (n - 1) for i, r in enumerate(group)]


groups_of = st.integers(2, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 0.1, 0.3, -2.0, 7.7]) | st.floats(-3, 3, width=32), min_size=n, max_size=n),
        min_size=1,
        max_size=5,
    )
)
kinds = st.sampled_from(rewards.ADVANTAGES)


@settings(max_examples=200, deadline=None)
@given(groups=groups_of, kind=kinds, eps=st.sampled_from([1e-6, 1e-4]))
def test_advantages_are_those_of_the_formulas(groups, kind, eps):
    found = group_advantages(np.ravel(groups), len(groups[0]), kind=kind, eps=eps)
    assert found.dtype == np.float64
    expected = [advantage for group in groups for advantage in by_hand(group, kind, eps)]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_advantages_of_a_group_by_hand():
    reward_B = [1, 0, 0, 1, 5, 5, 5, 5]
    assert group_advantages(reward_B, 4, kind="none").tolist() == reward_B
    assert group_advantages(reward_B, 4, kind="centred").tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    assert group_advantages(reward_B, 4, kind="rloo") == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, 0, 0], rel=1e-15)
    scaled = 0.5 / (math.sqrt(1 / 3) + 1e-6)  # sample deviation: 4 * 0.25 / 3
    assert group_advantages(reward_B, 4, kind="grpo") == pytest.approx([scaled, -scaled, -scaled, scaled, 0, 0, 0, 0], rel=1e-15)


@settings(max_examples=100, deadline=None)
@given(groups=groups_of)
def test_rloo_is_centred_times_n_over_n_minus_1(groups):
    n = len(groups[0])
    rloo, centred = (group_advantages(np.ravel(groups), n, kind=kind) for kind in ("rloo", "centred"))
    np.testing.assert_allclose(rloo, centred * n / (n - 1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(rloo.reshape(-1, n).sum(1), 0, atol=1e-12)


@pytest.mark.parametrize("kind", ["centred", "grpo", "rloo"])
@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("reward", [0.1, 1.0, -0.7, 1e-300, 1 / 3])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(kind, size, reward):
    """The mean of three times 0.1 is not 0.1, and (r - mean) / eps would be a signal."""
    found = group_advantages([reward] * size + [0.0] * (size - 1) + [1.0], size, kind=kind)
    assert found[:size].tolist() == [0.0] * size and np.all(found[size:] != 0)


@settings(max_examples=100, deadline=None)
@given(groups=groups_of, kind=kinds, data=st.data())
def test_groups_do_not_see_each_other(groups, kind, data):
    """Some of the groups, in any order, have the advantages that they have among all."""
    n, order = len(groups[0]), data.draw(st.permutations(range(len(groups))))
    chosen = order[: data.draw(st.integers(1, len(groups)))]
    whole_PG = group_advantages(np.ravel(groups), n, kind=kind).reshape(-1, n)
    part_PG = group_advantages(np.ravel([groups[i] for i in chosen]), n, kind=kind).reshape(-1, n)
    np.testing.assert_array_equal(part_PG, whole_PG[chosen])
    inside = data.draw(st.permutations(range(n)))
    moved_PG = group_advantages(np.array(groups)[:, inside].ravel(), n, kind=kind).reshape(-1, n)
    np.testing.assert_allclose(moved_PG, whole_PG[:, inside], rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_the_deviation_is_that_of_trl():
    """Whose factor n / (n - 1) is of float32; with n in place of n - 1 the difference would be 15%."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("trl.trainer.utils")
    reward_PG = np.random.default_rng(0).normal(size=(5, 4))
    tensor = torch.tensor(reward_PG)
    expected = (tensor - tensor.mean(1, keepdim=True)) / (utils.nanstd(tensor, dim=1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(reward_PG.ravel(), 4, kind="grpo", eps=1e-4), expected.numpy().ravel(), rtol=1e-7)


@pytest.mark.parametrize(
    "reward_B, size, kind, message",
    [
        ([0, 1], 2, "dr_grpo", "advantage 'dr_grpo' is not known; valid: none, centred, grpo, rloo (Dr. GRPO is centred with loss.norm"),
        ([0, 1], 1, "rloo", "advantage 'rloo' compares the rollouts of a prompt, but rollout.group_size = 1; give 2 or more"),
        ([0, 1, 2], 2, "grpo", "3 rewards are no whole number of groups; rollout.group_size = 2 must divide them"),
        ([0, math.nan], 2, "grpo", "rewards must be finite numbers"),
    ],
)
def test_what_has_no_advantages_is_refused(reward_B, size, kind, message):
    with pytest.raises(UserError) as error:
        group_advantages(reward_B, size, kind=kind)
    assert str(error.value).startswith(message)


def test_single_rollouts_have_their_reward():
    assert group_advantages([0.5, 2], 1, kind="none").tolist() == [0.5, 2]


# ---- which rollouts count

#           groups of 3: solved      failed         mixed        equal, neither of them failed nor solved by 1
REWARD_B = np.array([1, 1, 1, 0, 0, 0, 0, 1, 0, 0.5, 0.5, 0.5])
STOPPED_B = np.array([1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0], bool)


def test_groups_of_equal_rewards_are_not_informative():
    assert informative_B(REWARD_B, 3).tolist() == [False] * 6 + [True] * 3 + [False] * 3
    assert informative_B(REWARD_B, 1).tolist() == [False] * 12
    third = np.array([0.1, 0.1, 0.1])
    assert informative_B(third, 3).tolist() == [False] * 3


def test_the_mask_leaves_out_what_is_asked():
    informative = informative_B(REWARD_B, 3)
    for groups in (False, True):
        for overlong in (False, True):
            mask_B = term_mask(REWARD_B, STOPPED_B, 3, filter_groups=groups, mask_overlong=overlong)
            assert mask_B.dtype == bool
            expected = [(informative[b] or not groups) and (STOPPED_B[b] or not overlong) for b in range(12)]
            assert mask_B.tolist() == expected
    assert term_mask(REWARD_B, STOPPED_B, 3).all()


def test_the_metrics_have_entries_and_follow_their_formulas():
    attempts = [Attempt("", reward) for reward in REWARD_B[:-1]] + [Attempt("", 0.5, well_formed=False)]
    found = rewards.metrics(Judged(attempts, REWARD_B, errors=2), 3)
    assert found == {
        "reward/equal_groups": 3 / 4,
        "reward/solved_groups": 1 / 4,
        "reward/failed_groups": 2 / 4,  # no completion with reward 1
        "reward/verifier_errors": 2,
        "reward/well_formed": 11 / 12,
    }
    assert set(found) == {name for name in GLOSSARY if name.startswith("reward/")}
