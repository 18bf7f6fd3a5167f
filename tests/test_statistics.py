"""The statistics beside the loss: masses, overlap, optimal baseline, extra tokens; nothing is computed that is not needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_token_stats import B, T, V, dense, heads

from opd_jax.numerics import token_stats as lib
from opd_jax.numerics.token_stats import DenseHead, Head, Signal, Target, token_stats


def laws(student, teacher, valid=8):
    return (np.asarray(jax.nn.softmax(dense(head).logits_BTV[..., :valid], axis=-1)) for head in (student, teacher))


@pytest.mark.parametrize("columns", [None, 3])
def test_statistics_of_a_support_equal_loops(columns, float64):
    student, teacher, tokens_BT = heads(jnp.float64, valid=8)
    needs, k = ("mass", "target_mass", "overlap"), 3
    settings = {"needs": needs, "tile": 2, "tile_columns": columns}
    found = {
        support: token_stats(student, Target((teacher,)), tokens_BT, signal=Signal("reverse_kl", support, k=k), **settings)
        for support in ("topk_teacher", "topk_student", "topk_union", "topk_union+token")
    }
    p, q = laws(student, teacher)
    for b in range(B):
        for t in range(T):
            best = lambda law, b=b, t=t: set(np.argsort(-law[b, t])[:k].tolist())
            token = int(tokens_BT[b, t])
            members = {"topk_teacher": best(q), "topk_student": best(p), "topk_union": best(p) | best(q)}
            members["topk_union+token"] = members["topk_union"] | {token}
            for support, stats in found.items():
                inside = sorted(members[support])
                assert float(stats.mass_BT[b, t]) == pytest.approx(p[b, t][inside].sum(), abs=1e-12)
                assert float(stats.target_mass_BT[b, t]) == pytest.approx(q[b, t][inside].sum(), abs=1e-12)
                assert float(stats.overlap_BT[b, t]) == pytest.approx(len(best(p) & best(q)) / k, abs=1e-12)


def test_the_mass_of_the_whole_vocabulary_is_1_and_of_the_sampled_token_its_own():
    student, teacher, tokens_BT = heads()
    of = lambda signal, *needs: token_stats(student, Target((teacher,)), tokens_BT, signal=signal, needs=("mass", "target_mass", *needs))
    for signal in (Signal("reverse_kl"), Signal("nll"), Signal("reverse_kl", "topk_union", k=V)):
        stats = of(signal)
        np.testing.assert_array_equal(stats.mass_BT, np.ones((B, T)))
        np.testing.assert_array_equal(stats.target_mass_BT, np.ones((B, T)))
    np.testing.assert_array_equal(of(Signal("reverse_kl", "topk_union", k=V), "overlap").overlap_BT, np.ones((B, T)))
    stats = of(Signal("reverse_kl", "sampled"), "logp", "target_logp")
    np.testing.assert_allclose(stats.mass_BT, np.exp(stats.logp_BT), rtol=1e-6)
    np.testing.assert_allclose(stats.target_mass_BT, np.exp(stats.target_logp_BT), rtol=1e-6)


def test_the_optimal_baseline_equals_a_loop_over_scores(float64):
    student, teacher, tokens_BT = heads(jnp.float64, valid=8)
    stats = token_stats(student, Target((teacher,)), tokens_BT, signal=Signal("reverse_kl"), needs=("optimal_baseline",), tile=2)
    p, q = laws(student, teacher)
    for b in range(B):
        for t in range(T):
            weight = [((np.eye(8)[y] - p[b, t]) ** 2).sum() for y in range(8)]
            log_ratio = np.log(q[b, t] / p[b, t])
            expected = (p[b, t] * weight * log_ratio).sum() / (p[b, t] * weight).sum()
            assert float(stats.optimal_baseline_BT[b, t]) == pytest.approx(expected, abs=1e-12)


def test_the_optimal_baseline_of_a_law_of_one_token_is_0_and_tokens_without_mass_do_not_count():
    teacher = DenseHead(jnp.array([[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]]))
    student = DenseHead(jnp.array([[[200.0, 0.0, -jnp.inf], [1.0, 2.0, -jnp.inf], [30.0, 0.0, 0.0]]]))
    stats = token_stats(student, Target((teacher,)), jnp.zeros((1, 3), int), signal=Signal("reverse_kl"), needs=("optimal_baseline",))
    p, q = np.asarray(jax.nn.softmax(jnp.array([1.0, 2.0]))), np.asarray(jax.nn.softmax(jnp.array([0.0, 1.0, 2.0])))[:2]
    # With two tokens both scores have the same norm: the plain mean of the log-ratio.
    assert float(stats.optimal_baseline_BT[0, 0]) == 0.0
    assert float(stats.optimal_baseline_BT[0, 1]) == pytest.approx((p * np.log(q / p)).sum(), rel=1e-5)
    assert np.isfinite(float(stats.optimal_baseline_BT[0, 2]))


def test_extra_tokens_have_log_probs_with_gradients(float64):
    """Also where a position names a token twice."""
    student, teacher, tokens_BT = heads(jnp.float64, softcap=2.0, valid=8)
    rng = np.random.default_rng(5)
    extra_BTN = jnp.asarray(rng.integers(0, 8, (B, T, 4))).at[:, :, 1].set(3).at[:, :, 2].set(3)
    weight_BTN = jnp.asarray(rng.normal(size=(B, T, 4)))
    log_softmax = lambda head: jax.nn.log_softmax(dense(head).logits_BTV[..., :8] / 0.7)
    pick = lambda x: jnp.take_along_axis(x, extra_BTN, axis=-1)
    signal = Signal("reverse_kl", student_temperature=0.7, teacher_temperature=0.7)

    def ours(hidden, tile, columns):
        head, needs = Head(hidden, student.unembed_DV, 2.0, student.valid_V), ("logp", "extra_logp", "extra_target_logp")
        settings = {"needs": needs, "extra_tokens_BTN": extra_BTN, "tile": tile, "tile_columns": columns}
        stats = token_stats(head, Target((teacher,)), tokens_BT, signal=signal, **settings)
        return jnp.sum(weight_BTN * stats.extra_logp_BTN) + jnp.sum(stats.logp_BT), stats

    def plain(hidden):
        logp = log_softmax(Head(hidden, student.unembed_DV, 2.0))
        return jnp.sum(weight_BTN * pick(logp)) + jnp.sum(jnp.take_along_axis(logp, tokens_BT[..., None], axis=-1))

    for tile in ((2, None), (T, None), (2, 4)):
        gradient, stats = jax.grad(ours, has_aux=True)(student.hidden_BTD, *tile)
        np.testing.assert_allclose(stats.extra_logp_BTN, pick(log_softmax(student)), atol=1e-12)
        np.testing.assert_allclose(stats.extra_target_logp_BTN, pick(log_softmax(teacher)), atol=1e-12)
        np.testing.assert_allclose(gradient, jax.grad(plain)(student.hidden_BTD), atol=1e-11)


def test_only_what_is_needed_is_computed(monkeypatch):
    """No top-k where nothing reads one, and no work in the backward pass for a statistic without a cotangent."""
    student, teacher, tokens_BT = heads()
    used = []
    gradient = lib._tile_logit_gradient
    spy = lambda student, teacher, tokens, cotangents, signal: (
        used.append(set(cotangents)),
        gradient(student, teacher, tokens, cotangents, signal),
    )[1]
    monkeypatch.setattr(lib, "_tile_logit_gradient", spy)

    def loss(hidden, needs):
        head = Head(hidden, student.unembed_DV)
        stats = token_stats(head, Target((teacher,)), tokens_BT, signal=Signal("reverse_kl", "topk_teacher", k=2), needs=needs, tile=T)
        return sum(jnp.sum(x) for x in (stats.local_BT, stats.kl_BT) if x is not None), stats.logp_BT

    program = lambda *needs: str(jax.make_jaxpr(lambda h: loss(h, needs)[0])(student.hidden_BTD))
    assert "top_k" not in program("logp", "kl", "target_logp", "entropy", "optimal_baseline") and "top_k" in program("local")
    jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(student.hidden_BTD, ("logp", "local", "kl"))
    assert used == [{"local"}]


def test_a_masked_token_whose_loss_is_infinite_does_not_reach_the_gradient():
    student, teacher = jnp.zeros((1, 2, 3)), jnp.array([[[0.0, 0.0, -jnp.inf], [0.0, 1.0, 2.0]]])

    def masked_loss(z):
        stats = token_stats(
            DenseHead(z), Target((DenseHead(teacher),)), jnp.zeros((1, 2), int), signal=Signal("reverse_kl"), needs=("local",)
        )
        return jnp.sum(jnp.where(jnp.array([[False, True]]), stats.local_BT, 0))

    gradient = np.asarray(jax.grad(masked_loss)(student))
    assert not gradient[0, 0].any() and np.isfinite(gradient).all() and gradient[0, 1].any()


def test_statistics_that_do_not_exist_are_refused():
    student, teacher, tokens_BT = heads()
    with pytest.raises(ValueError, match="'overlap' needs a top-k support, signal.support = 'full' has no k"):
        token_stats(student, Target((teacher,)), tokens_BT, signal=Signal("reverse_kl"), needs=("overlap",))
    for needs in ({"extra_logp"}, {"nothing"}):
        with pytest.raises(AssertionError):
            token_stats(student, Target((teacher,)), tokens_BT, signal=Signal("reverse_kl"), needs=needs)
    for needs, signal in (({"mass"}, Signal("reverse_kl", "topk_union", k=2)), ({"target_mass"}, Signal("nll"))):
        with pytest.raises(AssertionError, match="need a target"):
            token_stats(student, None, tokens_BT, signal=signal, needs=needs)
