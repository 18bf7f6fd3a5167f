"""Which terms an example has by its tag: refusals, and metrics that speak of the rows that have a teacher."""

import dataclasses
import types

import numpy as np
import pytest
from test_bank import batch_of, config_of, goal_of, gradient, members

from opd_jax import batches, claim, objective, observed, parallel, routing, train
from opd_jax import config as config_lib
from opd_jax.batches import token_shares
from opd_jax.data import pipeline
from opd_jax.data.tasks import Example
from opd_jax.replay import Recalled
from opd_jax.teachers import Bank
from opd_jax.types import Prompts, UserError

EXAMPLES = [Example(0, "1=", tag="x"), Example(1, "2=", tag="y")]
REWARD = config_lib.Reward(weight=1.0)


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({"masking": config_lib.Masking(tags="x")}, "have neither the tag 'y' of the example '2='; name it in one of them"),
        ({"reward": config_lib.Reward(tags="x"), "masking": config_lib.Masking(tags="x")}, "(reward.weight = 0)"),
    ],
)
def test_an_example_without_a_term_is_refused(blocks, words):
    with pytest.raises(UserError) as error:
        routing.check(config_of(**blocks), EXAMPLES)
    assert words in str(error.value)


def test_one_of_both_terms_is_enough():
    for masking, reward in (("x", "y"), ("x,y", "y"), ("", "x"), ("x", "")):
        routing.check(config_of(masking=config_lib.Masking(tags=masking), reward=dataclasses.replace(REWARD, tags=reward)), EXAMPLES)


@pytest.mark.parametrize("blocks", [{"preference": config_lib.Preference(weight=1.0)}, {"loss": config_lib.Loss(labels=1.0)}])
def test_terms_of_all_examples_are_enough(blocks):
    routing.check(config_of(masking=config_lib.Masking(tags="x"), **blocks), EXAMPLES)


def test_a_tag_without_a_teacher_is_refused_unless_it_is_not_distilled():
    several = config_lib.Teacher(members={name: config_lib.Member(path=name) for name in "xz"})
    with pytest.raises(UserError, match="no member has the tag 'y'"):
        routing.check(config_of(teacher=several, reward=REWARD), EXAMPLES)
    routing.check(config_of(teacher=several, reward=REWARD, masking=config_lib.Masking(tags="x")), EXAMPLES)


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({"masking": config_lib.Masking(tags="x,w")}, "masking.tags = 'x,w': no example has the tag 'w'; valid: x, y"),
        ({"reward": config_lib.Reward(tags="x")}, "reward.tags = 'x' chooses who has the term that reward.weight = 0 leaves out"),
        (
            {"masking": config_lib.Masking(tags="x"), "signal": config_lib.Signal(weight=0.0), "reward": REWARD},
            "masking.tags = 'x' chooses who has the term that signal.weight = 0 leaves out",
        ),
    ],
)
def test_tags_without_effect_are_refused(blocks, words):
    with pytest.raises(UserError) as error:
        routing.check_names(config_of(**blocks), EXAMPLES)
    assert words in str(error.value)
    routing.check_names(config_of(masking=config_lib.Masking(tags=" x , y")), EXAMPLES)


def test_a_balance_of_one_tag_is_refused():
    balanced = config_of(loss=config_lib.Loss(balance="tag"))
    routing.check_names(balanced, EXAMPLES)
    with pytest.raises(UserError, match="loss.balance = 'tag' weighs examples of different tags, but task.name = 'arithmetic' has no two"):
        routing.check_names(balanced, EXAMPLES[:1])


def test_metrics_compare_on_the_rows_that_have_a_teacher():
    """Those of the other rows are as if they were not there; entropies and tokens are of all."""
    frozen, models = members()
    bank, goal = Bank(members=models, combine="route"), goal_of()
    route_B, compared_B = np.array([0, 1] * 4, np.int32), np.array([True, True, False, True, False, False, True, True])
    whole = batch_of(goal, route_B=route_B)
    some = gradient(goal, bank, frozen, whole.replace(compared_B=compared_B), microbatches=2)[1]
    only = gradient(goal, bank, frozen, batch_of(goal, route_B=route_B[compared_B], rows=compared_B))[1]
    every = gradient(goal, bank, frozen, whole)[1]
    found, of_them, of_all = (observed.metrics(sums) for sums in (some, only, every))
    for name in ("train/reverse_kl", "train/log_ratio_mean"):
        assert float(found[name]) == pytest.approx(float(of_them[name]), rel=1e-5)
        assert float(found[name]) != pytest.approx(float(of_all[name]), rel=1e-2)
    for name in ("train/tokens", "rollout/entropy"):
        assert float(found[name]) == pytest.approx(float(of_all[name]), rel=1e-5)


def test_claims_say_what_tags_leave_out():
    config = config_of(
        masking=config_lib.Masking(tags="x"), reward=dataclasses.replace(REWARD, tags="y"), loss=config_lib.Loss(balance="tag")
    )
    said = claim.of_run(objective.from_config(config, has_teacher=True), config)
    for words in ("masking.tags=x leaves tokens out", "(reward.tags=y)", "(loss.balance=tag)"):
        assert words in said


def test_shares_of_tokens_are_by_tag():
    mask_BT = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]], bool)
    assert token_shares(EXAMPLES, mask_BT) == {"train/token_share/x": 0.5, "train/token_share/y": 0.5}
    assert token_shares([EXAMPLES[0], Example(2, "3=")], mask_BT[[0, 1, 1, 1]]) == {"train/token_share/x": 4 / 6}


def test_shares_of_tokens_are_those_that_are_learnt_from():
    """With rollout.aggregate an update learns from other completions than it has written."""
    mask_BT = np.array([[True, True, True], [True, False, False]])

    def step(examples):
        completions = types.SimpleNamespace(mask_BT=mask_BT, standing_BT=mask_BT)
        read = Prompts(np.zeros((2, 2), np.int32), np.ones((2, 2), bool), np.arange(2, dtype=np.uint32))
        return pipeline.Batch(examples, read, read, 0), completions

    maker = object.__new__(batches.BatchMaker)
    maker._mesh, maker._made = parallel.make_mesh(1, 1, 1), lambda *_: batches.Made(None, None, {}, None)
    learnt = maker(*step(EXAMPLES), recalled=Recalled(*step(EXAMPLES[::-1]), None, 1.5)).learnt
    assert learnt == (8, 1.5, {"train/token_share/x": 0.25, "train/token_share/y": 0.75})


def test_a_run_refuses_tags_before_any_work(tmp_path):
    c = config_lib.default()
    c.task.name, c.task.skills, c.masking.tags, c.teacher.path = "skills", "chain,sort", "chain", "nowhere"
    with pytest.raises(UserError, match="have neither the tag 'sort' of the example"):
        next(train.run(c, tmp_path / "run"))
    c.masking.tags = "chian"
    with pytest.raises(UserError, match="no example has the tag 'chian'; valid: chain, sort"):
        next(train.run(c, tmp_path / "run"))
