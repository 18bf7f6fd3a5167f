"""Tiles of the vocabulary give what whole vocabularies give: every signal and statistic that has such a form, with its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import mostly_slow
from test_token_stats import B, T, heads

from opd_jax import parallel
from opd_jax.numerics import heads as heads_lib
from opd_jax.numerics import token_stats as lib
from opd_jax.numerics import vocabulary
from opd_jax.numerics.signals import SUPPORTS, TAILS
from opd_jax.numerics.token_stats import Head, Signal, SparseTarget, Target, TokenTarget, token_stats

V = 24  # eight blocks of three columns
WARM = {"student_temperature": 0.7, "teacher_temperature": 1.4}
STATISTICS = ("logp", "local", "extra_logp", "target_logp", "extra_target_logp", "kl", "entropy", "target_entropy", "mass", "target_mass")


def signals():
    yield from (Signal(kind, **WARM) for kind in ("reverse_kl", "nll", "negative_entropy", "cross_entropy", "top1_cross_entropy"))
    yield from (Signal(kind, beta=0.3) for kind in ("jsd", "jsd_continuous", "skew_forward_kl", "skew_reverse_kl"))
    yield from (Signal("forward_kl", clip=0.05), Signal("jsd", "sampled", beta=0.5, **WARM), Signal("reverse_kl", "sampled"))
    yield from (Signal("reverse_kl", "topk_union+token", tail=tail, k=5, **WARM) for tail in TAILS)
    yield from (Signal("reverse_kl", support, tail="sampled_tail", k=5) for support in SUPPORTS[2:])
    yield from (Signal(kind, "topk_union", tail="bucket", k=5, beta=0.3, clip=0.01) for kind in ("jsd", "forward_kl"))
    yield from (Signal("forward_kl", "topk_student", tail=tail, k=k) for tail, k in (("none", 23), ("renormalise", 23), ("bucket", V)))


def models(dtype=jnp.float64, vocab=V, valid=None, softcap=None):
    student, teacher, tokens_BT = heads(dtype, softcap, valid, vocab=vocab)
    extra_BTN = jnp.asarray(np.random.default_rng(3).integers(0, valid or vocab, (B, T, 3)), jnp.int32).at[:, :, 1].set(2)
    return student, Target((teacher,)), tokens_BT, extra_BTN


def values_and_gradients(student, target, tokens_BT, extra_BTN, signal, needs, **tiles):
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.normal(size=(B, T))).at[0, 1].set(0) for _ in range(2)] + [jnp.asarray(rng.normal(size=(B, T, 3)))]

    def loss(hidden, unembed):
        head = dataclasses.replace(student, hidden_BTD=hidden, unembed_DV=unembed)
        stats = token_stats(head, target, tokens_BT, signal=signal, needs=needs, extra_tokens_BTN=extra_BTN, **tiles)
        parts = zip(weights, (stats.logp_BT, stats.local_BT, stats.extra_logp_BTN), strict=True)
        return sum(jnp.sum(w * x) for w, x in parts if x is not None), stats

    # Compiled at once: one by one its operations would take longer.
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(student.hidden_BTD, student.unembed_DV)


def check_equal(found, expected, atol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def name_of(signal):
    return f"{signal.kind}-{signal.support}-{signal.tail}-{signal.k}"


@pytest.mark.parametrize("signal", mostly_slow(list(signals()), lambda signal: signal.tail in ("renormalise", "bucket")), ids=name_of)
def test_equal_to_whole_vocabularies_in_float64(signal, float64):
    inputs = models(softcap=2.0, valid=22)
    needs = {*STATISTICS} | ({"overlap"} if signal.is_topk else set())
    expected = values_and_gradients(*inputs, signal, needs, tile=T)
    check_equal(values_and_gradients(*inputs, signal, needs, tile=3, tile_columns=16), expected, 1e-11)  # with a rest along T and along V


@pytest.mark.parametrize("vocab", [23, 24, 48])
def test_equal_in_float32(vocab):
    inputs = models(jnp.float32, vocab)
    signal, needs = Signal("reverse_kl", "topk_union", tail="bucket", k=5), {"logp", "local", "kl"}
    expected = values_and_gradients(*inputs, signal, needs, tile=T)
    check_equal(values_and_gradients(*inputs, signal, needs, tile_columns=16), expected, 1e-5)


def test_a_loss_over_the_whole_vocabulary_without_a_teacher(float64):
    student, _, *tokens = models()
    for signal in (Signal("nll"), Signal("negative_entropy")):
        needs = {"local", "entropy", "extra_logp"}
        found = values_and_gradients(student, None, *tokens, signal, needs, tile=2, tile_columns=8)
        check_equal(found, values_and_gradients(student, None, *tokens, signal, needs, tile=T), 1e-11)


@pytest.mark.parametrize("tail", ["renormalise", "bucket", "generalised", "none"])
def test_a_cached_top(tail, float64):
    student, target, tokens_BT, extra_BTN = models()
    cached = SparseTarget(*lib.topk(target.heads[0], k=7, tile=T))
    signal, needs = Signal("forward_kl", "topk_teacher", tail=tail, k=5), {"logp", "local", "mass", "target_mass", "overlap", "entropy"}
    expected = values_and_gradients(student, cached, tokens_BT, extra_BTN, signal, needs, tile=T)
    check_equal(values_and_gradients(student, cached, tokens_BT, extra_BTN, signal, needs, tile=2, tile_columns=8), expected, 1e-11)


def test_cached_log_probs_of_tokens(float64):
    student, target, tokens_BT, extra_BTN = models()
    logp_BT = token_stats(target.heads[0], None, tokens_BT, signal=Signal("nll"), needs={"logp"}).logp_BT
    signal, needs = Signal("reverse_kl", "sampled"), {"logp", "local", "mass", "target_logp"}
    inputs = (student, TokenTarget(logp_BT), tokens_BT, extra_BTN, signal, needs)
    check_equal(values_and_gradients(*inputs, tile_columns=8), values_and_gradients(*inputs, tile=T), 1e-11)


def test_ties_of_a_top_go_to_the_lower_id_whatever_tile_they_are_in():
    head = Head(jnp.ones((1, 2, 1)), jnp.asarray(np.random.default_rng(0).integers(0, 4, (1, 48)), jnp.float32))
    for k in (1, 7, 20):
        of = lambda k=k, **tiles: jax.jit(lambda head: lib.topk(head, k=k, **tiles))(head)
        expected, found = of(tile=2), of(tile_columns=16)
        np.testing.assert_array_equal(found[0], expected[0])
        check_equal(found, expected, 1e-6)


def test_a_vocabulary_across_devices(float64):
    """The same numbers where rows and vocabulary lie across a mesh, and no device gathers the unembedding."""
    mesh = parallel.make_mesh(2, 1, 4)
    rng = np.random.default_rng(0)
    make = lambda: Head(jnp.asarray(rng.normal(size=(4, 6, 5))), jnp.asarray(rng.normal(size=(5, 4096))))
    student, teacher = make(), make()
    tokens_BT = jnp.asarray(rng.integers(0, 4096, (4, 6)), jnp.int32)

    @jax.jit
    def gradients(student, teacher, tokens_BT):
        def loss(student):
            tiles = {"signal": Signal("reverse_kl"), "needs": {"logp", "local"}, "tile_columns": 256}
            stats = token_stats(student, Target((teacher,)), tokens_BT, **tiles)
            return jnp.sum(stats.local_BT + 0.1 * stats.logp_BT)

        return jax.grad(loss)(student)

    expected = gradients(student, teacher, tokens_BT)
    lay = lambda head: Head(
        jax.device_put(head.hidden_BTD, parallel.sharding(mesh, ("batch", None, None), head.hidden_BTD.shape)),
        jax.device_put(head.unembed_DV, parallel.sharding(mesh, (None, "vocab"), head.unembed_DV.shape)),
    )
    with jax.set_mesh(mesh):
        spread = lay(student), lay(teacher), parallel.shard_batch(tokens_BT, mesh)
        found = gradients(*spread)
        program = gradients.lower(*spread).compile().as_text()
    check_equal(found, expected, 1e-12)
    assert "f64[5,1024]" in program and "f64[5,4096]" not in program and "f64[5,16,256]" not in program


def test_statistics_without_such_a_form_take_whole_vocabularies():
    student, target, tokens_BT, _ = models(jnp.float32)
    pooled = Target(target.heads * 2, jnp.full((2, B, T), 0.5), "prob")
    assert vocabulary.has_form(student, target, {"logp", "local"})
    for other, needs in ((target, {"logp", "gradient_square"}), (pooled, {"local"}), (pooled, {"disagreement"})):
        assert not vocabulary.has_form(student, other, needs)
        with pytest.raises(AssertionError, match="no form by tiles of the vocabulary"):
            token_stats(student, other, tokens_BT, signal=Signal("reverse_kl"), needs=needs, tile_columns=8)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_vocabulary():
    """At most 64 MiB beside inputs, outputs and gradients, at 4096 positions, whatever the rows."""

    def temporary(rows, length, vocab, dtype, signal):
        shape = lambda *s: jax.ShapeDtypeStruct(s, dtype)
        tokens_BT = jax.ShapeDtypeStruct((rows, length), jnp.int32)

        def loss(hidden, unembed, teacher_hidden, teacher_unembed, tokens_BT):
            target = Target((Head(teacher_hidden, teacher_unembed),))
            stats = token_stats(Head(hidden, unembed), target, tokens_BT, signal=signal, needs={"logp", "local", "kl"})
            return jnp.sum(stats.local_BT)

        head = (shape(rows, length, 64), shape(64, vocab))
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*head, *head, tokens_BT).compile()
        return program.memory_analysis().temp_size_in_bytes

    for rows, length in ((4, 1024), (32, 128), (512, 8)):
        for signal in (Signal("reverse_kl"), Signal("reverse_kl", "topk_union", tail="bucket", k=16)):
            most = temporary(rows, length, 152_064, jnp.float32, signal)
            assert most <= 64 * 2**20
            assert temporary(rows, length, 2 * 152_064, jnp.float32, signal) <= most + heads_lib.COLUMN_TILE_BYTES
    assert temporary(8, 512, 151_936, jnp.float32, Signal("reverse_kl")) <= 64 * 2**20  # no tile divides it: the last one overlaps
