"""The teacher bank in an update: self-teachers between their ends, routes against rows alone, mixtures against dense logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import context_of, ragged_prompts, ragged_rollout, tiny_model

from opd_jax import config as config_lib
from opd_jax import learner, objective, teachers
from opd_jax.models import transformer
from opd_jax.teachers import Bank
from opd_jax.types import UserError, view

ROWS = 8


def config_of(**blocks):
    return dataclasses.replace(config_lib.Config(), **blocks)


def goal_of(**blocks):
    return objective.from_config(config_of(**blocks), has_teacher=True)


@functools.cache
def case():
    """(student, two teachers of other shapes, prompts of students and of teachers, completions)."""
    rng = np.random.default_rng(0)
    others = (tiny_model(1), tiny_model(2, num_hidden_layers=1))
    return tiny_model(0), others, ragged_prompts(rng, ROWS), ragged_prompts(rng, ROWS, width=9), ragged_rollout(rng, ROWS)


def batch_of(goal, *, route_B=None, rows=slice(None), contexts=None):
    _, _, own, theirs, completions = jax.tree.map(lambda x: x, case())
    student, teacher = view(own, completions), view(theirs, completions)
    take = lambda tree: jax.tree.map(lambda x: x[rows], tree)
    context = context_of(take(completions))
    return learner.make_batch(goal, take(student), take(teacher), context, contexts=contexts, route_B=route_B)


def gradient(goal, bank, frozen, batch, *, params=None, kept=None, microbatches=1):
    (own, config), *_ = case()
    function = functools.partial(learner.gradient, goal, config, bank, microbatches=microbatches)
    return jax.jit(function)(own if params is None else params, frozen, batch, kept=kept)


def same(a, b, tolerance=1e-6):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) <= tolerance


def members():
    (one, one_config), (two, two_config) = case()[1]
    return {"one": one, "two": two}, (("one", one_config), ("two", two_config))


# ---- self-teachers


def self_bank(update, **settings):
    return Bank(members=(("teacher", case()[0][1]),), update=update, **settings)


def trained(update, steps=3, **settings):
    """(state after some updates, the metrics of the last)."""
    (params, config), *_ = case()
    bank, goal = self_bank(update, **settings), goal_of()
    optimizer = learner.make_optimizer(config_lib.Learner(learning_rate=1e-2, schedule="constant"), steps=10)
    state = learner.init_state(jax.tree.map(jnp.copy, params), optimizer, bank)
    run = learner.make_update(goal, config, bank, optimizer, microbatches=2, state=state)
    for _ in range(steps):
        state, metrics = run(state, {"teacher": params}, batch_of(goal))
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def frozen_and_live():
    return trained("frozen"), trained("live")


@pytest.mark.parametrize("update, rate", [("ema", 0.0), ("trust_region", 0.0)])
def test_at_rate_0_a_self_teacher_is_frozen(update, rate, frozen_and_live):
    state, metrics = trained(update, rate=rate)
    assert same(state.params, frozen_and_live[0][0].params, 1e-5)
    assert metrics["train/loss"] == pytest.approx(frozen_and_live[0][1]["train/loss"], rel=1e-4)


@pytest.mark.parametrize("update, settings", [("ema", {"rate": 1.0}), ("trust_region", {"rate": 1.0}), ("sync", {"every": 1})])
def test_at_the_other_end_it_is_live(update, settings, frozen_and_live):
    state, metrics = trained(update, **settings)
    assert same(state.params, frozen_and_live[1][0].params, 1e-5)
    assert metrics["train/loss"] == pytest.approx(frozen_and_live[1][1]["train/loss"], rel=1e-4)
    assert abs(metrics["train/loss"] - frozen_and_live[0][1]["train/loss"]) > 1e-3


def test_an_average_moves_by_its_rate_after_every_update():
    (before, _), *_ = case()
    one, two = (trained("ema", steps=steps, rate=0.25)[0] for steps in (1, 2))
    first = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before, one.params)
    assert same(one.kept, first) and not same(one.kept, one.params, 1e-3)
    assert same(two.kept, jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, first, two.params))


def test_a_copy_is_made_when_it_is_due():
    (before, _), *_ = case()
    assert same(trained("sync", steps=1, every=2)[0].kept, before, 0.0)
    two, three = (trained("sync", steps=steps, every=2)[0] for steps in (2, 3))
    assert same(two.kept, two.params, 1e-7)  # but for the rounding of a second computation of the same update
    assert same(three.kept, two.kept, 0.0) and not same(three.kept, three.params, 1e-3)


def test_a_trust_region_is_the_geometric_mixture_of_the_first_and_the_live_student():
    (params, config), ((other, _), _), _, theirs, completions = case()
    goal, rate, teacher_view = goal_of(), 0.3, view(theirs, completions)
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    found = gradient(goal, self_bank("trust_region", rate=rate), {"teacher": params}, batch_of(goal), params=moved)[2]
    logits = lambda p: transformer.hidden(p, config, teacher_view)
    laws = [jax.nn.log_softmax(jnp.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV)) for head in map(logits, (params, moved))]
    mixture = jax.nn.log_softmax((1 - rate) * laws[0] + rate * laws[1])
    assert same(found, by_hand(mixture, moved), 1e-5)


def by_hand(target_BTV, params):
    """The gradient of the mean reverse KL per token to a law, without token_stats."""
    (_, config), _, own, _, completions = case()

    def loss(params):
        head = transformer.hidden(params, config, view(own, completions))
        logp = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV))
        return jnp.sum(jnp.where(completions.mask_BT, jnp.sum(jnp.exp(logp) * (logp - target_BTV), -1), 0)) / completions.mask_BT.sum()

    return jax.grad(loss)(params)


def laws_of_members():
    _, others, _, theirs, completions = case()
    heads = [transformer.hidden(params, config, view(theirs, completions)) for params, config in others]
    return [jax.nn.log_softmax(jnp.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV)) for head in heads]


# ---- several members


@pytest.mark.parametrize("combine", ["geometric", "arithmetic"])
def test_mixtures_by_weight(combine):
    frozen, models = members()
    found = gradient(goal_of(), Bank(models, (0.25, 0.75), combine), frozen, batch_of(goal_of()))[2]
    one, two = laws_of_members()
    arithmetic = jnp.logaddexp(jnp.log(0.25) + one, jnp.log(0.75) + two)
    expected = arithmetic if combine == "arithmetic" else jax.nn.log_softmax(0.25 * one + 0.75 * two)
    assert same(found, by_hand(expected, case()[0][0]), 1e-5)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_routed_rows_see_their_own_teacher_alone(microbatches):
    frozen, models = members()
    goal, route_B = goal_of(loss=config_lib.Loss(normaliser="sequence_sum")), np.array([0, 1, 1, 0, 1, 0, 0, 1])
    routed = gradient(goal, Bank(models, (0.5, 0.5)), frozen, batch_of(goal, route_B=jnp.asarray(route_B)), microbatches=microbatches)
    alone = []
    for number, name in enumerate(("one", "two")):
        rows = np.flatnonzero(route_B == number)
        one = teachers.single(models[number][1])
        alone.append(gradient(goal, one, {"teacher": frozen[name]}, batch_of(goal, rows=rows)))
    assert float(routed[0]) == pytest.approx(0.5 * sum(float(one[0]) for one in alone), rel=1e-5)
    halves = jax.tree.map(lambda a, b: 0.5 * (a + b), alone[0][2], alone[1][2])
    assert same(routed[2], halves, 1e-5)


# ---- a reference


def test_scale_1_does_not_look_at_the_reference():
    frozen, models = members()
    plain = gradient(goal_of(), teachers.single(models[0][1]), {"teacher": frozen["one"]}, batch_of(goal_of()))
    bank = Bank(models[:1], scale=1.0, reference=models[1][1])
    again = gradient(goal_of(), bank, frozen | {"reference": jax.tree.map(lambda x: x * jnp.nan, frozen["two"])}, batch_of(goal_of()))
    assert same(plain, again, 0.0)


@pytest.mark.parametrize("combine, route", [("geometric", None), ("route", (0, 1, 1, 0, 1, 0, 0, 1))])
def test_extrapolation_beyond_each_rows_law(combine, route):
    (params, config), *_, own, _, completions = case()
    frozen, models = members()
    bank = Bank(models, (0.5, 0.5), combine, scale=1.5, reference=config)
    batch = batch_of(goal_of(), route_B=None if route is None else jnp.array(route))
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    found = gradient(goal_of(), bank, frozen | {"reference": params}, batch, params=moved)[2]
    one, two = laws_of_members()
    base = 0.5 * (one + two) if route is None else jnp.where(jnp.array(route)[:, None, None] == 0, one, two)
    head = transformer.hidden(params, config, view(own, completions))
    reference = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV))
    assert same(found, by_hand(jax.nn.log_softmax(1.5 * base - 0.5 * reference), moved), 1e-5)


# ---- what is refused


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({"teacher": config_lib.Teacher(path="x", update="ema")}, "teacher.update = 'ema' is for a self-teacher"),
        ({"teacher": config_lib.Teacher(path="x", update="emma")}, "did you mean ema?"),
        ({"teacher": config_lib.Teacher(path="x", members={"a": config_lib.Member(path="y")})}, "two answers; give one"),
        ({"teacher": config_lib.Teacher(members={"reference": config_lib.Member(path="y")})}, "is the name of another model"),
        (
            {"teacher": config_lib.Teacher(members={"a": config_lib.Member(path="y", tag="b"), "b": config_lib.Member(path="z")})},
            "two members have one tag (b, b)",
        ),
        (
            {
                "teacher": config_lib.Teacher(path="x"),
                "extrapolation": config_lib.Extrapolation(scale=1.5, normalise=False),
                "signal": config_lib.Signal("forward_kl"),
            },
            "extrapolation.normalise = False needs signal.divergence = 'reverse_kl'",
        ),
        ({"teacher": config_lib.Teacher(members={"a": config_lib.Member()})}, "teacher.members.a.path = '' must name a model"),
        ({"teacher": config_lib.Teacher(members={"a": config_lib.Member(path="y", weight=0.0)})}, "weight = 0.0 must be above 0"),
        (
            {
                "teacher": config_lib.Teacher(members={n: config_lib.Member(path=n) for n in "ab"}, combine="arithmetic"),
                "extrapolation": config_lib.Extrapolation(scale=1.5),
            },
            "use 'route' or 'geometric'",
        ),
    ],
)
def test_banks_that_make_no_sense_are_refused(blocks, words):
    with pytest.raises(UserError) as error:
        goal_of(**blocks)
    assert words in str(error.value)
