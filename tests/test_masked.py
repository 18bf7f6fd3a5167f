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
