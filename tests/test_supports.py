"""Every divergence on every support with every tail, values and gradients, against own float64 loops, enumeration and TRL."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import mostly_slow

from opd_jax.numerics import entries
from opd_jax.numerics.divergences import divergence
from opd_jax.numerics.signals import SUPPORTS, TAILS
from opd_jax.numerics.token_stats import DenseHead, Signal, Target, token_stats

V, K = 6, 2
KINDS = [(kind, beta) for kind, takes in entries.DIVERGENCES.items() for beta in ((0.0, 0.3, 1.0) if takes else (None,))]
FEW = [("reverse_kl", None), ("jsd", 0.3)]
TOPK = [support for support in SUPPORTS if support.startswith("topk")]
NO_TOKEN = [support for support in TOPK if not support.endswith("+token")]
EXACT = ("generalised", "renormalise", "bucket", "none")  # tails without a sampled token


def plain_entry(kind, beta):
    """What a divergence sums over the vocabulary, without linear parts, on probabilities."""
    mix = lambda a, b: beta * a + (1 - beta) * b
    log = lambda a, b: a * math.log(a / b)
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse_kl" if beta else "forward_kl"
    return {
        "reverse_kl": lambda p, q: log(p, q),
        "forward_kl": lambda p, q: log(q, p),
        "jsd": lambda p, q: beta * log(q, mix(q, p)) + (1 - beta) * log(p, mix(q, p)),
        "jsd_continuous": lambda p, q: (1 - beta) * log(q, mix(q, p)) + beta * log(p, mix(q, p)),
        "skew_forward_kl": lambda p, q: log(q, mix(q, p)),
        "skew_reverse_kl": lambda p, q: log(p, mix(p, q)),
    }[kind]


def derivative(f, p, q):
    h = 1e-5 * p
    return (f(p - 2 * h, q) - 8 * f(p - h, q) + 8 * f(p + h, q) - f(p + 2 * h, q)) / (12 * h)


def generalised_entry(kind, beta):
    """The plain entry less its tangent at p = q, the only linear part c (p - q) that makes an entry stationary there."""
    plain = plain_entry(kind, beta)
    slope = derivative(plain, 0.3, 0.3)
    return lambda p, q: plain(p, q) - slope * (p - q)


def softmax(logits):
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def support_of(student, teacher, support, token, k=K):
    best = lambda logits: set(sorted(range(len(logits)), key=lambda v: -logits[v])[:k])
    name, _, plus = support.partition("+")
    chosen = {"topk_teacher": best(teacher), "topk_student": best(student), "topk_union": best(student) | best(teacher)}[name]
    return chosen | ({token} if plus else set())


def loop(student, teacher, kind, beta, tail, chosen, token):
    """The loss of one token on the support `chosen`, entry by entry."""
    p, q = softmax(student), softmax(teacher)
    plain, generalised = plain_entry(kind, beta), generalised_entry(kind, beta)
    inside = lambda law: sum(law[v] for v in chosen)
    if tail == "renormalise":
        return sum(plain(p[v] / inside(p), q[v] / inside(q)) for v in chosen)
    if tail == "bucket":
        rest = plain(1 - inside(p), 1 - inside(q)) if len(chosen) < len(p) else 0.0
        return sum(plain(p[v], q[v]) for v in chosen) + rest
    head = sum((generalised if tail in ("generalised", "sampled_tail") else plain)(p[v], q[v]) for v in chosen)
    if tail in ("generalised", "none") or token in chosen:
        return head
    weight = derivative(generalised, p[token], q[token]) if tail == "sampled_tail" else math.log(p[token] / q[token])
    return head + weight * math.log(p[token])


def logits(seed, scale=1.5):
    """V rows of one token; every test has these shapes, because each shape is compiled anew."""
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.normal(size=(2, V, 1, V))
    return student, teacher, rng.integers(0, V, (V, 1))


def value_and_gradient(student, teacher, tokens_BT, **arguments):
    """(values [B], gradients [B, V]) of divergence()."""

    def loss(z):
        values = divergence(z, jnp.asarray(teacher), tokens_BT=jnp.asarray(tokens_BT), **arguments)
        return values.sum(), values

    (_, values), gradients = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(student))
    return values[:, 0], gradients[:, 0]


def mean_over_draws(student, teacher, **arguments):
    """(expectation over y ~ p of the gradient at one position [V], gradient of each y [V, V])."""
    every = lambda z: np.broadcast_to(z[:1], (V, 1, V))
    _, gradients = value_and_gradient(every(student), every(teacher), np.arange(V)[:, None], **arguments)
    return np.asarray(softmax(student[0, 0])) @ gradients, np.asarray(gradients)


@pytest.mark.parametrize("kind, beta", mostly_slow(KINDS, FEW.__contains__))
def test_values_and_gradients_of_all_supports_and_tails_equal_loops_in_float64(kind, beta, float64):
    """Gradients by finite differences of the loops with the support held fixed; those of the sampled tails are tested in expectation."""
    student, teacher, tokens = logits(0)
    for support in TOPK:
        for tail in TAILS if kind == "reverse_kl" else TAILS[:-1]:
            values, gradients = value_and_gradient(student, teacher, tokens, kind=kind, beta=beta, support=support, tail=tail, k=K)
            for b in range(2):
                z, u, y = student[b, 0], teacher[b, 0], int(tokens[b, 0])
                of = functools.partial(loop, teacher=u, kind=kind, beta=beta, tail=tail, chosen=support_of(z, u, support, y), token=y)
                assert float(values[b]) == pytest.approx(of(z), rel=1e-9, abs=1e-9), (support, tail)
                if tail in EXACT:
                    step = 1e-5 * np.eye(V)
                    wanted = [(of(z + step[v]) - of(z - step[v])) / 2e-5 for v in range(V)]
                    np.testing.assert_allclose(gradients[b], wanted, atol=1e-8, err_msg=f"{support} {tail}")


@pytest.mark.parametrize("kind, beta", KINDS)
def test_the_linear_part_makes_an_entry_stationary_where_the_laws_agree(kind, beta):
    assert entries.linear(kind, beta) == pytest.approx(-derivative(plain_entry(kind, beta), 0.3, 0.3), abs=1e-9)


@pytest.mark.parametrize("kind, beta", mostly_slow(KINDS, FEW.__contains__))
@pytest.mark.parametrize("support", NO_TOKEN)
def test_the_sampled_tail_has_the_expected_gradient_of_the_whole_vocabulary(support, kind, beta, float64):
    student, teacher, tokens = logits(1)
    _, full = value_and_gradient(student, teacher, tokens, kind=kind, beta=beta)
    found, _ = mean_over_draws(student, teacher, kind=kind, beta=beta, support=support, tail="sampled_tail", k=K)
    np.testing.assert_allclose(found, full[0], atol=1e-13)


@pytest.mark.parametrize("support", NO_TOKEN)
def test_the_published_sampled_tail_is_off_by_the_gradient_of_the_mass_on_the_support(support, float64):
    student, teacher, tokens = logits(2)
    _, full = value_and_gradient(student, teacher, tokens, kind="reverse_kl")
    found, _ = mean_over_draws(student, teacher, kind="reverse_kl", support=support, tail="sampled_tail_published", k=K)
    p, chosen = np.asarray(softmax(student[0, 0])), support_of(student[0, 0], teacher[0, 0], support, 0)
    inside = np.isin(np.arange(V), list(chosen))
    mass_gradient = p * (inside - p[inside].sum())
    np.testing.assert_allclose(found - full[0], mass_gradient, atol=1e-13)
    assert np.linalg.norm(mass_gradient) > 0.05


def plus_one_form(student, teacher, chosen):
    """Gradients [V, V] by y of: sum over S of p log(p/q), and 1[y outside] sg(log p/q(y) + 1) log p(y)."""
    u = jax.nn.log_softmax(jnp.asarray(teacher))

    def loss(z, y):
        logp = jax.nn.log_softmax(z)
        inside = jnp.isin(jnp.arange(V), jnp.asarray(sorted(chosen)))
        head = jnp.sum(jnp.where(inside, jnp.exp(logp) * (logp - u), 0))
        return head + jnp.where(inside[y], 0, jax.lax.stop_gradient(logp[y] - u[y] + 1) * logp[y])

    return np.asarray(jax.vmap(jax.grad(loss), (None, 0))(jnp.asarray(student), jnp.arange(V)))


@pytest.mark.parametrize("seed", range(3))
def test_the_form_with_plus_1_has_the_same_expectation_more_variance_and_is_not_0_at_equal_laws(seed, float64):
    student, teacher, _ = logits(10 + seed)
    ours = functools.partial(mean_over_draws, kind="reverse_kl", support="topk_teacher", tail="sampled_tail", k=K)
    chosen = support_of(student[0, 0], teacher[0, 0], "topk_teacher", 0)
    p = np.asarray(softmax(student[0, 0]))
    trace = lambda gradients: p @ ((gradients - p @ gradients) ** 2).sum(-1)
    mean, gradients = ours(student, teacher)
    other = plus_one_form(student[0, 0], teacher[0, 0], chosen)
    np.testing.assert_allclose(p @ other, mean, atol=1e-13)
    assert trace(other) > 1.1 * trace(gradients) > 0
    same, other_same = ours(student, student)[1], plus_one_form(student[0, 0], student[0, 0], chosen)
    assert np.abs(same).max() == 0.0
    np.testing.assert_allclose(p @ other_same, 0, atol=1e-13)
    assert np.abs(other_same).max() > 0.1


def test_the_head_without_its_linear_part_has_its_minimum_at_q_over_e(float64):
    """It pushes at least 1 - 1/e of the mass out of the support; the generalised head has its minimum at q."""
    _, teacher, tokens = logits(3)
    q = np.asarray(softmax(teacher[0, 0]))
    inside = np.isin(np.arange(V), list(support_of(teacher[0, 0], teacher[0, 0], "topk_teacher", 0)))
    for tail, ratio in (("none", 1 / math.e), ("generalised", 1.0)):
        arguments = {"kind": "reverse_kl", "support": "topk_teacher", "tail": tail, "k": K}
        stationary = np.log(np.where(inside, ratio * q, q * (1 - ratio * q[inside].sum()) / q[~inside].sum()))
        value, gradient = value_and_gradient(np.tile(stationary, (V, 1, 1)), np.tile(teacher[:1], (V, 1, 1)), tokens, **arguments)
        np.testing.assert_allclose(gradient, 0, atol=1e-14)
        assert float(value[0]) == pytest.approx(-q[inside].sum() / math.e if tail == "none" else 0, abs=1e-14)

        loss = jax.jit(jax.value_and_grad(lambda z, a=arguments: divergence(z[None, None], jnp.asarray(teacher[:1]), **a)[0, 0]))
        numpy = lambda z, loss=loss: tuple(np.asarray(x, np.float64) for x in loss(z))
        found = scipy.optimize.minimize(numpy, np.zeros(V), jac=True, method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(np.asarray(softmax(found.x))[inside] / q[inside], ratio, atol=1e-5)


@pytest.mark.parametrize("kind, beta", mostly_slow(KINDS, FEW.__contains__))
def test_equal_laws_give_exactly_0_with_no_gradient_but_for_the_plain_head(kind, beta):
    """To the last bit in float32; the sampled tail for each single draw."""
    student, _, tokens = logits(4, scale=15.0)
    student = student.astype(np.float32)
    for support in TOPK:
        for tail in ("generalised", "renormalise", "bucket", "sampled_tail"):
            value, gradient = value_and_gradient(student, student, tokens, kind=kind, beta=beta, support=support, tail=tail, k=K)
            assert not np.asarray(value).any() and not np.asarray(gradient).any(), (support, tail)
    mild = logits(4)[0].astype(np.float32)
    _, gradient = value_and_gradient(mild, mild, tokens, kind=kind, beta=beta, support="topk_teacher", tail="none", k=K)
    assert (float(jnp.linalg.norm(gradient)) > 0.05) == (entries.linear(kind, beta) != 0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail, add", [("bucket", True), ("renormalise", False)])
def test_student_topk_is_trls_self_distillation_loss(alpha, tail, add, float64):
    torch = pytest.importorskip("torch")
    from trl.experimental.sdpo import loss_utils

    student, teacher, tokens = logits(5)
    values, gradients = value_and_gradient(student, teacher, tokens, kind="jsd", beta=alpha, support="topk_student", tail=tail, k=K)
    leaf = torch.tensor(student, requires_grad=True)
    theirs = loss_utils.compute_topk_self_distillation_loss(
        leaf, torch.tensor(teacher), distillation_topk=K, distillation_alpha=alpha, distillation_add_tail=add
    )
    theirs.sum().backward()
    # Their interior mixtures take the logs of their weights in float32.
    np.testing.assert_allclose(values, theirs.detach().numpy()[:, 0], atol=1e-7)
    np.testing.assert_allclose(gradients, leaf.grad.numpy()[:, 0], atol=1e-7)


def test_sampled_support_is_trls_sampled_token_loss(float64):
    torch = pytest.importorskip("torch")
    from trl.experimental.sdpo import loss_utils

    student, teacher, tokens = logits(6)
    values, gradients = value_and_gradient(student, teacher, tokens, kind="reverse_kl", support="sampled")
    leaf = torch.tensor(student, requires_grad=True)
    theirs = loss_utils.compute_sampled_token_self_distillation_loss(
        leaf, torch.tensor(teacher), torch.tensor(tokens), distillation_alpha=1.0
    )
    theirs.sum().backward()
    np.testing.assert_allclose(values, theirs.detach().numpy()[:, 0], atol=1e-12)
    np.testing.assert_allclose(gradients, leaf.grad.numpy()[:, 0], atol=1e-12)


@pytest.mark.parametrize("kind, beta", mostly_slow(KINDS, FEW.__contains__))
def test_k_of_the_vocabulary_is_full_to_the_last_bit(kind, beta):
    """Whatever the tail; also where only padding rows are left outside, whose number is not known when the program is made."""
    student, teacher, tokens = (np.asarray(x) for x in logits(7))
    wide = lambda z: DenseHead(jnp.asarray(np.concatenate([z, z + 1], -1), jnp.float32), jnp.arange(2 * V) < V)

    def of(z, signal):
        stats = token_stats(
            DenseHead(z, wide(student).valid_V), Target((wide(teacher),)), jnp.asarray(tokens), signal=signal, needs=("local",)
        )
        return stats.local_BT.sum()

    both = lambda signal: jax.value_and_grad(of)(wide(student).logits_BTV, signal)
    wanted = both(Signal(kind, beta=beta))
    for support in ("topk_teacher", "topk_union+token"):
        for tail in TAILS if kind == "reverse_kl" else TAILS[:-1]:
            for k in (V, V + 1, 2 * V) if kind == "reverse_kl" else (V, 2 * V):
                found = both(Signal(kind, support, tail=tail, k=k, beta=beta))
                for a, b in zip(found, wanted, strict=True):
                    np.testing.assert_array_equal(a, b, err_msg=f"{support} {tail} {k}")


def test_the_renormalised_gradient_is_the_published_one_and_exactly_0_outside():
    """d loss / dz_v = p^(v) (log p^/q^(v) - loss) on the support."""
    student, teacher, tokens = logits(8)
    values, gradients = value_and_gradient(
        student.astype(np.float32), teacher.astype(np.float32), tokens, kind="reverse_kl", support="topk_teacher", k=3
    )
    chosen = sorted(support_of(student[0, 0], teacher[0, 0], "topk_teacher", 0, k=3))
    p, q = (np.asarray(softmax(z[0, 0][chosen])) for z in (student, teacher))
    np.testing.assert_allclose(gradients[0][np.asarray(chosen)], p * (np.log(p / q) - float(values[0])), atol=1e-6)
    assert not np.asarray(gradients[0])[np.setdiff1d(np.arange(V), chosen)].any()


def test_what_is_in_two_sets_counts_once(float64):
    """Teacher and student agree on token 0, the student's second is 1 and the teacher's 2: the union has three members."""
    student, teacher = (np.tile(z, (V, 1, 1)) for z in ([4.0, 3.0, 0.0, 1.0, 0.5, 0.2], [4.0, 0.0, 3.0, 1.0, 0.5, 0.2]))
    of = lambda support, y: float(
        value_and_gradient(student, teacher, np.full((V, 1), y), kind="reverse_kl", support=support, tail="generalised", k=2)[0][0]
    )
    entry, p, q = generalised_entry("reverse_kl", None), softmax(student[0, 0]), softmax(teacher[0, 0])
    assert of("topk_union", 0) == pytest.approx(sum(entry(p[v], q[v]) for v in (0, 1, 2)), abs=1e-9)
    for y in (0, 1, 2):
        assert of("topk_union+token", y) == of("topk_union", y)
    assert of("topk_union+token", 4) == pytest.approx(of("topk_union", 4) + entry(p[4], q[4]), abs=1e-9)


def test_equal_logits_leave_exactly_k_members():
    flat = jnp.zeros((1, 1, V))
    for support, members in (("topk_teacher", K), ("topk_union", K), ("topk_student+token", K + 1)):
        stats = token_stats(
            DenseHead(flat), Target((DenseHead(flat),)), jnp.full((1, 1), V - 1), signal=Signal("reverse_kl", support, k=K), needs=("mass",)
        )
        assert float(stats.mass_BT[0, 0]) == pytest.approx(members / V)


def test_a_bucket_is_at_most_the_full_divergence_and_a_generalised_head_too(float64):
    student, teacher, tokens = logits(9)
    for kind, beta in KINDS:
        full, _ = value_and_gradient(student, teacher, tokens, kind=kind, beta=beta)
        for tail in ("bucket", "generalised"):
            part, _ = value_and_gradient(student, teacher, tokens, kind=kind, beta=beta, support="topk_student", tail=tail, k=K)
            assert (np.asarray(part) <= np.asarray(full) + 1e-12).all() and (np.asarray(part) >= -1e-12).all()


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 10.0, 100.0]),
    st.sampled_from(KINDS),
    st.sampled_from(TOPK),
    st.sampled_from(TAILS),
    st.integers(1, 4),
)
@settings(max_examples=120, deadline=None)
def test_never_nan_also_where_tokens_have_no_mass(seed, scale, case, support, tail, k):
    student, teacher, tokens = (x.astype(np.float32) for x in logits(seed, scale))
    rng = np.random.default_rng(seed)
    student[rng.random(student.shape) < 0.4] = -np.inf
    teacher[rng.random(student.shape) < 0.4] = -np.inf
    # Mass where the teacher has none makes a reverse KL infinite, and then no gradient exists.
    student[np.isneginf(teacher)] = -np.inf
    student[..., 0], teacher[..., 0] = 1.0, -2.0
    kind, beta = case if tail != "sampled_tail_published" else ("reverse_kl", None)
    arguments = {"kind": kind, "beta": beta, "support": support, "tail": tail, "k": k}
    value, gradient = value_and_gradient(student, teacher, tokens.astype(int), **arguments)
    assert not np.isnan(np.asarray(value)).any() and np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("tail", TAILS)
def test_what_the_teacher_lacks_outside_the_support_does_not_matter(tail):
    """A served teacher knows its top alone: the rest may stand there as -inf, but for a bucket, which counts it."""
    student, teacher, _ = (x.astype(np.float32) for x in logits(12))
    teacher = np.where(teacher < np.sort(teacher)[..., -K, None], -np.inf, teacher)
    inside = np.argmax(teacher, axis=-1)
    value, gradient = value_and_gradient(student, teacher, inside, kind="reverse_kl", support="topk_teacher", tail=tail, k=K)
    assert np.isfinite(np.asarray(gradient)).all() == np.isfinite(np.asarray(value)).all() == (tail != "bucket")
