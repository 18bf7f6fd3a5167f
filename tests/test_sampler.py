"""The sampling law against NumPy and transformers' warpers, the draw, and the counted uniforms."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax import parallel, sampler
from opd_jax.sampler import Law
from opd_jax.types import UserError


def logits_BV(seed=0, rows=4, vocab=12, scale=2.0):
    return np.random.default_rng(seed).normal(size=(rows, vocab)) * scale


LAWS = {
    "plain": Law(),
    "temperature": Law(temperature=0.6),
    "top_k": Law(top_k=4),
    "top_p": Law(top_p=0.7),
    "min_p": Law(min_p=0.2),
    "all": Law(temperature=1.7, top_k=9, top_p=0.9, min_p=0.05),
    "greedy": Law(temperature=0.0),
    "top_k 1": Law(top_k=1),
    "top_p nearly 0": Law(top_p=1e-6),
    "top_k beyond the vocabulary": Law(top_k=100),
}


def numpy_law(logits_V, law: Law):
    """Probabilities of one row by the definitions, in float64."""
    if law.greedy:
        return np.eye(len(logits_V))[np.argmax(logits_V)]
    p = np.exp(logits_V / law.temperature - np.max(logits_V / law.temperature))
    p /= p.sum()
    order = np.argsort(-p)
    if law.top_k:
        p[order[law.top_k :]] = 0.0
        p /= p.sum()
    if law.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= law.top_p]] = 0.0
    if law.min_p:
        p[p < law.min_p * p.max()] = 0.0
    return p / p.sum()


@pytest.mark.parametrize("name", LAWS)
def test_laws_equal_numpy(name):
    logits = logits_BV()
    found = np.exp(sampler.law_logp(jnp.asarray(logits, jnp.float32), LAWS[name]))
    np.testing.assert_allclose(found, [numpy_law(row, LAWS[name]) for row in logits], atol=1e-6)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "all"])
def test_laws_equal_the_warpers_of_transformers(name):
    torch = pytest.importorskip("torch")
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    law = LAWS[name]
    warpers = [TemperatureLogitsWarper(law.temperature)] if law.temperature != 1 else []
    warpers += [TopKLogitsWarper(law.top_k)] if law.top_k else []
    warpers += [TopPLogitsWarper(law.top_p)] if law.top_p < 1 else []
    warpers += [MinPLogitsWarper(law.min_p)] if law.min_p else []
    logits = logits_BV(seed=3, rows=16)
    theirs = torch.softmax(LogitsProcessorList(warpers)(None, torch.tensor(logits, dtype=torch.float32)), dim=-1).numpy()
    np.testing.assert_allclose(np.exp(sampler.law_logp(jnp.asarray(logits, jnp.float32), law)), theirs, atol=1e-6)


def test_top_p_includes_the_token_that_crosses():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for top_p, kept in ((0.4, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4)):
        assert int(np.isfinite(sampler.law_logp(logits, Law(top_p=top_p))).sum()) == kept


def test_draws_are_the_inverse_of_the_cumulative_distribution():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    for uniform, token in ((0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 2), (0.9999999, 2)):
        drawn, logp, behaviour = sampler.draw(logits, jnp.array([uniform], jnp.float32), Law())
        assert int(drawn[0]) == token
        assert float(logp[0]) == pytest.approx(float(logits[0, token]), abs=1e-6) == pytest.approx(float(behaviour[0]), abs=1e-6)


def test_tokens_without_mass_are_never_drawn():
    """Padding rows of the vocabulary, and what the law removed, at the ends of the unit interval too."""
    logits = jnp.array([[-jnp.inf, 0.0, -jnp.inf, 1.0, -jnp.inf]])
    for law in (Law(), Law(top_p=0.9), Law(temperature=0.0)):
        for uniform in (0.0, 1e-30, 0.5, np.nextafter(np.float32(1), np.float32(0))):
            assert int(sampler.draw(logits, jnp.array([uniform], jnp.float32), law)[0][0]) in (1, 3)


def test_draws_from_a_large_vocabulary_are_those_of_the_definition():
    """By blocks, of which the last is not full: the token at which the cumulative distribution exceeds the uniform, in float64."""
    logits, rows = logits_BV(seed=7, rows=64, vocab=1000, scale=3.0), np.arange(64)
    logits[:, 256:384] = -np.inf  # a block without mass
    uniform_B = np.random.default_rng(8).random(64).astype(np.float32)
    for law in (Law(), Law(temperature=0.7), Law(top_k=40)):
        token_B, logp_B, behaviour_B = sampler.draw(jnp.asarray(logits, jnp.float32), jnp.asarray(uniform_B), law)
        p, policy = (np.array([numpy_law(row, one) for row in logits]) for one in (law, Law()))
        cumulative = np.cumsum(p, axis=-1)
        assert np.abs(cumulative - uniform_B[:, None]).min() > 1e-6  # otherwise rounding could decide
        np.testing.assert_array_equal(token_B, np.argmax(cumulative > uniform_B[:, None], axis=-1))
        np.testing.assert_allclose(logp_B, np.log(policy[rows, token_B]), atol=1e-5)
        np.testing.assert_allclose(behaviour_B, np.log(p[rows, token_B]), atol=1e-5)


@pytest.mark.parametrize("holders", [(3, 700), (0, 999), (511, 512), (130,)])
def test_of_a_large_vocabulary_too_only_tokens_with_mass_are_drawn(holders):
    logits = np.full((1, 1000), -np.inf, np.float32)
    logits[0, list(holders)] = 0.3 * np.arange(len(holders))
    ends = np.linspace(0, 1, 30, endpoint=False).tolist() + [1e-30, np.nextafter(np.float32(1), np.float32(0))]
    drawn = [int(sampler.draw(jnp.asarray(logits), jnp.array([uniform], jnp.float32), Law())[0][0]) for uniform in ends]
    assert set(drawn) == set(holders) and drawn[0] == holders[0] and drawn[-1] == holders[-1]


def test_a_level_that_rounding_puts_outside_the_mass_finds_the_nearest_token_with_some():
    """Levels are differences of sums, so that one may come out below 0, or not below the whole mass."""
    mass_BN = jnp.array([[0.0, 0.5, 0.0, 0.25, 0.0]] * 2)
    first_B, before_B = sampler._first_above(mass_BN, jnp.array([-1e-8, 0.75]))
    assert first_B.tolist() == [1, 3] and before_B.tolist() == [0.0, 0.5]


def test_both_log_probabilities_of_a_law():
    logits = jnp.asarray(logits_BV(rows=1), jnp.float32)
    law = Law(temperature=0.5, top_k=3)
    token, logp, behaviour = sampler.draw(logits, jnp.array([0.4]), law)
    assert float(logp[0]) == pytest.approx(float(jax.nn.log_softmax(logits)[0, token[0]]), abs=1e-6)
    assert float(behaviour[0]) == pytest.approx(np.log(numpy_law(np.asarray(logits, np.float64)[0], law)[int(token[0])]), abs=1e-5)


def test_frequencies_of_many_draws_follow_the_law():
    logits, law = logits_BV(seed=5, rows=1, vocab=6, scale=1.0), Law(top_k=4)
    count = 20_000
    uniform_B = sampler.uniforms(jax.random.key(1), jnp.arange(count, dtype=jnp.uint32), jnp.int32(0))
    tokens = sampler.draw(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, 6)), uniform_B, law)[0]
    p = numpy_law(logits[0], law)
    observed = np.bincount(np.asarray(tokens), minlength=6)
    assert not observed[p == 0].any()
    assert scipy.stats.chisquare(observed[p > 0], count * p[p > 0]).pvalue > 1e-3


def test_uniforms_depend_on_key_id_and_position_alone():
    key, ids = jax.random.key(0), jnp.array([3, 7, 11], jnp.uint32)
    base = np.asarray(sampler.uniforms(key, ids, jnp.int32(2)))
    np.testing.assert_array_equal(np.asarray(sampler.uniforms(key, ids[::-1], jnp.int32(2))), base[::-1])
    np.testing.assert_array_equal(np.asarray(sampler.uniforms(key, ids[1:2], jnp.int32(2))), base[1:2])
    others = [
        sampler.uniforms(key, ids, jnp.int32(3)),
        sampler.uniforms(jax.random.key(1), ids, jnp.int32(2)),
        sampler.uniforms(key, ids + 1, jnp.int32(2)),
    ]
    assert not any(np.isin(np.asarray(other), base).any() for other in others)
    assert ((base >= 0) & (base < 1)).all()


def test_golden_uniforms():
    """The same bits in every release: a run that is resumed after an upgrade draws what it would have drawn."""
    found = sampler.uniforms(jax.random.key(0), jnp.array([0, 1, 2**32 - 1], jnp.uint32), jnp.int32(7))
    assert found.tolist() == [0.13564205169677734, 0.014302492141723633, 0.31720900535583496]


def test_no_two_draws_of_a_step_share_their_uniform():
    """Neither rollouts and positions that add up to the same, nor rollouts and positions that are exchanged."""
    ids = jnp.arange(40, dtype=jnp.uint32)
    grid = np.stack([sampler.uniforms(jax.random.key(0), ids, jnp.int32(position)) for position in range(40)])
    assert len(np.unique(grid)) > 0.99 * grid.size  # 23 bits collide by chance now and then


@pytest.mark.parametrize("shape", models.MESHES)
def test_uniforms_are_the_same_bits_on_eight_devices(shape):
    mesh = parallel.make_mesh(*shape)
    ids, key = jnp.arange(16, dtype=jnp.uint32), jax.random.key(4)
    spread = jax.device_put(ids, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    function = jax.jit(sampler.uniforms)
    np.testing.assert_array_equal(np.asarray(function(key, spread, jnp.int32(5))), np.asarray(function(key, ids, jnp.int32(5))))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"temperature": -1.0}, "temperature = -1.0 must be 0"),
        ({"temperature": 1e-39}, "temperature = 1e-39 must be 0 .greedy. or at least 0.0001"),
        ({"temperature": float("nan")}, "temperature = nan must be 0"),
        ({"top_p": 0.0}, "top_p = 0.0 must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k = -1 must be 0"),
        ({"min_p": 1.5}, "min_p = 1.5 must be between 0 and 1"),
    ],
)
def test_laws_that_do_not_exist_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Law(**fields)
