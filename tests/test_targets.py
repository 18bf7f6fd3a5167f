"""Targets: pools against the mixtures that they stand for, routing against rows alone, cached laws against whole ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from opd_jax.numerics.heads import DenseHead, Head, topk
from opd_jax.numerics.targets import SparseTarget, Target, TokenTarget
from opd_jax.numerics.token_stats import Signal, token_stats

pytestmark = pytest.mark.usefixtures("float64")
B, T, V, M = 2, 3, 7, 3


def logits(seed, members=None):
    shape = (B, T, V) if members is None else (members, B, T, V)
    return np.random.default_rng(seed).normal(size=shape)


def tokens(seed=5):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (B, T)))


def weights(seed=7):
    return np.random.default_rng(seed).dirichlet(np.ones(M), (B, T)).transpose(2, 0, 1)


def pool(teachers, weight_MBT, pool="logit", **more):
    return Target(tuple(DenseHead(jnp.asarray(x)) for x in teachers), jnp.asarray(weight_MBT), pool, **more)


def one(teacher):
    return Target((DenseHead(jnp.asarray(teacher)),))


def stats(target, signal, needs=("local",), student=None, tile=None):
    student = logits(1) if student is None else student
    return token_stats(DenseHead(jnp.asarray(student)), target, tokens(), signal=signal, needs={*needs}, tile=tile)


def gradient(target, signal, tile=None):
    """Of the sum of the local losses by the student's logits."""
    loss = lambda x: jnp.sum(stats(target, signal, student=x, tile=tile).local_BT)
    return jax.grad(loss)(jnp.asarray(logits(1)))


def close(a, b, tolerance=1e-12):
    return float(jnp.max(jnp.abs(jnp.asarray(a) - jnp.asarray(b)))) < tolerance


def test_laws_are_the_mixtures_by_numpy():
    teachers, w = logits(2, M), weights()
    law = scipy.special.log_softmax(teachers, axis=-1)
    geometric = scipy.special.log_softmax(np.einsum("mbt,mbtv->btv", w, law), axis=-1)
    arithmetic = np.log(np.einsum("mbt,mbtv->btv", w, np.exp(law)))
    for kind, expected in (("logit", geometric), ("prob", arithmetic)):
        found = stats(pool(teachers, w, kind), Signal("reverse_kl"), ("target_logp", "target_entropy", "kl"))
        assert close(found.target_logp_BT, np.take_along_axis(expected, np.asarray(tokens())[..., None], -1)[..., 0])
        assert close(found.target_entropy_BT, -np.sum(np.exp(expected) * expected, -1))
        p = scipy.special.log_softmax(logits(1), axis=-1)
        assert close(found.kl_BT, np.sum(np.exp(p) * (p - expected), -1))


@pytest.mark.parametrize("kind, mixture", [("reverse_kl", "logit"), ("forward_kl", "prob")])
def test_a_weighted_sum_of_divergences_has_the_gradient_of_one_from_the_pool(kind, mixture):
    teachers, w = logits(2, M), weights()
    student = jnp.asarray(logits(1))
    total = lambda x: sum(jnp.sum(w[m] * stats(one(teachers[m]), Signal(kind), student=x).local_BT) for m in range(M))
    assert close(jax.grad(total)(student), gradient(pool(teachers, w, mixture), Signal(kind)))
    other = "prob" if mixture == "logit" else "logit"
    assert not close(jax.grad(total)(student), gradient(pool(teachers, w, other), Signal(kind)), 1e-3)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_one_hot_weights_route_each_position_to_its_teacher_exactly(kind):
    teachers, signal = logits(2, M), Signal(kind, beta=0.5)
    chosen_BT = np.random.default_rng(3).integers(0, M, (B, T))
    w = np.eye(M)[chosen_BT].transpose(2, 0, 1)
    own = np.take_along_axis(teachers, chosen_BT[None, ..., None], axis=0)[0]
    assert (stats(pool(teachers, w, "prob"), signal).local_BT == stats(one(own), signal).local_BT).all()
    assert (gradient(pool(teachers, w, "prob"), signal) == gradient(one(own), signal)).all()


def test_scale_1_does_not_see_the_reference():
    """ExOPD with lambda = 1 is plain distillation, whatever the reference."""
    teacher, signal = logits(2), Signal("reverse_kl")
    ends = np.array([np.ones((B, T)), np.zeros((B, T))])
    for reference in (logits(8), 50 * logits(9)):
        assert close(gradient(pool([teacher, reference], ends), signal), gradient(one(teacher), signal))


def test_a_trust_region_runs_from_the_reference_to_the_student():
    reference, live = logits(2), logits(1)
    for mix, expected in ((0.0, reference), (1.0, live)):
        w = np.array([np.full((B, T), 1 - mix), np.full((B, T), mix)])
        assert close(gradient(pool([reference, live], w), Signal("reverse_kl")), gradient(one(expected), Signal("reverse_kl")))


def test_extrapolation_goes_beyond_the_teacher():
    """The target is q^lambda r^(1 - lambda), normalised."""
    teacher, reference, scale = logits(2), logits(3), 1.7
    w = np.array([np.full((B, T), scale), np.full((B, T), 1 - scale)])
    law = scipy.special.log_softmax(scale * teacher + (1 - scale) * reference, axis=-1)
    assert close(gradient(pool([teacher, reference], w), Signal("reverse_kl")), gradient(one(law), Signal("reverse_kl")))


def expected_sampled_gradient(target):
    p = jax.nn.softmax(jnp.asarray(logits(1)))

    def loss(x, token):
        chosen = jnp.full((B, T), token)
        found = token_stats(DenseHead(x), target, chosen, signal=Signal("reverse_kl", "sampled"), needs={"local"})
        return jnp.sum(p[..., token] * found.local_BT)

    return sum(jax.grad(loss)(jnp.asarray(logits(1)), token) for token in range(V))


def test_without_a_normaliser_token_credit_keeps_its_gradient_and_a_generalised_top_k_does_not():
    teachers, w = [logits(2), logits(3)], np.array([np.full((B, T), 2.0), np.full((B, T), -1.0)])
    normal, raw = pool(teachers, w), pool(teachers, w, normalise=False)
    whole = gradient(normal, Signal("reverse_kl"))
    seen = [stats(target, Signal("reverse_kl"), ("target_logp",)).target_logp_BT for target in (normal, raw)]
    assert not close(*seen, 1e-3)
    assert close(gradient(raw, Signal("reverse_kl")), whole)
    assert close(expected_sampled_gradient(raw), whole) and close(expected_sampled_gradient(normal), whole)
    cut = Signal("reverse_kl", "topk_teacher", tail="generalised", k=3)
    assert not close(gradient(raw, cut), gradient(normal, cut), 1e-3)


def test_a_token_that_a_member_rules_out_stays_out():
    """Also where its weight is negative, which would make it certain."""
    teacher, reference = logits(2), logits(3)
    reference[..., 4] = -np.inf
    w = np.array([np.full((B, T), 1.5), np.full((B, T), -0.5)])
    student, ruled_out_BT = DenseHead(jnp.asarray(logits(1))), jnp.full((B, T), 4)
    found = token_stats(student, pool([teacher, reference], w), ruled_out_BT, signal=Signal("forward_kl"), needs={"target_logp", "local"})
    assert np.isneginf(found.target_logp_BT).all() and np.isfinite(found.local_BT).all()
    unused = np.array([np.ones((B, T)), np.zeros((B, T))])
    assert close(gradient(pool([teacher, reference], unused), Signal("forward_kl")), gradient(one(teacher), Signal("forward_kl")))


def heads_of(seed, width, rows):
    rng = np.random.default_rng(seed)
    valid_V = jnp.arange(rows) < V
    return Head(jnp.asarray(rng.normal(size=(B, T, width))), jnp.asarray(rng.normal(size=(width, rows))), valid_V=valid_V)


def test_members_may_differ_in_width_and_padding():
    members = (heads_of(1, 4, V), heads_of(2, 6, V + 3), heads_of(3, 5, V + 1))
    student, w = heads_of(4, 8, V + 2), weights()
    dense = [np.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV)[..., :V] for head in members]
    own = np.einsum("btd,dv->btv", student.hidden_BTD, student.unembed_DV)[..., :V]
    signal = Signal("jsd", beta=0.3)
    found = token_stats(student, Target(members, jnp.asarray(w), "prob"), tokens(), signal=signal, needs={"local"})
    assert close(found.local_BT, stats(pool(dense, w, "prob"), signal, student=own).local_BT)


@pytest.mark.parametrize("mixture", ["logit", "prob"])
@pytest.mark.parametrize("tile", [1, 2])
def test_tiles_cut_the_weights_too(mixture, tile):
    target, signal = pool(logits(2, M), weights(), mixture), Signal("reverse_kl")
    assert close(stats(target, signal, tile=tile).local_BT, stats(target, signal).local_BT)
    assert close(gradient(target, signal, tile=tile), gradient(target, signal))


def test_a_pool_has_no_gradient():
    loss = lambda x: jnp.sum(stats(pool(x, weights()), Signal("reverse_kl")).local_BT)
    assert (jax.grad(loss)(jnp.asarray(logits(2, M))) == 0).all()


def cached(teacher, k):
    return SparseTarget(*topk(DenseHead(jnp.asarray(teacher)), k=k))


@pytest.mark.parametrize("tail", ["renormalise", "bucket", "generalised", "none"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("k", [2, 4])
def test_a_cached_top_k_is_as_good_as_the_law(kind, tail, k):
    signal, targets = Signal(kind, "topk_teacher", tail=tail, k=k, beta=0.3), (cached(logits(2), 4), one(logits(2)))
    assert close(*(gradient(target, signal) for target in targets))
    for name in ("target_mass_BT", "mass_BT", "local_BT"):
        assert close(*(getattr(stats(target, signal, ("target_mass", "mass", "local")), name) for target in targets))


def test_a_hard_label_is_the_limit_of_a_cold_teacher_and_needs_one_cached_token():
    hard = Signal("top1_cross_entropy")
    cold = gradient(one(logits(2)), Signal("forward_kl", teacher_temperature=1e-3))
    assert close(gradient(one(logits(2)), hard), cold, 1e-9)
    assert close(gradient(cached(logits(2), 1), hard), cold, 1e-9)
    # Renormalised on a single token both laws are 1 there: no label, but nothing to learn.
    assert not gradient(one(logits(2)), Signal("forward_kl", "topk_teacher", k=1)).any()


def test_cached_log_probs_are_as_good_as_the_law_for_what_is_sampled():
    law = jax.nn.log_softmax(jnp.asarray(logits(2)))
    target = TokenTarget(jnp.take_along_axis(law, tokens()[..., None], axis=-1)[..., 0])
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        signal = Signal(kind, "sampled", beta=0.3)
        assert close(gradient(target, signal), gradient(one(logits(2)), signal))
    assert (stats(target, Signal("reverse_kl", "sampled"), ("target_logp",)).target_logp_BT == target.logp_BT).all()


@pytest.mark.parametrize(
    "target, signal, needs, words",
    [
        ("token", Signal("reverse_kl"), ("local",), "use signal.support = 'sampled'"),
        ("token", Signal("reverse_kl", "sampled"), ("kl",), "'kl' needs more than log-probs of the sampled tokens"),
        ("sparse", Signal("reverse_kl"), ("local",), "needs more than the teacher's top 4"),
        ("sparse", Signal("reverse_kl", "topk_teacher", k=5), ("local",), "signal.k of at most 4"),
        ("sparse", Signal("reverse_kl", "topk_student", k=2), ("local",), "use signal.support = 'topk_teacher'"),
        ("sparse", Signal("reverse_kl", "topk_teacher", k=2, tail="sampled_tail"), ("local",), "signal.tail renormalise, bucket"),
        ("sparse", Signal("reverse_kl", "topk_teacher", k=2, teacher_temperature=2.0), ("local",), "loss.teacher_temperature = 2"),
        ("sparse", Signal("reverse_kl", "topk_teacher", k=2), ("target_logp",), "'target_logp' needs more than"),
    ],
)
def test_what_a_cache_does_not_hold_is_refused(target, signal, needs, words):
    made = {"token": TokenTarget(jnp.zeros((B, T))), "sparse": cached(logits(2), 4)}[target]
    with pytest.raises(ValueError, match="cached") as error:
        stats(made, signal, needs)
    assert words in str(error.value)
