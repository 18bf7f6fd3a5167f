"""From a config's signal to the loss: every field arrives, and what does not fit is refused by its name."""

import re

import pytest

from opd_jax import config as config_lib
from opd_jax import objective
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
