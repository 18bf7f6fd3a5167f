"""One update: microbatches, meshes and normalisers leave the gradient alone; equal models give none; bad numbers leave the state alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import context_of, ragged_prompts, ragged_rollout, tiny_model

from opd_jax import config as config_lib
from opd_jax import learner, objective, parallel, teachers
from opd_jax.models import spec, transformer
from opd_jax.types import view

pytestmark = pytest.mark.slow

LOSSES = {
    "reverse_kl": ("reverse_kl", "full", "token"),
    "forward_kl": ("forward_kl", "full", "token"),
    "jsd": ("jsd", "full", "token"),
    "sampled": ("reverse_kl", "sampled", "token"),
    "to_go": ("reverse_kl", "sampled", "to_go"),
    "nll": ("nll", "full", "token"),
    "leave_one_out": ("reverse_kl", "sampled", "to_go", {"baseline": "leave_one_out", "exact_future": True}),
    "position_mean": ("reverse_kl", "full", "to_go", {"baseline": "position_mean"}),
    "cumulative": ("reverse_kl", "sampled", "to_go", {"importance": "cumulative", "baseline": "batch_mean"}),
    "topk": ("jsd", "topk_union+token", "token"),
}


def make_objective(name="reverse_kl", normaliser="token_mean", has_teacher=True):
    divergence, support, credit, *choices = LOSSES[name]
    config = config_lib.Config(
        rollout=config_lib.Rollout(max_new_tokens=7, group_size=2),
        signal=config_lib.Signal(divergence, support, **({"k": 4, "tail": "bucket"} if "topk" in support else {})),
        estimator=config_lib.Estimator(credit, **(choices[0] if choices else {})),
        loss=config_lib.Loss(normaliser=normaliser),
    )
    return objective.from_config(config, has_teacher=has_teacher)


def test_jit_equals_no_jit():
    goal = make_objective("to_go")
    params, config, teacher_params, teacher_config, batch = make_case(goal, rows=2)
    compiled = gradient(goal, config, teacher_config, params, teacher_params, batch)
    plain = learner.gradient(goal, config, teachers.single(teacher_config), params, {"teacher": teacher_params}, batch)
    assert max_difference(compiled, plain) < 1e-5


def make_case(goal, teacher_seed=1, rows=8):
    rng = np.random.default_rng(0)
    params, config = tiny_model(0)
    teacher_params, teacher_config = tiny_model(teacher_seed)
    prompts, rollout = ragged_prompts(rng, rows), ragged_rollout(rng, rows)
    batch = learner.make_batch(goal, view(prompts, rollout), view(prompts, rollout), context_of(rollout))
    return params, config, teacher_params, teacher_config, batch


def gradient(goal, config, teacher_config, params, teacher_params, batch, *, microbatches=1):
    """learner.gradient, compiled."""
    function = functools.partial(learner.gradient, goal, config, teachers.single(teacher_config), microbatches=microbatches)
    return jax.jit(function)(params, {"teacher": teacher_params}, batch)


def max_difference(a, b):
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    ("name", "normaliser"),
    [
        *[("reverse_kl", normaliser) for normaliser in ("token_mean", "sequence_mean", "sequence_sum", "constant")],
        *[(name, "token_mean") for name in ("to_go", "leave_one_out", "position_mean", "cumulative")],
    ],
)
def test_microbatches_give_equal_gradients_with_ragged_lengths(name, normaliser):
    goal = make_objective(name, normaliser)
    params, config, teacher_params, teacher_config, batch = make_case(goal)
    whole = gradient(goal, config, teacher_config, params, teacher_params, batch, microbatches=1)
    assert float(optax.tree.norm(whole[2])) > 1e-3
    for pieces in (2, 4):
        split = gradient(goal, config, teacher_config, params, teacher_params, batch, microbatches=pieces)
        assert max_difference(whole[2], split[2]) < 1e-5 * float(optax.tree.norm(whole[2]))
        for a, b in zip(jax.tree.leaves(whole[:2]), jax.tree.leaves(split[:2]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "nll"])
def test_teacher_equal_to_student_gives_no_gradient_and_another_one_does(name):
    goal = make_objective(name)
    for teacher_seed, same in ((0, True), (1, False)):
        params, config, teacher_params, teacher_config, batch = make_case(goal, teacher_seed)
        loss, _, grads = gradient(goal, config, teacher_config, params, teacher_params, batch)
        norm = float(optax.tree.norm(grads))
        if same:
            assert float(loss) == 0.0 and norm == 0.0
        else:
            assert norm > 1e-3


def test_prompts_of_different_width_stay_aligned():
    """The teacher reads a prompt of its own; when it is the student's, padded wider, nothing changes."""
    goal = make_objective()
    params, config, _, _, batch = make_case(goal)
    wide = batch.teacher.replace(
        prompt_BS=jnp.pad(batch.teacher.prompt_BS, ((0, 0), (5, 0)), constant_values=3),
        prompt_mask_BS=jnp.pad(batch.teacher.prompt_mask_BS, ((0, 0), (5, 0))),
    )
    loss, _, _ = gradient(goal, config, config, params, params, batch.replace(teacher=wide))
    assert float(loss) < 1e-7
    other = batch.teacher.replace(prompt_BS=(batch.teacher.prompt_BS + 1) % 17)
    loss, _, _ = gradient(goal, config, config, params, params, batch.replace(teacher=other))
    assert float(loss) > 1e-3


def run_updates(mesh_shape, name="reverse_kl", microbatches=2, steps=2):
    goal = make_objective(name)
    params, config, teacher_params, teacher_config, batch = make_case(goal)
    mesh = parallel.make_mesh(*mesh_shape)
    place = lambda tree, c: jax.device_put(jax.device_get(tree), spec.shardings(transformer.param_specs(c), mesh))
    optimizer = learner.make_optimizer(config_lib.Learner(learning_rate=1e-2), steps=10)
    state = learner.init_state(place(params, config), optimizer)
    update = learner.make_update(goal, config, teachers.single(teacher_config), optimizer, microbatches=microbatches, state=state)
    teacher_params = place(teacher_params, teacher_config)
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, metrics = update(state, {"teacher": teacher_params}, learner.place(mesh, batch))
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}, update


@pytest.mark.parametrize("name", ["reverse_kl", "topk"])
def test_eight_devices_equal_one(name):
    one, metrics_one, _ = run_updates((1, 1, 1), name)
    eight, metrics_eight, update = run_updates((2, 2, 2), name)
    assert metrics_eight == pytest.approx(metrics_one, rel=1e-4)
    assert max_difference(one.params, eight.params) < 1e-5
    assert update._cache_size() == 1


def test_parameters_and_moments_are_sharded():
    goal = make_objective()
    params, config, *_ = make_case(goal)
    mesh = parallel.make_mesh(2, 2, 2)
    params = jax.device_put(jax.device_get(params), spec.shardings(transformer.param_specs(config), mesh))
    state = learner.init_state(params, learner.make_optimizer(config_lib.Learner(), steps=10))
    sharded = [leaf for leaf in jax.tree.leaves(state.params) if leaf.addressable_shards[0].data.size < leaf.size]
    assert len(sharded) > 5
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim >= 2]
    assert len(moments) == 2 * len([p for p in jax.tree.leaves(params) if p.ndim >= 2])
    assert all(m.sharding.spec in {p.sharding.spec for p in jax.tree.leaves(params)} for m in moments)


def test_a_gradient_that_is_not_finite_stops_all_later_updates():
    goal = make_objective()
    params, config, teacher_params, teacher_config, batch = make_case(goal)
    optimizer = learner.make_optimizer(config_lib.Learner(), steps=10)
    state = learner.init_state(params, optimizer)
    before = jax.device_get(state)
    update = learner.make_update(goal, config, teachers.single(teacher_config), optimizer, microbatches=1, state=state)
    bad = jax.tree.map(lambda p: p * jnp.nan, teacher_params)
    state, metrics = update(state, {"teacher": bad}, batch)
    assert not np.isfinite(float(metrics["train/loss"]))
    state, metrics = update(state, {"teacher": teacher_params}, batch)
    assert np.isfinite(float(metrics["train/loss"])) and not bool(state.finite)
    assert int(state.step) == 0
    assert max_difference(before.params, jax.device_get(state).params) == 0.0


def test_all_masked_batch_changes_nothing():
    goal = make_objective()
    params, config, teacher_params, teacher_config, batch = make_case(goal)
    context = batch.shares[0].context
    nothing = dataclasses.replace(context, mask_BT=jnp.zeros_like(context.mask_BT))
    empty = learner.make_batch(goal, batch.student, batch.teacher, nothing)
    loss, _, grads = gradient(goal, config, teacher_config, params, teacher_params, empty)
    assert float(loss) == 0.0 and float(optax.tree.norm(grads)) == 0.0


def test_weight_decay_spares_norms_and_biases():
    settings = config_lib.Learner(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    params = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    optimizer = learner.make_optimizer(settings, steps=10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"], 0.0)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules(name):
    schedule = learner.make_schedule(config_lib.Learner(learning_rate=2.0, schedule=name, warmup_steps=4, final_fraction=0.1), steps=24)
    assert [float(schedule(i)) for i in (0, 2, 4)] == pytest.approx([0.0, 1.0, 2.0])
    middle, end = {"constant": (2.0, 2.0), "linear": (1.1, 0.2), "cosine": (1.1, 0.2)}[name]
    assert [float(schedule(14)), float(schedule(24))] == pytest.approx([middle, end])
