"""Every claim of the registry, by exact enumeration in float64, through the code that trains."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.analysis import enumeration
from opd_jax.numerics import estimators
from opd_jax.numerics.estimators import REGISTRY, TARGETS, Term, loss_B
from opd_jax.numerics.token_stats import Signal, Stats

pytestmark = pytest.mark.usefixtures("float64")

MODELS = {
    "tabular": {},
    "tabular, 4 tokens": {"length": 4, "seed": 1},
    "shared parameters": {"features": 2, "length": 4, "seed": 2},
    "stop token": {"stop": 2, "length": 4, "seed": 3},
    "stop token, shared parameters": {"stop": 0, "features": 3, "length": 4, "seed": 4},
    "observations": {"observed": (1,), "length": 4, "features": 3, "seed": 5},
    "observations first and last": {"observed": (0, 3), "length": 4, "seed": 6},
    "wide": {"vocab": 6, "length": 2, "seed": 7},
}


def distance(a, b):
    return float(jnp.max(jnp.abs(a - b)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", REGISTRY)
def test_expected_gradient_is_the_claimed_one(name, model):
    estimator, model = REGISTRY[name], enumeration.make(model, **MODELS[model])
    assert float(jnp.sum(model.probability_N)) == pytest.approx(1.0, abs=1e-12)
    error = distance(model.expected_gradient(estimator), model.exact_gradient(estimator.target))
    if estimator.unbiased:
        assert error < 1e-6
    else:
        assert error > 1e-4


@pytest.mark.parametrize("target", TARGETS)
def test_targets_differ_from_each_other(target):
    model = enumeration.make("tabular", **MODELS["tabular"])
    for other in TARGETS:
        if other != target:
            assert distance(model.exact_gradient(target), model.exact_gradient(other)) > 1e-3


def test_local_and_prefix_parts_add_up_to_the_sequence_gradient():
    """g1 + g2 = the gradient (Theorem 2): token-level estimators miss exactly E sum_t (sum_{u > t} l_u) s_t."""
    model = enumeration.make("shared", **MODELS["shared parameters"])
    later = model.expected_gradient(REGISTRY["to_go"]) - model.expected_gradient(REGISTRY["token"])
    missing = model.exact_gradient("sequence_reverse_kl") - model.exact_gradient("token_reverse_kl")
    assert distance(later, missing) < 1e-12
    assert float(jnp.linalg.norm(missing)) > 1e-2


@pytest.mark.parametrize("model", ["tabular, 4 tokens", "shared parameters", "stop token"])
def test_variance_falls_in_the_order_of_the_theory(model):
    model = enumeration.make(model, **MODELS[model])
    order = ["sequence", "to_go", "rao_blackwell_to_go", "token"]
    variances = [float(model.trace_covariance(REGISTRY[name])) for name in order]
    assert variances == sorted(variances, reverse=True)
    assert float(model.trace_covariance(REGISTRY["token_full"])) < variances[-1]


def test_discount_ends_are_token_and_to_go():
    model = enumeration.make("tabular", **MODELS["tabular"])
    for gamma, name in ((0.0, "token"), (1.0, "to_go")):
        built = estimators.build(Signal("reverse_kl", "sampled"), "discounted", gamma)
        assert distance(model.gradients(built), model.gradients(REGISTRY[name])) < 1e-12


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "jsd_continuous", "skew_forward_kl", "skew_reverse_kl"])
def test_sampled_support_has_the_expected_gradient_of_the_full_one(kind):
    model = enumeration.make("stop", **MODELS["stop token"])
    sampled, full = (estimators.build(Signal(kind, support, beta=0.3), "token", 1.0) for support in ("sampled", "full"))
    assert distance(model.expected_gradient(sampled), model.expected_gradient(full)) < 1e-12
    assert float(model.trace_covariance(sampled)) > float(model.trace_covariance(full))


@pytest.mark.parametrize("name", REGISTRY)
def test_equal_models_give_zero_for_every_rollout(name):
    model = enumeration.make("tabular", **MODELS["tabular"])
    same = enumeration.Enumerable(**{**vars(model), "teacher_logits_NTV": model.logits(model.theta_FV)})
    assert float(jnp.max(jnp.abs(same.gradients(REGISTRY[name])))) < 1e-12


@pytest.mark.parametrize("name", REGISTRY)
def test_surrogate_ignores_what_is_masked_and_jits_and_vmaps(name):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 4, 5, 3))
    tokens, mask = rng.integers(0, 3, (4, 5)), rng.random((4, 5)) < 0.6
    grad = jax.grad(lambda s, *rest: REGISTRY[name].surrogate(s, *rest).sum())
    clean = grad(student, teacher, tokens, mask)
    assert clean.dtype == jnp.float64
    dirty = (np.where(mask[..., None], x, np.nan) for x in (student, teacher))
    np.testing.assert_array_equal(grad(*dirty, np.where(mask, tokens, -100), mask), clean)
    assert float(jnp.max(jnp.abs(jnp.where(mask[..., None], 0, clean)))) == 0.0
    np.testing.assert_allclose(jax.jit(grad)(student, teacher, tokens, mask.astype(np.float32)), clean, atol=1e-12)
    one = lambda *row: REGISTRY[name].surrogate(*(x[None] for x in row))[0]
    np.testing.assert_allclose(
        jax.vmap(one)(student, teacher, tokens, mask), REGISTRY[name].surrogate(student, teacher, tokens, mask), atol=1e-12
    )


def test_registry_states_its_claims():
    for name, estimator in REGISTRY.items():
        assert estimator.name == name and estimator.target in TARGETS
        assert estimator.claim.startswith("Unbiased" if estimator.unbiased else "Biased")
        assert estimator.formula and estimator.reference and inspect.getdoc(type(estimator))
        assert hash(estimator) == hash(REGISTRY[name])


def test_weights_scale_the_two_parts_of_a_term_and_have_no_gradient():
    logp_BT, local_BT, weight_BT = jnp.array([[-1.0, -2.0]]), jnp.array([[0.5, 0.25]]), jnp.array([[2.0, 4.0]])
    mask_BT, advantage_BT = jnp.array([[1.0, 0.5]]), jnp.array([[3.0, -1.0]])

    def loss(weight_BT, advantage_BT):
        term = Term(mask_BT, local_BT, advantage_BT, w_local_BT=weight_BT, w_score_BT=10 * weight_BT)
        return loss_B(Stats(logp_BT=logp_BT), term).sum()

    assert float(loss(weight_BT, advantage_BT)) == pytest.approx((2 * 0.5 + 20 * 3 * 1) + 0.5 * (4 * 0.25 - 40 * 1 * 2))
    for gradient in jax.grad(loss, (0, 1))(weight_BT, advantage_BT):
        assert float(jnp.max(jnp.abs(gradient))) == 0.0


@pytest.mark.parametrize(
    ("signal", "credit", "words"),
    [
        (Signal("forward_kl"), "to_go", ["estimator.credit", "to_go", "forward_kl"]),
        (Signal("reverse_kl"), "sequence", ["estimator.credit", "sequence"]),
        (Signal("reverse_kl"), "togo", ["estimator.credit", "togo", "to_go"]),
    ],
)
def test_combinations_without_a_meaning_are_refused(signal, credit, words):
    with pytest.raises(ValueError) as error:
        estimators.build(signal, credit, 0.9)
    assert all(word in str(error.value) for word in words)
