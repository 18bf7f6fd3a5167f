"""Rollout sources of two writers: dagger's mixture of laws against enumeration, mix's choice of steps, what a run says of both."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import scipy.stats
from test_sampler import numpy_law

from opd_jax import config as config_lib
from opd_jax import cost, glossary, metrics, model_io, objective, parallel, rewards, rollout, sampler, train
from opd_jax.config import ConfigError
from opd_jax.data import pipeline, tasks
from opd_jax.data.tasks import Example
from opd_jax.data.tokenizer import byte
from opd_jax.models import transformer
from opd_jax.sampler import Law
from opd_jax.types import Prompts, UserError

KEY = jax.random.key(3)
STOP, LENGTH = 1, 2


# ---- one draw


def draws(count, *, beta, law, shared=5, seed=0):
    """(logits of student and teacher, of other widths, what many draws from them gave)."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=7), rng.normal(size=6)
    id_B = jnp.arange(count, dtype=jnp.uint32)
    uniform_B, writer_B = (sampler.uniforms(jax.random.key(k), id_B, jnp.int32(0)) for k in (1, 2))
    wide = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), (count, len(x))) for x in (student, teacher)]
    return student, teacher, sampler.draw_mixture(*wide, uniform_B, writer_B, jnp.float32(beta), law, shared)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("law", [Law(), Law(temperature=0.7, top_k=3)], ids=["plain", "truncated"])
def test_draws_follow_the_mixture_of_the_two_laws_on_the_tokens_that_both_have(beta, law):
    count = 20_000
    student, teacher, (token_B, logp_B, behaviour_B) = draws(count, beta=beta, law=law)
    mixture = beta * numpy_law(teacher[:5], law) + (1 - beta) * numpy_law(student[:5], law)
    observed = np.bincount(np.asarray(token_B), minlength=5)
    assert len(observed) == 5 and not observed[mixture == 0].any()
    assert scipy.stats.chisquare(observed[mixture > 0], count * mixture[mixture > 0]).pvalue > 1e-3
    np.testing.assert_allclose(behaviour_B, np.log(mixture[token_B]), atol=1e-5)
    whole = np.log(numpy_law(student, Law()))  # the policy of the loss knows its other rows too
    np.testing.assert_allclose(logp_B, whole[token_B], atol=1e-5)


# ---- completions


@functools.cache
def case():
    """(student, teacher, the student's prompts, the teacher's own, of another width); 12 rows."""
    student, teacher = (models.tiny_model(seed, scale=6.0, num_hidden_layers=1) for seed in (1, 2))
    rng = np.random.default_rng(0)
    return student, teacher, models.ragged_prompts(rng, 12, width=5), models.ragged_prompts(rng, 12, width=7)


def mixed(beta, own=None, theirs=None, *, student=None, teacher=None, **changes):
    one, two, prompts, teacher_prompts = case()
    asked = {"key": KEY, "max_new_tokens": 6, "stop_ids": (STOP, 4)} | changes
    reads = (prompts if own is None else own), (teacher_prompts if theirs is None else theirs)
    return rollout.sample_mixture(*(student or one), reads[0], *(teacher or two), reads[1], beta=beta, **asked)


def fields(found, but=()):
    return {name: np.asarray(getattr(found, name)) for name in found.__dataclass_fields__ if name not in but}


def same(a, b, but=()):
    for name, value in fields(a, but).items():
        np.testing.assert_array_equal(value, np.asarray(getattr(b, name)), err_msg=name)


def rows_of(prompts, rows):
    return jax.tree.map(lambda x: x[np.asarray(rows)], prompts)


def log_probs(model, prompts, tokens_BT):
    """[B, T] float64, from one pass without a cache."""
    params, config = model
    tokens = jnp.concatenate([prompts.tokens_BS, tokens_BT], axis=1)
    mask_BL = jnp.concatenate([prompts.mask_BS, jnp.ones(tokens_BT.shape, bool)], axis=1)
    logits = transformer.apply(params, config, tokens, mask_BL=mask_BL)[:, prompts.tokens_BS.shape[1] - 1 : -1]
    logp = np.asarray(logits, np.float64) - np.log(np.exp(np.asarray(logits, np.float64)).sum(-1, keepdims=True))
    return np.take_along_axis(logp, np.asarray(tokens_BT)[:, :, None], axis=-1)[:, :, 0]


@pytest.mark.parametrize("law", [{}, pytest.param({"top_p": 0.8}, marks=pytest.mark.slow)], ids=["plain", "truncated"])
def test_at_its_ends_the_mixture_is_one_model_bit_for_bit(law):
    """Two writers may not cost a bit: the student's draws, and the teacher's after its own prompt, whose log-probs are the behaviour's."""
    student, teacher, prompts, teacher_prompts = case()
    asked = {"key": KEY, "max_new_tokens": 6, "stop_ids": (STOP, 4)} | law
    same(mixed(0.0, **law), rollout.sample(*student, prompts, **asked))
    taught = mixed(1.0, **law)
    same(taught, rollout.sample(*teacher, teacher_prompts, **asked), but=("logp_BT",))
    expected = np.where(taught.mask_BT, log_probs(student, prompts, taught.tokens_BT), 0)
    np.testing.assert_allclose(taught.logp_BT, expected, atol=1e-4)


def test_both_log_probs_are_those_of_a_pass_over_the_whole_text():
    student, teacher, prompts, teacher_prompts = case()
    found = mixed(0.4)
    mask_BT = np.asarray(found.mask_BT)
    own, theirs = log_probs(student, prompts, found.tokens_BT), log_probs(teacher, teacher_prompts, found.tokens_BT)
    np.testing.assert_allclose(found.logp_BT, np.where(mask_BT, own, 0), atol=1e-4)
    mixture = np.log(0.4 * np.exp(theirs) + 0.6 * np.exp(own))
    np.testing.assert_allclose(found.behaviour_logp_BT, np.where(mask_BT, mixture, 0), atol=1e-4)
    assert np.asarray(found.stopped_B).any() and not np.asarray(found.stopped_B).all()
    alone = [mixed(beta).tokens_BT for beta in (0.0, 1.0)]
    assert not any(np.array_equal(found.tokens_BT, tokens) for tokens in alone)


def test_completions_come_as_often_as_their_probability_says():
    """All completions of at most two tokens, enumerated: each token has a writer of its own, and each model has its cache."""
    vocab, count, beta = 4, 6000, 0.35
    student, teacher = (models.tiny_model(seed, scale=6.0, num_hidden_layers=1, vocab_size=vocab) for seed in (4, 5))
    prompt = lambda tokens: Prompts(
        jnp.broadcast_to(jnp.array([tokens], jnp.int32), (count, len(tokens))),
        jnp.ones((count, len(tokens)), bool),
        jnp.arange(count, dtype=jnp.uint32),
    )
    own, theirs = prompt([2, 3]), prompt([0, 3, 0])
    found = mixed(beta, own, theirs, student=student, teacher=teacher, max_new_tokens=LENGTH, stop_ids=(STOP,))
    every = [(STOP,)] + [pair for pair in itertools.product(range(vocab), repeat=2) if pair[0] != STOP]
    padded = jnp.array([(pair * 2)[:2] for pair in every], jnp.int32)
    p, q = (log_probs(model, rows_of(read, range(len(every))), padded) for model, read in ((student, own), (teacher, theirs)))
    token_NT = np.log(beta * np.exp(q) + (1 - beta) * np.exp(p))
    expected = np.exp([row[: len(pair)].sum() for row, pair in zip(token_NT, every, strict=True)])
    assert expected.sum() == pytest.approx(1, abs=1e-5)
    drawn = [tuple(tokens[mask].tolist()) for tokens, mask in zip(np.asarray(found.tokens_BT), np.asarray(found.mask_BT), strict=True)]
    observed = np.array([drawn.count(pair) for pair in every])
    assert observed.sum() == count and expected.min() * count > 5
    assert scipy.stats.chisquare(observed, count * expected / expected.sum()).pvalue > 1e-3
    behaviour = np.asarray(found.behaviour_logp_BT).sum(1)
    np.testing.assert_allclose(behaviour, [np.log(expected[every.index(pair)]) for pair in drawn], atol=2e-5)


def near(a, b):
    same(a, b, but=("logp_BT", "behaviour_logp_BT"))
    for name in ("logp_BT", "behaviour_logp_BT"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_order_split_padding_and_length_change_nothing():
    _, _, own, theirs = case()
    whole = mixed(0.5)
    order = np.random.default_rng(1).permutation(12)
    near(mixed(0.5, rows_of(own, order), rows_of(theirs, order)), rows_of(whole, order))
    wide = lambda read: Prompts(
        jnp.pad(read.tokens_BS, ((0, 0), (3, 0)), constant_values=9), jnp.pad(read.mask_BS, ((0, 0), (3, 0))), read.id_B
    )
    part = [2, 7, 5]
    near(mixed(0.5, wide(rows_of(own, part)), wide(rows_of(theirs, part))), rows_of(whole, part))
    longer = mixed(0.5, max_new_tokens=9)
    np.testing.assert_array_equal(longer.tokens_BT[:, :6], whole.tokens_BT)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_draw_the_same_tokens(shape):
    (params, config), (teacher_params, teacher), own, theirs = case()
    own, theirs = rows_of(own, range(8)), rows_of(theirs, range(8))
    one, mesh = mixed(0.5, own, theirs), parallel.make_mesh(*shape)
    with jax.set_mesh(mesh):
        near(mixed(0.5, *parallel.shard_batch((own, theirs), mesh)), one)


def test_another_beta_compiles_nothing(caplog):
    mixed(0.5)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for beta in (0.0, 0.25, 1.0):
            mixed(beta)
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")] == []


@pytest.mark.slow
def test_tokens_that_the_student_does_not_have_are_not_drawn():
    """A teacher of 19 rows of which 14 are real, a student of 17: only the first 14 are drawn, whoever writes."""
    _, _, own, theirs = case()
    params, config = models.tiny_model(6, scale=6.0, num_hidden_layers=1, vocab_size=19)
    teacher = params, dataclasses.replace(config, valid_vocab_size=14)
    found = mixed(0.5, teacher=teacher, stop_ids=())
    assert int(jnp.max(found.tokens_BT)) < 14
    assert np.isfinite(found.logp_BT).all() and np.isfinite(found.behaviour_logp_BT).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"beta": 1.5}, "beta = 1.5 must be between 0 and 1"),
        ({"beta": float("nan")}, "beta = nan must be between 0 and 1"),
        ({"theirs": slice(3)}, "teacher_prompts has 3 rows and prompts 12; give one for each rollout"),
        ({"max_new_tokens": 58}, "a prompt of 7 tokens and max_new_tokens = 58 exceed the model's context of 64 tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be at least 1"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(changes, words):
    changes = {"beta": 0.5} | changes
    rows = changes.pop("theirs", slice(None))
    theirs = jax.tree.map(lambda x: x[rows], case()[3])
    theirs = theirs.replace(mask_BS=jnp.ones_like(theirs.mask_BS))
    with pytest.raises(UserError, match=re.escape(words)):
        mixed(changes.pop("beta"), theirs=theirs, **changes)


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
    for source in ("student", "teacher", "dataset", "dagger"):
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
    (params, student), mesh = byte_models()[0], parallel.make_mesh()
    source = rollout.make_source(
        settings_of(source="mix", student_fraction=0.0), tokenizer=byte(), student=student, teacher=None, seed=0, mesh=mesh
    )
    with pytest.raises(UserError, match=re.escape("rollout.source = 'mix': the example with prompt 'ab' has no solution to learn from")):
        source(params, None, empty, 0)
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
            "teacher.path = '' must name a model: rollout.source = 'dagger' needs a teacher",
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
    with pytest.raises(ConfigError, match="config field rollout.source = 'dagger' mixes with one teacher, not with a, b"):
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
        told[importance] = objective.claim(objective.from_config(config, has_teacher=True), config)
    assert told["cumulative"] == told["sequence"] == "Unbiased for the token-level reverse KL with prefixes held fixed"
    spoilt = ", but for: completions are drawn from the mixture with the teacher, corrected by estimator.importance=token"
    assert told["token"] == told["cumulative"] + spoilt


def test_the_work_of_two_writers_by_hand():
    """Both read every token that is written, each after its own prompt."""
    tokens = {"prompt": 10, "teacher_prompt": 30, "completion": 50}
    work = cost.account("dagger", 7, 7, 11, scored=True).work(**tokens)
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
    if source == "dagger":
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
