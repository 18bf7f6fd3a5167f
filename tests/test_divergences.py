"""divergence() and the per-entry functions against TRL, SciPy and NumPy float64, values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax.numerics import entries
from opd_jax.numerics.divergences import divergence
from opd_jax.numerics.token_stats import Signal

BETA = 0.3
CASES = [(kind, beta) for kind, takes in entries.DIVERGENCES.items() for beta in ((0.0, 0.2, 0.5, 0.9, 1.0) if takes else (None,))]


def softmax64(logits, temperature=1.0):
    return scipy.special.softmax(np.asarray(logits, np.float64) / temperature, axis=-1)


def numpy_divergence(p, q, kind, beta):
    """The definitions, from probabilities, in float64."""
    kl = lambda a, b: scipy.special.rel_entr(a, b).sum(-1)
    if kind in ("jsd", "jsd_continuous") and beta in (0.0, 1.0):
        return kl(p, q) if beta else kl(q, p)
    mixture = None if beta is None else beta * q + (1 - beta) * p
    return {
        "reverse_kl": lambda: kl(p, q),
        "forward_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(q, mixture) + (1 - beta) * kl(p, mixture),
        "jsd_continuous": lambda: (1 - beta) * kl(q, mixture) + beta * kl(p, mixture),
        "skew_forward_kl": lambda: kl(q, mixture),
        "skew_reverse_kl": lambda: kl(p, beta * p + (1 - beta) * q),
    }[kind]()


def logits(seed, shape=(2, 3, 7), scale=3.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) * scale, rng.normal(size=shape) * scale


@pytest.mark.parametrize("kind, beta", CASES)
def test_values_equal_numpy_in_float64(kind, beta, float64):
    student, teacher = logits(0)
    found = divergence(jnp.asarray(student), jnp.asarray(teacher), kind=kind, beta=beta, student_temperature=0.7, teacher_temperature=1.3)
    np.testing.assert_allclose(found, numpy_divergence(softmax64(student, 0.7), softmax64(teacher, 1.3), kind, beta), atol=1e-12)


@pytest.mark.parametrize("kind, beta", CASES)
def test_gradients_equal_finite_differences(kind, beta, float64):
    student, teacher = logits(1, shape=(1, 1, 5))
    gradient = jax.grad(lambda z: divergence(z, jnp.asarray(teacher), kind=kind, beta=beta, student_temperature=0.8).sum())
    found, step = np.asarray(gradient(jnp.asarray(student))), 1e-6
    for v in range(5):
        shift = np.zeros_like(student)
        shift[0, 0, v] = step
        value = lambda z: numpy_divergence(softmax64(z, 0.8), softmax64(teacher), kind, beta).sum()
        assert found[0, 0, v] == pytest.approx((value(student + shift) - value(student - shift)) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("kind, beta", CASES)
def test_equal_laws_give_exactly_0_with_no_gradient(kind, beta):
    """In float32, to the last bit, as DESIGN's stationarity at the teacher demands; also with logits far apart."""
    student = jnp.asarray(logits(2, scale=20.0)[0], jnp.float32)
    loss = lambda z: divergence(z, student, kind=kind, beta=beta).sum()
    assert float(loss(student)) == 0.0
    assert float(jnp.abs(jax.grad(loss)(student)).max()) == 0.0
    if not (kind.startswith("skew") and beta == 1.0):
        assert float(jnp.abs(jax.grad(loss)(student + jnp.asarray(logits(3)[1], jnp.float32))).max()) > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jsd_is_trls_generalized_jsd(beta, temperature):
    torch = pytest.importorskip("torch")
    from trl.experimental.gkd import GKDTrainer

    student, teacher = logits(4)
    ours = divergence(
        jnp.asarray(student, jnp.float32),
        jnp.asarray(teacher, jnp.float32),
        kind="jsd",
        beta=beta,
        student_temperature=temperature,
        teacher_temperature=temperature,
    )
    ours_gradient = jax.grad(
        lambda z: divergence(
            z, jnp.asarray(teacher, jnp.float32), kind="jsd", beta=beta, student_temperature=temperature, teacher_temperature=temperature
        ).sum()
    )(jnp.asarray(student, jnp.float32))
    leaf = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    theirs = GKDTrainer.generalized_jsd_loss(
        leaf, torch.tensor(teacher, dtype=torch.float32), beta=beta, temperature=temperature, reduction="sum"
    )
    theirs.backward()
    assert float(ours.sum()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    np.testing.assert_allclose(ours_gradient, leaf.grad.numpy(), atol=1e-5)


@given(
    st.lists(st.floats(-40, 40), min_size=4, max_size=4),
    st.lists(st.floats(-40, 40), min_size=4, max_size=4),
    st.sampled_from(CASES),
)
@settings(max_examples=60, deadline=None)
def test_entries_are_never_negative_and_never_nan(a, b, case):
    kind, beta = case
    logp, logq = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (a, b))
    value, slope = entries.entry(kind, beta)(logp, logq)
    assert float(value.min()) >= -1e-6
    assert np.isfinite(np.asarray(slope)).all()


@pytest.mark.parametrize("kind, beta", [case for case in CASES if case[0] != "reverse_kl"])
def test_tokens_without_mass_contribute_no_nan(kind, beta):
    student = jnp.array([[[0.0, 1.0, -jnp.inf, -jnp.inf]]])
    teacher = jnp.array([[[0.5, -jnp.inf, 0.2, -jnp.inf]]])
    value = divergence(student, teacher, kind=kind, beta=beta)
    assert not np.isnan(np.asarray(value)).any()


@pytest.mark.parametrize("kind, beta", CASES)
def test_sampled_support_has_the_expected_gradient_of_the_full_one(kind, beta, float64):
    """Sum over tokens y of p(y) times the gradient of the sampled form at y, with p held fixed."""
    student, teacher = (jnp.asarray(x) for x in logits(5, shape=(1, 1, 6)))
    full = jax.grad(lambda z: divergence(z, teacher, kind=kind, beta=beta).sum())(student)
    p = softmax64(student)[0, 0]
    expected = sum(
        p[y]
        * jax.grad(lambda z, y=y: divergence(z, teacher, kind=kind, beta=beta, support="sampled", tokens_BT=jnp.full((1, 1), y)).sum())(
            student
        )
        for y in range(6)
    )
    np.testing.assert_allclose(expected, full, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperatures_divide_logits(temperature, float64):
    student, teacher = (jnp.asarray(x) for x in logits(6))
    both = functools.partial(divergence, kind="reverse_kl")
    np.testing.assert_allclose(
        both(student, teacher, student_temperature=temperature, teacher_temperature=2 * temperature),
        both(student / temperature, teacher / (2 * temperature)),
        atol=1e-12,
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"kind": "kl"}, "kind = 'kl' is not known; valid: reverse_kl"),
        ({"kind": "nll"}, "'nll' is not known"),
        (
            {"kind": "reverse_kl", "support": "some"},
            "signal.support = 'some' is not known; valid: full, sampled, topk_teacher, topk_student, topk_union, topk_teacher.token, "
            "topk_student.token, topk_union.token$",
        ),
        (
            {"kind": "reverse_kl", "support": "topk_union", "k": 2, "tail": "some"},
            "signal.tail = 'some' is not known; valid: generalised, sampled_tail, renormalise, bucket, none, sampled_tail_published$",
        ),
        (
            {"kind": "reverse_kl", "k": 4},
            r"signal.k = 4 is for top-k supports \(topk_teacher, topk_student, topk_union\), not for signal.support = 'full'$",
        ),
        ({"kind": "reverse_kl", "support": "sampled", "k": 4}, "signal.k = 4 is for top-k supports"),
        (
            {"kind": "reverse_kl", "tail": "bucket"},
            "signal.tail = 'bucket' is for top-k supports .*; with signal.support = 'full' leave it at 'renormalise'$",
        ),
        (
            {"kind": "reverse_kl", "support": "topk_teacher"},
            "signal.k = None must be a whole number of at least 1 for signal.support = 'topk_teacher'$",
        ),
        ({"kind": "reverse_kl", "support": "topk_union+token", "k": 0}, "signal.k = 0 must be a whole number of at least 1"),
        ({"kind": "reverse_kl", "support": "topk_student", "k": 2.0}, "signal.k = 2.0 must be a whole number of at least 1"),
        (
            {"kind": "forward_kl", "support": "topk_teacher", "k": 2, "tail": "sampled_tail_published"},
            "signal.tail = 'sampled_tail_published' is for signal.divergence = 'reverse_kl', not for 'forward_kl'; use 'sampled_tail'$",
        ),
        (
            {"kind": "reverse_kl", "support": "sampled"},
            "^support = 'sampled' needs tokens_BT, the tokens that the student drew$",
        ),
        ({"kind": "reverse_kl", "support": "topk_teacher+token", "k": 2}, "^support = 'topk_teacher.token' needs tokens_BT"),
        ({"kind": "jsd", "beta": 0.5, "support": "topk_teacher", "k": 2, "tail": "sampled_tail"}, "^tail = 'sampled_tail' needs tokens_BT"),
        (
            {"kind": "reverse_kl", "support": "topk_teacher", "k": 2, "tail": "sampled_tail_published"},
            "^tail = 'sampled_tail_published' needs tokens_BT",
        ),
        ({"kind": "jsd"}, "signal.beta = None must be between 0 and 1"),
        ({"kind": "jsd", "beta": 1e-5}, "makes signal.divergence = 'jsd' vanish"),
        ({"kind": "reverse_kl", "student_temperature": 0.0}, "student_temperature = 0.0 must be above 0"),
    ],
)
def test_refusals(arguments, words):
    """Never a number for a question that was not asked."""
    with pytest.raises(ValueError, match=words):
        divergence(jnp.zeros((1, 1, 3)), jnp.zeros((1, 1, 3)), **arguments)


@pytest.mark.parametrize("kind", entries.LOSSES)
@pytest.mark.parametrize("support", ["sampled", "topk_teacher", "topk_union+token"])
def test_losses_that_are_no_divergences_take_the_whole_vocabulary_alone(kind, support):
    words = f"^signal.support = '{re.escape(support)}' is for divergences, not for signal.divergence = '{kind}'; use 'full'$"
    with pytest.raises(ValueError, match=words):
        Signal(kind, support, k=2 if support.startswith("topk") else None)


def test_logits_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(1, 5, 7\) and \(1, 6, 9\), both must be"):
        divergence(jnp.zeros((1, 5, 7)), jnp.zeros((1, 6, 9)), kind="reverse_kl")
    with pytest.raises(ValueError, match="both must be .B, T, V."):
        divergence(jnp.zeros((5, 7)), jnp.zeros((5, 7)), kind="reverse_kl")
