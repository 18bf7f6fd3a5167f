"""The tiled loss path equals the dense one, values and gradients, and never holds [B, T, V]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import mostly_slow

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
    "top1_cross_entropy": Signal("top1_cross_entropy"),
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
        "top1_cross_entropy": lambda: -jnp.sum(jnp.where(logq == logq.max(-1, keepdims=True), logp, 0.0), -1),
    }[signal.kind]()
    if signal.support == "sampled":
        local = jax.lax.stop_gradient(pick(logp) - pick(logq)) * pick(logp)
    return pick(logp), local


def loss(function, student, teacher, tokens_BT, signal):
    logp, local = function(student, teacher, tokens_BT, signal)
    rng = np.random.default_rng(9)
    a, b = (jnp.asarray(rng.normal(size=(B, T)), logp.dtype) for _ in range(2))
    return jnp.sum(a * logp + b * local)


def tiled(tile, columns=None):
    def function(student, teacher, tokens_BT, signal):
        needs, tiles = ("logp", "local"), {"tile": tile, "tile_columns": columns}
        stats = token_stats(student, Target((teacher,)), tokens_BT, signal=signal, needs=needs, **tiles)
        return stats.logp_BT, stats.local_BT

    return function


def value_and_gradients(function, student, teacher, tokens_BT, signal):
    arrays = (student.hidden_BTD, student.unembed_DV)
    rebuild = lambda hidden, unembed: Head(hidden, unembed, student.softcap, student.valid_V)
    value = lambda *a: loss(function, rebuild(*a), teacher, tokens_BT, signal)
    return jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(*arrays)  # at once: one by one its operations compile for longer


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("softcap, valid", mostly_slow([(None, None), (2.0, None), (None, 8)], (None, None).__eq__))
def test_tiles_equal_the_dense_form_with_gradients_in_float64(name, softcap, valid, float64):
    if name == "jsd" and valid:
        valid = None  # the plain oracle cannot subtract two infinities; entries are tested without mass in test_divergences
    student, teacher, tokens_BT = heads(jnp.float64, softcap, valid)
    expected, wanted = value_and_gradients(plain_loss, student, teacher, tokens_BT, SIGNALS[name])
    for tile in ((1,), (3,), (None,), (3, 4), (T, V)):
        found, gradients = value_and_gradients(tiled(*tile), student, teacher, tokens_BT, SIGNALS[name])
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
    for tile in ((2,), (T,), (2, 3), (T, V)):
        local = lambda *a, tile=tile: (jnp.zeros((B, T)), tiled(*tile)(*a)[1])
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
    for tile in ((2,), (5,), (2, 4)):
        found, gradients = value_and_gradients(tiled(*tile), student, teacher, tokens_BT, SIGNALS[name])
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


@pytest.mark.parametrize("columns", [None, 4])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "sampled reverse_kl"])
def test_equal_heads_give_exactly_0(name, columns):
    student, _, tokens_BT = heads(scale=4.0)
    signal = Signal(SIGNALS[name].kind, SIGNALS[name].support, beta=SIGNALS[name].beta)
    local = lambda hidden: token_stats(
        Head(hidden, student.unembed_DV), Target((student,)), tokens_BT, signal=signal, needs=("local",), tile=3, tile_columns=columns
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


@pytest.mark.parametrize("columns", [None, 4])
def test_tiles_that_nobody_looks_at_are_not_made(columns, float64):
    """With rubbish in them values and gradients elsewhere are what they are without a mask: NaN times 0 would not be 0."""
    student, teacher, tokens_BT = heads(jnp.float64)
    mask_BT = jnp.arange(T)[None, :] < jnp.array([[0], [2], [4]])  # of the tiles of 3 positions the last one is not looked at
    weights_BT = jnp.where(mask_BT, jnp.asarray(np.random.default_rng(1).normal(size=(B, T))), 0)

    def value(hidden_BTD, unembed_DV, mask_BT):
        settings = {"signal": Signal("reverse_kl"), "needs": ("logp", "local", "kl"), "tile": 3, "tile_columns": columns}
        stats = token_stats(Head(hidden_BTD, unembed_DV), Target((teacher,)), tokens_BT, mask_BT=mask_BT, **settings)
        used = [jnp.where(weights_BT != 0, x_BT, 0) for x_BT in (stats.logp_BT, stats.local_BT)]
        return jnp.sum(weights_BT * (used[0] + 2 * used[1])), stats

    both = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
    (total, stats), gradients = both(student.hidden_BTD, student.unembed_DV, None)
    (found, skipped), of_skipped = both(student.hidden_BTD.at[:, 6:].set(jnp.nan), student.unembed_DV, mask_BT)
    assert found == total
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-15), of_skipped, gradients)
    for name in ("logp_BT", "local_BT", "kl_BT"):
        np.testing.assert_array_equal(getattr(skipped, name)[:, :6], getattr(stats, name)[:, :6])
        assert not np.any(getattr(skipped, name)[:, 6:])


def test_the_default_tile_fits_its_bytes():
    whole = lambda *shape: heads_lib.tiling(*shape, columns=False)
    assert whole(4, 10_000, 150_000).positions * 4 * 4 * 150_000 <= heads_lib.TILE_BYTES
    assert whole(64, 4096, 150_000) == (1, None)  # never less than a position
    assert whole(2, 16, 100) == (16, None)


def test_large_vocabularies_are_cut_where_their_statistics_can_be():
    for rows, length, vocab in ((32, 128, 152_064), (4, 1024, 152_064), (512, 1024, 152_064), (4, 4096, 50_257)):
        tiling = heads_lib.tiling(rows, length, vocab, columns=True)
        assert rows * tiling.positions * tiling.columns * 4 <= heads_lib.COLUMN_TILE_BYTES and tiling.positions <= length
    # Enough rows of whole vocabularies fit, or there are no more.
    assert heads_lib.tiling(32, 128, 8192, columns=True) == (64, None)
    assert heads_lib.tiling(1, 8, 152_064, columns=True) == (8, None)


@pytest.mark.parametrize("columns", [None, 3])
def test_topk_equals_a_full_sort(columns):
    student, _, _ = heads(valid=8)
    ids_BTK, logp_BTK, outside_BT = lib.topk(student, k=3, tile=2, tile_columns=columns)
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
