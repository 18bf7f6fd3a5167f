"""Advantages against SciPy's filter and NumPy loops; masked tokens neither add nor discount."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.numerics import credit


def loop(log_ratio_BT, mask_BT, kind, gamma, kl_BT=None, mean=False):
    """The definition, one token at a time, in float64."""
    result = np.zeros(mask_BT.shape)
    for b, t in np.argwhere(mask_BT):
        if kind == "sequence":
            result[b, t] = log_ratio_BT[b][mask_BT[b]].sum()
            continue
        result[b, t] = log_ratio_BT[b, t]
        factor = 0.0 if kind == "token" else (gamma if kind == "discounted" else 1.0)
        discount, later, total = 1.0, 0.0, 0.0
        for u in range(t + 1, mask_BT.shape[1]):
            if mask_BT[b, u]:
                discount *= factor
                later += discount * (log_ratio_BT[b, u] if kl_BT is None else -kl_BT[b, u])
                total += discount
        result[b, t] += later if not mean else later / total if total else 0.0
    return result


def case(seed, rows=5, length=9):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, length)), rng.random((rows, length)) < 0.6, rng.random((rows, length))


@pytest.mark.parametrize("kind", credit.CREDITS)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_advantages_equal_a_loop_over_ragged_masks_with_gaps(kind, gamma):
    log_ratio_BT, mask_BT, _ = case(0)
    found = credit.advantages(jnp.asarray(log_ratio_BT), jnp.asarray(mask_BT), credit=kind, gamma=gamma)
    np.testing.assert_allclose(found, loop(log_ratio_BT, mask_BT, kind, gamma), atol=1e-5)


@pytest.mark.parametrize("kind", ["token", "to_go", "discounted"])
def test_exact_kl_replaces_future_terms_alone(kind):
    log_ratio_BT, mask_BT, kl_BT = case(1)
    found = credit.advantages(jnp.asarray(log_ratio_BT), jnp.asarray(mask_BT), credit=kind, gamma=0.7, exact_kl_BT=jnp.asarray(kl_BT))
    np.testing.assert_allclose(found, loop(log_ratio_BT, mask_BT, kind, 0.7, kl_BT), atol=1e-5)


@given(st.integers(0, 10_000), st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_discounted_return_is_scipys_recursive_filter(seed, gamma):
    reward_BT = np.random.default_rng(seed).normal(size=(3, 12))
    expected = scipy.signal.lfilter([1.0], [1.0, -gamma], reward_BT[:, ::-1], axis=1)[:, ::-1]
    found = credit.advantages(jnp.asarray(reward_BT), jnp.ones((3, 12), bool), credit="discounted", gamma=gamma)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_gamma_0_and_1_are_token_and_to_go():
    log_ratio_BT, mask_BT, _ = case(2)
    of = lambda **kwargs: np.asarray(credit.advantages(jnp.asarray(log_ratio_BT), jnp.asarray(mask_BT), **kwargs))
    np.testing.assert_array_equal(of(credit="discounted", gamma=0.0), of(credit="token"))
    np.testing.assert_array_equal(of(credit="discounted", gamma=1.0), of(credit="to_go"))


def test_a_long_masked_observation_does_not_cut_the_return():
    """What a token answers for crosses tool output: 2 + gamma * 3 over a gap of 50 masked tokens, not gamma ** 51 * 3 (trl#7024)."""
    mask_BT = np.zeros((1, 52), bool)
    mask_BT[0, [0, 51]] = True
    reward_BT = np.where(mask_BT, np.array([[2.0] + [7.0] * 50 + [3.0]]), np.nan)
    found = credit.advantages(jnp.asarray(reward_BT), jnp.asarray(mask_BT), credit="discounted", gamma=0.5)
    assert float(found[0, 0]) == pytest.approx(3.5)
    assert float(found[0, 51]) == pytest.approx(3.0)
    assert not np.asarray(found)[0, 1:51].any()


def test_masked_equals_subset():
    log_ratio_BT, mask_BT, _ = case(3, rows=1)
    subset = jnp.asarray(log_ratio_BT[:, mask_BT[0]])
    for kind in credit.CREDITS:
        whole = credit.advantages(jnp.asarray(log_ratio_BT), jnp.asarray(mask_BT), credit=kind, gamma=0.8)
        alone = credit.advantages(subset, jnp.ones(subset.shape, bool), credit=kind, gamma=0.8)
        np.testing.assert_allclose(np.asarray(whole)[:, mask_BT[0]], alone, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"credit": "sum"}, "'sum' is not known; valid: token, to_go, discounted, sequence"),
        ({"credit": "discounted", "gamma": 1.5}, "gamma = 1.5 must be between 0 and 1"),
        ({"credit": "sequence", "exact_kl_BT": jnp.zeros((1, 2))}, "takes no exact_kl_BT"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        credit.advantages(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), **arguments)


@pytest.mark.parametrize("kind, gamma", [("to_go", 1.0), ("discounted", 0.3), ("discounted", 0.0)])
def test_the_mean_of_what_comes_later_equals_the_loop(kind, gamma):
    log_ratio_BT, mask_BT, kl_BT = case(3)
    for kl, exact in ((None, None), (jnp.asarray(kl_BT), kl_BT)):
        found = credit.advantages(
            jnp.asarray(log_ratio_BT), jnp.asarray(mask_BT), credit=kind, gamma=gamma, exact_kl_BT=kl, mean_future=True
        )
        np.testing.assert_allclose(found, loop(log_ratio_BT, mask_BT, kind, gamma, exact, mean=True), atol=1e-5)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_a_mean_of_no_future_is_refused(kind):
    with pytest.raises(ValueError, match="mean_future is for credit 'to_go' or 'discounted', not"):
        credit.advantages(jnp.zeros((1, 2)), jnp.ones((1, 2)), credit=kind, mean_future=True)
