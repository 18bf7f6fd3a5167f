"""Config: unknown fields, types and ranges are refused with the field, the value and what is valid."""

import dataclasses
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from opd_jax import config
from opd_jax.config import ConfigError, fields

MOE = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def changed(**changes) -> ConfigDict:
    c = config.default()
    c.teacher.path = "somewhere"
    for name, value in changes.items():
        node = c
        *blocks, last = name.split("__")
        for block in blocks:
            node = node[block]
        with node.unlocked(), node.ignore_type():
            node[last] = value
    return c


def test_defaults_round_trip():
    c = config.default()
    c.teacher.path = "somewhere"
    parsed = config.parse(c)
    assert dataclasses.asdict(parsed) == c.to_dict()
    assert hash(parsed) == hash(config.parse(c))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout__bach_size": 4}, "config field rollout.bach_size does not exist; did you mean rollout.batch_size?"),
        ({"rollout__batch_size": 4.5}, "config field rollout.batch_size = 4.5 has type float, it must be int"),
        ({"rollout__batch_size": True}, "config field rollout.batch_size = True has type bool, it must be int"),
        ({"rollout": 3}, "config field rollout = 3 must be a block with the fields source, "),
        ({"rollout__batch_size": 0}, "config field rollout.batch_size = 0 must be at least 1"),
        ({"rollout__group_size": 5}, "config field rollout.group_size = 5 must divide rollout.batch_size = 64"),
        ({"learner__microbatches": 5}, "config field learner.microbatches = 5 must divide rollout.batch_size = 64"),
        (
            {"mesh__data": 3},
            "config field rollout.batch_size = 64 makes learner.microbatches = 1 of 64 rollouts each, which mesh.data * mesh.fsdp = 3 "
            "does not divide; change one of them",
        ),
        ({"rollout__top_p": 0.0}, "config field rollout.top_p = 0.0 must be above 0 and at most 1"),
        ({"rollout__temperature": -1.0}, "config field rollout.temperature = -1.0 must be 0 (greedy) or at least 0.0001"),
        ({"loss__student_temperature": 0.0}, "config field loss.student_temperature = 0.0 must be above 0"),
        ({"learner__learning_rate": float("nan")}, "config field learner.learning_rate = nan must be a finite number"),
        (
            {"rollout__source": "teachr"},
            "config field rollout.source = 'teachr' is not known; valid: student, teacher, dataset, mix, dagger, corrected, cache; did you "
            "mean teacher?",
        ),
        ({"loss__normaliser": "mean"}, "config field loss.normaliser = 'mean' is not known; valid: token_mean, sequence_mean"),
        (
            {"teacher__path": "", "rollout__source": "teacher"},
            "config field teacher.path = '' must name a model, because rollout.source = 'teacher' needs a teacher",
        ),
        ({"reward__weight": 1.0, "rollout__top_k": 1}, "config field rollout.temperature = 1.0 is greedy, but reward.weight = 1"),
        ({"masking__skip_first": 5, "masking__first_only": 3}, "config field masking.skip_first = 5 must be below 3, or no token is left"),
        ({"masking__skip_first": 64}, "config field masking.skip_first = 64 must be below 64, or no token is left to learn from"),
        (
            {"teacher__path": "", "signal__divergence": "nll", "context__privileged__reads": "solution"},
            "config field context.privileged.reads = 'solution' needs a teacher to read it",
        ),
        (
            {"rollout__source": "teacher", "context__privileged__reads": "solution"},
            "config field context.privileged.reads = 'solution' is read where a teacher scores; rollout.source = 'teacher' lets it write",
        ),
        ({"rollout__temperature": 1e-39}, "config field rollout.temperature = 1e-39 must be 0 (greedy) or at least 0.0001"),
        (
            {"signal__support": "sampled", "rollout__temperature": 0.0},
            "config field rollout.temperature = 0.0 is greedy, but signal.support = 'sampled' needs draws from the policy",
        ),
        (
            {"signal__support": "sampled", "rollout__source": "teacher"},
            "config field rollout.source = 'teacher' must be 'student', because signal.support = 'sampled' needs draws of the student",
        ),
        (
            {"signal__support": "topk_teacher", "signal__k": 4, "signal__tail": "sampled_tail", "rollout__source": "dataset"},
            "config field rollout.source = 'dataset' must be 'student', because signal.tail = 'sampled_tail' needs draws of the student",
        ),
        (
            {"signal__support": "topk_teacher", "signal__k": 4, "signal__tail": "sampled_tail_published", "rollout__temperature": 0.0},
            "config field rollout.temperature = 0.0 is greedy, but signal.tail = 'sampled_tail_published' needs draws from the policy",
        ),
        ({"signal__k": -1}, "config field signal.k = -1 must be 0 or more"),
        (
            {"estimator__credit": "to_go", "rollout__source": "dataset"},
            "config field rollout.source = 'dataset' must be 'student', because estimator.credit = 'to_go' needs draws of the student",
        ),
        (
            {"student__init__model_type": "qwen3_moe"},
            "config field student.init.num_experts = 0 must be at least 1, because student.init.model_type = 'qwen3_moe'",
        ),
        (
            {"student__init__num_experts": 4},
            "config field student.init.num_experts = 4 must be 0, because student.init.model_type = 'llama'",
        ),
        (
            {f"student__init__{name}": value for name, value in MOE.items()} | {"student__init__num_experts_per_tok": 5},
            "config field student.init.num_experts_per_tok = 5 must be at most student.init.num_experts = 4",
        ),
        ({"checkpoint__keep": 1}, "config field checkpoint.keep = 1 must be at least 2"),
        ({"seed": 2**31}, "config field seed = 2147483648 must be below 2**31"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_refused_with_field_value_and_remedy(changes, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)) as error:
        config.parse(changed(**changes))
    assert "\n" not in str(error.value)


def test_nothing_need_be_held_out():
    assert config.parse(changed(task__eval_size=0)).task.eval_size == 0
    with pytest.raises(ConfigError, match="task.eval_size = -1 must be 0 or more"):
        config.parse(changed(task__eval_size=-1))


def test_every_field_has_a_comment_with_its_meaning():
    text = pathlib.Path(fields.__file__).read_text()
    for cls in vars(config).values():
        if dataclasses.is_dataclass(cls):
            for field in dataclasses.fields(cls):
                if not dataclasses.is_dataclass(field.type):
                    commented = rf"^    {field.name}: \w+(\[.*\])? = .*  # \S"
                    assert re.search(commented, text, re.M), f"{cls.__name__}.{field.name} has no comment"


def test_parse_arg():
    declared = {"role": ("opd", "sft"), "tiny": False, "seed": 0}
    assert config.parse_arg(None, **declared).to_dict() == {"role": "opd", "tiny": False, "seed": 0}
    assert config.parse_arg("sft,tiny,seed=2", **declared).to_dict() == {"role": "sft", "tiny": True, "seed": 2}
    assert config.parse_arg("role=sft", **declared).role == "sft"
    for bad in ("tinny", "seed=x", "seed", "role=gkd"):
        with pytest.raises(ConfigError, match=re.escape(bad.partition("=")[2] or bad)):
            config.parse_arg(bad, **declared)


def test_differences_name_what_a_resumed_run_may_not_change():
    old, new = changed().to_dict(), changed().to_dict()
    new["eval"]["every"], new["steps"] = 7, 200
    assert config.differences(old, new) == []
    new["seed"], new["rollout"]["batch_size"] = 1, 32
    assert config.differences(old, new) == ["rollout.batch_size: 64 -> 32", "seed: 0 -> 1"]
    new = changed().to_dict() | {"steps": 50}
    assert config.differences(old, new) == ["steps: 100 -> 50"]
