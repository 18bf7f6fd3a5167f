"""Normalisers and masked reductions against NumPy loops; what is masked never counts, NaN included."""

import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.numerics import masked

MASK_BT = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
LOSS_BT = np.array([[1.0, 2.0, np.nan, 4.0], [8.0, np.inf, 0.0, 0.0], [np.nan] * 4])

BY_HAND = {
    "token_mean": (1 + 2 + 4 + 8) / 4,
    "sequence_mean": ((1 + 2 + 4) / 3 + 8 + 0) / 3,
    "sequence_sum": (1 + 2 + 4 + 8) / 3,
    "constant": (1 + 2 + 4 + 8) / (3 * 10),
}


@pytest.mark.parametrize("kind", masked.NORMALISERS)
def test_normalisers_by_hand(kind):
    weights_BT, denominator = masked.normaliser(kind, jnp.asarray(MASK_BT), max_length=10)
    loss = masked.masked_sum(weights_BT * jnp.asarray(LOSS_BT, jnp.float32), jnp.asarray(MASK_BT)) / denominator
    assert float(loss) == pytest.approx(BY_HAND[kind], rel=1e-6)


@pytest.mark.parametrize("kind", masked.NORMALISERS)
def test_an_all_masked_batch_gives_0(kind):
    weights_BT, denominator = masked.normaliser(kind, jnp.zeros((2, 3), bool), max_length=3)
    assert float(jnp.abs(weights_BT).sum()) == 0.0 and float(denominator) >= 1.0


@pytest.mark.parametrize("kind", masked.NORMALISERS)
def test_padding_changes_only_what_counts_rollouts(kind):
    """Wider padding changes nothing; a row without tokens counts as a rollout everywhere but in the mean over tokens."""
    wide_BT = np.pad(MASK_BT, ((0, 0), (0, 3)))
    weights_BT, denominator = masked.normaliser(kind, jnp.asarray(MASK_BT), max_length=10)
    wider_BT, same = masked.normaliser(kind, jnp.asarray(wide_BT), max_length=10)
    np.testing.assert_array_equal(wider_BT[:, :4], weights_BT)
    assert float(same) == float(denominator)
    fewer = masked.normaliser(kind, jnp.asarray(MASK_BT[:2]), max_length=10)[1]
    assert (float(fewer) == float(denominator)) == (kind == "token_mean")


def test_unknown_normaliser_is_refused():
    with pytest.raises(ValueError, match="'mean' is not known; valid: token_mean, sequence_mean"):
        masked.normaliser("mean", jnp.ones((1, 1), bool), max_length=1)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_masked_reductions_equal_numpy_masked_arrays(axis):
    expected = np.ma.masked_array(np.where(MASK_BT, LOSS_BT, 0.0), ~MASK_BT)
    total = masked.masked_sum(jnp.asarray(LOSS_BT), jnp.asarray(MASK_BT), axis)
    mean = masked.masked_mean(jnp.asarray(LOSS_BT), jnp.asarray(MASK_BT), axis)
    np.testing.assert_allclose(total, np.ma.filled(expected.sum(axis), 0.0))
    np.testing.assert_allclose(mean, np.ma.filled(expected.mean(axis), 0.0), rtol=1e-6)


# ---- equal shares of domains


@pytest.mark.parametrize("kind", masked.NORMALISERS)
def test_balanced_domains_have_the_mean_of_their_means(kind):
    """token_mean balanced is the mean over domains of each one's mean over tokens; of the others likewise, in their masses."""
    rng = np.random.default_rng(0)
    mask_BT = np.arange(7)[None, :] < rng.integers(1, 8, 9)[:, None]
    loss_BT, domain_B = rng.normal(size=mask_BT.shape), np.array([0, 1, 1, 3, 0, 1, 3, 1, 0])  # no row is of domain 2
    weights_BT, denominator = (np.asarray(x) for x in masked.normaliser(kind, jnp.asarray(mask_BT), max_length=7))
    balanced_BT = np.asarray(masked.balanced(jnp.asarray(weights_BT), jnp.asarray(weights_BT.sum(1)), jnp.asarray(domain_B)))
    mass_D = [weights_BT[domain_B == d].sum() for d in (0, 1, 3)]
    means = [(weights_BT * loss_BT)[domain_B == d].sum() / mass for d, mass in zip((0, 1, 3), mass_D, strict=True)]
    expected = np.mean(means) * sum(mass_D) / denominator
    assert (balanced_BT * loss_BT).sum() / denominator == pytest.approx(expected, rel=1e-5)
    assert kind != "token_mean" or expected == pytest.approx(np.mean(means))


@pytest.mark.parametrize("domain_B", [[0, 0, 0], [2, 0, 2]])
def test_one_domain_or_equal_masses_change_no_bit(domain_B):
    mask_BT = jnp.asarray(np.arange(6)[None, :] < np.array([2, 5, 3])[:, None])
    weights_BT, _ = masked.normaliser("token_mean", mask_BT, max_length=6)
    np.testing.assert_array_equal(masked.balanced(weights_BT, weights_BT.sum(1), jnp.asarray(domain_B)), weights_BT)


def test_a_domain_without_mass_has_no_share():
    mask_BT = jnp.asarray([[True, True], [False, False], [True, False]])
    weights_BT, _ = masked.normaliser("token_mean", mask_BT, max_length=2)
    balanced_BT = masked.balanced(weights_BT, weights_BT.sum(1), jnp.asarray([0, 1, 2]))
    np.testing.assert_allclose(balanced_BT, [[0.75, 0.75], [0, 0], [1.5, 0]])


def test_a_mean_over_pairs_counts_two_rows_as_one():
    mask_BT = jnp.asarray([[True, True], [False, False], [True, False], [True, True], [True, False]])
    weights_BT, denominator = masked.normaliser(masked.PAIR_MEAN, mask_BT, max_length=2)
    np.testing.assert_array_equal(weights_BT, mask_BT)
    assert float(denominator) == 2.0
