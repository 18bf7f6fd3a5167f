"""Every claim of the registry, by exact enumeration in float64, through the code that trains."""

import dataclasses
import functools
import inspect
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import mostly_slow

from opd_jax.analysis import claims, enumeration
from opd_jax.numerics import estimators
from opd_jax.numerics.estimators import REGISTRY, TARGETS, MultiSample, Term, loss_B
from opd_jax.numerics.token_stats import Signal, Stats
from opd_jax.types import UserError

pytestmark = pytest.mark.usefixtures("float64")

MODELS = {
    "stop token, shared parameters": {"stop": 0, "features": 3, "length": 4, "seed": 4},
    "stop token, observation": {"stop": 2, "observed": (1,), "features": 3, "length": 4, "seed": 5},
    "tabular, observations first and last": {"observed": (0, 3), "length": 4, "seed": 6},
    "wider than the registered top-k": {"vocab": 19, "length": 2, "features": 3, "seed": 8},
    "tabular": {},
    "tabular, 4 tokens": {"length": 4, "seed": 1},
    "shared parameters": {"features": 2, "length": 4, "seed": 2},
    "stop token": {"stop": 2, "length": 4, "seed": 3},
}
# On these every claim is proved; the first alone in the fast tests, because each pair is a program to compile.
PROVED_ON = [name if number == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(list(MODELS)[:4])]


def distance(a, b):
    return float(jnp.max(jnp.abs(a - b)))


@functools.cache
def model_of(name):
    return enumeration.make(name, **MODELS[name])


def error_of(estimator, model):
    """Largest difference between the expected gradient and the claimed target."""
    return distance(model.expected_gradient(estimator), model.exact_gradient(estimator.target))


@pytest.mark.parametrize("model", PROVED_ON)
@pytest.mark.parametrize("name", [name for name, estimator in REGISTRY.items() if estimator.unbiased])
def test_expected_gradient_is_the_claimed_one(name, model):
    assert float(jnp.sum(model_of(model).probability_N)) == pytest.approx(1.0, abs=1e-12)
    assert error_of(REGISTRY[name], model_of(model)) < 1e-6


@pytest.mark.parametrize("name", [name for name, estimator in REGISTRY.items() if not estimator.unbiased])
def test_what_says_that_it_is_biased_differs(name):
    """From its own target; a top-k that holds the whole vocabulary is exact."""
    small, wide = (error_of(REGISTRY[name], model_of(model)) for model in (list(MODELS)[0], list(MODELS)[3]))
    assert wide > 1e-4
    assert (small < 1e-6) == ("topk" in name)


@pytest.mark.parametrize("name", ["k2_reward", "k3_reward"])
def test_rewards_that_follow_no_divergence_named_here(name):
    model = model_of("tabular")
    found = model.expected_gradient(REGISTRY[name])
    assert min(distance(found, model.exact_gradient(target)) for target in TARGETS) > 1e-3


def test_a_discount_need_not_lie_between_its_ends():
    """Its bias may be larger than that of the token alone: 31 times in this student."""
    model = enumeration.make("one feature", vocab=2, length=5, features=1, seed=72, scale=2)
    exact = model.exact_gradient("sequence_reverse_kl")
    bias = {name: float(jnp.linalg.norm(model.expected_gradient(REGISTRY[name]) - exact)) for name in ("token", "discounted")}
    assert bias["discounted"] > 5 * bias["token"] > 0


@pytest.mark.parametrize("target", TARGETS)
def test_targets_differ_from_each_other(target):
    model = model_of("tabular")
    for other in TARGETS:
        if other != target:
            assert distance(model.exact_gradient(target), model.exact_gradient(other)) > 1e-3


def test_local_and_prefix_parts_add_up_to_the_sequence_gradient():
    """g1 + g2 = the gradient (Theorem 2): token-level estimators miss exactly E sum_t (sum_{u > t} l_u) s_t."""
    model = model_of("shared parameters")
    later = model.expected_gradient(REGISTRY["to_go"]) - model.expected_gradient(REGISTRY["token"])
    missing = model.exact_gradient("sequence_reverse_kl") - model.exact_gradient("token_reverse_kl")
    assert distance(later, missing) < 1e-12
    assert float(jnp.linalg.norm(missing)) > 1e-2


@pytest.mark.parametrize("model", ["tabular, 4 tokens", "shared parameters", "stop token"])
def test_variance_falls_in_the_order_of_the_theory(model):
    model = model_of(model)
    order = ["sequence", "to_go", "rao_blackwell_to_go", "token"]
    variances = [float(model.trace_covariance(REGISTRY[name])) for name in order]
    assert variances == sorted(variances, reverse=True)
    assert float(model.trace_covariance(REGISTRY["token_full"])) < variances[-1]


def test_discount_ends_are_token_and_to_go():
    model = model_of("tabular")
    for gamma, name in ((0.0, "token"), (1.0, "to_go")):
        built = estimators.build(Signal("reverse_kl", "sampled"), "discounted", gamma)
        assert distance(model.gradients(built), model.gradients(REGISTRY[name])) < 1e-12


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "jsd_continuous", "skew_forward_kl", "skew_reverse_kl"])
def test_sampled_support_has_the_expected_gradient_of_the_full_one(kind):
    model = model_of("stop token")
    sampled, full = (estimators.build(Signal(kind, support, beta=0.3), "token", 1.0) for support in ("sampled", "full"))
    assert distance(model.expected_gradient(sampled), model.expected_gradient(full)) < 1e-12
    assert float(model.trace_covariance(sampled)) > float(model.trace_covariance(full))


ONE_OF_EACH_KIND = ("to_go_leave_one_out", "rao_blackwell_to_go", "local_to_go", "token_full", "k3_loss", "k2_reward", "topk_bucket")
NOISY_AT_THE_TEACHER = {"k1_loss", "topk_biased_head", "topk_biased_published_tail"}


@pytest.mark.parametrize("name", REGISTRY)
def test_equal_models_give_zero_for_every_rollout(name):
    """But for a loss whose gradient is noise, and for heads without their linear part."""
    model = model_of(list(MODELS)[3] if "topk" in name else "tabular")
    same = dataclasses.replace(model, teacher_logits_NTV=model.logits(model.theta_FV))
    largest = float(jnp.max(jnp.abs(same.gradients(REGISTRY[name]))))
    assert largest > 1e-2 if name in NOISY_AT_THE_TEACHER else largest < 1e-12


@pytest.mark.parametrize("name", mostly_slow(REGISTRY, ONE_OF_EACH_KIND.__contains__))
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


@pytest.mark.parametrize(
    "change, words",
    [
        ({"student_logits_BTV": np.zeros((5, 3))}, "student_logits_BTV has the shape (5, 3); must be [B, T, V]"),
        ({"teacher_logits_BTV": np.zeros((4, 5, 7))}, "teacher_logits_BTV has the shape (4, 5, 7); must be [B, T, V] = (4, 5, 3)"),
        ({"tokens_BT": np.zeros((4, 6), int)}, "tokens_BT has the shape (4, 6); must be [B, T] = (4, 5)"),
        ({"mask_BT": np.ones(5)}, "mask_BT has the shape (5,); must be [B, T] = (4, 5)"),
        ({"behaviour_logp_BT": np.zeros(4)}, "behaviour_logp_BT has the shape (4,)"),
        ({"group_B": np.zeros(5)}, "group_B has the shape (5,); must be [B] = (4,)"),
        ({"extra_tokens_BTN": np.zeros((4, 5), int)}, "extra_tokens_BTN has the shape (4, 5); must be [B, T, N]"),
        ({"tokens_BT": np.full((4, 5), 3)}, "tokens_BT holds 3 where mask_BT is not 0; must be in 0 to 2"),
        ({"tokens_BT": jnp.full((4, 5), -1)}, "tokens_BT holds -1"),
        ({"extra_tokens_BTN": np.full((4, 5, 2), 9)}, "extra_tokens_BTN holds 9"),
    ],
)
def test_a_surrogate_names_the_argument_that_does_not_fit(change, words):
    given = {"student_logits_BTV": np.zeros((4, 5, 3)), "teacher_logits_BTV": np.zeros((4, 5, 3)), "tokens_BT": np.zeros((4, 5), int)}
    given |= {"mask_BT": np.ones((4, 5))} | change
    student = given.pop("student_logits_BTV")
    call = lambda logits: REGISTRY["to_go"].surrogate(logits, **given)
    for one in (call, jax.jit(call)):  # what jit closes over is known in it
        with pytest.raises(ValueError, match=re.escape(words)):
            one(student)


def test_registry_states_its_claims():
    for name, estimator in REGISTRY.items():
        assert estimator.name == name and estimator.target in TARGETS
        assert estimator.claim.startswith("Unbiased" if estimator.unbiased else "Biased")
        assert estimator.formula and estimator.reference and inspect.getdoc(type(estimator))
        assert hash(estimator) == hash(dataclasses.replace(estimator)), "a static argument of jitted functions"


def test_weights_scale_the_two_parts_of_a_term_and_have_no_gradient():
    logp_BT, local_BT, weight_BT = jnp.array([[-1.0, -2.0]]), jnp.array([[0.5, 0.25]]), jnp.array([[2.0, 4.0]])
    mask_BT, advantage_BT = jnp.array([[1.0, 0.5]]), jnp.array([[3.0, -1.0]])

    def loss(weight_BT, advantage_BT):
        term = Term(mask_BT, local_BT, advantage_BT, w_local_BT=weight_BT, w_score_BT=10 * weight_BT)
        return loss_B(Stats(logp_BT=logp_BT), term).sum()

    assert float(loss(weight_BT, advantage_BT)) == pytest.approx((2 * 0.5 + 20 * 3 * 1) + 0.5 * (4 * 0.25 - 40 * 1 * 2))
    for gradient in jax.grad(loss, (0, 1))(weight_BT, advantage_BT):
        assert float(jnp.max(jnp.abs(gradient))) == 0.0


def test_what_is_masked_has_no_gradient_even_if_it_is_no_number():
    logp_BT, mask_BT = jnp.array([[-1.0, jnp.nan]]), jnp.array([[True, False]])

    def loss(logp_BT, local_BT):
        return loss_B(
            Stats(logp_BT=logp_BT), Term(mask_BT, local_BT, jnp.array([[2.0, jnp.inf]]), w_local_BT=jnp.array([[3.0, jnp.nan]]))
        ).sum()

    found = jax.grad(loss, (0, 1))(logp_BT, jnp.array([[1.0, jnp.inf]]))
    np.testing.assert_array_equal(found[0], [[-2.0, 0.0]])
    np.testing.assert_array_equal(found[1], [[3.0, 0.0]])


BUILT = [
    *itertools.product(("reverse_kl", "forward_kl", "jsd"), ("full", "sampled"), ("token",), (1.0,), ({},)),
    *itertools.product(("reverse_kl",), ("full", "sampled"), ("to_go", "discounted"), (0.0, 0.6, 1.0), ({},)),
    *itertools.product(("reverse_kl",), ("sampled",), ("to_go", "discounted"), (0.6,), ({"baseline": "kl"},)),
    *itertools.product(("reverse_kl",), ("sampled",), ("to_go", "discounted"), (0.6,), ({"exact_future": True},)),
    *itertools.product(("reverse_kl",), ("sampled",), ("token", "sequence"), (1.0,), ({"baseline": "kl"}, {"baseline": "optimal"})),
]


def check_claim(built, model):
    error = error_of(built, model)
    assert (error < 1e-6) == built.unbiased, (built.claim, error)
    assert built.claim.startswith("Unbiased" if built.unbiased else "Biased")


@pytest.mark.parametrize("case", BUILT, ids=str)
def test_the_claim_of_what_a_config_builds_holds(case):
    kind, support, credit, gamma, choices = case
    built = estimators.build(Signal(kind, support, beta=0.5), credit, gamma, **choices)
    check_claim(built, model_of("stop token, shared parameters"))


@pytest.mark.parametrize("support", ["topk_teacher", "topk_student", "topk_union", "topk_teacher+token"])
@pytest.mark.parametrize("kind", mostly_slow(["reverse_kl", "forward_kl", "jsd"], "reverse_kl".__eq__))
def test_the_claim_of_a_top_k_and_its_tail_holds(kind, support):
    for tail in ("sampled_tail", "generalised", "renormalise", "bucket", "none"):
        built = estimators.build(Signal(kind, support, tail=tail, k=1, beta=0.5), "token", 1.0)
        check_claim(built, model_of("tabular, 4 tokens"))


def test_multi_sample_follows_its_claim_with_less_noise_for_more_draws():
    """Expectation over the completion and over the further draws at each of its positions."""
    model = enumeration.make("short", vocab=3, length=2, stop=2, features=2, seed=9)
    about = {"name": "multi_sample", "claim": "", "formula": "", "reference": "", "target": "token_reverse_kl", "unbiased": True}
    variance = {}
    for draws, leave_one_out in ((1, False), (2, False), (2, True), (3, True)):
        estimator = MultiSample(**about, signal=Signal("reverse_kl", "sampled"), leave_one_out=leave_one_out)
        found = model.expected_gradient(estimator, extra_samples=draws)
        assert distance(found, model.exact_gradient("token_reverse_kl")) < 1e-10
        variance[draws, leave_one_out] = float(model.trace_covariance(estimator, extra_samples=draws))
    full = float(model.trace_covariance(REGISTRY["token_full"]))
    assert variance[2, False] - full == pytest.approx((variance[1, False] - full) / 2)
    assert full < variance[3, True] < variance[2, True]
    with pytest.raises(ValueError, match="has 1 draw per position; leave_one_out needs 2"):
        model.expected_gradient(estimator, extra_samples=1)


@pytest.mark.parametrize(
    ("signal", "credit", "choices", "words"),
    [
        (Signal("forward_kl"), "to_go", {}, "estimator.credit = 'to_go' does not go with signal.divergence = 'forward_kl'"),
        (Signal("reverse_kl"), "sequence", {}, "estimator.credit = 'sequence' does not go with"),
        (Signal("reverse_kl"), "togo", {}, "estimator.credit = 'togo' is not known; valid: token, to_go"),
        (Signal("reverse_kl", "sampled"), "token", {"exact_future": True}, "exact_future = True needs estimator.credit = 'to_go'"),
        (Signal("forward_kl"), "token", {"exact_future": True}, "exact_future = True is for advantages"),
        (Signal("reverse_kl"), "token", {"baseline": "kl"}, "baseline = 'kl' is for advantages"),
        (Signal("reverse_kl"), "to_go", {"baseline": "optimal"}, "baseline = 'optimal' is for the sampled token's own"),
        (Signal("reverse_kl"), "to_go", {"baseline": "kl"}, "baseline = 'kl' is for the sampled token's own"),
        (Signal("reverse_kl"), "to_go", {"exact_future": True}, "exact_future = True is for signal.support = 'sampled'"),
        (Signal("nll"), "token", {"importance": "sequence"}, "importance = 'sequence' is for divergences"),
        (Signal("forward_kl"), "token", {"importance": "tis"}, "importance = 'tis' is not known"),
        (Signal("forward_kl"), "token", {"importance": "clip", "clip": 0.2}, "clip = 0.2 must be at least 1"),
        (Signal("reverse_kl", "sampled"), "to_go", {"baseline": "mean"}, "baseline = 'mean' is not known; valid: none, kl"),
        (Signal("reverse_kl", "sampled"), "to_go", {"importance": "tis"}, "importance = 'tis' is not known; valid: none, token"),
        (Signal("reverse_kl", "sampled"), "discounted", {"gamma": 1.5}, "estimator.gamma = 1.5 must be between 0 and 1"),
        (
            Signal("reverse_kl", "topk_teacher", tail="sampled_tail", k=2),
            "token",
            {"importance": "cumulative"},
            "importance = 'cumulative' does not go with signal.tail = 'sampled_tail'",
        ),
    ],
)
def test_combinations_without_a_meaning_are_refused(signal, credit, choices, words):
    with pytest.raises(ValueError, match=words):
        estimators.build(signal, credit, **{"gamma": 0.9, **choices})


def test_a_claim_names_other_temperatures_and_no_target():
    built = estimators.build(Signal("reverse_kl", "sampled", student_temperature=0.5, teacher_temperature=2.0), "to_go", 1.0)
    assert built.target == "" and built.claim.endswith("the sequence-level reverse KL, of the laws at temperatures 0.5 and 2")


def test_the_table_of_the_readme_is_the_registry():
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert claims.insert(readme, where="README.md") == readme, "python experiments/claims.py writes it"
    assert all(f"| `{name}` |" in readme for name in REGISTRY)
    with pytest.raises(UserError, match="README.md: the marks"):
        claims.insert("no marks", where="README.md")
