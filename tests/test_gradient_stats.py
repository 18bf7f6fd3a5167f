"""From inner products to numbers: against NumPy, on Gaussians whose truth is known, and where a sample is too small."""

import numpy as np
import pytest

from opd_jax.analysis import gradient_stats as gs
from opd_jax.analysis.gradient_stats import Laboratory, Parts, Reference, Value
from opd_jax.analysis.study_enumerated import units_of_vectors


def sample(rng, means_ED, spread, *, units, group=1, within=1.0):
    """Gradients [B, E, D]: a mean, noise that a unit shares and noise of each rollout."""
    means_ED = np.asarray(means_ED, float)
    shared = rng.normal(size=(units, 1, *means_ED.shape)) * spread * np.sqrt(1 - within)
    own = rng.normal(size=(units, group, *means_ED.shape)) * spread * np.sqrt(within)
    return (means_ED + shared + own).reshape(units * group, *means_ED.shape)


def laboratory(vectors_BED, exact_TD=None, *, group=1, resamples=400, seed=0, **settings):
    exact_TD = np.zeros((0, vectors_BED.shape[2])) if exact_TD is None else np.asarray(exact_TD, float)
    units = units_of_vectors(vectors_BED, exact_TD, group)
    return Laboratory(units, gs.resample(len(units.gram_PSS), resamples, seed), **settings)


def test_variance_is_numpys_with_divisor_n_less_1():
    vectors = sample(np.random.default_rng(0), np.ones((2, 5)), 2.0, units=30)
    expected = np.var(vectors, axis=0, ddof=1).sum(1)
    np.testing.assert_allclose(laboratory(vectors).variances(), expected, rtol=1e-10)
    one = laboratory(vectors).variance(1)
    assert one.value == pytest.approx(expected[1]) and one.low < one.value < one.high
    assert laboratory(vectors).batch_variance(1).value == pytest.approx(expected[1])


def test_products_are_the_mean_over_pairs_of_different_units():
    vectors = sample(np.random.default_rng(1), np.ones((2, 4)), 1.0, units=9)
    a, b = vectors[:, 0], vectors[:, 1]
    pairs = [a[i] @ b[j] for i in range(9) for j in range(9) if i != j]
    units = units_of_vectors(vectors, np.zeros((0, 4)), 1)
    assert gs.products(units.mean_gram_SS, units.gram_PSS)[0, 1] == pytest.approx(np.mean(pairs))


def test_resampled_products_leave_out_copies():
    """By brute force: a resample is a list of units; pairs of the same unit do not count."""
    vectors = sample(np.random.default_rng(2), np.ones((2, 3)), 1.0, units=8)
    units = units_of_vectors(vectors, np.zeros((0, 3)), 1)
    counts = gs.resample(8, 5, seed=3)
    for found, count in zip(gs.resampled_products(units, counts), counts, strict=True):
        drawn = np.repeat(np.arange(8), count)
        pairs = [vectors[i, 0] @ vectors[j, 1] for i in drawn for j in drawn if i != j]
        assert found[0, 1] == pytest.approx(np.mean(pairs))


def test_resamples_from_sketches_stand_around_the_exact_value():
    """What the sketches get wrong at the sample itself is taken off all resamples."""
    rng = np.random.default_rng(2)
    vectors = sample(rng, np.full((1, 400), 0.3), 1.0, units=40)
    units = units_of_vectors(vectors, np.zeros((0, 400)), 1)
    sketch = units.sketch_PSR @ rng.normal(size=(400, 30)) / 30**0.5
    rough = gs.Units(1, units.mean_gram_SS, units.gram_PSS, sketch, units.second_PE, {})
    point, total = gs.products(units.mean_gram_SS, units.gram_PSS)[0, 0], sketch.mean(0)[0]
    assert abs(total @ total - units.mean_gram_SS[0, 0]) > 0.05 * point
    assert gs.resampled_products(rough, gs.resample(40, 4000, seed=0)).mean() == pytest.approx(point, rel=0.02)


@pytest.mark.parametrize(("group", "within"), [(1, 1.0), (4, 0.5)])
def test_estimates_are_unbiased_over_many_repetitions(group, within):
    """Mean over repetitions within 4 standard errors of the truth; rollouts of a unit share half of their noise."""
    rng, means = np.random.default_rng(4), np.array([[0.5, 0, 0, 0], [0.3, 0.2, 0, 0]])
    found = []
    for _ in range(400):
        vectors = sample(rng, means, 1.5, units=12, group=group, within=within)
        lab = laboratory(vectors, [[0.1, 0.2, 0.3, 0.0]], group=group, resamples=2)
        square, inner = lab._form(lab._only(0), lab._only(0))[0], lab._form(lab._only(1), lab._only(2))[0]
        found.append([lab.variances()[0], square, inner, lab.batch_variance(0).value])
    mean, error = np.mean(found, 0), np.std(found, 0, ddof=1) / np.sqrt(len(found))
    noise = 4 * 1.5**2
    truth = [noise, 0.25, 0.3 * 0.1 + 0.2 * 0.2, noise * (within + group * (1 - within))]
    assert np.all(np.abs(mean - truth) < 4 * error), (mean, truth, error)


def test_intervals_cover_the_truth():
    """Of 150 samples: variance near 95%, a bias that is there at least 90%, no bias called one in at most 5% of them."""
    rng, inside, biased, resolved, called = np.random.default_rng(5), 0, 0, 0, 0
    means = np.array([np.r_[1.0, np.zeros(19)], np.zeros(20)])
    for seed in range(150):
        vectors = sample(rng, means, 1.0, units=60)
        lab = laboratory(vectors, np.zeros((1, 20)), resamples=200, seed=seed)
        variance, bias, none = lab.variance(0), lab.bias(0, Reference(2, None)), lab.bias(1, Reference(2, None))
        inside += variance.low <= 20 <= variance.high
        biased += bias.low <= 1 <= bias.high
        resolved += bias.value is not None
        called += none.value is not None
    assert inside >= 132 and biased >= 135 and resolved >= 140 and called <= 7, (inside, biased, resolved, called)


def test_snr_and_cosine_of_a_large_sample_are_the_truth():
    rng = np.random.default_rng(6)
    means, target = np.array([[1.0, 0.0, 0.0]]), np.array([[1.0, 1.0, 0.0]])
    lab = laboratory(sample(rng, means, 1.0, units=4000), target)
    for value, truth in ((lab.snr(0), 1 / 3), (lab.cosine(0, Reference(1, None)), 2**-0.5)):
        assert value.low < truth < value.high and abs(value.value - truth) < 0.05


def test_what_a_sample_cannot_resolve_is_null_with_its_interval():
    vectors = sample(np.random.default_rng(7), np.full((1, 50), 0.01), 5.0, units=16)
    lab = laboratory(vectors, np.full((1, 50), 0.01))
    assert lab.snr(0).value is None and lab.snr(0).low == 0 and 0 < lab.snr(0).high < np.inf
    assert lab.bias(0, Reference(1, None)).value is None and lab.bias(0, Reference(1, None)).high > 0
    assert lab.cosine(0, Reference(1, None)) == Value(None, -1.0, 1.0)
    assert lab.variance(0).value is not None


def test_zero_gradients_give_no_number_that_is_not_one():
    lab = laboratory(np.zeros((16, 2, 3)), np.zeros((1, 3)))
    values = [lab.variance(0), lab.snr(0), lab.bias(0, Reference(2, None)), lab.cosine(0, Reference(2, None)), gs.ratio(lab, 0, lab, 1)]
    for value in values:
        assert all(x is None or np.isfinite(x) for x in (value.value, value.low, value.high))
    assert values[0].value == 0 and values[1].value is None and values[4].value is None


def controlled(rng, units, *, on_policy=True, estimator_mean=(1.0, 0.5, 0.0), reference_mean=(1.0, 0.0, 0.0)):
    """An estimator that shares its noise with the reference on its rollouts; and that reference on draws of its own."""
    noise = rng.normal(size=(units, 3)) * 3
    own = noise + estimator_mean + rng.normal(size=(units, 3)) * 0.1
    shadow, independent = noise + reference_mean, rng.normal(size=(units, 3)) + reference_mean
    vectors = np.stack([own, shadow, independent], axis=1)
    units_ = units_of_vectors(vectors, np.zeros((0, 3)), 1)
    references = [Reference(stream=2, shadow=1)]
    return Laboratory(units_, gs.resample(units, 300, 0), references=references, on_policy=on_policy), references[0]


def test_a_control_takes_off_the_noise_that_is_shared():
    lab, reference = controlled(np.random.default_rng(8), 60)
    bias = lab.bias(0, reference)
    assert abs(bias.value - 0.5) < 0.1 and bias.low < 0.5 < bias.high and bias.high - bias.low < 0.2
    without, _ = controlled(np.random.default_rng(8), 60, on_policy=False)
    assert without.bias(0, reference).high > 2 * bias.high


def test_controls_keep_the_mean():
    rng = np.random.default_rng(9)
    found = []
    for _ in range(300):
        lab, _ = controlled(rng, 20)
        weights = lab._mean(0, None)
        found.append(lab._form(weights, weights)[0])
    assert abs(np.mean(found) - 1.25) < 4 * np.std(found) / np.sqrt(300)


def test_a_reference_is_not_compared_with_itself():
    """On its own rollouts and its own draws it differs by noise alone: null, and an interval that is not empty."""
    lab, reference = controlled(np.random.default_rng(10), 60)
    bias = lab.bias(1, reference)
    assert bias.value is None and bias.high > 0.5


def test_ratios_and_exponents_are_paired():
    """Two estimators that differ by a factor have it without noise; the variance of T-fold sums grows as their square."""
    rng = np.random.default_rng(11)
    noise = rng.normal(size=(50, 1, 4))
    labs = [laboratory(np.concatenate([t * noise, 2 * t * noise], axis=1)) for t in (1, 2, 4)]
    ratio = gs.ratio(labs[0], 1, labs[0], 0)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((4, 4, 4))
    slope = gs.exponent(labs, [0, 0, 0], [1, 2, 4])
    assert (slope.value, slope.low, slope.high) == pytest.approx((2, 2, 2))
    apart = gs.exponent([labs[0], laboratory(8 * rng.normal(size=(50, 1, 4)))], [0, 0], [1, 8])
    assert apart.low < 2 < apart.high and apart.high - apart.low > 0.05


def test_shares_add_up_to_one_and_are_those_of_the_covariance():
    """Parts of a vector: its first 2 and its last 3 numbers."""
    rng = np.random.default_rng(12)
    vectors = sample(rng, np.ones((1, 5)), [1, 1, 3, 3, 3], units=40)
    pieces = [vectors[:, :, :2], vectors[:, :, 2:]]
    squares = np.stack([np.square(p).sum(2) for p in pieces], axis=2)
    parts = Parts(("few", "many"), squares, squares, np.stack([np.square(p.mean(0)).sum(1) for p in pieces], axis=1))
    shares = laboratory(vectors).shares(0, parts)
    expected = np.var(vectors[:, 0, :2], axis=0, ddof=1).sum() / np.var(vectors[:, 0], axis=0, ddof=1).sum()
    assert shares["few"].value == pytest.approx(expected) and shares["few"].value + shares["many"].value == pytest.approx(1)
    assert shares["few"].low < expected < shares["few"].high
