"""Clipped entries of divergences: own float64 loops, PyTorch, and what clipping does to the minimum."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_supports import FEW, KINDS, V, generalised_entry, logits, plain_entry, softmax, support_of, value_and_gradient

from opd_jax import claim, objective
from opd_jax import config as config_lib
from opd_jax.numerics import entries
from opd_jax.numerics.divergences import divergence
from opd_jax.numerics.signals import Signal

CLIP = 0.05


def cut_entry(kind, beta):
    """min(f, clip): of forward_kl, under any of its names, the plain term."""
    forward = kind == "forward_kl" or (kind in ("jsd", "jsd_continuous", "skew_forward_kl") and beta == 0)
    entry = (plain_entry if forward else generalised_entry)(kind, beta)
    return lambda p, q: min(entry(p, q), CLIP)


def loop(student, teacher, kind, beta, tail, chosen):
    """The clipped loss of one token. `chosen` is the support; all: full."""
    p, q = softmax(student), softmax(teacher)
    inside = lambda law: sum(law[v] for v in chosen)
    pairs = [(p[v], q[v]) for v in chosen]
    if tail == "renormalise":
        pairs = [(a / inside(p), b / inside(q)) for a, b in pairs]
    elif len(chosen) < len(p):
        pairs.append((1 - inside(p), 1 - inside(q)))
    return sum(cut_entry(kind, beta)(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_values_and_gradients_equal_loops(kind, beta, float64):
    student, teacher, tokens = logits(0)
    cut = 0
    for support, tail, k in (("full", "renormalise", None), ("topk_teacher", "renormalise", 4), ("topk_student", "bucket", 3)):
        if support != "full" and (kind, beta) not in [*FEW, ("forward_kl", None)]:
            continue
        arguments = {"kind": kind, "beta": beta, "support": support, "tail": tail, "k": k}
        values, gradients = value_and_gradient(student, teacher, tokens, clip=CLIP, **arguments)
        for b in range(V):
            z, u = student[b, 0], teacher[b, 0]
            chosen = set(range(V)) if k is None else support_of(z, u, support, 0, k)
            of = lambda z, u=u, tail=tail, chosen=chosen: loop(z, u, kind, beta, tail, chosen)
            assert float(values[b]) == pytest.approx(of(z), rel=1e-9, abs=1e-9), support
            step = 1e-6 * np.eye(V)
            wanted = [(of(z + step[v]) - of(z - step[v])) / 2e-6 for v in range(V)]
            np.testing.assert_allclose(gradients[b], wanted, atol=1e-8, err_msg=f"{support} {tail}")
        plain, _ = value_and_gradient(student, teacher, tokens, **arguments)
        cut += int((np.asarray(plain) > np.asarray(values) + 1e-6).sum())
    assert cut > 0 or beta == 1.0  # what is compared has been clipped somewhere


def test_the_published_loss_and_its_gradient_by_pytorch(float64):
    """sum_v min(q log(q/p), clip) and autograd; OPSD's clip."""
    student, teacher, tokens = logits(1)
    leaf = torch.tensor(student, requires_grad=True)
    logp, logq = torch.log_softmax(leaf, -1), torch.log_softmax(torch.tensor(teacher), -1)
    theirs = torch.clamp(torch.exp(logq) * (logq - logp), max=CLIP).sum(-1)
    theirs.sum().backward()
    values, gradients = value_and_gradient(student, teacher, tokens, kind="forward_kl", clip=CLIP)
    np.testing.assert_allclose(values, theirs.detach().numpy()[:, 0], atol=1e-13)
    np.testing.assert_allclose(gradients, leaf.grad.numpy()[:, 0], atol=1e-13)


def test_clipping_turns_the_gradient_of_the_clipped_tokens_around(float64):
    """Each has a forward KL that pulls it up, p - q < 0, and a clipped one that pushes it down, p times the teacher's unclipped mass."""
    student, teacher, tokens = logits(2)
    _, full = value_and_gradient(student, teacher, tokens, kind="forward_kl")
    _, clipped = value_and_gradient(student, teacher, tokens, kind="forward_kl", clip=CLIP)
    p, q = (np.asarray(jax.nn.softmax(z[:, 0], axis=-1)) for z in (student, teacher))
    over = q * np.log(q / p) > CLIP
    assert over.any() and not over.all(axis=1).any()
    assert (np.asarray(full)[over] < 0).all() and (np.asarray(clipped)[over] > 0).all()
    free = np.where(over, 0, q).sum(1, keepdims=True)
    np.testing.assert_allclose(clipped, p * free - np.where(over, 0, q), atol=1e-14)


def test_the_minimum_of_the_clipped_loss_has_no_mass_on_a_clipped_token(float64):
    """From a student that gives the teacher's second token little, descent takes away the rest; unclipped it arrives at the teacher."""
    teacher = np.log(np.array([[[0.5, 0.3, 0.1, 0.05, 0.03, 0.02]]]))
    start = np.log(np.array([[[0.65, 0.15, 0.1, 0.05, 0.03, 0.02]]]))
    ends = {}
    for clip in (0.0, CLIP):
        gradient = jax.grad(lambda z, clip=clip: _forward(z, teacher, clip))
        step = lambda z, _, gradient=gradient: (z - 0.5 * gradient(z), None)
        ends[clip] = np.asarray(jax.nn.softmax(jax.lax.scan(step, jnp.asarray(start), length=4000)[0]))[0, 0]
    np.testing.assert_allclose(ends[0.0], np.exp(teacher)[0, 0], atol=1e-6)
    assert ends[CLIP][1] < 1e-3
    np.testing.assert_allclose(ends[CLIP][[0, 2]] / ends[CLIP][0], [1.0, 0.2], atol=1e-2)  # the others share what it had
    assert float(_forward(np.log(ends[CLIP])[None, None], teacher, CLIP)) < 0 <= float(_forward(teacher, teacher, CLIP))


def _forward(student, teacher, clip):
    return divergence(jnp.asarray(student), jnp.asarray(teacher), kind="forward_kl", clip=clip).sum()


@pytest.mark.parametrize(
    "support, tail, k", [("full", "renormalise", None), ("topk_teacher", "renormalise", 3), ("topk_union", "bucket", 2)]
)
@pytest.mark.parametrize("kind, beta", [("forward_kl", None), ("reverse_kl", None), ("jsd", 0.3)])
def test_a_clip_above_every_entry_changes_no_bit(kind, beta, support, tail, k):
    student, teacher, tokens = (x.astype(np.float32) for x in logits(3))
    arguments = {"kind": kind, "beta": beta, "support": support, "tail": tail, "k": k}
    for a, b in zip(
        value_and_gradient(student, teacher, tokens.astype(int), **arguments),
        value_and_gradient(student, teacher, tokens.astype(int), clip=1e3, **arguments),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_clipped_entries_are_finite_where_the_divergence_is_not():
    student, teacher, tokens = (x.astype(np.float32) for x in logits(4))
    student[..., 0], teacher[..., 1] = -np.inf, -np.inf
    for kind in ("forward_kl", "reverse_kl"):
        plain, _ = value_and_gradient(student, teacher, tokens.astype(int), kind=kind)
        values, gradients = value_and_gradient(student, teacher, tokens.astype(int), kind=kind, clip=CLIP)
        assert np.isinf(np.asarray(plain)).all() and np.isfinite(np.asarray(values)).all() and np.isfinite(np.asarray(gradients)).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"support": "sampled"}, "signal.clip = 0.05 does not go with signal.support = 'sampled'"),
        ({"support": "topk_teacher", "k": 2, "tail": "generalised"}, "signal.clip = 0.05 does not go with signal.tail = 'generalised'"),
        ({"support": "topk_student", "k": 2, "tail": "sampled_tail"}, "does not go with signal.tail = 'sampled_tail'"),
        ({"kind": "nll"}, "signal.clip = 0.05 is for divergences, not for signal.divergence = 'nll'; use 0"),
        ({"clip": math.nan}, "signal.clip = nan must be 0"),
        ({"clip": math.inf}, "signal.clip = inf must be 0"),
        ({"clip": -0.1}, "signal.clip = -0.1 must be 0"),
    ],
)
def test_what_cannot_be_clipped_is_refused(fields, message):
    with pytest.raises(ValueError) as error:
        Signal(**{"kind": "forward_kl", "clip": CLIP} | fields)
    assert message in str(error.value)


def test_the_claim_says_that_a_clipped_divergence_is_biased_and_why():
    def built(**fields):
        config = config_lib.Config(signal=config_lib.Signal(**fields), loss=config_lib.Loss(normaliser="sequence_sum"))
        return objective.from_config(config, has_teacher=True), config

    goal, config = built(divergence="forward_kl", clip=CLIP)
    assert goal.estimator.signal.clip == CLIP and not goal.estimator.unbiased
    assert claim.of_run(goal, config) == (
        "Biased for the token-level forward KL with prefixes held fixed: an entry above signal.clip 0.05 has no gradient of its own, so "
        "that the minimiser may put no mass on a token of the teacher"
    )
    assert built(divergence="forward_kl")[0].estimator.unbiased
    with pytest.raises(config_lib.ConfigError, match="signal.clip = 0.05 is for estimator.credit = 'token', not for 'to_go'"):
        config = config_lib.Config(signal=config_lib.Signal(clip=CLIP), estimator=config_lib.Estimator(credit="to_go"))
        objective.from_config(config, has_teacher=True)


def test_the_forward_kl_has_one_function_whatever_it_is_called():
    """What is clipped without its linear part is told by it."""
    forward = entries.entry("forward_kl", None)
    for kind in ("jsd", "jsd_continuous", "skew_forward_kl"):
        assert entries.entry(kind, 0.0) is forward
