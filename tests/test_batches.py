"""From completions to the batch of an update: what teachers read, which tokens each part learns from, advantages, routes."""

import dataclasses

import jax
import numpy as np
import pytest
from models import tiny_model

from opd_jax import config as config_lib
from opd_jax import objective, parallel, rewards, score
from opd_jax.batches import BatchMaker
from opd_jax.data import tokenizer
from opd_jax.data.contexts import Reader
from opd_jax.data.pipeline import Encoder, Pipeline, encode_completions
from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.teacher_prompts import TeacherPrompts
from opd_jax.rollout import from_completions
from opd_jax.types import Prompts, UserError

BYTES = tokenizer.byte()
LENGTH = 6


class Sums:
    """A task whose completions the tests write: "ab" is right, what is not of a and b is malformed."""

    name, verifiable, digest = "sums", True, ""

    def examples(self, split):
        return [Example(0, "1=", solution="ab", tag="x"), Example(1, "2=", solution="ab", tag="y")]

    def verify(self, example, text):
        if text == "crash":
            raise RuntimeError("a verifier may fail")
        return Verdict(float(text == "ab"), "" if text == "ab" else f"not {text}", well_formed=set(text) <= set("ab"))


def make(texts, *, max_length=64, overlong="refuse", judge=None, teacher_model=None, **blocks):
    """(what is made of two prompts with half of the texts each, the encoder of the teacher)."""
    rollout = config_lib.Rollout(batch_size=len(texts), group_size=len(texts) // 2, max_new_tokens=LENGTH)
    settings = dataclasses.replace(config_lib.Config(), **{"rollout": rollout} | blocks)
    goal = objective.from_config(settings, has_teacher=True)
    encoder = Encoder(Reader(BYTES), max_length, overlong)
    inform = TeacherPrompts(settings.context.privileged, encoder) if settings.context.privileged.reads else None
    mesh = parallel.make_mesh()
    pipeline = Pipeline(Sums().examples("train"), encoder, prompts_per_step=2, group_size=len(texts) // 2, seed=0)
    prompts = pipeline.batch(0)
    with jax.set_mesh(mesh):
        tokens_BT, mask_BT, stopped_B = encode_completions(texts, BYTES, max_new_tokens=LENGTH)
        completions = from_completions(*parallel.shard_batch((tokens_BT, mask_BT, stopped_B, prompts.prompts.id_B), mesh))
        params, model = teacher_model or (None, None)
        maker = BatchMaker(settings, goal, Sums(), BYTES, inform, mesh, judge=judge and rewards.OwnJudge(judge), teacher=model)
        return maker(prompts, completions, params), completions, goal


def mask_of(made, goal, name="distillation"):
    names = [part.name for part in goal.parts]
    return np.asarray(made.batch.shares[names.index(name)].context.mask_BT)


def read(view):
    return [BYTES.decode(row[mask].tolist()) for row, mask in zip(np.asarray(view.prompt_BS), np.asarray(view.prompt_mask_BS), strict=True)]


def privileged(**settings):
    return config_lib.Context(privileged=config_lib.Privileged(**{"layout": "compact", **settings}))


def test_without_settings_everyone_reads_the_prompt_and_learns_from_every_token():
    made, completions, goal = make(["ab", "ba", "ab", "b"])
    assert read(made.batch.teacher) == read(made.batch.student) and made.judged is None and made.counts == {}
    np.testing.assert_array_equal(mask_of(made, goal), completions.mask_BT)


def test_a_sibling_that_succeeded_is_read_and_who_has_none_is_left_out():
    made, completions, goal = make(["ab", "ba", "b", "bb"], context=privileged(reads="sibling"))
    first = read(made.batch.student)
    told = read(made.batch.teacher)
    assert told[1] == f"+ab\n{first[1]}" and [told[row] for row in (0, 2, 3)] == [first[row] for row in (0, 2, 3)]
    mask_BT = np.asarray(completions.mask_BT)
    np.testing.assert_array_equal(mask_of(made, goal), mask_BT & np.array([False, True, False, False])[:, None])
    assert made.counts == {"context/present": 0.25, "context/shortened": 0.0, "context/too_long": 0.0}
    np.testing.assert_array_equal(made.batch.mask_BT, mask_BT)  # metrics speak of all that was drawn


def test_feedback_is_that_of_the_own_completion():
    made, *_ = make(["ab", "ba", "b", "bb"], context=privileged(reads="feedback"))
    plain, told = read(made.batch.student), read(made.batch.teacher)
    assert told == [plain[0], *(f"!not {text}\n{prompt}" for text, prompt in zip(["ba", "b", "bb"], plain[1:], strict=True))]


def test_a_context_that_does_not_fit_is_shortened_or_left_out_and_counted():
    made, _, goal = make(["ab", "bababa", "b", "bb"], context=privileged(reads="feedback"), max_length=12)
    assert made.counts["context/shortened"] > 0
    made, _, goal = make(["ab", "ba", "b", "bb"], context=privileged(reads="solution"), max_length=4)
    assert made.counts["context/too_long"] == 1.0 and not mask_of(made, goal).any()


def test_tokens_are_left_out_by_position_and_kind():
    texts = ["ab", "bab", "abab", "b"]
    whole = np.asarray(make(texts)[1].mask_BT)
    place_T = np.arange(LENGTH)
    for masking, keep_BT in (
        ({"skip_first": 2}, whole & (place_T >= 2)),
        ({"first_only": 3, "skip_first": 1}, whole & (place_T >= 1) & (place_T < 3)),
        ({"special_tokens": "drop"}, whole & (place_T < np.array([len(text) for text in texts])[:, None])),
    ):
        made, _, goal = make(texts, masking=config_lib.Masking(**masking), extra_signal=config_lib.ExtraSignal(weight=1.0))
        for name in ("distillation", "extra"):
            np.testing.assert_array_equal(mask_of(made, goal, name), keep_BT)


def test_rollouts_are_left_out_by_their_verdict():
    texts = ["ab", "c", "crash", "b"]
    for masking, keep_B in (({"malformed": "drop"}, [1, 0, 0, 1]), ({"solved": "drop"}, [0, 1, 1, 1]), ({"failed": "drop"}, [1, 0, 0, 0])):
        made, completions, goal = make(texts, masking=config_lib.Masking(**masking))
        np.testing.assert_array_equal(mask_of(made, goal), np.asarray(completions.mask_BT) & np.array(keep_B, bool)[:, None])
        assert made.judged.errors == 1


def test_rewards_become_advantages_of_their_part():
    texts = ["ab", "ba", "b", "bb"]
    made, completions, goal = make(texts, reward=config_lib.Reward(weight=1.0, advantage="rloo"))
    share = made.batch.shares[1]
    np.testing.assert_allclose(np.asarray(share.context.advantage_BT)[:, 0], [1.0, -1.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(mask_of(made, goal, "reward"), completions.mask_BT)
    np.testing.assert_array_equal(mask_of(made, goal), completions.mask_BT)


@pytest.mark.parametrize("settings, keep_B", [({"filter_groups": True}, [1, 1, 0, 0]), ({"only": "solved"}, [1, 0, 0, 0])])
def test_rewards_of_some_rollouts(settings, keep_B):
    made, completions, goal = make(["ab", "ba", "b", "bb"], reward=config_lib.Reward(weight=1.0, **settings))
    np.testing.assert_array_equal(mask_of(made, goal, "reward"), np.asarray(completions.mask_BT) & np.array(keep_B, bool)[:, None])


def test_rollouts_go_to_the_member_of_their_tag():
    members = {"one": config_lib.Member(path="p", tag="y"), "x": config_lib.Member(path="q")}
    made, *_ = make(["ab", "ba", "b", "bb"], teacher=config_lib.Teacher(members=members))
    prompts = read(made.batch.student)
    assert np.asarray(made.batch.route_B).tolist() == [{"1=": 1, "2=": 0}[prompt] for prompt in prompts]


def test_a_tag_without_a_member_is_refused():
    members = {"one": config_lib.Member(path="p", tag="z"), "x": config_lib.Member(path="q")}
    with pytest.raises(UserError, match="no member has the tag 'y' of the example '2='; there are z, x"):
        make(["ab", "ba", "b", "bb"], teacher=config_lib.Teacher(members=members))


# ---- preferences


def preferred(made, goal):
    """(sign of each row, number of its partner) of the part's context."""
    context = made.batch.shares[[part.name for part in goal.parts].index("preference")].context
    return np.asarray(context.sign_B).tolist(), np.asarray(context.partner_B).tolist()


def test_rewards_make_a_pair_of_the_best_and_the_worst():
    texts = ["ba", "ab", "b", "b", "b", "bb"]
    made, completions, goal = make(texts, preference=config_lib.Preference(weight=1.0, judge="reward"))
    assert preferred(made, goal) == ([-1, 1, 0, 0, 0, 0], [1, 0, 2, 3, 4, 5])
    in_pair = np.array([True, True, False, False, False, False])
    np.testing.assert_array_equal(mask_of(made, goal, "preference"), np.asarray(completions.mask_BT) & in_pair[:, None])
    np.testing.assert_array_equal(mask_of(made, goal), completions.mask_BT)
    assert made.counts == {"preference/pairs": 0.5} and float(made.batch.shares[1].denominator) == 1.0


@pytest.mark.parametrize("judge", ["teacher", "teacher_mean"])
def test_the_teacher_ranks_by_its_log_probs_after_what_it_reads(judge):
    """With a solution to read; the two judges differ, and so do rankings by the student's prompt."""
    params, model = tiny_model(3, vocab_size=BYTES.vocab_size, tie_word_embeddings=False)
    texts = ["a", "abab", "bbb", "ab", "b", "ba"]
    blocks = {"context": privileged(reads="solution"), "preference": config_lib.Preference(weight=1.0, judge=judge)}
    made, completions, goal = make(texts, teacher_model=(params, model), **blocks)
    read = made.batch.teacher
    prompts = Prompts(read.prompt_BS, read.prompt_mask_BS, completions.id_B)
    logp_BT = np.asarray(score.logprobs(params, model, prompts, completions))
    score_B = logp_BT.sum(1) / (np.asarray(completions.mask_BT).sum(1) if judge == "teacher_mean" else 1)
    expected = [0] * 6
    for group in (range(3), range(3, 6)):
        expected[max(group, key=lambda row: score_B[row])], expected[min(group, key=lambda row: score_B[row])] = 1, -1
    assert preferred(made, goal)[0] == expected


# ---- a judge in place of the verifier


def test_a_judge_gives_rewards_and_verdicts():
    def longest(example, text):
        if text == "bb":
            raise RuntimeError("no idea")
        return Verdict(0.0, "empty", well_formed=False) if text == "b" else len(text) / 4

    masking, reward = config_lib.Masking(malformed="drop"), config_lib.Reward(weight=1.0, advantage="none")
    made, completions, goal = make(["ab", "baba", "b", "bb"], judge=longest, masking=masking, reward=reward)
    assert made.judged.reward_B.tolist() == [0.5, 1.0, 0.0, 0.0] and made.judged.errors == 1
    assert np.asarray(made.batch.shares[1].context.advantage_BT)[:, 0].tolist() == [0.5, 1.0, 0.0, 0.0]
    well_formed = np.array([True, True, False, False])  # who cannot be judged is not well-formed
    np.testing.assert_array_equal(mask_of(made, goal), np.asarray(completions.mask_BT) & well_formed[:, None])


# ---- tags


def tag_of(made):
    return [{"1=": "x", "2=": "y"}[prompt] for prompt in read(made.batch.student)]


def test_examples_of_some_tags_are_distilled_and_of_others_rewarded():
    settings = {"masking": config_lib.Masking(tags="x"), "reward": config_lib.Reward(weight=1.0, tags="y, z")}
    made, completions, goal = make(["ab", "ba", "b", "bb"], **settings)
    is_x = np.array([tag == "x" for tag in tag_of(made)])
    mask_BT = np.asarray(completions.mask_BT)
    np.testing.assert_array_equal(mask_of(made, goal), mask_BT & is_x[:, None])
    np.testing.assert_array_equal(mask_of(made, goal, "reward"), mask_BT & ~is_x[:, None])
    assert np.asarray(made.batch.compared_B).tolist() == is_x.tolist()
    assert make(["ab", "ba", "b", "bb"])[0].batch.compared_B is None


def test_who_is_not_distilled_needs_no_member():
    members = {"one": config_lib.Member(path="p", tag="z"), "x": config_lib.Member(path="q")}
    blocks = {"teacher": config_lib.Teacher(members=members), "reward": config_lib.Reward(weight=1.0)}
    made, _, goal = make(["ab", "ba", "b", "bb"], masking=config_lib.Masking(tags="x,z"), **blocks)
    is_x = [tag == "x" for tag in tag_of(made)]
    assert np.asarray(made.batch.compared_B).tolist() == is_x and np.asarray(made.batch.route_B)[is_x].tolist() == [1, 1]
    assert mask_of(made, goal).any(1).tolist() == is_x and mask_of(made, goal, "reward").any(1).all()


def test_an_example_without_a_term_is_refused():
    settings = {"masking": config_lib.Masking(tags="x"), "reward": config_lib.Reward(weight=1.0, tags="z")}
    with pytest.raises(UserError, match="masking.tags = 'x' and reward.tags = 'z' have neither the tag 'y' of the example '2='"):
        make(["ab", "ba", "b", "bb"], **settings)


def test_balanced_tags_have_equal_shares():
    texts = ["a", "b", "ababa", "abab"]
    made, completions, goal = make(texts, loss=config_lib.Loss(balance="tag"))
    weights_B = np.asarray(made.batch.shares[0].weights_BT).sum(1)
    tokens_B = np.asarray(completions.mask_BT).sum(1)
    assert tokens_B.tolist() == [2, 2, 6, 5]
    np.testing.assert_allclose(weights_B, [3.75, 3.75, 7.5 * 6 / 11, 7.5 * 5 / 11], rtol=1e-6)
    assert float(made.batch.shares[0].denominator) == tokens_B.sum()
