"""Adaptive extrapolation: the rule by NumPy, its two ends, its targets by hand, microbatches, whole runs; confidence in mixtures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from test_bank import batch_of, by_hand, case, config_of, goal_of, gradient, laws_of_members, members, same
from test_train import assert_same_student, opd_config, sft_config, without_clock

from opd_jax import claim, learner, metrics, objective, teachers, train
from opd_jax import config as config_lib
from opd_jax.models import transformer
from opd_jax.numerics.extrapolation import CALIBRATION, Rule
from opd_jax.teachers import Bank
from opd_jax.types import UserError, view

RULE = Rule(tau=0.5, max_gain=0.9)


def state_of(gain):
    """A state in which the next gain is this one, where max_gain is at least as large."""
    return {name: jnp.float32(value) for name, value in {"share": gain, "size": 1.0, "budget": 1.0, "updates": CALIBRATION}.items()}


def draws(seed, rows=4, length=5):
    rng = np.random.default_rng(seed)
    logp, target, reference = -rng.exponential(1, (3, rows, length))
    return logp, target, reference, rng.random((rows, length)) < 0.8


def test_the_rule_by_numpy():
    """In float64, over the calibration and beyond it."""
    state, gains, raw, shares, sizes = RULE.begin(), [], [], [], []
    for update in range(CALIBRATION + 5):
        logp, target, reference, mask = draws(update)
        target = target * 0.8**update  # what is left to go changes from update to update
        gains.append(float(RULE.gain(state)))
        near = RULE.nearness(jnp.float32(logp), jnp.float32(target), jnp.float32(reference))
        state = RULE.advance(state, RULE.sums(near, jnp.float32(target - reference), mask, gains[-1]))
        x, d = (target - logp)[mask], (target - reference)[mask]
        q = np.exp(-(np.exp(x) - x - 1) / 0.5)
        np.testing.assert_allclose(np.asarray(near)[mask], q, rtol=2e-5, atol=1e-30)
        if update >= CALIBRATION:
            expected = np.clip(np.mean(raw[:CALIBRATION]) * shares[-1] / sizes[-1], 0, 0.9)
            assert gains[-1] == pytest.approx(expected, rel=1e-4) and 0 < expected < 0.9
        rho, s = (abs(d) * q).sum() / abs(d).sum(), np.sqrt(np.mean((d * q) ** 2))
        raw.append(s)
        shares.append(rho if not shares else 0.95 * shares[-1] + 0.05 * rho)
        sizes.append(s if not sizes else 0.9 * sizes[-1] + 0.1 * s)
    assert gains[:CALIBRATION] == [0.0] * CALIBRATION
    assert float(dataclasses.replace(RULE, max_gain=0.01).gain(state)) == pytest.approx(0.01)


def test_tokens_that_are_ruled_out_and_updates_without_a_token_change_nothing():
    logp = jnp.log(jnp.array([[0.5, 0.5, 0.5]]))
    target, reference = jnp.array([[-1.0, -jnp.inf, -1.0]]), jnp.array([[-2.0, -1.0, -jnp.inf]])
    near = RULE.nearness(logp, target, reference)
    assert near[0, 0] > 0 and near[0, 1] == near[0, 2] == 0
    mask = jnp.ones((1, 3), bool)
    found = RULE.sums(near, target - reference, mask, 0.5)
    alone = RULE.sums(near[:, :1], (target - reference)[:, :1], mask[:, :1], 0.5)
    assert all(float(found[name]) == float(alone[name]) for name in alone if name != "scale")
    assert float(found["scale"]) == pytest.approx(3 + 0.5 * float(near[0, 0]))
    none = RULE.sums(near, target - reference, jnp.zeros((1, 3), bool), 0.5)
    assert RULE.advance(state_of(0.3), none) == state_of(0.3)


def adaptive_bank(rule, **settings):
    """One teacher and, as the reference, the student as it was."""
    return Bank(members()[1][:1], rule=rule, reference=case()[0][1], **settings)


def frozen_of():
    return members()[0] | {"reference": case()[0][0]}


def moved():
    return jax.tree.map(lambda x: 1.1 * x, case()[0][0])


def adaptive_gradient(bank, gain, **more):
    (_, config), *_ = case()
    batch, goal = batch_of(goal_of(), **more), goal_of()
    function = jax.jit(lambda p, f, b, a: learner.gradient(goal, config, bank, p, f, b, adaptive=a))
    return function(moved(), frozen_of(), batch, state_of(gain))


def test_without_a_gain_the_reference_is_not_looked_at():
    plain = gradient(goal_of(), teachers.single(members()[1][0][1]), {"teacher": frozen_of()["one"]}, batch_of(goal_of()), params=moved())
    found = adaptive_gradient(adaptive_bank(dataclasses.replace(RULE, max_gain=0.0), normalise=False), 0.4)
    assert same(found[2], plain[2], 1e-7) and float(found[1]["scale"]) == float(found[1]["tokens"])


def test_where_every_token_is_near_a_gain_is_a_fixed_scale():
    bank = Bank(members()[1][:1], scale=1.25, reference=case()[0][1])
    fixed = gradient(goal_of(), bank, frozen_of(), batch_of(goal_of()), params=moved())
    found = adaptive_gradient(adaptive_bank(Rule(tau=1e30)), 0.25)
    assert same(found[2], fixed[2], 1e-6) and float(found[1]["scale"] / found[1]["tokens"]) == pytest.approx(1.25)
    other = adaptive_gradient(adaptive_bank(Rule(tau=0.5)), 0.25)
    assert not same(other[2], fixed[2], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["one", "route", "geometric"])
def test_each_token_has_its_own_target(combine):
    """By dense logits: near tokens beyond the law of the row, others at it."""
    (params, config), *_, own, _, completions = case()
    route_B = jnp.array([0, 1, 1, 0, 1, 0, 0, 1])
    several = Bank(members()[1], (0.5, 0.5), combine, rule=RULE, reference=config)
    bank = adaptive_bank(RULE) if combine == "one" else several
    found = adaptive_gradient(bank, 0.8, route_B=route_B if combine == "route" else None)
    dense = lambda p: jax.nn.log_softmax(
        (lambda head: jnp.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV))(transformer.hidden(p, config, view(own, completions)))
    )
    one, two = laws_of_members()
    routed, mixture = jnp.where(route_B[:, None, None] == 0, one, two), jax.nn.log_softmax(0.5 * (one + two))
    base = {"one": one, "route": routed, "geometric": mixture}[combine]
    x = jnp.take_along_axis(base - dense(moved()), completions.tokens_BT[..., None], -1)
    scale = 1 + 0.8 * jnp.exp(-(jnp.exp(x) - x - 1) / RULE.tau)
    assert same(found[2], by_hand(jax.nn.log_softmax(scale * base + (1 - scale) * dense(params)), moved()), 1e-5)
    assert float(found[1]["scale"]) == pytest.approx(float(jnp.sum(jnp.where(completions.mask_BT, scale[..., 0], 0))), rel=1e-5)


@pytest.mark.slow
def test_the_state_is_the_same_at_any_number_of_microbatches():
    (_, config), *_ = case()
    bank, optimizer = adaptive_bank(RULE), learner.make_optimizer(config_lib.Learner(schedule="constant"), steps=10)
    ends = []
    for microbatches in (1, 4):
        state = learner.init_state(moved(), optimizer, bank).replace(adaptive=state_of(0.3))
        run = learner.make_update(goal_of(), config, bank, optimizer, microbatches=microbatches, state=state)
        for _ in range(2):
            state, measured = run(state, frozen_of(), batch_of(goal_of()))
        assert 0 < measured["extrapolation/gain"] < 0.9 and 1 < measured["extrapolation/scale"] < 1.9
        ends.append(jax.device_get((state.adaptive, state.params)))
    assert ends[0][0]["updates"] == CALIBRATION + 2
    assert same(*(end[0] for end in ends), 1e-6) and same(*(end[1] for end in ends), 1e-5)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tmp_path):
    list(train.run(sft_config(), tmp_path / "base"))
    c = opd_config(tmp_path / "base", steps=CALIBRATION + 3)
    c.student.init.hidden_size, c.eval.prompts, c.learner.learning_rate = 24, 0, 1e-2
    c.extrapolation.adaptive, c.extrapolation.tau = True, 0.5
    for record in train.run(c, tmp_path / "left"):
        if record["step"] == CALIBRATION + 1:
            break
    list(train.run(c, tmp_path / "left"))
    whole = list(train.run(c, tmp_path / "whole"))
    assert without_clock(metrics.read(tmp_path / "left" / "metrics.jsonl")) == without_clock(whole)
    assert_same_student(tmp_path / "left", tmp_path / "whole")
    assert set(whole[-1]) <= set(metrics.GLOSSARY)
    assert [record["extrapolation/gain"] > 0 for record in whole] == [False] * CALIBRATION + [True] * 3
    assert whole[-1]["extrapolation/scale"] > 1 == whole[0]["extrapolation/scale"]


# ---- confidence


@pytest.mark.parametrize("combine", ["geometric", "arithmetic"])
def test_certain_members_weigh_more(combine):
    frozen, models = members()
    found = gradient(goal_of(), Bank(models, (0.25, 0.75), combine, confidence=0.7), frozen, batch_of(goal_of()))[2]
    laws = np.stack(laws_of_members()).astype(np.float64)
    entropy = -np.sum(np.exp(laws) * laws, -1, keepdims=True)
    log_w = np.log(np.array([0.25, 0.75]))[:, None, None, None] - entropy / 0.7
    log_w = log_w - scipy.special.logsumexp(log_w, axis=0)
    arithmetic = scipy.special.logsumexp(log_w + laws, axis=0)
    law = arithmetic if combine == "arithmetic" else scipy.special.log_softmax(np.sum(np.exp(log_w) * laws, 0), axis=-1)
    assert same(found, by_hand(jnp.float32(law), case()[0][0]), 1e-5)


def test_at_a_high_temperature_confidence_is_gone():
    frozen, models = members()
    bank = Bank(models, (0.25, 0.75), "geometric")
    plain, found = (gradient(goal_of(), b, frozen, batch_of(goal_of()))[2] for b in (bank, dataclasses.replace(bank, confidence=1e9)))
    assert same(plain, found, 1e-6)


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({"extrapolation": {"adaptive": True, "scale": 1.5}}, "extrapolation.scale = 1.5 must be 1, because extrapolation.adaptive"),
        ({"extrapolation": {"adaptive": True}, "teacher": {"path": "", "combine": "arithmetic"}}, "not teacher.combine = 'arithmetic'"),
        ({"extrapolation": {"adaptive": True, "normalise": False}, "signal": {"divergence": "forward_kl"}}, "needs signal.divergence"),
        (
            {"extrapolation": {"adaptive": True}, "signal": {"divergence": "nll"}, "rollout": {"source": "dataset"}},
            "extrapolation.adaptive = True needs a teacher that scores",
        ),
        (
            {"extrapolation": {"adaptive": True}, "signal": {"weight": 0.0}, "loss": {"labels": 1.0}},
            "and a term that compares with it; give teacher.path and signal.weight",
        ),
        ({"teacher": {"confidence": 1.0}}, "teacher.confidence = 1 weighs members of a mixture"),
        ({"teacher": {"path": "", "confidence": 1.0}}, "teacher.combine = 'geometric' or 'arithmetic'"),
        ({"extrapolation": {"tau": 0.0}}, "extrapolation.tau = 0.0 must be above 0"),
        ({"extrapolation": {"max_gain": -1.0}}, "extrapolation.max_gain = -1.0 must be 0 or more"),
        ({"teacher": {"confidence": -1.0}}, "teacher.confidence = -1.0 must be 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(blocks, words):
    c = config_lib.default()
    c.teacher.path = "x"
    for block, fields in blocks.items():
        c[block].update(fields)
    if not c.teacher.path:
        c.teacher.members.update({name: config_lib.member(path=name) for name in "ab"})
    with pytest.raises(UserError) as error:
        objective.from_config(config_lib.parse(c), has_teacher=True)
    assert words in str(error.value)


def test_the_claim_says_that_no_fixed_target_is_followed():
    config = config_of(
        teacher=config_lib.Teacher(members={n: config_lib.Member(path=n) for n in "ab"}, combine="geometric", confidence=0.5),
        extrapolation=config_lib.Extrapolation(adaptive=True),
    )
    said = claim.of_run(objective.from_config(config, has_teacher=True), config)
    assert "no fixed objective (extrapolation.adaptive=True)" in said and "(teacher.confidence=0.5)" in said
