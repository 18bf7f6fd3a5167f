"""From a config's signal to the loss: every field arrives, and what does not fit is refused by its name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import claim, objective
from opd_jax import config as config_lib
from opd_jax.config import ConfigError
from opd_jax.numerics import heads
from opd_jax.numerics.estimators import Context
from opd_jax.numerics.token_stats import Head, Signal, Target


def from_signal(**fields):
    config = config_lib.Config(signal=config_lib.Signal(**fields), loss=config_lib.Loss(student_temperature=0.7, teacher_temperature=1.4))
    return objective.from_config(config, has_teacher=True)


def test_every_field_of_the_signal_arrives():
    built = from_signal(divergence="jsd", support="topk_union+token", k=16, tail="bucket", beta=0.3).estimator
    wanted = Signal("jsd", "topk_union+token", tail="bucket", k=16, beta=0.3, student_temperature=0.7, teacher_temperature=1.4)
    assert built.signal == wanted
    assert from_signal().estimator.signal == Signal("reverse_kl", beta=0.5, student_temperature=0.7, teacher_temperature=1.4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"support": "topk"}, "config field signal.support = 'topk' is not known; valid: full, sampled, topk_teacher, "),
        ({"support": "topk_student", "k": 4, "tail": "buckets"}, "config field signal.tail = 'buckets' is not known; valid: generalised, "),
        ({"support": "topk_teacher"}, "signal.k = 0 must be a whole number of at least 1 for signal.support = 'topk_teacher'"),
        ({"k": 4}, "signal.k = 4 is for top-k supports (topk_teacher, topk_student, topk_union), not for signal.support = 'full'"),
        ({"support": "sampled", "tail": "bucket"}, "signal.tail = 'bucket' is for top-k supports"),
        (
            {"divergence": "nll", "support": "topk_student", "k": 4},
            "signal.support = 'topk_student' is for divergences, not for signal.divergence = 'nll'; use 'full'",
        ),
        (
            {"divergence": "jsd", "support": "topk_student", "k": 4, "tail": "sampled_tail_published"},
            "signal.tail = 'sampled_tail_published' is for signal.divergence = 'reverse_kl', not for 'jsd'; use 'sampled_tail'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        from_signal(**fields)


def claim_of(rollout=None, estimator=None, **loss):
    config = config_lib.Config(
        signal=config_lib.Signal(support="sampled"),
        rollout=config_lib.Rollout(**(rollout or {})),
        estimator=config_lib.Estimator(**{"credit": "to_go", **(estimator or {})}),
        loss=config_lib.Loss(**{"normaliser": "sequence_sum", **loss}),
    )
    return claim.of_run(objective.from_config(config, has_teacher=True), config)


def test_a_run_says_what_spoils_the_claim_of_its_estimator():
    plain = "Unbiased for the sequence-level reverse KL"
    assert claim_of() == plain
    assert claim_of({"temperature": 0.7}, {"importance": "sequence"}) == plain
    for spoilt, words in (
        (claim_of(normaliser="token_mean"), "lengths weigh completions (loss.normaliser=token_mean)"),
        (
            claim_of({"top_p": 0.9}, {"importance": "cumulative"}),
            "rollout.top_p=0.9 draws nothing outside its tokens, which no ratio brings back",
        ),
        (
            claim_of({"temperature": 0.7}, {"importance": "clip"}),
            "completions are drawn at temperature 0.7, corrected by estimator.importance=clip",
        ),
    ):
        assert spoilt == f"{plain}, but for: {words}"


@pytest.mark.parametrize(
    "rollout, estimator, message",
    [
        (
            {"temperature": 0.0},
            {"importance": "cumulative"},
            "importance = 'cumulative' needs draws, and rollout.temperature = 0 is greedy",
        ),
        ({"source": "dataset"}, {"importance": "token"}, "importance = 'token' needs the law that wrote the completions"),
        ({}, {"baseline": "leave_one_out"}, "baseline = 'leave_one_out' needs rollout.group_size of at least 2, not 1"),
        ({}, {"baseline": "mean"}, "estimator.baseline = 'mean' is not known; valid: none, kl"),
    ],
)
def test_choices_of_the_estimator_that_do_not_fit_are_refused(rollout, estimator, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        claim_of(rollout, estimator)


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({"context": config_lib.Context(privileged=config_lib.Privileged(reads="solution"))}, "context.privileged.reads = 'solution'"),
        ({"extrapolation": config_lib.Extrapolation(scale=1.25)}, "extrapolation.scale = 1.25"),
    ],
)
def test_a_law_that_nothing_is_compared_with_is_not_changed(blocks, words):
    with pytest.raises(ConfigError, match=f"config field {words} changes what a teacher says, and no term of the loss compares with one"):
        objective.from_config(config_lib.Config(signal=config_lib.Signal("nll"), **blocks), has_teacher=True)
    objective.from_config(config_lib.Config(**blocks), has_teacher=True)
    ranked = config_lib.Preference(weight=1.0)
    objective.from_config(config_lib.Config(signal=config_lib.Signal("nll"), preference=ranked, **blocks), has_teacher=True)


def test_positions_behind_all_completions_cost_nothing(monkeypatch):
    """They lie in tiles that are not made: rubbish there reaches neither the loss nor its gradient. What only a part draws is looked at."""
    goal = objective.from_config(config_lib.Config(), has_teacher=True)
    rng = np.random.default_rng(0)
    hidden_BTD, unembed_DV, teacher_DV = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 6, 3), (3, 5), (3, 5)))
    tokens_BT, mask_BT = jnp.zeros((2, 6), jnp.int32), jnp.arange(6)[None] < jnp.array([[1], [4]])

    def loss(unembed_DV, hidden_BTD, drawn_BT=None):
        shares = tuple(objective.share(part, Context(mask_BT, drawn_BT=drawn_BT), 6) for part in goal.parts)
        targets = {"teacher": Target((Head(hidden_BTD, teacher_DV),)), "reference": None}
        return objective.loss(goal, Head(hidden_BTD, unembed_DV), targets, tokens_BT, mask_BT, shares)[0]

    both = jax.value_and_grad(loss)
    whole, rubbish = both(unembed_DV, hidden_BTD), hidden_BTD.at[:, 4:].set(jnp.nan)
    monkeypatch.setattr(heads, "TILE_BYTES", 2 * 5 * 4 * 2)  # of two positions
    monkeypatch.setattr(heads, "LEAST_ROWS", 1)
    found = both(unembed_DV, rubbish)
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], whole[1], atol=1e-6)
    assert jnp.isnan(both(unembed_DV, rubbish, jnp.ones((2, 6), bool))[1]).any()
