"""Exact facts about gradients of enumerable students, each with the assumption it needs, in float64.

Advantages are plain formulas in NumPy (`analysis/values.py`); `test_values.py` holds them equal to the registry's.
Variance means the trace of the covariance of the estimate from one rollout.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.analysis import enumeration, values
from opd_jax.numerics import credit, estimators, masked
from opd_jax.numerics.estimators import REGISTRY, TARGETS, Context, Estimator, Term
from opd_jax.numerics.token_stats import Signal

pytestmark = pytest.mark.usefixtures("float64")

RAGGED = {
    "stop token": {"stop": 2, "length": 4, "seed": 3},
    "stop token, shared parameters": {"stop": 0, "features": 3, "length": 4, "seed": 4},
    "observations": {"observed": (1,), "length": 4, "features": 3, "seed": 5},
    "observations and a stop token": {"observed": (0, 2), "stop": 1, "length": 5, "seed": 6},
}
FIXED = {"tabular": {"length": 4, "seed": 2}, "shared parameters": {"length": 4, "features": 6, "seed": 5}}
SAMPLED = Signal("reverse_kl", "sampled")
ABOUT = {"name": "", "claim": "", "formula": "", "reference": "", "target": "sequence_reverse_kl", "unbiased": True, "signal": SAMPLED}


def discounted(own_NT, gamma):
    """sum_{u >= t} gamma^(u - t) l_u on completions without a gap."""
    total = own_NT.copy()
    for t in range(own_NT.shape[1] - 2, -1, -1):
        total[:, t] += gamma * total[:, t + 1]
    return total


def mean_of(model, advantage_NT):
    return values.mean_and_trace(model, values.score_gradients(model, advantage_NT))[0]


def trace_of(model, advantage_NT):
    return values.mean_and_trace(model, values.score_gradients(model, advantage_NT))[1]


def exact(model, target="sequence_reverse_kl"):
    return np.asarray(model.exact_gradient(target))


def distance(a, b):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))


# ---- the gradient of the sequence-level reverse KL and its parts


@pytest.mark.parametrize("model", FIXED)
def test_table_of_advantages(model):
    """V = 3, T = 4, 81 completions: trajectory > to-go > to-go + K > Rao-Blackwell + K and Rao-Blackwell > Rao-Blackwell + K > token.

    The order is that of these instances, not a theorem: `test_kl_baseline_may_raise_the_variance` has others.
    """
    model = enumeration.make(model, **FIXED[model])
    assert len(model.tokens_NT) == 81
    own, k = values.log_ratio(model), values.kl(model)
    to_go, rao_blackwell = own + values.later(own), own - values.later(k)
    unbiased = {
        "trajectory": own.sum(axis=1, keepdims=True) + 0 * own,
        "to_go": to_go,
        "to_go + K": to_go + k,
        "rao_blackwell": rao_blackwell,
        "rao_blackwell + K": rao_blackwell + k,
    }
    for advantage in unbiased.values():
        assert distance(mean_of(model, advantage), exact(model)) < 1e-6
    spread = {name: trace_of(model, advantage) for name, advantage in unbiased.items()}
    token = trace_of(model, own)
    assert spread["trajectory"] > spread["to_go"] > spread["to_go + K"] > spread["rao_blackwell + K"] > token
    assert spread["to_go"] > spread["rao_blackwell"] > spread["rao_blackwell + K"]
    # The token's +K leaves its mean alone.
    assert distance(mean_of(model, own + k), mean_of(model, own)) < 1e-12


@pytest.mark.parametrize("model", FIXED)
def test_discounts_trade_bias_for_variance(model):
    """gamma 1, .75, .5, .25, 0: the bias grows from 0 to the token's, the variance falls from to-go's to the token's."""
    model = enumeration.make(model, **FIXED[model])
    own = values.log_ratio(model)
    found = [values.mean_and_trace(model, values.score_gradients(model, discounted(own, g))) for g in (1, 0.75, 0.5, 0.25, 0)]
    bias = [float(np.linalg.norm(mean - exact(model))) for mean, _ in found]
    assert bias == sorted(bias) and bias[0] < 1e-12 and bias[1] > 1e-2
    assert [spread for _, spread in found] == sorted((spread for _, spread in found), reverse=True)
    token_bias = np.linalg.norm(exact(model, "token_reverse_kl") - exact(model))
    assert bias[-1] == pytest.approx(token_bias, rel=1e-9)
    assert found[-1][0] @ exact(model) / np.linalg.norm(found[-1][0]) / np.linalg.norm(exact(model)) > 0.8


@pytest.mark.parametrize("model", RAGGED)
def test_two_parts_add_up_with_stop_tokens_and_observations(model):
    """g1 + g2: the token-level gradient misses exactly E sum_t (sum_{u > t} l_u) s_t, and with exact KLs for the l_u the same."""
    model = enumeration.make(model, **RAGGED[model])
    missing = exact(model) - exact(model, "token_reverse_kl")
    assert np.linalg.norm(missing) > 1e-2
    for future in (values.later(values.log_ratio(model)), -values.later(values.kl(model))):
        assert distance(mean_of(model, future), missing) < 1e-12


@pytest.mark.parametrize("model", RAGGED)
def test_gradient_of_the_law_of_prefixes(model):
    """Theorem 2: grad E sum_t f(c_t) = E sum_t (sum_{u > t} f(c_u)) s_t for any function f of the prefix."""
    model = enumeration.make(model, **RAGGED[model])
    f_NT = np.where(model.mask_NT, values.given_state(model, np.random.default_rng(0).normal(size=model.mask_NT.shape)), 0)
    total_N = jnp.asarray(f_NT.sum(axis=1))
    gradient = jax.grad(lambda theta_FV: jnp.exp(model.log_probability(model.logits(theta_FV))) @ total_N)(model.theta_FV)
    # score_gradients has the sign of a loss.
    assert distance(-mean_of(model, values.later(f_NT)), gradient.ravel()) < 1e-12
    assert float(jnp.linalg.norm(gradient)) > 1e-2


@pytest.mark.parametrize("model", [*FIXED, *RAGGED])
def test_steps_of_the_proof(model):
    """The four steps from E R grad log pi(y) to reward-to-go and to exact KLs.

    (a) E s_t = 0, so the reward's own gradient vanishes; (b) E l_u s_t = 0, u < t; (c) E b(c_t) s_t = 0; (d) E l_u s_t = -E K_u s_t, u > t.
    """
    model = enumeration.make(model, **{**FIXED, **RAGGED}[model])
    own, k, mask = values.log_ratio(model), values.kl(model), np.asarray(model.mask_NT)
    baseline = values.given_state(model, np.random.default_rng(0).normal(size=own.shape))
    for t in range(own.shape[1]):
        at_t = lambda x_N, t=t: mean_of(model, np.where(np.arange(own.shape[1]) == t, x_N[:, None], 0))
        assert distance(at_t(np.ones(len(own))), 0) < 1e-12  # (a)
        assert distance(at_t(baseline[:, t]), 0) < 1e-12  # (c)
        for u in range(own.shape[1]):
            if u < t:
                assert distance(at_t(own[:, u]), 0) < 1e-12  # (b)
            if u > t:
                assert distance(at_t(own[:, u]), at_t(-k[:, u])) < 1e-12  # (d)
                assert not mask[:, [t, u]].all(axis=1).any() or distance(at_t(own[:, u]), 0) > 1e-4

    def rewards(theta_FV):
        """E of the sum of the log-ratios with the law of the completions held fixed: its gradient is that of the reward alone."""
        return model.probability_N @ (model.log_probability(model.teacher_logits_NTV) - model.log_probability(model.logits(theta_FV)))

    assert distance(jax.grad(rewards)(model.theta_FV), 0) < 1e-12


@pytest.mark.parametrize("target", TARGETS)
def test_exact_gradients_by_finite_differences(target):
    """Central differences of the objective: no autodiff, and none of token_stats' own derivative."""
    model = enumeration.make("", observed=(1,), stop=2, features=3, length=4, seed=5)
    theta, step = np.asarray(model.theta_FV), 1e-5
    shifts = step * np.eye(theta.size).reshape(-1, *theta.shape)
    objectives = jax.jit(jax.vmap(lambda theta_FV: model.objective(target, theta_FV)))
    found = (objectives(theta[None] + shifts) - objectives(theta[None] - shifts)) / (2 * step)
    np.testing.assert_allclose(exact(model, target), found, atol=1e-8)


def test_discount_ends():
    """gamma 0 is the token, gamma 1 reward-to-go, for every rollout; the code that trains agrees at any gamma."""
    model = enumeration.make("tabular", **FIXED["tabular"])
    own = values.log_ratio(model)
    np.testing.assert_array_equal(discounted(own, 0), own)
    np.testing.assert_allclose(discounted(own, 1), own + values.later(own), atol=1e-12)
    for gamma in (0.0, 0.3, 1.0):
        trained = credit.advantages(jnp.asarray(own), model.mask_NT, credit="discounted", gamma=gamma)
        np.testing.assert_allclose(trained, discounted(own, gamma), atol=1e-12)


# ---- one prefix: the three sampled KLs, and what stop-gradients are for


@pytest.fixture
def prefix():
    """(logits of the student, log-probs of the teacher) of one prefix over six tokens."""
    rng = np.random.default_rng(7)
    return rng.normal(size=6), values.log_softmax(rng.normal(size=6))


def difference(function, z, step=1e-6):
    """Gradient of a function of the logits by central differences."""
    return np.array([(function(z + step * e) - function(z - step * e)) / (2 * step) for e in np.eye(len(z))])


def reverse(z, logq):
    logp = values.log_softmax(z)
    return np.exp(logp) @ (logp - logq)


def forward(z, logq):
    return np.exp(logq) @ (logq - values.log_softmax(z))


K = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d}


def test_sampled_kls_as_values(prefix):
    """E k1 = E k3 = KL(pi || q); k2 is biased."""
    z, logq = prefix
    logp = values.log_softmax(z)
    mean = {name: np.exp(logp) @ k(logp - logq) for name, k in K.items()}
    assert mean["k1"] == pytest.approx(reverse(z, logq), abs=1e-14) and mean["k3"] == pytest.approx(reverse(z, logq), abs=1e-14)
    assert abs(mean["k2"] - reverse(z, logq)) > 1e-2


def test_sampled_kls_as_losses(prefix):
    """E grad k1 = 0, E grad k2 = grad KL(pi || q), E grad k3 = grad KL(q || pi): tokens are data, log pi(y) is differentiated."""
    z, logq = prefix
    p = np.exp(values.log_softmax(z))
    means = {name: difference(lambda z, k=k: p @ k(values.log_softmax(z) - logq), z) for name, k in K.items()}
    assert distance(means["k1"], 0) < 1e-9
    assert distance(means["k2"], difference(lambda z: reverse(z, logq), z)) < 1e-9
    assert distance(means["k3"], difference(lambda z: forward(z, logq), z)) < 1e-9
    assert distance(means["k2"], means["k3"]) > 1e-2


def test_sampled_kls_as_rewards(prefix):
    """E sg(k) s = grad KL(pi || q) for k1 alone; k2 and k3 are biased."""
    z, logq = prefix
    logp = values.log_softmax(z)
    score_YV = np.eye(len(z)) - np.exp(logp)[None]
    target = difference(lambda z: reverse(z, logq), z)
    means = {name: (np.exp(logp) * k(logp - logq)) @ score_YV for name, k in K.items()}
    assert distance(means["k1"], target) < 1e-9
    assert np.linalg.norm(means["k2"] - target) > 1e-2 and np.linalg.norm(means["k3"] - target) > 1e-2


def test_an_advantage_that_is_not_detached_adds_the_gradient_of_the_entropy(prefix):
    """(log pi - log q) log pi with both factors differentiated has the mean grad KL - grad H, not grad KL."""
    z, logq = prefix
    p = np.exp(values.log_softmax(z))

    def loss(z, detach):
        logp = jax.nn.log_softmax(z)
        weight = logp - logq
        return p @ ((jax.lax.stop_gradient(weight) if detach else weight) * logp)

    entropy = difference(lambda z: -np.exp(values.log_softmax(z)) @ values.log_softmax(z), z)
    right, wrong = (jax.grad(loss)(jnp.asarray(z), detach) for detach in (True, False))
    target = difference(lambda z: reverse(z, logq), z)
    assert distance(right, target) < 1e-9
    assert distance(wrong, target - entropy) < 1e-9
    assert np.linalg.norm(entropy) > 1e-2


def test_in_ratio_form_an_advantage_that_is_not_detached_is_noise(prefix):
    """sg(1/pi) pi (log pi - log q): the mean stays grad KL, each token's gradient has its score on top."""
    z, logq = prefix
    p = np.exp(values.log_softmax(z))

    def loss_Y(z, detach):
        logp = jax.nn.log_softmax(z)
        weight = logp - logq
        return jnp.exp(logp) / p * (jax.lax.stop_gradient(weight) if detach else weight)

    right_YV, wrong_YV = (jax.jacobian(loss_Y)(jnp.asarray(z), detach) for detach in (True, False))
    assert distance(wrong_YV - right_YV, np.eye(len(z)) - p[None]) < 1e-12
    assert distance(p @ wrong_YV, difference(lambda z: reverse(z, logq), z)) < 1e-9


# ---- baselines and batches


def test_kl_baseline_may_raise_the_variance():
    """l_t + K_t has the mean of l_t; in trace it saves on some instances and costs on others. The score-norm optimal b* never costs."""
    ratios = {"kl": [], "optimal": []}
    for seed in range(20):
        model = enumeration.make("tabular", length=4, seed=seed)
        own, k = values.log_ratio(model), values.kl(model)
        plain = trace_of(model, own)
        ratios["kl"].append(trace_of(model, own + k) / plain)
        ratios["optimal"].append(trace_of(model, own - values.optimal_baseline(model, own)) / plain)
    assert min(ratios["kl"]) < 0.9 and max(ratios["kl"]) > 1.5
    assert max(ratios["optimal"]) < 1
    assert all(best <= kl for best, kl in zip(ratios["optimal"], ratios["kl"], strict=True))


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
    plain, weighted = REGISTRY["token"], TokenRatio(**ABOUT)
    law = model.law(temperature=0.7)
    assert distance(model.expected_gradient(weighted, law=law), exact_under(model, law)) < 1e-12
    assert distance(model.expected_gradient(plain, law=law), exact_under(model, law)) > 1e-2
    law = model.law(top_p=0.8)
    left = np.asarray(model.expected_gradient(weighted, law=law)) - exact_under(model, law)
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
        target = exact_under(model, law)
        plain, weighted = (probability_N @ values.score_gradients(model, w * own) - target for w in (1, weight_NT))
        ratios.append(np.linalg.norm(weighted) / np.linalg.norm(plain))
    assert min(ratios) < 0.7 and max(ratios) > 1.3 and 6 < sum(ratio > 1 for ratio in ratios) < 14


def exact_under(model, law):
    return np.asarray(model.exact_gradient("token_reverse_kl", law=law))


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
    assert distance(mean, exact_under(model, law)) < 1e-12
    assert distance(mean, exact(model, "token_reverse_kl")) > 1e-3


# ---- how large estimates can be, and how their variance grows


def bounds(model):
    """(largest |l_t|, largest |s_t|, T) over all completions."""
    square_NT = np.stack([np.sum(values.score_gradients(model, place) ** 2, axis=1) for place in np.eye(model.tokens_NT.shape[1])])
    return np.abs(values.log_ratio(model)).max(), np.sqrt(square_NT.max()), model.tokens_NT.shape[1]


def estimates(model):
    own = values.log_ratio(model)
    advantage = {"token": own, "to_go": own + values.later(own), "sequence": own.sum(axis=1, keepdims=True) + 0 * own}
    return {name: values.score_gradients(model, a) for name, a in advantage.items()}


LIMIT = {"token": lambda t: t, "to_go": lambda t: t * (t + 1) / 2, "sequence": lambda t: t**2}


@pytest.mark.parametrize("length", range(1, 7))
@pytest.mark.parametrize("features", [None, 3])
def test_bounds_on_estimates_and_variances(features, length):
    """|l| <= Br, |s| <= Bs: |g| <= T Br Bs for the token, T(T+1)/2 to go, T^2 for the trajectory; variances at most their squares."""
    model = enumeration.make("", length=length, features=features, seed=length)
    r, s, _ = bounds(model)
    for name, gradients in estimates(model).items():
        limit = LIMIT[name](length) * r * s
        assert np.linalg.norm(gradients, axis=1).max() <= limit + 1e-12
        assert values.mean_and_trace(model, gradients)[1] <= limit**2
    for gamma in (0.25, 0.5, 0.9):
        advantage = discounted(values.log_ratio(model), gamma)
        reach = r * (1 - gamma ** (length - np.arange(length))) / (1 - gamma)
        assert (np.abs(advantage) <= reach + 1e-12).all()
        assert trace_of(model, advantage) <= (length * r * s / (1 - gamma)) ** 2


@pytest.mark.parametrize("length", range(1, 7))
def test_bounds_are_reached(length):
    """Tokens drawn independently of their prefix: the completion that repeats the rarest token meets each bound, so none can be lower."""
    model = enumeration.make("", vocab=2, length=length)
    alone = jnp.ones((*model.tokens_NT.shape, 1))
    logits_NTV = jnp.broadcast_to(jnp.array([2.0, -2.0]), model.teacher_logits_NTV.shape)
    model = dataclasses.replace(model, theta_FV=jnp.array([[0.5, -0.5]]), features_NTF=alone, teacher_logits_NTV=logits_NTV)
    r, s, _ = bounds(model)
    for name, gradients in estimates(model).items():
        assert np.linalg.norm(gradients, axis=1).max() == pytest.approx(LIMIT[name](length) * r * s, rel=1e-12)


def test_variance_of_to_go_grows_faster_than_that_of_the_token():
    """V = 2, tabular, the mean of to-go / token over five seeds at T = 2, 4, 6, 8 (2.3, 4.2, 5.4, 7.7 here): growth, not an exponent."""
    ratios = []
    for length in (2, 4, 6, 8):
        each = []
        for seed in range(5):
            model = enumeration.make("", vocab=2, length=length, seed=seed)
            own = values.log_ratio(model)
            each.append(trace_of(model, own + values.later(own)) / trace_of(model, own))
        ratios.append(np.mean(each))
    assert all(after > 1.2 * before for before, after in itertools.pairwise(ratios))


# ---- where descent ends


@functools.partial(jax.jit, static_argnames=("name", "steps", "rate"))
@functools.partial(jax.vmap, in_axes=(0, None, None, None))
def descend(model, name, steps, rate):
    """(the student at the end of descent on the exact expectation of an estimator, the norm of its last step's gradient), for a stack."""

    def field(theta_FV):
        at = dataclasses.replace(model, theta_FV=theta_FV)
        return (at.probability_N @ at.gradients(REGISTRY[name])).reshape(theta_FV.shape)

    theta_FV = jax.lax.scan(lambda theta_FV, _: (theta_FV - rate * field(theta_FV), None), model.theta_FV, None, length=steps)[0]
    return dataclasses.replace(model, theta_FV=theta_FV), jnp.linalg.norm(field(theta_FV))


def ends(models, name, *, steps, rate):
    """The students that `descend` makes of several of one shape, and their gradients' norms."""
    stack, norms = descend(jax.tree.map(lambda *x: jnp.stack(x), *models), name, steps, rate)
    return [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(len(models))], norms


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token", "to_go"])
def test_tabular_students_reach_the_teacher(name):
    """Theorem 3: descent on either expected gradient ends at pi = q at every prefix, though the two differ everywhere else."""
    model = enumeration.make("tabular", seed=1)
    uniform = dataclasses.replace(model, theta_FV=0 * model.theta_FV)
    for start, end in zip((model, uniform), ends((model, uniform), name, steps=3000, rate=4.0)[0], strict=True):
        teacher_NTV = np.exp(values.log_softmax(np.asarray(model.teacher_logits_NTV)))
        assert np.abs(np.exp(values.student_logp(end)) - teacher_NTV).max() < 1e-6
        assert distance(exact(start), exact(start, "token_reverse_kl")) > 1e-2


@pytest.mark.slow
def test_students_with_shared_parameters_end_elsewhere():
    """d = 2, V = 3, T = 3: both gradients vanish at their ends, which differ in sequence-level KL; token's is not stationary for it."""
    models = [enumeration.make("shared", features=2, seed=seed) for seed in (3, 7, 8)]
    kl = {}
    for name in ("token", "to_go"):
        found, norms = ends(models, name, steps=8000, rate=0.3)
        assert float(norms.max()) < 1e-8
        assert all((np.linalg.norm(exact(model)) < 1e-7) == (name == "to_go") for model in found)
        kl[name] = np.array([float(model.objective("sequence_reverse_kl", model.theta_FV)) for model in found])
    assert (kl["token"] - kl["to_go"] > 1e-2).all()


# ---- gaps, state-only rewards, values


def test_return_crosses_observations():
    """A return that starts anew at each observation is biased; the one that crosses it is not."""
    model = enumeration.make("observations", **RAGGED["observations"])
    own, mask = values.log_ratio(model), np.asarray(model.mask_NT)
    cut = own.copy()
    for t in range(own.shape[1] - 2, -1, -1):
        cut[:, t] += np.where(mask[:, t + 1], cut[:, t + 1], 0)
    assert distance(mean_of(model, own + values.later(own)), exact(model)) < 1e-12
    assert distance(mean_of(model, cut), exact(model)) > 1e-2


def test_observations_do_not_discount():
    """gamma counts the tokens that were written: with a gap, the advantages are those of the same log-ratios without it."""
    model = enumeration.make("observations", **RAGGED["observations"])
    own, written = values.log_ratio(model), np.asarray(model.mask_NT)[0]
    assert (np.asarray(model.mask_NT) == written).all() and not written.all()
    expected = np.zeros_like(own)
    expected[:, written] = discounted(own[:, written], 0.6)
    trained = credit.advantages(jnp.asarray(own), model.mask_NT, credit="discounted", gamma=0.6)
    np.testing.assert_allclose(trained, expected, atol=1e-12)


def test_a_penalty_of_the_state_alone_teaches_nothing():
    """A top-k KL used as the advantage of its own position: it does not depend on the token drawn, so its expected gradient is 0."""
    model = enumeration.make("stop token", **RAGGED["stop token"])
    logp, logq = values.student_logp(model), values.log_softmax(np.asarray(model.teacher_logits_NTV))
    top = logq >= np.sort(logq, axis=-1)[..., -2:-1]
    head = [np.where(top, x - np.log(np.sum(np.where(top, np.exp(x), 0), axis=-1, keepdims=True)), 0) for x in (logp, logq)]
    penalty_NT = np.where(model.mask_NT, np.sum(np.where(top, np.exp(head[0]) * (head[0] - head[1]), 0), axis=-1), 0)
    assert penalty_NT.max() > 0.1
    assert distance(mean_of(model, -penalty_NT), 0) < 1e-12
    assert trace_of(model, -penalty_NT) > 1e-2
    # Put on the tokens before it, the same penalty does teach.
    assert np.linalg.norm(mean_of(model, -values.later(penalty_NT))) > 1e-2


@pytest.mark.parametrize("arguments", [{}, {"stop": 1}, {"features": 2}])
def test_sum_of_exact_kls_estimates_the_sequence_kl_with_less_noise(arguments):
    """sum_t K_t has the mean of -sum_t l_t (the chain rule) and, on these 20 instances, less variance (no theorem: they correlate)."""
    for seed in range(20):
        model = enumeration.make("", length=4, seed=seed, **arguments)
        probability_N = np.asarray(model.probability_N)
        sampled_N, exact_N = -values.log_ratio(model).sum(axis=1), values.kl(model).sum(axis=1)
        mean = probability_N @ sampled_N
        assert mean == pytest.approx(float(model.objective("sequence_reverse_kl", model.theta_FV)), abs=1e-12)
        assert probability_N @ exact_N == pytest.approx(mean, abs=1e-12)
        assert probability_N @ (exact_N - mean) ** 2 < probability_N @ (sampled_N - mean) ** 2


# ---- the proofs see a wrong estimator


@dataclasses.dataclass(frozen=True)
class Perturbed(Estimator):
    """An estimator of the registry with a fault."""

    base: Estimator
    fault: str

    needs = ()

    def terms(self, stats, context: Context) -> Term:
        return self.base.terms(stats, context)

    def surrogate(self, student_logits_BTV, teacher_logits_BTV, tokens_BT, mask_BT, **given):
        if self.fault == "last token lost":
            later_BT = jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1] - mask_BT
            mask_BT = mask_BT & (later_BT > 0)
        loss_B = self.base.surrogate(student_logits_BTV, teacher_logits_BTV, tokens_BT, mask_BT, **given)
        if self.fault == "larger by 1%":
            return 1.01 * loss_B
        if self.fault == "a reward for one token":
            logp_BT = jax.nn.log_softmax(student_logits_BTV)[..., 0]
            return loss_B - 0.01 * jnp.sum(jnp.where(mask_BT & (tokens_BT == 0), logp_BT, 0), axis=1)
        return loss_B


def claim_holds(estimator, base):
    """What `test_estimators.py` asserts of a claim, on one model."""
    model = enumeration.make("shared", vocab=3, length=3, features=2, stop=2, seed=4)
    rollouts = 2 if getattr(base, "looks_across", False) else 1
    error = distance(model.expected_gradient(estimator, rollouts=rollouts), model.exact_gradient(base.target))
    return error < 1e-6 if base.unbiased else error > 1e-4


def faulty(base, fault):
    about = {f.name: getattr(base, f.name) for f in dataclasses.fields(Estimator)}
    return Perturbed(**about, base=base, fault=fault)


UNBIASED = [name for name, estimator in REGISTRY.items() if estimator.unbiased]


@pytest.mark.parametrize("name", [n if n in ("to_go", "token_full") else pytest.param(n, marks=pytest.mark.slow) for n in UNBIASED])
def test_each_proof_fails_when_its_estimator_is_perturbed(name):
    base = REGISTRY[name]
    for fault in ("larger by 1%", "last token lost", "a reward for one token"):
        assert not claim_holds(faulty(base, fault), base), fault


@pytest.mark.parametrize("name", [n if n == "to_go" else pytest.param(n, marks=pytest.mark.slow) for n in UNBIASED])
def test_each_proof_of_an_advantage_fails_without_its_stop_gradients(name, monkeypatch):
    """Every stop-gradient of the estimator's own arithmetic dropped: the mean moves, unless the estimator has no advantage."""
    base = REGISTRY[name]
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    assert claim_holds(faulty(base, "no stop-gradient"), base) == ("target_logp" not in base.needs)


@pytest.mark.parametrize("name", [name for name, e in REGISTRY.items() if not e.unbiased])
def test_a_claim_of_bias_fails_for_an_unbiased_estimator(name):
    base = REGISTRY[name]
    signal = TARGETS[base.target]
    right = estimators.build(SAMPLED, "to_go", 1.0) if signal is None else estimators.build(signal, "token", 1.0)
    assert claim_holds(base, base) and not claim_holds(right, base)
