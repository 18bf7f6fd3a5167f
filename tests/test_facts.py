"""Exact facts about what gradients point at, each with the assumption it needs, on enumerable students in float64.

Advantages are plain formulas in NumPy (`analysis/values.py`); `test_values.py` holds them equal to the registry's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import FIXED, RAGGED, discounted, distance, exact, mean_of, trace_of

from opd_jax.analysis import enumeration, values
from opd_jax.numerics import credit
from opd_jax.numerics.estimators import REGISTRY, TARGETS

pytestmark = pytest.mark.usefixtures("float64")


# ---- the gradient of the sequence-level reverse KL and its parts


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


# ---- observations, and rewards of the state alone


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


@pytest.mark.slow
def test_with_shared_parameters_the_start_may_matter_more_than_the_estimator():
    """Descent on the true gradient ends at 0.77 or at 1.19 nats, by its start: the second is above the token's better end, 0.81."""
    model, rng = enumeration.make("shared", features=2, seed=3), np.random.default_rng(0)
    starts = [dataclasses.replace(model, theta_FV=jnp.asarray(3 * rng.normal(size=model.theta_FV.shape))) for _ in range(3)]
    kl = {}
    for name in ("token", "to_go"):
        found, _ = ends(starts, name, steps=8000, rate=0.3)
        kl[name] = [float(model.objective("sequence_reverse_kl", end.theta_FV)) for end in found]
    assert max(kl["to_go"]) > min(kl["token"]) + 0.1
    assert min(kl["to_go"]) < min(kl["token"]) - 1e-2
