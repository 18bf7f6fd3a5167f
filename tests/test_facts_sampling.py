"""Exact facts about batches and sampling laws: normalisers, batch means, temperature and truncation, on enumerable students in float64."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import FIXED, RAGGED, distance, exact, mean_of

from opd_jax.analysis import enumeration, values
from opd_jax.numerics import masked
from opd_jax.numerics.estimators import REGISTRY, Context, Estimator, Term
from opd_jax.numerics.token_stats import Signal

pytestmark = pytest.mark.usefixtures("float64")

ABOUT = {"name": "", "claim": "", "formula": "", "reference": "", "target": "token_reverse_kl", "unbiased": True}


@pytest.mark.parametrize("model", [{"length": 3, "seed": 1}, {"length": 3, "stop": 1, "features": 2, "seed": 2}])
@pytest.mark.parametrize("rollouts", [2, 3])
def test_a_batch_mean_with_the_own_sample_scales_the_gradient(model, rollouts):
    """Return less the batch mean: 1 - 1/n of the gradient with the own rollout in it, all of it (leave one out) without."""
    model = enumeration.make("", **model)
    return_N = values.log_ratio(model).sum(axis=1)
    score_NG = values.score_gradients(model, np.ones(model.mask_NT.shape))
    rows = np.array(list(itertools.product(range(len(return_N)), repeat=rollouts)))
    weight_C, return_CB = np.asarray(model.probability_N)[rows].prod(axis=1), return_N[rows]
    mean_C1 = return_CB.mean(axis=1, keepdims=True)
    others_CB = (return_CB.sum(axis=1, keepdims=True) - return_CB) / (rollouts - 1)
    for baseline, share in ((mean_C1, 1 - 1 / rollouts), (others_CB, 1)):
        mean = np.einsum("c,cb,cbg->g", weight_C, (return_CB - baseline) / rollouts, score_NG[rows])
        assert distance(mean, share * exact(model)) < 1e-12


@pytest.mark.parametrize("kind", masked.NORMALISERS)
@pytest.mark.parametrize("rollouts", [1, 2, 3])
def test_normalisers_under_ragged_lengths(kind, rollouts):
    """sequence_sum and constant give a fixed multiple of the gradient; token_mean and sequence_mean give another direction."""
    model = enumeration.make("stop token", stop=2, length=3, features=2, seed=3)
    mask_NT, own, places = np.asarray(model.mask_NT), values.log_ratio(model), np.eye(3, dtype=bool)
    to_go = own + values.later(own)
    part_NTG = np.stack([values.score_gradients(model, np.where(place, to_go, 0)) for place in places], axis=1)
    rows = np.array(list(itertools.product(range(len(own)), repeat=rollouts)))
    weights_CBT, z_C = jax.vmap(lambda mask_BT: masked.normaliser(kind, mask_BT, max_length=3))(jnp.asarray(mask_NT[rows]))
    estimates_CG = np.einsum("cbt,cbtg->cg", np.asarray(weights_CBT, float), part_NTG[rows]) / np.asarray(z_C, float)[:, None]
    mean = np.asarray(model.probability_N)[rows].prod(axis=1) @ estimates_CG
    if kind in ("sequence_sum", "constant"):
        assert distance(mean, exact(model) / (3 if kind == "constant" else 1)) < 1e-6
    else:
        cosine = mean @ exact(model) / np.linalg.norm(mean) / np.linalg.norm(exact(model))
        assert cosine < 0.999


# ---- the sampling law


def test_under_top_p_scores_have_a_mean_and_baselines_cost():
    """E_mu s != 0 under top-p (and under another temperature): a constant baseline moves the expected gradient by exactly b E_mu s."""
    model = enumeration.make("tabular", **FIXED["tabular"])
    for change in ({"top_p": 0.8}, {"temperature": 0.7}):
        law = model.law(**change)
        probability_N, own = np.asarray(law.probability_N), values.log_ratio(model)
        mean = lambda advantage_NT, weight_N=probability_N: weight_N @ values.score_gradients(model, advantage_NT)
        score = -mean(np.ones_like(own))
        assert np.linalg.norm(score) > 1e-2
        np.testing.assert_allclose(mean(own - 0.5) - mean(own), 0.5 * score, atol=1e-12)
    assert distance(mean_of(model, np.ones_like(own)), 0) < 1e-12


@dataclasses.dataclass(frozen=True)
class TokenRatio(Estimator):
    """l_t with the weight pi(y_t) / mu(y_t), prefixes as they come."""

    needs = ("logp", "target_logp")

    def terms(self, stats, context: Context) -> Term:
        log_ratio_BT = stats.target_logp_BT - stats.logp_BT
        return Term(context.mask_BT, advantage_BT=log_ratio_BT, w_score_BT=jnp.exp(stats.logp_BT - context.behaviour_logp_BT))


def test_token_ratio_under_top_p_leaves_the_bias_of_the_support():
    """Against the fixed-prefix gradient on mu's prefixes: pi/mu leaves exactly the tokens never drawn, under a temperature nothing."""
    model = enumeration.make("tabular", **FIXED["tabular"])
    plain, weighted = REGISTRY["token"], TokenRatio(**ABOUT, signal=Signal("reverse_kl", "sampled"))
    law = model.law(temperature=0.7)
    assert distance(model.expected_gradient(weighted, law=law), exact(model, "token_reverse_kl", law)) < 1e-12
    assert distance(model.expected_gradient(plain, law=law), exact(model, "token_reverse_kl", law)) > 1e-2
    law = model.law(top_p=0.8)
    left = np.asarray(model.expected_gradient(weighted, law=law)) - exact(model, "token_reverse_kl", law)
    np.testing.assert_allclose(left, -never_drawn(model, law), atol=1e-12)
    assert np.linalg.norm(left) > 1e-2


def test_token_ratio_under_top_p_may_raise_the_bias():
    """V = 6, T = 2, top-p 0.8, 20 instances: with pi/mu the norm of the bias is 0.63 to 1.38 times that without, above 1 on half."""
    ratios = []
    for seed in range(20):
        model = enumeration.make("", vocab=6, length=2, seed=seed)
        law, own = model.law(top_p=0.8), values.log_ratio(model)
        probability_N, drawn_NT = np.asarray(law.probability_N), ~np.isneginf(law.logp_NT)
        weight_NT = np.where(drawn_NT, np.exp(np.where(drawn_NT, model.law().logp_NT - law.logp_NT, 0)), 0)
        target = exact(model, "token_reverse_kl", law)
        plain, weighted = (probability_N @ values.score_gradients(model, w * own) - target for w in (1, weight_NT))
        ratios.append(np.linalg.norm(weighted) / np.linalg.norm(plain))
    assert min(ratios) < 0.7 and max(ratios) > 1.3 and 6 < sum(ratio > 1 for ratio in ratios) < 14


def never_drawn(model, law):
    """E_mu sum_t sum_{y outside mu} pi(y) (log pi(y) - log q(y)) s(y), by the definition."""
    logp, logq = values.student_logp(model), values.log_softmax(np.asarray(model.teacher_logits_NTV))
    outside_NTV = np.where(np.isneginf(np.asarray(law.logp_NTV)), np.exp(logp) * (logp - logq), 0)
    gradient_NTV = outside_NTV - outside_NTV.sum(axis=-1, keepdims=True) * np.exp(logp)
    return np.einsum("n,ntf,ntv->fv", law.probability_N, model.features_NTF, gradient_NTV).ravel()


@pytest.mark.parametrize("change", [{"top_p": 0.8}, {"top_k": 2}, {"temperature": 0.5}])
def test_full_vocabulary_loss_is_exact_at_each_prefix_of_any_law(change):
    """Under truncation only the law of the prefixes differs from the on-policy gradient."""
    model = enumeration.make("stop token", **RAGGED["stop token"])
    law = model.law(**change)
    mean = model.expected_gradient(REGISTRY["token_full"], law=law)
    assert distance(mean, exact(model, "token_reverse_kl", law)) < 1e-12
    assert distance(mean, exact(model, "token_reverse_kl")) > 1e-3
