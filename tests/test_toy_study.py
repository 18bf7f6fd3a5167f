"""The toy study: laws against SciPy, the update against own loops, exact moments against enumeration, what is written."""

import dataclasses
import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from opd_jax.analysis import plots_toy
from opd_jax.analysis.toy import exact, learning, network, results, study, tables, worlds
from opd_jax.analysis.toy.settings import CHUNKS, QUICK, VARIATIONS, Settings
from opd_jax.numerics import credit
from opd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
GAUSSIAN, CHAIN = worlds.Gaussian(0.1), worlds.Chain()
TINY = Settings(
    gammas=(0.0, 0.5, 1.0),
    seeds=(1, 2),
    horizon=4,
    batch=8,
    microbatches=4,
    iterations=CHUNKS,
    width=5,
    teacher_iterations=3,
    evaluation_batch=16,
)


def params(world, seed, width=5):
    return network.init(jax.random.key(seed), width=width, outputs=world.outputs)


# ---- laws


def test_gaussian_laws_are_scipys():
    rng = np.random.default_rng(0)
    out, other, action = rng.normal(size=(6, 2)), rng.normal(size=(6, 2)), rng.normal(size=6)
    sigma, other_sigma = (0.1 + np.log1p(np.exp(x[:, 1])) for x in (out, other))
    np.testing.assert_allclose(GAUSSIAN.log_prob(out, action), scipy.stats.norm.logpdf(action, out[:, 0], sigma), rtol=1e-5)
    for i in range(6):
        p, q = scipy.stats.norm(out[i, 0], sigma[i]), scipy.stats.norm(other[i, 0], other_sigma[i])
        kl, _ = scipy.integrate.quad(
            lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), out[i, 0] - 9 * sigma[i], out[i, 0] + 9 * sigma[i]
        )
        assert float(GAUSSIAN.kl(out[i], other[i])) == pytest.approx(kl, rel=1e-4)
    np.testing.assert_allclose(GAUSSIAN.act(out, np.full(6, 2.0)), out[:, 0] + 2 * sigma, rtol=1e-5)
    assert float(GAUSSIAN.move(jnp.array(1.0), jnp.array(-9.0))) == -8.0


def test_a_bound_on_steps_is_one_on_their_mean():
    bounded, out = worlds.Gaussian(0.1, 1.0), jnp.array([[0.01, 0.0], [50.0, 0.0], [-50.0, 0.0]])
    mean, sigma = bounded.parameters(out)
    np.testing.assert_allclose(mean, [0.01, 1, -1], atol=1e-5)
    np.testing.assert_array_equal(sigma, GAUSSIAN.parameters(out)[1])


def test_laws_of_the_chain_are_softmaxes_and_its_ends_hold():
    rng = np.random.default_rng(1)
    out, other, action = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), np.array([-1, 0, 1, 1, -1])
    p, q = scipy.special.softmax(out, axis=1), scipy.special.softmax(other, axis=1)
    np.testing.assert_allclose(CHAIN.log_prob(out, action), np.log(p[np.arange(5), action + 1]), rtol=1e-5)
    np.testing.assert_allclose(CHAIN.kl(out, other), [scipy.stats.entropy(a, b) for a, b in zip(p, q, strict=True)], rtol=1e-4)
    np.testing.assert_array_equal(CHAIN.move(jnp.array([8, -8, 8, 0]), jnp.array([1, -1, -1, 1])), [8, -8, 7, 1])
    n = 20_000
    drawn = np.asarray(CHAIN.act(jnp.asarray(out[:1]), CHAIN.noise(jax.random.key(0), (n,))))
    frequency = np.array([(drawn == a).mean() for a in (-1, 0, 1)])
    assert np.all(np.abs(frequency - p[0]) < 4 * np.sqrt(p[0] * (1 - p[0]) / n))  # 4 standard errors


def test_the_network_has_the_size_of_the_paper():
    count = lambda world: sum(x.size for x in jax.tree.leaves(params(world, 0, Settings().width)))
    assert (count(GAUSSIAN), count(CHAIN)) == (4022, 4083)


def test_the_network_by_hand():
    p = params(GAUSSIAN, 0)
    p["first"]["bias"] += 0.3
    w = {name: (np.asarray(p[name]["weight"]), np.asarray(p[name]["bias"])) for name in network.LAYERS}
    x = np.array([-1.0, 2.5, 0.75])
    for name in network.LAYERS[:2]:
        x = np.tanh(x @ w[name][0] + w[name][1])
    found = network.apply(p, -1.0, jnp.array([2.5, 0.0]), 0.75)[0]
    np.testing.assert_allclose(found, x @ w["output"][0] + w["output"][1], rtol=1e-5)


# ---- trajectories and updates


@pytest.mark.parametrize("task", [0, 1])
def test_trajectories_start_at_their_task_and_follow_the_actions(task):
    positions_BT, actions_BT = map(np.asarray, learning.rollout(GAUSSIAN, params(GAUSSIAN, 1), task, jax.random.key(0), TINY, 6))
    np.testing.assert_array_equal(positions_BT[:, 0], [2.0, -2.0][task])
    np.testing.assert_allclose(positions_BT[:, 1:], positions_BT[:, :-1] + actions_BT, rtol=1e-5)
    noise_TB = np.asarray(GAUSSIAN.noise(jax.random.key(0), (TINY.horizon, 6)))
    out = learning.outputs(params(GAUSSIAN, 1), task, jnp.asarray(positions_BT[:, :-1]), TINY.horizon)
    np.testing.assert_allclose(actions_BT, GAUSSIAN.act(out, noise_TB.T), rtol=1e-4, atol=1e-5)


def test_gradient_variance_is_the_trace_of_the_covariance_with_divisor_m():
    gradients_MP = np.random.default_rng(2).normal(size=(8, 30))
    expected = np.trace(np.cov(gradients_MP.T, ddof=0))
    assert float(learning.gradient_variance(jnp.asarray(gradients_MP))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world", [GAUSSIAN, CHAIN], ids=["gaussian", "chain"])
def test_one_update_by_own_loops(world, float64):
    """Advantages by a double loop, an SGD step, and the variance of microbatches in NumPy, on scores of each step."""
    settings = dataclasses.replace(TINY, optimizer="sgd", learning_rate=0.1)
    student, taught, seed, iteration = params(world, 1), [params(world, 2), params(world, 3)], 5, 2  # even: the right task
    stacked, carry = jax.tree.map(lambda *x: jnp.stack(x), *taught), (student, learning.make_optimizer(settings).init(student))
    step = jax.jit(functools.partial(learning.student_step, world, settings))
    key = jax.random.fold_in(learning._student_key(seed), iteration)
    positions_BT, actions_BT = learning.rollout(world, student, 1, key, settings, settings.batch)
    logp = jax.jit(lambda p: world.log_prob(learning.outputs(p, 1, positions_BT[:, :-1], settings.horizon), actions_BT))
    ratio_BT, score_BT = np.asarray(logp(taught[1]) - logp(student)), jax.jacrev(logp)(student)
    for g, gamma in enumerate(settings.gammas):
        (found, _), (variance, kl) = step(g, seed, stacked, carry, iteration)
        steps = range(settings.horizon)
        own_BT = np.array([[sum(gamma ** (u - t) * row[u] for u in range(t, settings.horizon)) for t in steps] for row in ratio_BT])
        gradients_B = jax.tree.map(lambda s, a=own_BT: -np.einsum("bt,bt...->b...", a, s), score_BT)
        expected = jax.tree.map(lambda old, grad: old - 0.1 * grad.mean(0), student, gradients_B)
        jax.tree.map(lambda new, own: np.testing.assert_allclose(new, own, rtol=1e-6, atol=1e-9), found, expected)
        last_MP = as_matrix(gradients_B["output"]).reshape(settings.microbatches, 2, -1).mean(1)
        assert float(variance) == pytest.approx(((last_MP - last_MP.mean(0)) ** 2).sum(1).mean(), rel=1e-6)
        assert float(kl) == pytest.approx(-ratio_BT.sum(1).mean(), rel=1e-6)


def test_odd_iterations_learn_from_the_left_teacher_and_even_ones_from_the_right():
    student = params(CHAIN, 1)
    blind = jax.tree.map(lambda x: jnp.stack([x, x * jnp.nan]), params(CHAIN, 2))  # the right teacher knows nothing
    step = jax.jit(functools.partial(learning.student_step, CHAIN, TINY, 0, 5, blind))
    seen = [float(step((student, learning.make_optimizer(TINY).init(student)), iteration)[1][0]) for iteration in (1, 2, 3, 4)]
    assert np.isfinite(seen).tolist() == [True, False, True, False]


def as_matrix(tree):
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(tree)], axis=1)


@pytest.mark.slow
def test_students_of_one_seed_begin_alike_and_gammas_part_them(trained):
    settings, _, training, _ = trained
    first = jax.tree.map(lambda x: x[0], training.snapshots)["first"]["weight"]
    assert training.variance_GSI.shape == (3, 2, 200) and first.shape[:2] == (3, 2)
    np.testing.assert_array_equal(first[0], first[2])
    assert float(jnp.max(jnp.abs(first[0, 0] - first[0, 1]))) > 0.1
    last = training.students["first"]["weight"]
    assert float(jnp.max(jnp.abs(last[0] - last[1]))) > 1e-4 and float(jnp.max(jnp.abs(last[0] - first[0]))) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("world", [GAUSSIAN, CHAIN], ids=["gaussian", "chain"])
def test_teachers_reach_their_targets_on_a_small_budget(world):
    settings = Settings(seeds=(0, 1), teacher_iterations=400, width=30, batch=32, iterations=CHUNKS, gammas=(0.0, 1.0))
    taught = learning.teachers(world, settings)
    for seed, task in itertools.product(range(2), range(2)):
        teacher = jax.tree.map(lambda x, at=(seed, task): x[at], taught)
        positions_BT, _ = learning.rollout(world, teacher, task, jax.random.key(7), settings, 64)
        last = np.asarray(positions_BT)[:, -5:]
        assert np.abs(last - settings.targets[task]).mean() < 0.5


@pytest.fixture(scope="module")
def trained():
    settings = dataclasses.replace(TINY, iterations=200, learning_rate=1e-2, batch=32, evaluation_batch=64)
    taught = learning.teachers(CHAIN, settings)
    training = learning.students(CHAIN, settings, taught)
    return settings, taught, training, learning.evaluate(CHAIN, settings, training)


@pytest.mark.slow
def test_students_come_near_their_teachers(trained):
    """The sequence KL, exact at each prefix, by every gamma on so short a horizon."""
    settings, _, training, after = trained
    start = dataclasses.replace(training, snapshots=jax.tree.map(lambda x: x[:1], training.snapshots))
    before = learning.evaluate(CHAIN, settings, start)
    assert np.all(np.asarray(after.reverse_kl_GSK) < 0.3 * np.asarray(before.reverse_kl_GSK))


@pytest.mark.slow
def test_evaluation_counts_visits_and_measures_each_policy(trained):
    settings, taught, training, evaluation = trained
    assert evaluation.visits_GSTX.shape == (3, 2, 5, 17) and evaluation.teacher_visits_STX.shape == (2, 5, 17)
    np.testing.assert_allclose(np.asarray(evaluation.visits_GSTX).sum(-1), 1.0, rtol=1e-5)  # the chain has no outside
    np.testing.assert_allclose(np.asarray(evaluation.visits_GSTX)[:, :, 0, [6, 10]], 0.5, rtol=1e-5)  # both starts, half each
    student = jax.tree.map(lambda x: x[2, 1], training.students)
    key = lambda task: jax.random.fold_in(jax.random.fold_in(jax.random.key(2), learning.EVALUATION), task)
    runs = [np.asarray(learning.rollout(CHAIN, student, task, key(task), settings, 64)[0]) for task in (0, 1)]
    for task in (0, 1):
        np.testing.assert_array_equal(evaluation.position_GSKE[2, 1, task], runs[task][:, -1])
    expected = np.bincount(np.concatenate(runs)[:, 3].astype(int) + 8, minlength=17) / 128
    np.testing.assert_allclose(evaluation.visits_GSTX[2, 1, 3], expected, rtol=1e-5)


@pytest.mark.slow
def test_the_teacher_as_student_has_no_kl_and_the_same_visits(trained):
    settings, taught, training, _ = trained
    left = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), taught)  # one policy for both tasks
    as_students = jax.tree.map(lambda x: jnp.broadcast_to(x[:, 0], (1, 3, *x[:, 0].shape)), taught)  # one snapshot, three gammas
    found = learning.evaluate(CHAIN, settings, dataclasses.replace(training, teachers=left, snapshots=as_students))
    np.testing.assert_allclose(found.reverse_kl_GSK, 0.0, atol=1e-5)
    np.testing.assert_array_equal(found.visits_GSTX[0], found.teacher_visits_STX)
    np.testing.assert_array_equal(found.position_GSKE[0], found.teacher_position_SKE)


# ---- exact bias and variance on the chain

EXACT = dataclasses.replace(TINY, horizon=3, gammas=(0.0, 0.6, 1.0), starts=(7.0, -7.0))  # within reach of the chain's ends


def enumerated(student, teacher, task, settings, gamma):
    """(probability [N], estimate of every parameter, leaves [N, ...]) of all trajectories, by the loss that trains."""
    actions_NT = jnp.asarray(list(itertools.product((-1, 0, 1), repeat=settings.horizon)))
    positions = [jnp.full(len(actions_NT), settings.starts[task])]
    for t in range(settings.horizon):
        positions.append(CHAIN.move(positions[-1], actions_NT[:, t]))
    positions_NT = jnp.stack(positions[:-1], axis=1)
    outputs = lambda p: learning.outputs(p, task, positions_NT, settings.horizon)
    logp_NT, logq_NT = (CHAIN.log_prob(outputs(p), actions_NT) for p in (student, teacher))
    advantage_NT = credit.advantages(logq_NT - logp_NT, jnp.ones(logp_NT.shape), credit="discounted", gamma=gamma)
    loss = lambda p, *row: learning.policy_loss(CHAIN, p, task, *(x[None] for x in row))
    gradients = jax.jit(jax.vmap(lambda *row: jax.grad(loss)(student, *row)))(positions_NT, actions_NT, advantage_NT)
    return np.asarray(jnp.exp(jnp.sum(logp_NT, axis=1))), gradients


def as_float64(seed):
    return jax.tree.map(lambda x: 2 * x.astype(jnp.float64), params(CHAIN, seed))


@pytest.mark.parametrize("task", [0, 1])
def test_dynamic_programming_is_enumeration(task, float64):
    student, teacher = as_float64(1), as_float64(2)
    found = jax.tree.map(np.asarray, exact.study(student, teacher, task, settings=EXACT))
    means = {}
    for g, gamma in enumerate(EXACT.gammas):
        weight_N, gradients = enumerated(student, teacher, task, EXACT, gamma)
        assert weight_N.sum() == pytest.approx(1.0, abs=1e-12)
        for name, gradient_NP in (("variance", as_matrix(gradients)), ("output_variance", as_matrix(gradients["output"]))):
            mean_P = weight_N @ gradient_NP
            assert found[name][g] == pytest.approx(weight_N @ ((gradient_NP - mean_P) ** 2).sum(1), rel=1e-9)
        means[gamma] = weight_N @ as_matrix(gradients)
    for g, gamma in enumerate(EXACT.gammas):
        assert found["bias"][g] == pytest.approx(np.linalg.norm(means[gamma] - means[1.0]), rel=1e-9, abs=1e-9)
        cosine = means[gamma] @ means[1.0] / np.linalg.norm(means[gamma]) / np.linalg.norm(means[1.0])
        assert found["cosine"][g] == pytest.approx(cosine, rel=1e-9)
    assert found["gradient"] == pytest.approx(np.linalg.norm(means[1.0]), rel=1e-9)
    assert found["bias"][2] < 1e-9 < 1e-3 < found["bias"][0]


def test_gamma_1_follows_the_trajectory_kl_and_gamma_0_its_part_at_frozen_occupancy(float64):
    student, teacher, task, horizon, start = as_float64(1), as_float64(2), 0, 20, 10

    @jax.jit
    def both(student):
        law = lambda p: exact.log_law(p, task, horizon)
        score_TSAP = exact.scores(student, task, horizon)
        of_dp = [exact.moments(law(student), law(teacher), score_TSAP, start, gamma)[0] for gamma in (1.0, 0.0)]
        kl = lambda p, frozen: exact.trajectory_kl(law(p), law(teacher), start, frozen=frozen)
        return of_dp, [jax.grad(kl)(student, frozen) for frozen in (False, True)]

    found, expected = both(student)
    expected = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)]) for gradient in expected]
    for own, autodiff in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, autodiff, rtol=1e-9, atol=1e-10)
    assert np.linalg.norm(expected[0] - expected[1]) > 1e-2


def test_occupancy_and_trajectory_kl_are_those_of_all_trajectories(float64):
    student, teacher = as_float64(1), as_float64(2)
    weight_N, _ = enumerated(student, teacher, 0, EXACT, 0.0)
    visited_TS = np.zeros((3, 17))
    total = 0.0
    logp, logq = (np.asarray(exact.log_law(p, 0, 3)) for p in (student, teacher))
    for weight, actions in zip(weight_N, itertools.product((-1, 0, 1), repeat=3), strict=True):
        place = 7
        for t, action in enumerate(actions):
            visited_TS[t, place + 8] += weight
            total += weight * (logp - logq)[t, place + 8, action + 1]
            place = min(place + action, 8)
    np.testing.assert_allclose(exact.occupancy(jnp.asarray(logp), 15), visited_TS, atol=1e-12)
    assert float(exact.trajectory_kl(jnp.asarray(logp), jnp.asarray(logq), 15)) == pytest.approx(total, rel=1e-10)


def test_the_measured_variance_is_the_exact_one_in_the_mean():
    """The formula's expectation over microbatches of n trajectories is (1 - 1/M) / n times one trajectory's trace variance: 400 batches,
    within 4 standard errors (of about 2%)."""
    settings = dataclasses.replace(TINY, horizon=3, batch=16)
    student, teacher = params(CHAIN, 1), params(CHAIN, 2)
    taught, carry = jax.tree.map(lambda x: jnp.stack([x, x]), teacher), (student, learning.make_optimizer(settings).init(student))
    odd = jnp.arange(1, 801, 2)  # the left task
    measure = jax.jit(jax.vmap(lambda g, i: learning.student_step(CHAIN, settings, g, 3, taught, carry, i)[1][0], in_axes=(None, 0)))
    with jax.enable_x64(True):
        one_G = np.asarray(exact.study(student, teacher, 0, settings=settings)["output_variance"])
    for g, one in enumerate(one_G):
        measured = np.asarray(measure(g, odd))
        error = measured.std(ddof=1) / np.sqrt(len(measured))
        assert abs(measured.mean() - one * (1 - 1 / settings.microbatches) / 4) < 4 * error


# ---- what is told


def test_windows_are_medians_of_each_task():
    settings = dataclasses.replace(TINY, iterations=40)
    variance_GSI = np.arange(3 * 2 * 40, dtype=float).reshape(3, 2, 40)
    variance_GSI[2, 1, 36:] = np.nan
    early, late, largest = results.windows(settings, variance_GSI)
    np.testing.assert_array_equal(early[0, 0], [np.median([0, 2]), np.median([1, 3])])
    np.testing.assert_array_equal(late[0, 0], [np.median([36, 38]), np.median([37, 39])])
    np.testing.assert_array_equal(largest[1, 0], [82, 83])
    assert np.isinf(late[2, 1]).all() and np.isfinite(early[2, 1]).all()


def test_intervals_are_students_of_logarithms():
    values = [0.1, 0.3, 0.2]
    low, high = scipy.stats.t.interval(0.95, 2, np.log10(values).mean(), scipy.stats.sem(np.log10(values)))
    np.testing.assert_allclose(results.interval(values), [np.prod(values) ** (1 / 3), 10**low, 10**high])
    assert results.interval([0.1, np.nan, 0.2]) is None and results.interval([0.1, np.inf, 0.2]) is None
    high = scipy.stats.t.interval(0.95, 1, 1.0, scipy.stats.sem([0.0, 2.0]))[1]
    np.testing.assert_allclose(results.interval([0.0, 2.0]), [1.0, 0.0, high])  # Student's low end, -11.7, is no distance


def claims(early, late, spike, distance, spread):
    settings = dataclasses.replace(TINY, gammas=(0.0, 0.25, 0.5, 0.75, 1.0))
    return [
        c["held"]
        for c in results.claims(
            settings, *(np.broadcast_to(np.reshape(x, (5, 1, 1)), (5, 2, 2)) for x in (early, late, spike, distance, spread))
        )
    ]


def test_claims_count_the_cases_that_hold():
    rising = [1, 2, 10, 300, 2000]
    near, wide = [0.2, 0.5, 1.0, 1.5, 3.0], [1, 1, 2, 1, 1]
    assert claims(rising, rising, np.multiply(rising, 20), near, wide) == [4, 8, 20, 4, 4, 4, 4]
    flat = [1, 1, 1, 1, 1]
    assert claims(rising, flat, np.multiply(flat, 5), near[::-1], flat) == [0, 4, 0, 0, 4, 0, 0]  # gamma 1 may be near where gamma 0 is not
    diverged = [1, 2, 10, 300, np.inf]
    assert claims(diverged, diverged, diverged, [0, 0, 0, 0, np.nan], wide)[-1] == 4  # who diverged did not settle at the target
    assert claims(rising, rising, rising, np.full(5, np.nan), wide)[3:] == [0, 0, 0, 0]  # where all do, nothing is said of gamma 1
    of = results.claims(TINY, *(np.ones((3, 2, 2)) for _ in range(5)))
    assert [claim["of"] for claim in of] == [4, 8, 12, 4, 4, 4, 4]
    assert "gamma 0 to 1" in of[1]["published"] and "gamma = 0.5" in of[4]["published"]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"iterations": 30}, "iterations = 30: must be a multiple of 20"),
        ({"iterations": 0}, "iterations = 0"),
        ({"microbatches": 3}, "microbatches = 3: must be at least 2 and divide batch = 64"),
        ({"microbatches": 1}, "microbatches = 1"),
        ({"optimizer": "lion"}, "optimizer = 'lion' is not known; valid: adam, sgd"),
        ({"gammas": (0.0, 0.5)}, "must hold 0 and 1"),
        ({"seeds": (3,)}, "at least two different"),
        ({"seeds": (3, 3)}, "at least two different"),
    ],
)
def test_settings_refuse(fields, words):
    with pytest.raises(UserError, match=words):
        Settings(**fields)


def test_published_settings_are_the_papers_and_the_rest_is_said_to_be_ours():
    split = Settings().split()
    assert split["published"] == {
        "gammas": (0.0, 0.25, 0.5, 0.75, 1.0),
        "seeds": (42, 43, 2026),
        "horizon": 20,
        "batch": 64,
        "microbatches": 8,
        "iterations": 2000,
        "starts": (2.0, -2.0),
        "targets": (-3.0, 3.0),
    }
    assert {"learning_rate", "min_sigma", "optimizer", "width", "teacher_iterations"} <= set(split["ours"])
    assert split["ours"]["max_step"] == "unbounded" and not set(split["ours"]) & set(split["published"])
    for fields in (QUICK, *VARIATIONS.values()):
        assert dataclasses.replace(Settings(), **fields) != Settings()


def test_a_page_of_a_shorter_study_says_so_first():
    lines = tables.head(Settings(**QUICK).split())
    assert lines[0] == "# QUICK: toy study of gradient variance" and lines[1].startswith("**200 of 2000 iterations")
    assert "iterations 2" not in lines[3] and lines[4] == "Changed from what is published: iterations 200 (there 2000)."
    lines = tables.head(Settings().split())
    assert lines[0] == "# Toy study of gradient variance" and "iterations 2000" in lines[2] and "Not published" in lines[3]
    assert tables.head(Settings(batch=32).split())[0] == lines[0]


def test_heat_maps_reach_as_far_as_students_drift(tmp_path):
    """A student at 40 is drawn, in one panel of two; the colour bar has its words."""
    stay_STX, far_STX = (np.zeros((2, 3, len(GAUSSIAN.edges) - 1)) for _ in range(2))
    stay_STX[..., 120], far_STX[..., np.searchsorted(GAUSSIAN.edges, 40.0)] = 1, 1
    plots_toy.visits(tmp_path / "v", {"stay": stay_STX, "far": far_STX}, (1, 2), GAUSSIAN.edges, (-3.0, 3.0), title="test")
    plots_toy.visits(tmp_path / "c", {"chain": np.ones((2, 3, 17))}, (1, 2), CHAIN.edges, (-3.0, 3.0), title="test")
    assert (tmp_path / "v.png").stat().st_size > 5000 and (tmp_path / "c.png").stat().st_size > 5000


def test_a_table_is_markdown():
    assert tables.table(["a", "b"], [[1, "x|y"]]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"


def test_a_point_of_a_curve_is_a_median_that_single_zeros_do_not_break():
    values = np.array([[1.0, 0.0, 3.0, 0.0, 0.0, 5.0, 2.0, np.inf, 2.0]])
    np.testing.assert_array_equal(plots_toy.medians(values, 3), [[1.0, np.nan, np.nan]])


def test_curves_end_where_a_seed_diverges(tmp_path):
    variance_GSI = np.ones((2, 3, 40)) * [[[1.0]], [[10.0]]]
    variance_GSI[1, 2, 20:] = np.nan
    variance_GSI[1, 1, 30:] = np.inf
    plots_toy.variance(tmp_path / "v", variance_GSI, (0.0, 1.0), title="test")
    for value in (np.nan, np.inf, 3e38):  # all seeds diverged at once, or are about to
        plots_toy.variance(tmp_path / "w", np.full((2, 3, 40), value, np.float32), (0.0, 1.0), title="test")
    text = (tmp_path / "v.svg").read_text()
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG") and "<svg" in text and str(tmp_path) not in text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out, said = tmp_path_factory.mktemp("toy") / "new", []
    found = study.run(out, TINY, {"SGD, 1e9": {"optimizer": "sgd", "learning_rate": 1e9}}, say=said.append)
    return out, found, said


@pytest.mark.slow
def test_the_study_writes_numbers_curves_figures_and_tables(written):
    out, found, said = written
    told = json.loads((out / "toy_study.json").read_text())
    assert set(told) == {"settings", "gaussian", "chain", "facts", "seconds"} and sum(line.endswith(" s") for line in said) == 5
    assert said[:3] == [
        "gaussian, defaults: begins",
        "gaussian, defaults: teachers, 3 iterations",
        f"gaussian, defaults: students of 3 gammas and 2 seeds, {CHUNKS} iterations",
    ]
    assert {k: v for k, v in told.items() if k != "seconds"} == json.loads(json.dumps(found))
    stems = [name for one in (*told["gaussian"].values(), told["chain"]) for name in one["figures"]] + ["chain_exact"]
    assert len(set(stems)) == 7
    for stem in stems:
        assert f"({stem}.png)" in (out / "toy_study.md").read_text()
        assert (out / f"{stem}.png").stat().st_size > 5000 and "<svg" in (out / f"{stem}.svg").read_text()
    with np.load(out / "toy_study_curves.npz", allow_pickle=False) as curves:
        assert curves["chain_variance"].shape == curves["gaussian__defaults_reverse_kl"].shape == (3, 2, CHUNKS)
    rows = told["chain"]["exact"]
    assert len(rows) == len(study.EXACT_AT) * 2 * 2 * 3
    assert max(row["bias"] for row in rows if row["gamma"] == 1) < 1e-9 * max(row["gradient"] for row in rows)
    page = (out / "toy_study.md").read_text()
    assert "Not published, chosen here: width 5" in page and "## Gaussian steps, SGD, 1e9" in page and "rho_{<t}" in page
    assert str(out) not in page


@pytest.mark.slow
def test_a_setting_that_diverges_is_told_as_such(written):
    out, found, _ = written
    wild = found["gaussian"]["SGD, 1e9"]
    assert wild["changed"] == {"optimizer": "sgd", "learning_rate": 1e9}
    assert all(row["diverged_seeds"] > 0 or min(min(x) for x in row["distance_per_seed"]) > 10 for row in wild["gammas"])
    if any(row["diverged_seeds"] for row in wild["gammas"]):
        assert "diverged" in (out / "toy_study.md").read_text().split("SGD, 1e9")[1]


def script(*flags):
    command = [sys.executable, "experiments/toy_study.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_refuses_before_any_work(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "toy_study.json").write_text("precious")
    for flags, words in (
        ([f"--workdir={tmp_path / 'full'}"], "exists and is not an empty folder"),
        ([f"--workdir={tmp_path / 'new'}", "--iterations=7"], "iterations = 7: must be a multiple of 20"),
    ):
        done = script(*flags)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert (tmp_path / "full" / "toy_study.json").read_text() == "precious" and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        study.run(tmp_path / "file", TINY, {})
    with pytest.raises(UserError, match="cannot be written"):
        study.run(tmp_path / "file" / "below", TINY, {})


@pytest.mark.slow
def test_the_script_runs(tmp_path, monkeypatch):
    """In this process, on tiny settings: what the flags ask for reaches the study."""
    asked = {}
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import toy_study

    monkeypatch.setattr(toy_study.study, "run", lambda out, settings, variations: asked.update(locals()))
    for flags, expected in (
        ([], (Settings(), VARIATIONS)),
        (["--novariations", "--iterations=40"], (Settings(iterations=40), {})),
        (["--quick"], (Settings(**QUICK), {})),
        (["--quick", "--iterations=20"], (Settings(**QUICK | {"iterations": 20}), {})),
    ):
        toy_study.flags.FLAGS.unparse_flags()
        toy_study.flags.FLAGS(["toy_study", f"--workdir={tmp_path}", *flags])
        toy_study.main([])
        assert (asked["settings"], asked["variations"]) == expected and asked["out"] == tmp_path
