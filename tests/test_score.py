"""Scores of a model on a rollout equal those of its dense logits, whatever prompt it reads."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from opd_jax import score
from opd_jax.models import transformer


def case(prompt_width=5, **changes):
    rng = np.random.default_rng(1)
    params, config = models.tiny_model(**changes)
    return params, config, models.ragged_prompts(rng, width=prompt_width), models.ragged_rollout(rng)


def dense_logp(params, config, prompts, rollout):
    """log_softmax [B, T, V] of every completion position, each row alone, without padding."""
    rows = []
    for b in range(prompts.tokens_BS.shape[0]):
        prompt = np.asarray(prompts.tokens_BS[b])[np.asarray(prompts.mask_BS[b])]
        tokens = jnp.asarray(np.concatenate([prompt, np.asarray(rollout.tokens_BT[b])]))[None]
        logits = transformer.apply(params, config, tokens)[0, len(prompt) - 1 : -1]
        rows.append(np.asarray(jax.nn.log_softmax(logits[:, : config.valid_vocab_size or config.vocab_size], axis=-1)))
    return np.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 5, 16])
def test_log_probabilities_equal_dense_ones_row_by_row(width):
    params, config, prompts, rollout = case(width)
    expected = np.take_along_axis(dense_logp(params, config, prompts, rollout), np.asarray(rollout.tokens_BT)[..., None], -1)[..., 0]
    found = score.logprobs(params, config, prompts, rollout)
    np.testing.assert_allclose(found, np.where(rollout.mask_BT, expected, 0), atol=1e-4)
    assert found.dtype == jnp.float32


def test_topk_equals_dense_top_k_with_the_mass_outside():
    params, config, prompts, rollout = case()
    logp = dense_logp(params, config, prompts, rollout)
    ids_BTK, logp_BTK, outside_BT = score.topk(params, config, prompts, rollout, k=4)
    order = np.argsort(-logp, axis=-1)[..., :4]
    agree = np.asarray(ids_BTK) == order
    assert agree[np.asarray(rollout.mask_BT)].mean() > 0.99  # ties within rounding may swap
    np.testing.assert_allclose(logp_BTK, np.take_along_axis(logp, order, -1), atol=1e-4)
    np.testing.assert_allclose(np.exp(outside_BT), 1 - np.exp(np.asarray(logp_BTK, np.float64)).sum(-1), atol=1e-5)


def test_hidden_states_make_the_same_scores():
    params, config, prompts, rollout = case()
    head = score.hidden(params, config, prompts, rollout)
    assert head.hidden_BTD.shape == (*rollout.tokens_BT.shape, config.hidden_size)
    logp = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV), axis=-1)
    np.testing.assert_allclose(logp, dense_logp(params, config, prompts, rollout), atol=1e-4)


def test_another_prompt_gives_other_scores():
    params, config, prompts, rollout = case()
    other = prompts.replace(tokens_BS=(prompts.tokens_BS + 1) % 17)
    assert float(jnp.abs(score.logprobs(params, config, prompts, rollout) - score.logprobs(params, config, other, rollout)).max()) > 0.1


def test_padding_rows_of_the_vocabulary_have_no_mass():
    import dataclasses

    params, config, prompts, rollout = case()
    masked = dataclasses.replace(config, valid_vocab_size=12)
    inside = rollout.replace(tokens_BT=rollout.tokens_BT % 12)
    found = score.logprobs(params, masked, prompts, inside)
    expected = np.take_along_axis(dense_logp(params, masked, prompts, inside), np.asarray(inside.tokens_BT)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, np.where(inside.mask_BT, expected, 0), atol=1e-4)
    assert int(score.topk(params, masked, prompts, inside, k=12)[0].max()) < 12


def in_float64(logp_BTV):
    """(log-probs, entropies) of a dense law, in float64 NumPy."""
    logp = np.asarray(logp_BTV, np.float64)
    logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
    return logp, -(np.exp(logp) * np.where(np.isneginf(logp), 0, logp)).sum(-1)


@pytest.mark.parametrize("valid", [None, 13])
def test_annotations_equal_dense_ones_in_float64(valid):
    """A teacher with padded vocabulary rows is as one without them."""
    import dataclasses

    params, config, prompts, rollout = case()
    config = dataclasses.replace(config, valid_vocab_size=valid)
    rollout = rollout.replace(tokens_BT=rollout.tokens_BT % 13)
    logp, entropy_BT = in_float64(dense_logp(params, config, prompts, rollout))
    mask, found = np.asarray(rollout.mask_BT), score.annotate(params, config, prompts, rollout, k=5)
    chosen = np.take_along_axis(logp, np.asarray(rollout.tokens_BT)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.logp_BT, np.where(mask, chosen, 0), atol=1e-4)
    np.testing.assert_allclose(found.entropy_BT, np.where(mask, entropy_BT, 0), atol=1e-4)
    np.testing.assert_allclose(found.top_logp_BTK, np.where(mask[..., None], -np.sort(-logp, axis=-1)[..., :5], 0), atol=1e-4)
    ids = np.asarray(found.top_ids_BTK)
    np.testing.assert_allclose(np.take_along_axis(logp, ids, -1)[mask], np.asarray(found.top_logp_BTK)[mask], atol=1e-4)
    np.testing.assert_allclose(found.logp_BT, score.logprobs(params, config, prompts, rollout), atol=1e-6)
    assert all(len(set(row)) == 5 for row in ids[mask].tolist())


def test_annotations_without_a_top_and_with_more_than_there_is():
    params, config, prompts, rollout = case()
    assert score.annotate(params, config, prompts, rollout).top_ids_BTK is None
    assert score.annotate(params, config, prompts, rollout, k=50).top_ids_BTK.shape == (*rollout.tokens_BT.shape, 17)
