"""Gradients of single rollouts against autodiff of their losses; sketches keep what they promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import context_of, ragged_prompts, ragged_rollout, tiny_model
from test_learner import gradient, make_case, make_objective

from opd_jax.analysis import shadow
from opd_jax.models import forward
from opd_jax.numerics.estimators import REGISTRY, loss_B
from opd_jax.numerics.token_stats import Target, token_stats
from opd_jax.types import view

NAMES = ("to_go_leave_one_out", "token", "token_full")
OTHERS = ("local_to_go", "token_optimal_baseline", "k3_plus_loss", "topk_sampled_tail")  # of the other classes and supports


@pytest.fixture(scope="module")
def case():
    """(student, teacher, views, context) of six ragged rollouts in groups of two."""
    rng = np.random.default_rng(0)
    prompts, rollout = ragged_prompts(rng, 6), ragged_rollout(rng, 6)
    context = dataclasses.replace(context_of(rollout), group_B=jnp.arange(6) // 2)
    return tiny_model(0), tiny_model(1), view(prompts, rollout), context


def measured(case, names, *, parts=3, width=64, exact_parameters=10**6):
    (params, config), (teacher_params, teacher_config), views, context = case
    estimators = tuple(REGISTRY[name] for name in names)
    projection = shadow.make_projection(params, width=width, exact_parameters=exact_parameters, seed=0)
    static = (estimators, shadow.Models(config, teacher_config), projection, parts)
    return gradients(params, teacher_params, views, context, static=static), projection


@functools.partial(jax.jit, static_argnames="static")
def gradients(params, teacher_params, views, context, *, static):
    estimators, models, *_ = static
    contexts = shadow.prepare(estimators, models, params, teacher_params, views, views, context)
    return shadow.rollout_gradients(*static, params, teacher_params, shadow.Rows(views, views, contexts))


@functools.partial(jax.jit, static_argnames=("estimator", "configs"))
def jacobian(params, teacher_params, estimator, configs, views, context):
    """The gradients of the losses [B], a row's at a time."""
    return jax.jacrev(lambda params: losses(params, teacher_params, estimator, configs, views, context))(params)


def losses(params, teacher_params, estimator, configs, views, context):
    """The losses [B] of a whole batch, as training makes them."""
    target = Target((forward.hidden(teacher_params, configs[1], views),))
    stats = token_stats(
        forward.hidden(params, configs[0], views), target, views.completion_BT, signal=estimator.signal, needs={"logp", *estimator.needs}
    )
    context = estimator.prepare(jax.lax.stop_gradient(stats), context)
    return loss_B(stats, estimator.terms(stats, context))


@pytest.mark.parametrize("names", [NAMES, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["three", "others"])
def test_gradients_of_rollouts_are_those_of_their_losses(case, names):
    """Each row against autodiff of that row's loss in the whole batch: also where a baseline looks across rows."""
    (params, config), (teacher_params, teacher_config), views, context = case
    found, projection = measured(case, names)
    for e, name in enumerate(names):
        rows = jacobian(params, teacher_params, REGISTRY[name], (config, teacher_config), views, context)
        for row in range(6):
            expected = projection.vector(jax.tree.map(lambda x, row=row: x[row], rows))
            scale = float(jnp.max(jnp.abs(expected))) + 1e-6
            np.testing.assert_allclose(found.vector_EN[row, e], expected, atol=2e-5 * scale, err_msg=name)


def test_squares_and_parts_belong_to_the_vectors(case):
    found, projection = measured(case, NAMES)
    squares = np.square(found.vector_EN).sum(2)
    np.testing.assert_allclose(found.squares_EG.sum(2), squares, rtol=1e-4)
    np.testing.assert_allclose(projection.squares_of_vector(found.vector_EN), found.squares_EG, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found.position_EI.sum(2), squares, rtol=1e-4)
    whole = jax.vmap(jax.vmap(projection.compress))(found.vector_EN)
    scale = float(jnp.max(jnp.abs(whole)))
    np.testing.assert_allclose(found.position_sketch_EIR.sum(2), whole, atol=1e-4 * scale)


def test_a_part_holds_what_its_tokens_contribute(case):
    """token credit: the gradient of the rollout with all other tokens masked. Seven tokens are parts of three, two and two."""
    (params, config), (teacher_params, teacher_config), views, context = case
    found, projection = measured(case, NAMES)
    e = NAMES.index("token")
    for t, tokens in enumerate(((0, 1, 2), (3, 4), (5, 6))):
        only = dataclasses.replace(context, mask_BT=context.mask_BT & np.isin(np.arange(7), tokens)[None])
        rows = jacobian(params, teacher_params, REGISTRY["token"], (config, teacher_config), views, only)
        part = np.stack([projection.vector(jax.tree.map(lambda x, row=row: x[row], rows)) for row in range(6)])
        inner = np.sum(part * found.vector_EN[:, e], axis=1)
        np.testing.assert_allclose(found.position_EI[:, e, t], inner, rtol=1e-3, atol=1e-3 * np.abs(inner).max())


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "name"), [("reverse_kl", "token_full"), ("to_go", "to_go")])
def test_mean_over_rollouts_is_the_gradient_that_trains(loss, name):
    goal = make_objective(loss, "sequence_sum")
    params, config, teacher_params, teacher_config, batch = make_case(goal)
    tree = gradient(goal, config, teacher_config, params, teacher_params, batch)[2]
    found, projection = measured(((params, config), (teacher_params, teacher_config), batch.student, batch.shares[0].context), (name,))
    expected = projection.vector(tree)
    np.testing.assert_allclose(found.vector_EN[:, 0].mean(0), expected, atol=1e-5 * float(jnp.abs(expected).max()))


# ---- sketches


@pytest.mark.parametrize("where", ["everywhere", "in one column"])
def test_sketch_keeps_inner_products_with_the_error_that_it_states(where):
    """Also where all that counts stands a sketch's width apart, as one column of a matrix does."""
    rng, width, seeds = np.random.default_rng(0), 128, 400
    scale = np.geomspace(1, 30, 64 * width) if where == "everywhere" else (np.arange(64 * width) % width == 3)
    x, y = (jnp.asarray(rng.normal(size=64 * width) * scale, jnp.float32) for _ in range(2))
    y += x
    sketch = jax.jit(jax.vmap(lambda seed: jnp.stack([shadow.count_sketch(v, width, seed) for v in (x, y)])))
    sketches = np.asarray(sketch(jnp.arange(seeds, dtype=jnp.uint32)), np.float64)
    inner = np.stack([(sketches[:, 0] ** 2).sum(1), (sketches[:, 0] * sketches[:, 1]).sum(1)], axis=1)
    truth = np.array([x @ x, x @ y])
    spread = inner.std(0, ddof=1)
    assert np.all(np.abs(inner.mean(0) - truth) < 4 * spread / seeds**0.5)
    stated = (2 / width) ** 0.5
    assert 0.6 * stated < spread[0] / truth[0] < 1.15 * stated


def test_numbers_less_than_a_sketch_apart_never_share_a_sum():
    for start in (0, 37):
        x = jnp.zeros(300).at[start : start + 64].set(1.0)
        sketch = np.asarray(shadow.count_sketch(x, 64, 5))
        assert (
            np.all(np.isin(np.abs(sketch), (0, 1, 2))) and np.square(np.asarray(shadow.count_sketch(x[:64], 64, 5))).sum() == x[:64].sum()
        )


def test_groups_have_the_leaves_of_their_names():
    cases = {
        "embed": "embedding",
        "unembed": "unembedding",
        "layers/0/attention/q": "attention",
        "layers/1/mlp/gate": "mlp",
        "layers/1/mlp/norm": "norm",
        "layers/0/attention/q_norm": "norm",
        "final_norm": "norm",
        "layers/0/attention/q/a": "attention",
        "blocks/kernel": "other",
    }
    assert {path: shadow.group_of(path) for path in cases} == cases
    params, _ = tiny_model(0)
    projection = shadow.make_projection(params, width=8, exact_parameters=10**6, seed=0)
    squares = projection.squares(params)
    norms = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if jax.tree_util.keystr(path).endswith("norm']")]
    assert projection.groups == ("embedding", "attention", "mlp", "norm")
    assert float(squares[3]) == pytest.approx(sum(float(jnp.sum(x**2)) for x in norms))
    assert float(squares.sum()) == pytest.approx(
        float(np.square(np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])).sum()), rel=1e-5
    )


@pytest.mark.slow
def test_a_large_model_is_sketched_by_group(case):
    """Squared norms of rollouts stay exact; the vectors are sketches, linear in the gradient."""
    exact, whole = measured(case, NAMES)
    found, projection = measured(case, NAMES, exact_parameters=0, width=512)
    assert whole.norm_error == 0 and projection.norm_error == pytest.approx((2 / 512) ** 0.5)
    np.testing.assert_allclose(found.squares_EG, exact.squares_EG, rtol=1e-4)
    assert found.vector_EN.shape[2] == 512 * len(projection.groups)
    ratio = np.asarray(projection.squares_of_vector(found.vector_EN)).sum(2) / np.asarray(exact.squares_EG).sum(2)
    assert np.all(np.abs(ratio - 1) < 5 * projection.norm_error)
    np.testing.assert_allclose(found.position_EI.sum(2), exact.position_EI.sum(2), rtol=0.4)
