"""The per-token loss on a support with a tail: its value, and its gradient over the student's logits, both from log-probabilities.

A sum over entries has the gradient `slope - p sum(slope)`, slope = p df/dp (entries.py); what is not on the support has slope 0. Supports
are sets of ids: they carry no gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp

from opd_jax.numerics import entries
from opd_jax.numerics.heads import pick
from opd_jax.numerics.signals import SAMPLED_TAILS, Signal


def top(logp: jax.Array, k: int) -> jax.Array:
    """Which entries [B, t, V] are among the k largest: exactly k, ties by the lower id."""
    ids = jax.lax.top_k(logp, k)[1]
    return jnp.put_along_axis(jnp.zeros(logp.shape, bool), ids, True, axis=-1, inplace=False)


def members(logp: jax.Array, logq: jax.Array | None, tokens_BT: jax.Array, signal: Signal) -> jax.Array | None:
    """Which entries [B, t, V] are on the signal's support; None: all."""
    chosen = jax.nn.one_hot(tokens_BT, logp.shape[-1], dtype=bool)
    if signal.support == "sampled":
        return chosen
    if not signal.is_topk or signal.k >= logp.shape[-1]:
        return None
    laws = {"topk_teacher": (logq,), "topk_student": (logp,), "topk_union": (logp, logq)}[signal.support.removesuffix("+token")]
    found = [top(law, signal.k) for law in laws] + ([chosen] if signal.adds_token else [])
    return jnp.stack(found).any(axis=0)


def mass(logp: jax.Array, on: jax.Array | None) -> jax.Array:
    """The probability of a support, [B, t]."""
    if on is None:
        return jnp.ones(logp.shape[:-1], logp.dtype)
    return jnp.minimum(jnp.sum(jnp.where(on, jnp.exp(logp), 0), axis=-1), 1)


def overlap(logp: jax.Array, logq: jax.Array, k: int) -> jax.Array:
    """|top-k of p and of q| / k, [B, t]."""
    if k >= logp.shape[-1]:
        return jnp.ones(logp.shape[:-1], logp.dtype)
    return jnp.sum(top(logp, k) & top(logq, k), axis=-1, dtype=logp.dtype) / k


def local(logp: jax.Array, logq: jax.Array | None, tokens_BT: jax.Array, signal: Signal) -> tuple[jax.Array, jax.Array]:
    """(per-token loss [B, t], its gradient over the student's logits at temperature 1 [B, t, V])."""
    if signal.kind == "top1_cross_entropy":
        signal, tokens_BT = dataclasses.replace(signal, kind="nll"), jnp.argmax(logq, axis=-1)
    on = members(logp, logq, tokens_BT, signal) if signal.is_topk else None
    return on_support(logp, logq, tokens_BT, on, signal)


def on_support(
    logp: jax.Array, logq: jax.Array | None, tokens_BT: jax.Array, on: jax.Array | None, signal: Signal
) -> tuple[jax.Array, jax.Array]:
    """`local` with the support given; its tokens, and the label of a cross-entropy, are places on the last axis of the laws.

    The laws may have one entry for many tokens off the support: then the gradient there is the sum of theirs, which are in proportion to p.
    """
    if signal.kind == "nll":
        return -pick(logp, tokens_BT), jnp.exp(logp) - jax.nn.one_hot(tokens_BT, logp.shape[-1], dtype=logp.dtype)
    entry = entry_of(signal)
    if signal.support == "sampled":
        return _sampled(entry(logp, logq)[1], logp, tokens_BT, True)
    if on is None:
        return _total(*entry(logp, logq), logp)
    if signal.tail == "renormalise":
        logp, logq = _restricted(logp, logq, on)
        return _total(*entry(logp, logq), logp)
    value, slope = entry(logp, logq)
    if signal.tail == "bucket":
        return _bucket(entry, value, slope, logp, logq, on)
    head_value, head_slope = value, slope
    if signal.tail in ("none", "sampled_tail_published"):
        linear = jnp.where(_whole(logp, logq, on), 0, entries.linear(signal.kind, signal.beta))[..., None].astype(logp.dtype)
        head_value, head_slope = value - linear * (jnp.exp(logp) - jnp.exp(logq)), slope - linear * jnp.exp(logp)
    loss, gradient = _total(jnp.where(on, head_value, 0), jnp.where(on, head_slope, 0), logp)
    if signal.tail in SAMPLED_TAILS:
        # The plain slope in both: of reverse_kl it is p log(p/q), the published weight. The heads differ, and with them the bias.
        tail_loss, tail_gradient = _sampled(slope, logp, tokens_BT, ~pick(on, tokens_BT))
        loss, gradient = loss + tail_loss, gradient + tail_gradient
    return loss, gradient


def entry_of(signal: Signal) -> entries.Entry:
    """The entries of a signal's divergence, cut off at its clip."""
    entry = entries.entry(signal.kind, signal.beta)
    return entries.clipped(entry, signal.clip) if signal.clip else entry


def gradient_products(
    logp: jax.Array, logq: jax.Array | None, tokens_BT: jax.Array, signal: Signal
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(|h|^2, |g|^2, <h, g>), each [B, t]: h the gradient of `local`, g that of the same kind over the whole vocabulary."""
    full = dataclasses.replace(signal, support="full", tail="renormalise", k=None)
    h, g = (local(logp, logq, tokens_BT, one)[1] for one in (signal, full))
    return jnp.sum(h * h, axis=-1), jnp.sum(g * g, axis=-1), jnp.sum(h * g, axis=-1)


def _total(value: jax.Array, slope: jax.Array, logp: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(value, axis=-1), slope - jnp.exp(logp) * jnp.sum(slope, axis=-1, keepdims=True)


def _sampled(slope: jax.Array, logp: jax.Array, tokens_BT: jax.Array, counts_BT: jax.Array | bool) -> tuple[jax.Array, jax.Array]:
    """sg(df/dp(y)) log p(y) where it counts. A token without mass was not drawn: it is padding, and must not make NaN."""
    logp_BT = pick(logp, tokens_BT)
    drawn_BT = jnp.exp(logp_BT) > 0
    weight_BT = jnp.where(drawn_BT & counts_BT, pick(slope, tokens_BT) / jnp.where(drawn_BT, jnp.exp(logp_BT), 1), 0)
    score = jax.nn.one_hot(tokens_BT, logp.shape[-1], dtype=logp.dtype) - jnp.exp(logp)
    return weight_BT * jnp.where(drawn_BT, logp_BT, 0), weight_BT[..., None] * score


def _whole(logp: jax.Array, logq: jax.Array, on: jax.Array) -> jax.Array:
    """Where nothing outside the support has mass [B, t]: such a support is the vocabulary, to the last bit."""
    return jnp.all(on | (jnp.isneginf(logp) & jnp.isneginf(logq)), axis=-1)


def _restricted(logp: jax.Array, logq: jax.Array, on: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both laws renormalised on the support; a law without mass there has none anywhere."""
    whole = _whole(logp, logq, on)[..., None]

    def restrict(log_law):
        total = jax.nn.logsumexp(jnp.where(on, log_law, -jnp.inf), axis=-1, keepdims=True)
        total = jnp.where(whole, 0, total)
        return jnp.where(on & ~jnp.isneginf(total), log_law - total, -jnp.inf)

    return restrict(logp), restrict(logq)


def _bucket(entry: entries.Entry, value, slope, logp, logq, on) -> tuple[jax.Array, jax.Array]:
    """The support and one entry for the rest, whose log-probability is summed outside: 1 less the sum inside cancels."""
    rest_p, rest_q = (jax.nn.logsumexp(jnp.where(on, -jnp.inf, x), axis=-1, keepdims=True) for x in (logp, logq))
    rest_value, rest_slope = entry(rest_p, rest_q)
    share = jnp.where(jnp.isneginf(logp), 0, jnp.exp(logp - rest_p))
    loss, gradient = _total(jnp.where(on, value, 0), jnp.where(on, slope, share * rest_slope), logp)
    return loss + rest_value[..., 0], gradient
