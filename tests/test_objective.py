"""From a config's signal to the loss: every field arrives, and what does not fit is refused by its name."""

import re

import pytest

from opd_jax import claim, objective
from opd_jax import config as config_lib
from opd_jax.config import ConfigError
from opd_jax.numerics.token_stats import Signal


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
