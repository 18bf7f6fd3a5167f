"""The tiled loss path equals the dense one, values and gradients, and never holds [B, T, V]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.numerics import heads as heads_lib
from opd_jax.numerics import token_stats as lib
from opd_jax.numerics.token_stats import STATISTICS, DenseHead, Head, Signal, Target, token_stats

B, T, D, V = 3, 7, 5, 11
SIGNALS = {
    "reverse_kl": Signal("reverse_kl"),
    "forward_kl": Signal("forward_kl", student_temperature=0.7, teacher_temperature=1.4),
    "jsd": Signal("jsd", beta=0.3, student_temperature=1.2),
    "sampled reverse_kl": Signal("reverse_kl", "sampled"),
    "nll": Signal("nll"),
    "cross_entropy": Signal("cross_entropy"),
    "negative_entropy": Signal("negative_entropy"),
}

FULL = [name for name in STATISTICS if name != "overlap" and not name.startswith("extra")]  # what needs neither a top-k nor extra tokens


def heads(dtype=jnp.float32, softcap=None, valid=None, seed=0, teacher_width=D + 2, vocab=V, scale=1.0):
    rng = np.random.default_rng(seed)
    make = lambda width: Head(
        jnp.asarray(scale * rng.normal(size=(B, T, width)), dtype),
        jnp.asarray(scale * rng.normal(size=(width, vocab)), dtype),
        softcap,
        None if valid is None else jnp.arange(vocab) < valid,
    )
    tokens_BT = jnp.asarray(rng.integers(0, valid or vocab, (B, T)), jnp.int32)
    return make(D), make(teacher_width), tokens_BT


def dense(head: Head) -> DenseHead:
    """The logits, by plain matrix products, differentiable by jax alone."""
    logits = jnp.einsum(
        "btd,dv->btv", head.hidden_BTD, head.unembed_DV, preferred_element_type=jnp.promote_types(head.hidden_BTD.dtype, "float32")
    )
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    return DenseHead(logits, head.valid_V)


def plain_loss(student: Head, teacher: Head, tokens_BT, signal: Signal):
    """(logp, local) with jax's own differentiation of log_softmax: no custom rule, no tiles."""
    mask = lambda head, logits: logits if head.valid_V is None else jnp.where(head.valid_V[None, None], logits, -jnp.inf)
    logp = jax.nn.log_softmax(mask(student, dense(student).logits_BTV / signal.student_temperature), axis=-1)
    logq = jax.nn.log_softmax(mask(teacher, dense(teacher).logits_BTV / signal.teacher_temperature), axis=-1)
    p, q = jnp.exp(logp), jnp.exp(logq)
    finite = lambda x: jnp.where(jnp.isfinite(x), x, 0.0)
    pick = lambda x: jnp.take_along_axis(x, tokens_BT[..., None], axis=-1)[..., 0]
    m = jnp.log(signal.beta * q + (1 - signal.beta) * p) if signal.kind == "jsd" else None
    local = {
        "reverse_kl": lambda: jnp.sum(p * (finite(logp) - finite(logq)), -1),
        "forward_kl": lambda: jnp.sum(q * (finite(logq) - finite(logp)), -1),
        "jsd": lambda: jnp.sum(signal.beta * q * (logq - m) + (1 - signal.beta) * p * (logp - m), -1),
        "nll": lambda: -pick(logp),
        "cross_entropy": lambda: -jnp.sum(q * finite(logp), -1),
        "negative_entropy": lambda: jnp.sum(p * finite(logp), -1),
    }[signal.kind]()
    if signal.support == "sampled":
        local = jax.lax.stop_gradient(pick(logp) - pick(logq)) * pick(logp)
    return pick(logp), local


def loss(function, student, teacher, tokens_BT, signal):
    logp, local = function(student, teacher, tokens_BT, signal)
    rng = np.random.default_rng(9)
    a, b = (jnp.asarray(rng.normal(size=(B, T)), logp.dtype) for _ in range(2))
    return jnp.sum(a * logp + b * local)


def tiled(tile):
    def function(student, teacher, tokens_BT, signal):
        stats = token_stats(student, Target((teacher,)), tokens_BT, signal=signal, needs=("logp", "local"), tile=tile)
        return stats.logp_BT, stats.local_BT

    return function


def value_and_gradients(function, student, teacher, tokens_BT, signal):
    arrays = (student.hidden_BTD, student.unembed_DV)
    rebuild = lambda hidden, unembed: Head(hidden, unembed, student.softcap, student.valid_V)
    return jax.value_and_grad(lambda *a: loss(function, rebuild(*a), teacher, tokens_BT, signal), argnums=(0, 1))(*arrays)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("softcap, valid", [(None, None), (2.0, None), (None, 8)])
def test_tiles_equal_the_dense_form_with_gradients_in_float64(name, softcap, valid, float64):
    if name == "jsd" and valid:
        valid = None  # the plain oracle cannot subtract two infinities; entries are tested without mass in test_divergences
    student, teacher, tokens_BT = heads(jnp.float64, softcap, valid)
    expected, wanted = value_and_gradients(plain_loss, student, teacher, tokens_BT, SIGNALS[name])
    for tile in (1, 3, T, None):
        found, gradients = value_and_gradients(tiled(tile), student, teacher, tokens_BT, SIGNALS[name])
        offset = 0.0
        if SIGNALS[name].support == "sampled":
            offset = value_offset(student, teacher, tokens_BT)
        assert float(found) == pytest.approx(float(expected) + offset, abs=1e-10)
        for a, b in zip(gradients, wanted, strict=True):
            if SIGNALS[name].support == "full":
                np.testing.assert_allclose(a, b, atol=1e-11)


TOPK = {
    "renormalise": Signal("reverse_kl", "topk_union+token", k=3, student_temperature=0.7, teacher_temperature=1.4),
    "bucket": Signal("forward_kl", "topk_student", tail="bucket", k=3),
    "generalised": Signal("reverse_kl", "topk_teacher", tail="generalised", k=3, teacher_temperature=1.4),
    "none": Signal("reverse_kl", "topk_teacher+token", tail="none", k=3, student_temperature=0.7),
    "sampled_tail": Signal("reverse_kl", "topk_student", tail="sampled_tail", k=3),
}


def plain_topk(student: Head, teacher: Head, tokens_BT, signal: Signal):
    """(0, local) on a support, with jax's own differentiation of softmax: no custom rule, no tiles, the set from a full sort."""
    mask = lambda head, logits: logits if head.valid_V is None else jnp.where(head.valid_V[None, None], logits, -1e30)
    z = mask(student, dense(student).logits_BTV / signal.student_temperature)
    u = mask(teacher, dense(teacher).logits_BTV / signal.teacher_temperature)
    top = lambda x: jnp.argsort(jnp.argsort(-x, axis=-1), axis=-1) < signal.k
    drawn = jnp.arange(V)[None, None] == tokens_BT[..., None]
    name, _, plus = signal.support.partition("+")
    on = {"topk_teacher": top(u), "topk_student": top(z), "topk_union": top(z) | top(u)}[name] | (drawn & bool(plus))
    inside, outside = (lambda x: jnp.where(on, x, -1e30)), (lambda x: jnp.where(on, -1e30, x))
    logp, logq = jax.nn.log_softmax(z), jax.nn.log_softmax(u)
    if signal.tail == "renormalise":
        logp, logq = jax.nn.log_softmax(inside(z)), jax.nn.log_softmax(inside(u))
    if signal.kind == "forward_kl":
        logp, logq = logq, logp
    local = jnp.sum(jnp.where(on, jnp.exp(logp) * (logp - logq), 0), -1)
    if signal.tail == "bucket":
        rest_p, rest_q = (jax.nn.logsumexp(outside(x), axis=-1) for x in (logp, logq))
        local += jnp.exp(rest_p) * (rest_p - rest_q)
    if signal.tail in ("generalised", "sampled_tail"):
        local += jnp.sum(jnp.where(on, jnp.exp(logq) - jnp.exp(logp), 0), -1)
    if signal.tail == "sampled_tail":
        pick = lambda x: jnp.sum(jnp.where(drawn, x, 0), -1)
        local += jnp.where(jnp.any(on & drawn, -1), 0, jax.lax.stop_gradient(pick(logp) - pick(logq)) * pick(logp))
    return jnp.zeros((B, T)), local


@pytest.mark.parametrize("tail", TOPK)
def test_tiles_of_a_topk_equal_the_dense_form_with_gradients_in_float64(tail, float64):
    student, teacher, tokens_BT = heads(jnp.float64, softcap=2.0, valid=8)
    expected, wanted = value_and_gradients(plain_topk, student, teacher, tokens_BT, TOPK[tail])
    for tile in (2, T):
        local = lambda *a, tile=tile: (jnp.zeros((B, T)), tiled(tile)(*a)[1])
        found, gradients = value_and_gradients(local, student, teacher, tokens_BT, TOPK[tail])
        assert float(found) == pytest.approx(float(expected), abs=1e-10)
        for a, b in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


def value_offset(student, teacher, tokens_BT):
    """Sampled values are no divergence; only their gradient is promised, which test_divergences checks in expectation."""
    args = (student, teacher, tokens_BT, SIGNALS["sampled reverse_kl"])
    return float(loss(tiled(T), *args) - loss(plain_loss, *args))


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGNALS)
def test_tiles_equal_the_dense_form_in_float32(name):
    student, teacher, tokens_BT = heads()
    expected, wanted = value_and_gradients(tiled(T), student, teacher, tokens_BT, SIGNALS[name])
    for tile in (2, 5):
        found, gradients = value_and_gradients(tiled(tile), student, teacher, tokens_BT, SIGNALS[name])
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
        for a, b in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_sampled_gradient_is_the_log_ratio_times_the_score(float64):
    student, teacher, tokens_BT = heads(jnp.float64)
    signal = SIGNALS["sampled reverse_kl"]
    found = value_and_gradients(lambda *a: (jnp.zeros((B, T)), tiled(3)(*a)[1]), student, teacher, tokens_BT, signal)[1]
    wanted = value_and_gradients(lambda *a: (jnp.zeros((B, T)), plain_loss(*a)[1]), student, teacher, tokens_BT, signal)[1]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_all_statistics_equal_dense_numpy(float64):
    student, teacher, tokens_BT = heads(jnp.float64, valid=8)
    stats = token_stats(student, Target((teacher,)), tokens_BT, signal=Signal("reverse_kl"), needs=FULL, tile=2)
    softmax = lambda head: np.asarray(jax.nn.softmax(dense(head).logits_BTV[..., :8], axis=-1))
    p, q = softmax(student), softmax(teacher)
    pick = lambda x: np.take_along_axis(x, np.asarray(tokens_BT)[..., None], -1)[..., 0]
    expected = {
        "logp": np.log(pick(p)),
        "local": (p * np.log(p / q)).sum(-1),
        "target_logp": np.log(pick(q)),
        "kl": (p * np.log(p / q)).sum(-1),
        "entropy": -(p * np.log(p)).sum(-1),
        "target_entropy": -(q * np.log(q)).sum(-1),
    }
    for name in expected:
        np.testing.assert_allclose(getattr(stats, f"{name}_BT"), expected[name], atol=1e-12)


def laws(student, teacher, valid=8):
    return (np.asarray(jax.nn.softmax(dense(head).logits_BTV[..., :valid], axis=-1)) for head in (student, teacher))


def test_statistics_of_a_support_equal_loops(float64):
    student, teacher, tokens_BT = heads(jnp.float64, valid=8)
    needs, k = ("mass", "target_mass", "overlap"), 3
    found = {
        support: token_stats(student, Target((teacher,)), tokens_BT, signal=Signal("reverse_kl", support, k=k), needs=needs, tile=2)
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

    def ours(hidden, tile):
        head, needs = Head(hidden, student.unembed_DV, 2.0, student.valid_V), ("logp", "extra_logp", "extra_target_logp")
        stats = token_stats(head, Target((teacher,)), tokens_BT, signal=signal, needs=needs, extra_tokens_BTN=extra_BTN, tile=tile)
        return jnp.sum(weight_BTN * stats.extra_logp_BTN) + jnp.sum(stats.logp_BT), stats

    def plain(hidden):
        logp = log_softmax(Head(hidden, student.unembed_DV, 2.0))
        return jnp.sum(weight_BTN * pick(logp)) + jnp.sum(jnp.take_along_axis(logp, tokens_BT[..., None], axis=-1))

    for tile in (2, T):
        gradient, stats = jax.grad(ours, has_aux=True)(student.hidden_BTD, tile)
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


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "sampled reverse_kl"])
def test_equal_heads_give_exactly_0(name):
    student, _, tokens_BT = heads(scale=4.0)
    signal = Signal(SIGNALS[name].kind, SIGNALS[name].support, beta=SIGNALS[name].beta)
    local = lambda hidden: token_stats(
        Head(hidden, student.unembed_DV), Target((student,)), tokens_BT, signal=signal, needs=("local",), tile=3
    ).local_BT.sum()
    value, gradient = jax.value_and_grad(local)(student.hidden_BTD)
    assert float(value) == 0.0 and float(jnp.abs(gradient).max()) == 0.0


def test_padding_tokens_without_mass_make_no_nan():
    """Padding is no draw of the student; in float32 its probability may be exactly 0, and 0 * NaN would reach the gradient."""
    hidden_BTD = jnp.full((1, 1, 1), 200.0)
    unembed_DV = jnp.array([[1.0, -1.0]])
    teacher = Head(hidden_BTD, unembed_DV / 50)

    def masked_loss(hidden_BTD):
        stats = token_stats(
            Head(hidden_BTD, unembed_DV),
            Target((teacher,)),
            jnp.ones((1, 1), jnp.int32),
            signal=Signal("reverse_kl", "sampled"),
            needs=("local",),
        )
        return jnp.sum(0.0 * jnp.where(jnp.zeros((1, 1), bool), stats.local_BT, 0.0))

    assert float(jnp.abs(jax.grad(masked_loss)(hidden_BTD)).max()) == 0.0


def test_the_target_and_the_other_statistics_have_no_gradient():
    student, teacher, tokens_BT = heads()

    def total(teacher_hidden, student_hidden):
        stats = token_stats(
            Head(student_hidden, student.unembed_DV),
            Target((Head(teacher_hidden, teacher.unembed_DV),)),
            tokens_BT,
            signal=Signal("reverse_kl"),
            needs=FULL,
        )
        constants = stats.target_logp_BT + stats.kl_BT + stats.entropy_BT + stats.target_entropy_BT
        return jnp.sum(stats.local_BT), jnp.sum(constants)

    over_teacher = jax.grad(lambda t: total(t, student.hidden_BTD)[0])(teacher.hidden_BTD)
    over_student = jax.grad(lambda s: total(teacher.hidden_BTD, s)[1])(student.hidden_BTD)
    assert not np.asarray(over_teacher).any() and not np.asarray(over_student).any()


def test_vocabularies_padded_to_different_sizes():
    """Rows beyond the smaller vocabulary have no mass: the same numbers as with both cut to it."""
    student, teacher, tokens_BT = heads(valid=8)
    longer = Head(teacher.hidden_BTD, jnp.pad(teacher.unembed_DV, ((0, 0), (0, 5)), constant_values=9.0), None, jnp.arange(V + 5) < 8)
    cut = lambda head: Head(head.hidden_BTD, head.unembed_DV[:, :8])
    of = lambda s, t: token_stats(s, Target((t,)), tokens_BT, signal=Signal("reverse_kl"), needs=("local", "logp"))
    for a, b in (
        (of(student, longer), of(cut(student), cut(teacher))),
        (of(longer_student(student), teacher), of(cut(student), cut(teacher))),
    ):
        np.testing.assert_allclose(a.local_BT, b.local_BT, atol=1e-5)
        np.testing.assert_allclose(a.logp_BT, b.logp_BT, atol=1e-5)


def longer_student(head):
    return Head(head.hidden_BTD, jnp.pad(head.unembed_DV, ((0, 0), (0, 2))), None, jnp.arange(V + 2) < 8)


@pytest.mark.slow
def test_bfloat16_heads_sum_in_float32():
    student, teacher, tokens_BT = heads(jnp.bfloat16, vocab=400, scale=0.3)
    wide = lambda head: Head(head.hidden_BTD.astype(jnp.float32), head.unembed_DV.astype(jnp.float32))
    found, gradients = value_and_gradients(tiled(2), student, teacher, tokens_BT, SIGNALS["reverse_kl"])
    expected, wanted = value_and_gradients(tiled(2), wide(student), wide(teacher), tokens_BT, SIGNALS["reverse_kl"])
    assert found.dtype == jnp.float32 and float(found) == pytest.approx(float(expected), rel=1e-4)
    assert gradients[0].dtype == jnp.bfloat16
    for a, b in zip(gradients, wanted, strict=True):
        assert float(jnp.abs(a.astype(jnp.float32) - b).max()) < 0.02 * float(jnp.abs(b).max())


def sizes_in(jaxpr):
    """The sizes of all arrays that a program makes, inner programs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield int(np.prod(variable.aval.shape)) if hasattr(variable.aval, "shape") else 0
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from sizes_in(getattr(inner, "jaxpr", inner))


def test_no_array_holds_positions_times_vocabulary():
    rows, length, width, vocab, tile = 2, 64, 4, 1000, 8
    student = Head(jnp.zeros((rows, length, width)), jnp.zeros((width, vocab)))
    tokens_BT = jnp.zeros((rows, length), jnp.int32)

    def value(hidden, unembed):
        stats = token_stats(Head(hidden, unembed), Target((student,)), tokens_BT, signal=Signal("jsd", beta=0.5), needs=FULL, tile=tile)
        return jnp.sum(stats.local_BT + stats.logp_BT)

    program = jax.make_jaxpr(jax.value_and_grad(value, argnums=(0, 1)))(student.hidden_BTD, student.unembed_DV)
    largest = max(sizes_in(program.jaxpr))
    assert rows * tile * vocab <= largest < rows * length * vocab / 4


def test_the_default_tile_fits_its_bytes():
    assert heads_lib.fitting_tile(4, 10_000, 150_000) * 4 * 4 * 150_000 <= heads_lib.TILE_BYTES
    assert heads_lib.fitting_tile(64, 4096, 150_000) == 1  # never less than a position
    assert heads_lib.fitting_tile(2, 16, 100) == 16


def test_topk_equals_a_full_sort():
    student, _, _ = heads(valid=8)
    ids_BTK, logp_BTK, outside_BT = lib.topk(student, k=3, tile=2)
    logp = np.asarray(jax.nn.log_softmax(dense(student).logits_BTV[..., :8], axis=-1))
    order = np.argsort(-logp, axis=-1)[..., :3]
    np.testing.assert_array_equal(ids_BTK, order)
    np.testing.assert_allclose(logp_BTK, np.take_along_axis(logp, order, -1), atol=1e-6)
    np.testing.assert_allclose(np.exp(outside_BT), 1 - np.exp(logp_BTK).sum(-1), atol=1e-6)


def test_the_mass_outside_the_top_does_not_cancel():
    logits = jnp.array([[[20.0, 0.0, -1.0, -2.0]]])
    expected = np.log(np.exp([0.0, -1.0, -2.0]).sum()) - np.log(np.exp(np.array([20.0, 0.0, -1.0, -2.0])).sum())
    assert float(lib.topk(DenseHead(logits), k=1)[2][0, 0]) == pytest.approx(expected, rel=1e-5)
    assert np.isneginf(lib.topk(DenseHead(logits), k=4)[2]).all()
