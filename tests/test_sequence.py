"""The mesh axis along the length: the same numbers, and each device holds its part of what scoring and learning keep of every token."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import context_of, ragged_prompts, ragged_rollout, tiny_config, tiny_model
from test_learner import make_objective

from opd_jax import config as config_lib
from opd_jax import learner, parallel, rollout, score, teachers
from opd_jax.models import forward, spec, transformer
from opd_jax.types import view

pytestmark = pytest.mark.slow

SHAPES = [(1, 1, 1, 8), (2, 1, 2, 2), (1, 2, 1, 4)]


def placed(params, config, mesh):
    return jax.device_put(jax.device_get(params), spec.shardings(transformer.param_specs(config), mesh))


def updated(shape, *, remat=False):
    """(state, metrics) after two updates at a width of 16 tokens, 8 of which are learnt from."""
    rng, goal, mesh = np.random.default_rng(0), make_objective("to_go"), parallel.make_mesh(*shape)
    (params, config), (teacher, teacher_config) = tiny_model(0, remat=remat), tiny_model(1)
    prompts, completions = ragged_prompts(rng, width=8), ragged_rollout(rng, length=8)
    batch = learner.make_batch(goal, view(prompts, completions), view(prompts, completions), context_of(completions))
    optimizer = learner.make_optimizer(config_lib.Learner(learning_rate=1e-2), steps=10)
    state = learner.init_state(placed(params, config, mesh), optimizer)
    update = learner.make_update(goal, config, teachers.single(teacher_config), optimizer, microbatches=2, state=state)
    with jax.set_mesh(mesh):
        for _ in range(2):
            state, metrics = update(state, {"teacher": placed(teacher, teacher_config, mesh)}, learner.place(mesh, batch))
    return jax.device_get(state), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_those_of_one_device(shape):
    (one, metrics_one), (many, metrics_many) = updated((1, 1, 1, 1)), updated(shape)
    assert metrics_many == pytest.approx(metrics_one, rel=1e-4)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_draws_are_those_of_one_device(shape):
    params, config = tiny_model(0)
    prompts, mesh = ragged_prompts(np.random.default_rng(1), width=8), parallel.make_mesh(*shape)
    settings = {"key": jax.random.key(2), "max_new_tokens": 8, "stop_ids": (3,)}
    one = rollout.sample(params, config, prompts, **settings)
    logp_BT = score.logprobs(params, config, prompts, one)
    with jax.set_mesh(mesh):
        own, rows = placed(params, config, mesh), parallel.shard_batch(prompts, mesh)
        many = rollout.sample(own, config, rows, **settings)
        again_BT = score.logprobs(own, config, rows, many)
    np.testing.assert_array_equal(many.tokens_BT, one.tokens_BT)
    np.testing.assert_allclose(again_BT, logp_BT, atol=2e-5)


def program(shape, length):
    """The compiled program of a device that makes hidden states [8, length / 2, D] after prompts as long, and where these lie."""
    config, mesh = tiny_config(hidden_size=48, num_attention_heads=4, head_dim=16), parallel.make_mesh(*shape)
    rng = np.random.default_rng(0)
    read = view(ragged_prompts(rng, width=length // 2), ragged_rollout(rng, length=length // 2))
    with jax.set_mesh(mesh):
        params = transformer.init(jax.random.key(0), config, mesh=mesh)
        make = jax.jit(lambda params, read: forward.hidden(params, config, read).hidden_BTD)
        compiled = make.lower(params, parallel.shard_batch(read, mesh)).compile()
        return compiled.as_text(), compiled(params, parallel.shard_batch(read, mesh))


def test_each_device_holds_its_part_of_the_length():
    """By the shapes in its program: 8 rows of 64 tokens of width 48."""
    whole, _ = program((1, 1, 1, 1), 64)
    split, hidden_BTD = program((2, 1, 1, 4), 64)
    assert {shard.data.shape for shard in hidden_BTD.addressable_shards} == {(4, 8, 48)}
    states = lambda text: {tuple(map(int, shape)) for shape in re.findall(r"f32\[(\d+),(\d+),48\]", text)}
    assert (8, 63) in states(whole)
    assert (4, 16) in states(split) and (4, 64) not in states(split) and (8, 64) not in states(split)


def test_a_length_that_does_not_divide_is_replicated_and_reported_once(caplog):
    text, hidden_BTD = program((2, 1, 1, 4), 62)
    assert {shard.data.shape for shard in hidden_BTD.addressable_shards} == {(4, 31, 48)}
    said = [record.getMessage() for record in caplog.records if "'length'" in record.getMessage()]
    assert said == [f"axis 'length' of size {size} is replicated: mesh.sequence = 4 does not divide it" for size in (62, 31)]
    assert jnp.isfinite(hidden_BTD).all() and "f32[4,62,48]" in text
