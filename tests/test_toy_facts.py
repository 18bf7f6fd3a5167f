"""Distillation read as reinforcement learning, ExOPD's fixed points, and the ratios off-policy: exact, on enumerable models in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.analysis import enumeration
from opd_jax.analysis.toy import cases, extrapolation, facts
from opd_jax.numerics.estimators import REGISTRY

pytestmark = pytest.mark.usefixtures("float64")


def moved(model, seed=0, scale=1.0):
    """The model with a student of other parameters."""
    noise = np.random.default_rng(seed).normal(size=model.theta_FV.shape)
    return dataclasses.replace(model, theta_FV=model.theta_FV + scale * jnp.asarray(noise))


def compiled(model, function):
    """function(model) as one program: many small ones take long."""
    return jax.jit(lambda theta_FV: function(dataclasses.replace(model, theta_FV=theta_FV)))(model.theta_FV)


def gradient(model, reference, strength, credit, normalise):
    return compiled(model, lambda m: facts.extrapolation_gradient(m, reference, strength, credit=credit, normalise=normalise))


# ---- the entropy-regularised reading


@pytest.mark.parametrize("name", cases.MODELS)
def test_minus_kl_is_expected_teacher_log_probability_plus_entropy(name):
    found = facts.entropy_reading(enumeration.make(name, **cases.MODELS[name]))
    assert abs(found["value"]) < 1e-12
    assert found["entropy_differentiated"] < 1e-12 and found["sampled_reward"] < 1e-12
    assert found["entropy_as_reward"] > 0.1


def test_an_entropy_bonus_that_is_only_a_reward_misses_the_gradient_of_the_entropy():
    model = enumeration.make("shared parameters", **cases.MODELS["shared parameters"])
    logp_N = model.log_probability(model.logits(model.theta_FV))

    def entropy(theta_FV):  # sum_t H at prefixes held fixed, mean over completions
        logp_NTV = jax.nn.log_softmax(model.logits(theta_FV))
        return -jnp.sum(jnp.exp(logp_N)[:, None] * jnp.sum(jnp.exp(logp_NTV) * logp_NTV, axis=-1))

    missed = jnp.linalg.norm(jax.grad(entropy)(model.theta_FV)) / jnp.linalg.norm(model.exact_gradient("sequence_reverse_kl"))
    assert facts.entropy_reading(model)["entropy_as_reward"] == pytest.approx(float(missed), rel=1e-10)


# ---- ExOPD


def test_lambda_1_is_plain_distillation_for_any_reference():
    model = enumeration.make("stop token", **cases.MODELS["stop token"])
    reference = moved(model, 3).logits(moved(model, 3).theta_FV)
    for credit in ("token", "to_go"):
        plain = model.expected_gradient(REGISTRY[credit])
        for normalise in (True, False):
            np.testing.assert_allclose(gradient(model, reference, 1.0, credit, normalise), plain, atol=1e-12)


@pytest.mark.parametrize("strength", [0.5, 1.5, 3.0])
def test_unnormalised_rewards_to_go_climb_the_published_objective(strength):
    """lambda E log(q/ref) - KL(pi || ref) (G-OPD), differentiated over all completions."""
    model = enumeration.make("shared parameters", **cases.MODELS["shared parameters"])
    reference = moved(model, 4).logits(moved(model, 4).theta_FV)
    logq_N, logref_N = (model.log_probability(logits) for logits in (model.teacher_logits_NTV, reference))

    def objective(theta_FV):
        logp_N = model.log_probability(model.logits(theta_FV))
        return jnp.sum(jnp.exp(logp_N) * (strength * (logq_N - logref_N) - (logp_N - logref_N)))

    found = gradient(model, reference, strength, "to_go", False)
    np.testing.assert_allclose(found, -jax.grad(objective)(model.theta_FV).ravel(), atol=1e-12)


def test_laws_of_the_two_targets_by_products_of_probabilities():
    model = enumeration.make("tabular", length=3, seed=1)
    reference = moved(model).logits(moved(model).theta_FV)
    q_NTV, r_NTV = (np.asarray(jax.nn.softmax(x)) for x in (model.teacher_logits_NTV, reference))
    tilted_NTV = q_NTV**1.5 * r_NTV**-0.5
    pick = lambda x: np.take_along_axis(x, np.asarray(model.tokens_NT)[..., None], axis=-1)[..., 0].prod(1)
    whole_N, each_N = pick(tilted_NTV), pick(tilted_NTV / tilted_NTV.sum(-1, keepdims=True))
    np.testing.assert_allclose(facts.extrapolated_law(model, reference, 1.5, normalise=False), whole_N / whole_N.sum(), atol=1e-14)
    np.testing.assert_allclose(facts.extrapolated_law(model, reference, 1.5, normalise=True), each_N, atol=1e-14)


@pytest.mark.parametrize("name", ["tabular", "stop token"])
def test_a_tabular_student_takes_any_law(name):
    model = enumeration.make(name, **cases.MODELS[name])
    law_N = jax.nn.softmax(jnp.asarray(np.random.default_rng(5).normal(size=len(model.tokens_NT))))
    np.testing.assert_allclose(facts.at_law(model, law_N).probability_N, law_N, atol=1e-14)


@pytest.mark.parametrize("length", [2, 4])
def test_fixed_points_of_normalised_and_unnormalised_targets(length):
    """Token-level gradients are the same and vanish at the normalised law; rewards to go see log Z of later prefixes and go elsewhere."""
    start = enumeration.make("tabular", length=length, seed=1)
    for row in extrapolation.fixed_points(moved(start), start.logits(start.theta_FV), (0.5, 1.0, 1.5)):
        assert max(row["stationary"].values()) < 1e-12 and len(row["stationary"]) == 4
        assert row["token_difference"] < 1e-12
        apart = [row["total_variation"], row["kept_to_go"], row["to_go_difference"]]
        assert max(apart) < 1e-12 if row["lambda"] == 1 else min(apart) > 5e-3


def test_following_the_to_go_gradient_leads_to_the_unnormalised_law():
    start = enumeration.make("tabular", length=2, seed=1)
    reference = start.logits(start.theta_FV)
    of = lambda theta, n: facts.extrapolation_gradient(
        dataclasses.replace(start, theta_FV=theta), reference, 1.5, credit="to_go", normalise=n
    )
    for normalise in (True, False):
        step = jax.jit(lambda theta, n=normalise: theta - 2.0 * of(theta, n).reshape(theta.shape))
        theta = jax.lax.fori_loop(0, 3000, lambda _, theta, step=step: step(theta), start.theta_FV)
        law_N = facts.extrapolated_law(start, reference, 1.5, normalise=normalise)
        np.testing.assert_allclose(dataclasses.replace(start, theta_FV=theta).probability_N, law_N, atol=1e-6)


def test_with_everything_exact_the_true_reward_rises_with_lambda():
    rows = extrapolation.breaking(instances=20, length=3)
    assert len(rows) == len(extrapolation.CASES) * 2 * len(extrapolation.STRENGTHS)
    exact = [row for row in rows if row["case"] == "all exact" and row["form"] == "unnormalised"]
    rewards = [row["reward"][0] for row in exact]
    assert rewards == sorted(rewards) and [row["lambda"] for row in exact] == list(extrapolation.STRENGTHS)
    for row in rows:
        if row["lambda"] == 1:
            assert row["gain"] == pytest.approx([0, 0, 0], abs=1e-12)
    at_1 = {row["form"]: row["reward"] for row in rows if row["lambda"] == 1 and row["case"] == "wrong reference" and row["error"] == 3}
    for form, reward in at_1.items():  # at lambda = 1 the reference does not count
        np.testing.assert_allclose(reward, next(r["reward"] for r in rows if (r["form"], r["lambda"]) == (form, 1)), atol=1e-12)


def test_unnormalised_fixed_points_by_their_definition():
    """ref'^(1-lambda) (ref exp(r + e))^lambda over whole completions, its mean reward from the definition alone, with each error's size."""
    model = enumeration.make("tabular", vocab=3, length=2)
    rng = np.random.default_rng(7)
    theta, noise, reward_N, error_N = (rng.normal(size=(3, *shape)) for shape in (*[model.theta_FV.shape] * 2, *[(9,)] * 2))
    rows = [row for row in extrapolation.breaking(instances=3, length=2, seed=7) if row["form"] == "unnormalised"]
    logp_N = lambda theta: np.asarray(model.log_probability(model.logits(jnp.asarray(theta))))
    for row in rows:
        each = []
        for i in range(3):
            believed_N = reward_N[i] + (row["error"] * error_N[i] if row["case"] == "teacher with errors" else 0)
            assumed_N = logp_N(theta[i] + (row["error"] * noise[i] if row["case"] == "wrong reference" else 0))
            weight_N = np.exp(row["lambda"] * (logp_N(theta[i]) + believed_N) + (1 - row["lambda"]) * assumed_N)
            each.append(weight_N @ reward_N[i] / weight_N.sum())
        assert row["reward"][0] == pytest.approx(np.mean(each), abs=1e-12), row


def test_verdicts_on_rows_made_by_hand():
    def row(case, form, strength, gain, one=0.0):
        return {
            "case": case[0],
            "error": case[1],
            "form": form,
            "lambda": strength,
            "reward": [gain, 0, 0],
            "gain": [gain, gain - 1, gain + 1],
            "one_completion": one,
        }

    gains = {0.5: (-3, 0), 1.0: (0, 0), 1.5: (0.5, 0.4), 2.0: (-0.9, 0.6), 2.5: (-1.5, 0.7), 3.0: (-2, 0.8)}
    rows = [row(case, form, s, *gain) for case in extrapolation.CASES for form in extrapolation.FORMS for s, gain in gains.items()]
    for found in extrapolation.verdicts(rows):
        assert (found["best_lambda"], found["breaks_from"], found["one_completion_from"]) == (1.5, 2.5, 2.0)
        assert found["best_gain"] == [0.5, -0.5, 1.5]
    rising = [row(case, form, s, s - 1) for case in extrapolation.CASES for form in extrapolation.FORMS for s in (0.5, 1.0, 3.0)]
    assert {found["breaks_from"] for found in extrapolation.verdicts(rising)} == {None}  # below lambda 1 nothing breaks


# ---- ratios off-policy

UNBIASED = {
    ("local", "before"),
    ("local", "through"),
    ("local", "sequence"),
    ("token", "through"),
    ("token", "sequence"),
    ("to_go", "sequence"),
}


@pytest.mark.parametrize("behaviour", ["temperature", "older parameters"])
@pytest.mark.parametrize("name", cases.MODELS)
def test_which_ratio_each_term_needs(name, behaviour):
    """The exact local term needs rho_{<t}, a sampled token rho_{<=t}, rewards to go the whole sequence; rho_t corrects none of them."""
    model = enumeration.make(name, **cases.MODELS[name])
    other = moved(model, 1, 0.7)
    logits = model.logits(model.theta_FV) / 0.6 if behaviour == "temperature" else other.logits(other.theta_FV)
    rows = facts.off_policy(model, logits)
    assert len(rows) == 15
    for row in rows:
        if (row["term"], row["weight"]) in UNBIASED:
            assert row["bias"] < 1e-12, row
        else:
            assert row["bias"] > 1e-3, row
        assert row["variance"] > 0


def test_on_policy_all_ratios_are_one():
    model = enumeration.make("stop token", **cases.MODELS["stop token"])
    logits = model.logits(model.theta_FV)
    for weight_NT in facts.ratios(model, logits).values():
        np.testing.assert_array_equal(weight_NT, 1.0)
    rows = facts.off_policy(model, logits)
    assert max(row["bias"] for row in rows) < 1e-12
    variance = {row["term"]: row["variance"] for row in rows if row["weight"] == "none"}
    for term, name in (("local", "token_full"), ("token", "token"), ("to_go", "to_go")):
        assert variance[term] == pytest.approx(float(model.trace_covariance(REGISTRY[name])), rel=1e-10)


def test_ratios_by_hand():
    model = enumeration.make("tabular", length=3, seed=1)
    other = moved(model)
    p, m = (
        np.take_along_axis(np.asarray(jax.nn.softmax(x.logits(x.theta_FV))), np.asarray(model.tokens_NT)[..., None], -1)[..., 0]
        for x in (model, other)
    )
    found = facts.ratios(model, other.logits(other.theta_FV))
    rho = p / m
    np.testing.assert_allclose(found["token"], rho, rtol=1e-12)
    np.testing.assert_allclose(found["before"][:, 2], rho[:, 0] * rho[:, 1], rtol=1e-12)
    np.testing.assert_allclose(found["before"][:, 0], 1.0, rtol=1e-12)
    np.testing.assert_allclose(found["through"][:, 1], rho[:, 0] * rho[:, 1], rtol=1e-12)
    np.testing.assert_allclose(found["sequence"][:, 0], rho.prod(1), rtol=1e-12)


@pytest.mark.slow
def test_the_rows_of_the_study_are_of_all_models_and_finite():
    found = cases.rows(instances=2)
    assert [row["model"] for row in found["entropy"]] == list(cases.MODELS)
    assert {(row["length"], row["lambda"]) for row in found["fixed_points"]} == {(n, s) for n in (2, 4) for s in extrapolation.STRENGTHS}
    assert len(found["off_policy"]) == 2 * 15 and len(found["breaks"]) == len(extrapolation.CASES) * 2
    assert {(r["term"], r["weight"]) for r in found["off_policy"] if r["bias"] < 1e-12} == UNBIASED
