"""Rollout sources of two writers: mix chooses steps, dagger the share of each round; what configs may ask of them, and what runs say."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from test_mixture import same

from opd_jax import claim, cost, glossary, metrics, model_io, objective, parallel, rewards, rollout, train
from opd_jax import config as config_lib
from opd_jax.config import ConfigError
from opd_jax.data import pipeline, tasks
from opd_jax.data.tasks import Example
from opd_jax.data.tokenizer import byte
from opd_jax.types import UserError

# ---- the sources of a config


def settings_of(**changes):
    return dataclasses.replace(config_lib.Rollout(batch_size=4, group_size=2, max_new_tokens=3), **changes)


def test_who_writes_is_a_function_of_seed_and_step():
    mix = settings_of(source="mix")
    chosen = [rollout.writer(mix, 0, step) == "student" for step in range(16)]
    assert chosen == [bool(int(bit)) for bit in "1100111011010000"]
    assert [rollout.writer(mix, 0, step) == "student" for step in reversed(range(16))] == chosen[::-1]
    assert [rollout.writer(mix, 1, step) == "student" for step in range(16)] != chosen
    for fraction in (0.0, 0.25, 1.0):
        share = [rollout.writer(settings_of(source="mix", student_fraction=fraction), 0, step) == "student" for step in range(2000)]
        assert abs(np.mean(share) - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / 2000)
    assert {rollout.writer(mix, 0, step) for step in range(16)} == {"student", "dataset"}
    for source in ("student", "teacher", "dataset", "dagger", "corrected"):
        assert {rollout.writer(settings_of(source=source), 0, step) for step in range(16)} == {source}


def test_the_teachers_share_falls_from_round_to_round():
    shares = lambda **changes: [rollout.teacher_share(settings_of(source="dagger", **changes), step) for step in range(6)]
    assert shares() == [0.2] * 6
    assert shares(beta=0.8, beta_decay=0.5) == [0.8, 0.4, 0.2, 0.1, 0.05, 0.025]
    assert shares(beta=0.8, beta_decay=0.5, round=2) == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert shares(beta=1.0, beta_decay=0.0, round=3) == [1.0] * 3 + [0.0] * 3


@functools.cache
def byte_models():
    return tuple(models.tiny_model(seed, scale=6.0, num_hidden_layers=1, vocab_size=259) for seed in (1, 2))


def batch():
    """Two prompts; the teacher reads them with a word before them."""
    examples = [Example(0, "ab=", "cd", "cd"), Example(1, "x=", "a long answer", "y")]
    encode = pipeline.Encoder(byte(), 32, "refuse")
    made = [pipeline.Pipeline(each, encode, prompts_per_step=2, group_size=2, seed=0).batch(0) for each in (examples, _informed(examples))]
    return dataclasses.replace(made[0], teacher_prompts=made[1].prompts)


def _informed(examples):
    return [dataclasses.replace(example, prompt=f"Look: {example.prompt}") for example in examples]


def made_by(step, **changes):
    (params, student), (teacher_params, teacher) = byte_models()
    mesh = parallel.make_mesh()
    source = rollout.make_source(settings_of(**changes), tokenizer=byte(), student=student, teacher=teacher, seed=0, mesh=mesh)
    with jax.set_mesh(mesh):
        return source(params, teacher_params, batch(), step)


@pytest.mark.slow
def test_a_step_of_the_mix_is_one_of_the_student_or_one_of_the_data_set():
    steps = {rollout.writer(settings_of(source="mix"), 0, step): step for step in range(16)}
    for source, step in steps.items():
        same(made_by(step, source="mix"), made_by(step, source=source))
    assert not np.array_equal(made_by(steps["student"], source="mix").tokens_BT, made_by(steps["student"], source="dataset").tokens_BT)


@pytest.mark.slow
def test_dagger_draws_with_the_key_and_the_share_of_its_step():
    (student, teacher), read = byte_models(), batch()
    found = made_by(5, source="dagger", beta=0.8, beta_decay=0.5, round=3, temperature=0.9)
    asked = {"key": jax.random.fold_in(jax.random.key(0), 5), "max_new_tokens": 3, "temperature": 0.9, "stop_ids": byte().eos_ids}
    own, theirs = (jax.tree.map(jnp.asarray, prompts) for prompts in (read.prompts, read.teacher_prompts))
    same(found, rollout.sample_mixture(*student, own, *teacher, theirs, beta=0.4, **asked))
    assert not np.array_equal(found.behaviour_logp_BT, made_by(2, source="dagger", beta=0.4).behaviour_logp_BT)


def test_a_mix_without_solutions_is_refused_unless_the_student_writes_every_step():
    empty = dataclasses.replace(batch(), examples=[Example(0, "ab")])
    student, mesh = models.tiny_config(259), parallel.make_mesh()
    settings = settings_of(source="mix", student_fraction=0.0)
    source = rollout.make_source(settings, tokenizer=byte(), student=student, teacher=None, seed=0, mesh=mesh)
    with pytest.raises(UserError, match=re.escape("rollout.source = 'mix': the example with prompt 'ab' has no solution to learn from")):
        source({}, None, empty, 0)
    for fraction, needed in ((0.0, True), (0.5, True), (1.0, False)):
        config = config_lib.Config(rollout=settings_of(source="mix", student_fraction=fraction))
        assert config_lib.needs_solutions(config) is needed and config_lib.own_draws(config) is not needed


# ---- what a config may ask


def parsed(**changes):
    c = config_lib.default()
    c.teacher.path = "somewhere"
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config_lib.parse(c)


SAMPLED = {"signal__support": "sampled"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout__student_fraction": 1.1}, "rollout.student_fraction = 1.1 must be between 0 and 1"),
        ({"rollout__beta": -0.1}, "rollout.beta = -0.1 must be between 0 and 1"),
        ({"rollout__beta_decay": 1.01}, "rollout.beta_decay = 1.01 must be between 0 and 1"),
        ({"rollout__round": 0}, "rollout.round = 0 must be at least 1"),
        (
            {"rollout__source": "dagger", "teacher__path": ""},
            "teacher.path = '' must name a model, because rollout.source = 'dagger' needs a teacher",
        ),
        (
            {"rollout__source": "mix"} | SAMPLED,
            "rollout.source = 'mix' must be 'student', because signal.support = 'sampled' needs draws of the student; "
            "or let rollout.student_fraction be 1",
        ),
        (
            {"rollout__source": "dagger"} | SAMPLED,
            "rollout.source = 'dagger' must be 'student', because signal.support = 'sampled' needs draws of the student; "
            "or let estimator.importance correct for who wrote",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'config field {message}')}$"):
        parsed(**changes)


def test_dagger_has_one_teacher():
    c = config_lib.default()
    c.rollout.source = "dagger"
    c.teacher.members = {"a": config_lib.member(path="a")}
    config_lib.parse(c)
    c.teacher.members = {name: config_lib.member(path=name) for name in "ab"}
    with pytest.raises(ConfigError, match="config field rollout.source = 'dagger' is one teacher's, not that of a, b"):
        config_lib.parse(c)


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout__source": "mix"},
        {"rollout__source": "mix", "rollout__student_fraction": 1.0} | SAMPLED,
        {"rollout__source": "dagger"},
        {"rollout__source": "dagger", "estimator__importance": "cumulative"} | SAMPLED,
    ],
)
def test_what_fits_is_not(changes):
    objective.from_config(parsed(**changes), has_teacher=True)


def test_importance_needs_a_law_and_rewards_the_students_own_completions():
    with pytest.raises(ConfigError, match="importance = 'token' needs the law .* rollout.source = 'mix' does not give"):
        objective.from_config(parsed(rollout__source="mix", estimator__importance="token"), has_teacher=True)
    objective.from_config(parsed(rollout__source="mix", rollout__student_fraction=1.0, estimator__importance="token"), has_teacher=True)
    rewarded = {"reward__weight": 1.0, "reward__advantage": "none"}
    for changes in ({"rollout__source": "mix"}, {"rollout__source": "dagger", "estimator__importance": "token"}):
        config = parsed(**rewarded, **changes)
        with pytest.raises(ConfigError, match=f"rollout.source = {config.rollout.source!r} must be 'student', because reward.weight = 1 "):
            rewards.check(config, tasks.from_config(config))
    config = parsed(rollout__source="mix", rollout__student_fraction=1.0, **rewarded)
    rewards.check(config, tasks.from_config(config))


def test_the_claim_of_dagger_says_what_its_correction_leaves():
    told = {}
    for importance in ("token", "cumulative", "sequence"):
        config = parsed(rollout__source="dagger", estimator__importance=importance, loss__normaliser="sequence_sum", **SAMPLED)
        told[importance] = claim.of_run(objective.from_config(config, has_teacher=True), config)
    assert told["cumulative"] == told["sequence"] == "Unbiased for the token-level reverse KL with prefixes held fixed"
    spoilt = ", but for: completions are drawn from the mixture with the teacher, corrected by estimator.importance=token"
    assert told["token"] == told["cumulative"] + spoilt


def test_the_work_of_two_writers_by_hand():
    """Both read every token that is written, each after its own prompt."""
    tokens = {"prompt": 10, "teacher_prompt": 30, "completion": 50}
    work = cost.account("dagger", 7, 7, 11, scorers=(11,)).work(**tokens)
    assert work == (2 * 7 * 60 + 2 * 11 * 80 + 2 * 11 * 80 + 6 * 7 * 60, 50, 50)


# ---- runs


def run_config(teacher, **changes):
    c = config_lib.default()
    c.seed, c.task.level, c.teacher.path = 7, 3, str(teacher)
    c.rollout.batch_size, c.rollout.max_new_tokens, c.rollout.group_size = 8, 4, 2
    c.student.init.hidden_size, c.student.init.intermediate_size, c.student.init.num_hidden_layers = 16, 16, 1
    c.steps, c.learner.decay_steps, c.eval.prompts, c.checkpoint.every, c.log.samples_every = 6, 6, 0, 2, 2
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return c


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    c = run_config("", rollout__source="dataset", signal__divergence="nll", steps=3)
    list(train.run(c, workdir))
    return workdir


def without_clock(records):
    return [{k: v for k, v in record.items() if not glossary.depends_on_clock(k)} for record in records]


RUNS = {
    "mix": {"rollout__source": "mix", "signal__divergence": "jsd", "log__diagnostics": True},
    "dagger": {"rollout__source": "dagger", "rollout__beta": 0.6, "rollout__beta_decay": 0.5, "rollout__round": 2}
    | {"signal__support": "sampled", "estimator__importance": "cumulative", "estimator__credit": "to_go"},
    "corrected": {"rollout__source": "corrected", "signal__divergence": "nll"},
}


@pytest.mark.slow
@pytest.mark.parametrize("source", RUNS)
def test_leaving_early_and_resuming_equals_one_run(source, teacher, tmp_path):
    whole = list(train.run(run_config(teacher, **RUNS[source]), tmp_path / "whole"))
    workdir = tmp_path / "left"
    for leave_after in (1, 4):
        for record in train.run(run_config(teacher, **RUNS[source]), workdir):
            if record["step"] == leave_after:
                break
    list(train.run(run_config(teacher, **RUNS[source]), workdir))
    assert without_clock(metrics.read(workdir / "metrics.jsonl")) == without_clock(whole)
    a, b = (jax.tree.leaves(model_io.open_model(str(path)).params) for path in (workdir, tmp_path / "whole"))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert (workdir / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    of_own = ("train/reverse_kl", "train/log_ratio_mean", "diag/ess_token")
    if source != "mix":
        assert not {"rollout/on_policy", *of_own} & {name for record in whole for name in record}
        return
    own = [record["rollout/on_policy"] for record in whole]
    assert own == [int(rollout.writer(config_lib.Rollout(source="mix"), 7, step) == "student") for step in range(6)]
    assert 0 < sum(own) < 6
    for record, on_policy in zip(whole, own, strict=True):
        assert [name in record for name in (*of_own, "rollout/reward")] == [bool(on_policy)] * 4
    generated = np.diff([record["cost/generated_tokens_total"] for record in whole], prepend=0)
    assert generated.tolist() == [record["train/tokens"] * on for record, on in zip(whole, own, strict=True)]


@pytest.mark.slow
def test_the_steps_of_a_mix_share_their_programs(teacher, tmp_path, caplog):
    """Completions of the data set and of the student give batches of one shape: after one step of each nothing is compiled."""
    c = run_config(teacher, **RUNS["mix"])
    seen, late = set(), []
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for record in train.run(c, tmp_path / "run"):
            found = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
            updates = [text for text in found if "update" in text.split(" with ")[0]]
            seen.add(record["rollout/on_policy"])
            late.append(len(updates))
    assert seen == {0, 1} and late[-1] == 1
