"""Identities of the methods, on configs: gradients at one position in closed form, limits, and where the optimum lies."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from tables import load, of_each_token

pytestmark = pytest.mark.usefixtures("float64")
QUICKSTART = "configs/quickstart.py"
V = 7


def laws(seed, count=3):
    """Log-laws of some models at one position."""
    return scipy.special.log_softmax(np.random.default_rng(seed).normal(size=(count, V)), axis=-1)


def signal(divergence, support="full", **more):
    return load(QUICKSTART, {"signal.divergence": divergence, "signal.support": support} | {f"signal.{k}": x for k, x in more.items()})


def test_gradients_of_both_directions():
    """Over the logits: p - q of the forward KL, p (log p/q - KL) of the reverse one, whichever token was drawn."""
    p, q, _ = laws(0)
    ratio = p - q
    for divergence, wanted in (("forward_kl", np.exp(p) - np.exp(q)), ("reverse_kl", np.exp(p) * (ratio - np.exp(p) @ ratio))):
        _, found = of_each_token(signal(divergence), p, q)
        np.testing.assert_allclose(found, np.tile(wanted, (V, 1)), atol=1e-12)


@pytest.mark.parametrize("end, divergence", [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_over_beta_tends_to_the_forward_kl_and_over_1_minus_beta_to_the_reverse_one(end, divergence):
    """With a distance in proportion to what is left of beta; at the ends themselves it is the KL, undivided."""
    p, q, _ = laws(1)
    limit = of_each_token(signal(divergence), p, q)
    distances = []
    for left in (0.1, 0.01, 0.001):
        loss, gradient = of_each_token(signal("jsd", beta=abs(end - left)), p, q)
        distances.append((abs(loss / left - limit[0]), np.abs(gradient / left - limit[1]).max()))
    for far, near in zip(distances, distances[1:], strict=False):
        np.testing.assert_allclose(np.array(far) / near, 10, rtol=0.3)
    exact = of_each_token(signal("jsd", beta=end), p, q)
    assert exact[0] == limit[0] and (exact[1] == limit[1]).all()


@pytest.mark.parametrize("divergence, inwards", [("reverse_kl", False), ("forward_kl", True)])
def test_a_plain_top_k_moves_the_mass_on_its_support_where_the_laws_agree(divergence, inwards):
    """Out of it the reverse KL, into it the forward one (cross-entropy on a teacher's top-k): -/+ p (1[on S] - p(S))."""
    p, *_ = laws(2)
    on = np.zeros(V)
    on[np.argsort(p)[-3:]] = 1
    wanted = np.exp(p) * (on - np.exp(p) @ on) * (-1 if inwards else 1)
    _, found = of_each_token(signal(divergence, "topk_teacher", k=3, tail="none"), p, p)
    np.testing.assert_allclose(found, np.tile(wanted, (V, 1)), atol=1e-12)


def test_a_trust_region_is_the_law_nearest_to_the_student_among_those_as_near_to_the_first_one():
    """KL(q || live) is least, for a bounded KL(q || first), where a KL(q || live) + (1 - a) KL(q || first) is: the target at mix a."""
    live, first, start = laws(3)
    mix = 0.3
    fields = {"teacher.recipe": "", "teacher.path": "student_init", "teacher.update": "trust_region", "teacher.rate": mix}

    def cost(z):
        q = scipy.special.log_softmax(z)
        return np.exp(q) @ (q - mix * live - (1 - mix) * first)

    found = scipy.optimize.minimize(cost, start, tol=1e-12)
    target = scipy.special.log_softmax(found.x)
    p, q = np.exp(live), np.exp(target)
    _, gradient = of_each_token(load(QUICKSTART, fields | {"signal.divergence": "forward_kl"}), live, first)
    np.testing.assert_allclose(gradient, np.tile(p - q, (V, 1)), atol=1e-6)
    assert np.abs(gradient).max() > 1e-2


@pytest.mark.parametrize("scale", [0.5, 1.25])
def test_both_forms_of_the_extrapolated_advantage(scale):
    """lambda (log q - log r) - (log p - log r) = -(log p - log q) + (lambda - 1) (log q - log r), times the score."""
    p, q, r = laws(4)
    advantage = -(p - q) + (scale - 1) * (q - r)
    _, found = of_each_token(load(f"configs/methods/ex_opd.py:scale={scale}"), p, q, r)
    np.testing.assert_allclose(found, -advantage[:, None] * (np.eye(V) - np.exp(p)), atol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.25])
def test_the_optimum_of_an_extrapolation_is_q_times_q_over_r_to_the_power_of_lambda_minus_1(scale):
    """There the advantage is one constant (log Z), whose expected gradient is 0; the teacher itself is none."""
    _, q, r = laws(5)
    best = scipy.special.log_softmax(q + (scale - 1) * (q - r))
    config = load(f"configs/methods/g_opd.py:scale={scale}")
    _, found = of_each_token(config, best, q, r)
    score = np.eye(V) - np.exp(best)
    constants = -found[:, 0] / score[:, 0]
    np.testing.assert_allclose(constants, scipy.special.logsumexp(q + (scale - 1) * (q - r)), atol=1e-9)
    np.testing.assert_allclose(np.exp(best) @ found, 0, atol=1e-12)
    assert np.abs(np.exp(q) @ of_each_token(config, q, q, r)[1]).max() > 1e-2
    _, exact = of_each_token(load(f"configs/methods/ex_opd.py:full,scale={scale}"), best, q, r)
    np.testing.assert_allclose(exact, 0, atol=1e-12)
