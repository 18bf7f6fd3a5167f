"""Targets: the law that the student is compared with, one teacher's or put together from several, or what is left of one in a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from opd_jax.numerics import entries
from opd_jax.numerics import heads as heads_lib
from opd_jax.numerics.heads import DenseHead, Head
from opd_jax.numerics.signals import Signal

POOLS = ("logit", "prob")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["heads", "weight_MBT"], meta_fields=["pool", "normalise", "members"])
@dataclasses.dataclass(frozen=True)
class Target:
    """The pooled law of M heads, each first normalised at the teacher temperature. `weight_MBT` None: one head, as it is.

    pool = "logit": log q = sum_m w_m log q_m, less its log-normaliser unless `normalise` is False. Weights may be negative and sum to
    anything: a geometric mixture has w >= 0 that sum to 1; lambda for the teacher and 1 - lambda for a reference extrapolate beyond it.
    Without `normalise` the log-ratio of a token is off by log Z of its prefix, which changes no expected gradient of token credit on the
    support `full` or `sampled`; it does change those of to-go credits and of top-k supports with the tail `generalised`.

    pool = "prob": q = sum_m w_m q_m, with w >= 0 that sum to 1 at each position; one-hot weights route a rollout to one teacher, exactly.

    The first `members` heads (None: all) are teachers of their own, whose laws `disagreement` compares; a reference or the live student
    comes after them.
    """

    heads: tuple[Head | DenseHead, ...]
    weight_MBT: jax.Array | None = None
    pool: str = "logit"
    normalise: bool = True
    members: int | None = None

    def __post_init__(self):
        assert self.pool in POOLS and len(self.heads) >= 1
        assert self.members is None or 1 <= self.members <= len(self.heads)
        assert self.weight_MBT is not None or len(self.heads) == 1, "several heads need weights"

    def window(self, start, size: int) -> "Target":
        """The target of positions [start, start + size)."""
        weight_MBT = self.weight_MBT
        cut = None if weight_MBT is None else heads_lib.positions(weight_MBT, start, size, axis=2)
        return dataclasses.replace(self, heads=tuple(head.window(start, size) for head in self.heads), weight_MBT=cut)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids_BTK", "logp_BTK", "rest_BT"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SparseTarget:
    """A teacher's K most probable tokens at temperature 1, from a cache or a server, and the log of the mass outside them, [B, T]."""

    ids_BTK: jax.Array
    logp_BTK: jax.Array
    rest_BT: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["logp_BT"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TokenTarget:
    """A teacher's log-probs of the sampled tokens alone, at temperature 1."""

    logp_BT: jax.Array


AnyTarget = Target | SparseTarget | TokenTarget

# What a law that is known in part can tell.
_OF_TOKENS = frozenset({"logp", "entropy", "local", "target_logp", "mass", "extra_logp"})
_OF_SPARSE = frozenset({"logp", "entropy", "local", "mass", "target_mass", "overlap", "extra_logp"})
_SPARSE_TAILS = ("renormalise", "bucket", "generalised", "none")


def check(target: AnyTarget | None, signal: Signal, needs) -> None:
    """Raises ValueError for a signal or statistic that needs more of the teacher's law than the target holds."""
    if target is None or isinstance(target, Target):
        return
    if signal.teacher_temperature != 1:
        raise ValueError(f"loss.teacher_temperature = {signal.teacher_temperature:g}: cached log-probs are those of temperature 1")
    if isinstance(target, TokenTarget):
        what, known = "log-probs of the sampled tokens", _OF_TOKENS
        fits = signal.support == "sampled" or not signal.needs_target
        remedy = "use signal.support = 'sampled'"
    else:
        size = target.ids_BTK.shape[-1]
        what, known = f"the teacher's top {size}", _OF_SPARSE
        on_top = signal.support == "topk_teacher" and signal.k <= size and signal.tail in _SPARSE_TAILS
        fits = not signal.needs_target or signal.kind == "top1_cross_entropy" or on_top
        remedy = f"use signal.support = 'topk_teacher' with signal.k of at most {size} and signal.tail {', '.join(_SPARSE_TAILS)}"
    if not fits:
        asked = f"signal.divergence = {signal.kind!r}, signal.support = {signal.support!r}, signal.tail = {signal.tail!r}"
        raise ValueError(f"{asked} needs more than {what}, which is all that is cached; {remedy}")
    missing = sorted(set(needs) - known)
    if missing:
        raise ValueError(f"the statistic {missing[0]!r} needs more than {what}, which is all that is cached")


def share_vocabulary(student: Head | DenseHead, target: AnyTarget | None):
    """Cuts all heads to the rows that all of them have."""
    if not isinstance(target, Target):
        return student, target
    common = min(map(heads_lib.vocabulary, (student, *target.heads)))
    kept = tuple(heads_lib.first_rows(head, common) for head in target.heads)
    return heads_lib.first_rows(student, common), dataclasses.replace(target, heads=kept)


def log_law(target: AnyTarget, tokens_BT: jax.Array, vocab: int, signal: Signal) -> jax.Array:
    """log q [B, t, V] of one tile; of a cached law what is known, in its place."""
    if isinstance(target, TokenTarget):  # nothing but the sampled token's entry is read
        nowhere = jnp.full((*tokens_BT.shape, vocab), -jnp.inf, target.logp_BT.dtype)
        return jnp.put_along_axis(nowhere, tokens_BT[..., None], target.logp_BT[..., None], axis=-1, inplace=False)
    if isinstance(target, SparseTarget):
        # The rest spread evenly: its sum is right, and no entry is above the K that are known.
        each_BT1 = (target.rest_BT - jnp.log(max(vocab - target.ids_BTK.shape[-1], 1)))[..., None]
        spread = jnp.broadcast_to(each_BT1, (*tokens_BT.shape, vocab))
        return jnp.put_along_axis(spread, target.ids_BTK, target.logp_BTK, axis=-1, inplace=False)
    laws = _laws(target, signal)
    if target.weight_MBT is None:
        return laws[0]
    weights = [weight_BT[..., None] for weight_BT in target.weight_MBT]
    if target.pool == "prob":
        return functools.reduce(jnp.logaddexp, [jnp.log(w) + law for w, law in zip(weights, laws, strict=True)])
    # A token that a member rules out stays out, whatever the sign of its weight.
    out = functools.reduce(jnp.logical_or, [jnp.isneginf(law) & (w != 0) for w, law in zip(weights, laws, strict=True)])
    pooled = sum(w * jnp.where(jnp.isneginf(law), 0, law) for w, law in zip(weights, laws, strict=True))
    pooled = jnp.where(out, -jnp.inf, pooled)
    return heads_lib.log_softmax(pooled) if target.normalise else pooled


def _laws(target: Target, signal: Signal) -> list[jax.Array]:
    return [heads_lib.log_softmax(heads_lib.logits(head, signal.teacher_temperature)) for head in target.heads]


def disagreement(target: Target, signal: Signal) -> jax.Array:
    """The generalised Jensen-Shannon divergence of the members' laws, (1/M) sum_m KL(q_m || mean of all) [B, t], from 0 to log M.

    Uniform whatever the weights: a route shows how far the others are. Exactly 0 for equal laws.
    """
    laws = jnp.stack(_laws(target, signal)[: target.members])
    most = jnp.max(laws, axis=0)
    # Relative to the largest, and by expm1: the mean of equal laws is that law to the last bit.
    below = jnp.expm1(laws - jnp.where(jnp.isneginf(most), 0, most)[None])
    mean = most + jnp.log1p(jnp.mean(below, axis=0))
    return jnp.mean(jnp.sum(entries.entry("reverse_kl", None)(laws, mean[None])[0], axis=-1), axis=0)
