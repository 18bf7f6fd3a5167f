"""Heads and targets -> per-token statistics: the only loss code that sees the vocabulary axis, in proofs and in training.

Logits are made and used tile by tile along T (never B: rows stay on their devices), in the forward pass and again in the backward pass;
no array of size [B, T, V] exists. One custom VJP has cotangents for the student's log-prob of the sampled token and for the local
divergence; everything else, the target first of all, is constant. Reverse mode only.
"""

import dataclasses
import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp

from opd_jax.numerics import entries

# Bytes of one tile of float32 logits; below it a call is a single tile.
TILE_BYTES = 64 * 2**20
STATISTICS = ("logp", "local", "target_logp", "kl", "entropy", "target_entropy")
_DIFFERENTIABLE = ("logp", "local")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["hidden_BTD", "unembed_DV", "valid_V"], meta_fields=["softcap"])
@dataclasses.dataclass(frozen=True)
class Head:
    """Logits not yet made: softcap * tanh(hidden @ unembed / softcap), or hidden @ unembed without a softcap.

    `valid_V` (bool, None: all) is False on padding rows of the vocabulary: they have no mass.
    """

    hidden_BTD: jax.Array
    unembed_DV: jax.Array
    softcap: float | None = None
    valid_V: jax.Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["logits_BTV", "valid_V"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseHead:
    """Logits as they are: the form of proofs and oracles."""

    logits_BTV: jax.Array
    valid_V: jax.Array | None = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["heads"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Target:
    """What the student is compared with: the law of one teacher."""

    heads: tuple[Head | DenseHead, ...]

    def __post_init__(self):
        assert len(self.heads) == 1, "a target has one head"


@dataclasses.dataclass(frozen=True)
class Signal:
    """Which per-token loss. `full` sums over the vocabulary; `sampled` is sg(df/dp(y)) log p(y), right in expectation over y ~ p.

    `beta` is used by the mixtures (jsd, jsd_continuous, skew_*); temperatures divide logits. Raises ValueError.
    """

    kind: str
    support: str = "full"
    beta: float | None = None
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0

    def __post_init__(self):
        if self.kind not in entries.KINDS:
            raise ValueError(f"signal.divergence = {self.kind!r} is not known; valid: {', '.join(entries.KINDS)}")
        if self.support not in ("full", "sampled"):
            raise ValueError(f"signal.support = {self.support!r} is not known; valid: full, sampled")
        if self.support == "sampled" and self.kind not in entries.DIVERGENCES:
            raise ValueError(f"signal.support = 'sampled' is for divergences, not for signal.divergence = {self.kind!r}; use 'full'")
        if entries.DIVERGENCES.get(self.kind):
            self._check_beta()
        for name in ("student_temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss.{name} = {getattr(self, name)!r} must be above 0")

    def _check_beta(self):
        if self.beta is None or not 0 <= self.beta <= 1:
            raise ValueError(f"signal.beta = {self.beta!r} must be between 0 and 1 for signal.divergence = {self.kind!r}")
        if self.kind == "jsd" and 0 < min(self.beta, 1 - self.beta) < 1e-3:
            raise ValueError(
                f"signal.beta = {self.beta!r} makes signal.divergence = 'jsd' vanish (it tends to 0 at both ends, a KL exactly there); "
                "use 0, 1, or a value from 0.001 to 0.999"
            )

    @property
    def needs_target(self) -> bool:
        return self.kind not in ("nll", "negative_entropy")


@functools.partial(jax.tree_util.register_dataclass, data_fields=[f"{name}_BT" for name in STATISTICS], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Stats:
    """Per-token statistics [B, T] in nats, at the signal's temperatures; None unless asked for. Only the first two have gradients."""

    logp_BT: jax.Array | None = None  # log pi(y)
    local_BT: jax.Array | None = None  # the signal's per-token loss
    target_logp_BT: jax.Array | None = None  # log q(y)
    kl_BT: jax.Array | None = None  # KL(pi || q) over the whole vocabulary, whatever the signal
    entropy_BT: jax.Array | None = None  # of pi
    target_entropy_BT: jax.Array | None = None  # of q


def token_stats(
    student: Head | DenseHead,
    target: Target | None,
    tokens_BT: jax.Array,
    *,
    signal: Signal,
    needs: Collection[str],
    tile: int | None = None,
) -> Stats:
    """Statistics of completion tokens [B, T] under the student's law and the target's.

    `needs` names what is wanted, from STATISTICS; `tile` is the number of positions made at once (None: as many as fit TILE_BYTES).
    Heads may differ in width and in padded vocabulary rows; rows beyond the smaller vocabulary have no mass. `target` may be None when
    neither the signal nor `needs` compares with one. Arithmetic is float32, or float64 for float64 heads.
    """
    wanted = tuple(name for name in STATISTICS if name in needs)
    assert set(wanted) == set(needs), f"unknown statistics {set(needs) - set(wanted)}"
    assert target is not None or (
        signal.needs_target <= ("local" not in wanted) and not {"target_logp", "kl", "target_entropy"} & set(needs)
    )
    teacher = jax.lax.stop_gradient(target.heads[0]) if target is not None else None
    student, teacher = _share_vocabulary(student, teacher)
    tile = tile or _fitting_tile(*tokens_BT.shape, _vocabulary(student))
    values = _statistics(student, teacher, tokens_BT, signal, wanted, min(tile, tokens_BT.shape[1]))
    fields = {f"{name}_BT": v if name in _DIFFERENTIABLE else jax.lax.stop_gradient(v) for name, v in zip(wanted, values, strict=True)}
    return Stats(**fields)


def topk(head: Head | DenseHead, *, k: int, tile: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids [B, T, K], log-probs [B, T, K], log of the mass outside [B, T]) of the k most probable tokens at temperature 1."""
    hidden = head.logits_BTV if isinstance(head, DenseHead) else head.hidden_BTD

    def one(_, inputs):
        logp = _log_softmax(_logits(inputs, 1.0))
        top, ids = jax.lax.top_k(logp, k)
        # Summed outside, not 1 less the sum inside, which cancels when the top has nearly all mass.
        outside = jnp.put_along_axis(logp, ids, -jnp.inf, axis=-1, inplace=False)
        return None, (ids, top, jax.nn.logsumexp(outside, axis=-1))

    rows, length = hidden.shape[:2]
    return _over_tiles(one, None, head, length, tile or _fitting_tile(rows, length, _vocabulary(head)))[1]


def _fitting_tile(rows: int, length: int, vocab: int) -> int:
    return min(max(TILE_BYTES // (4 * rows * vocab), 1), length)


# ---- one tile


def _logits(head: Head | DenseHead, temperature: float) -> jax.Array:
    if isinstance(head, DenseHead):
        logits = head.logits_BTV.astype(jnp.promote_types(head.logits_BTV.dtype, jnp.float32))
    else:
        accumulate = jnp.promote_types(head.hidden_BTD.dtype, jnp.float32)
        logits = jnp.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV, preferred_element_type=accumulate)
        if head.softcap is not None:
            logits = head.softcap * jnp.tanh(logits / head.softcap)
    logits = logits / temperature
    return logits if head.valid_V is None else jnp.where(head.valid_V[None, None, :], logits, -jnp.inf)


def _log_softmax(logits: jax.Array) -> jax.Array:
    return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def _pick(x_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BTV, tokens_BT[..., None], axis=-1)[..., 0]


def _entropy(logp: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.where(jnp.isneginf(logp), 0, jnp.exp(logp) * logp), axis=-1)


def _tile_values(student, teacher, tokens_BT, signal: Signal, wanted: tuple[str, ...]) -> list[jax.Array]:
    logp = _log_softmax(_logits(student, signal.student_temperature))
    logq = _log_softmax(_logits(teacher, signal.teacher_temperature)) if teacher is not None else None
    make = {
        "logp": lambda: _pick(logp, tokens_BT),
        "local": lambda: _local(logp, logq, tokens_BT, signal)[0],
        "target_logp": lambda: _pick(logq, tokens_BT),
        "kl": lambda: jnp.sum(entries.entry("reverse_kl", None)(logp, logq)[0], axis=-1),
        "entropy": lambda: _entropy(logp),
        "target_entropy": lambda: _entropy(logq),
    }
    return [make[name]() for name in wanted]


def _local(logp, logq, tokens_BT, signal: Signal) -> tuple[jax.Array, jax.Array]:
    """(per-token loss [B, T], its gradient over the student's log-softmax logits at temperature 1 [B, T, V])."""
    if signal.kind == "nll":
        chosen = jax.nn.one_hot(tokens_BT, logp.shape[-1], dtype=logp.dtype)
        return -_pick(logp, tokens_BT), jnp.exp(logp) - chosen
    value, slope = entries.entry(signal.kind, signal.beta)(logp, logq)
    if signal.support == "sampled":
        # sg(df/dp(y)) log p(y), with df/dp = slope / p. A token without mass was not drawn: it is padding, and must not make NaN.
        p_BT = jnp.exp(_pick(logp, tokens_BT))
        weight = jnp.where(p_BT > 0, _pick(slope, tokens_BT) / jnp.where(p_BT > 0, p_BT, 1), 0)
        chosen = jax.nn.one_hot(tokens_BT, logp.shape[-1], dtype=logp.dtype)
        return weight * _pick(logp, tokens_BT), weight[..., None] * (chosen - jnp.exp(logp))
    return jnp.sum(value, axis=-1), slope - jnp.exp(logp) * jnp.sum(slope, axis=-1, keepdims=True)


def _tile_logit_gradient(student, teacher, tokens_BT, cotangents: dict[str, jax.Array], signal: Signal) -> jax.Array:
    """Gradient over hidden @ unembed (or over the dense logits) of one tile, [B, t, V]."""
    logp = _log_softmax(_logits(student, signal.student_temperature))
    gradient = jnp.zeros_like(logp)
    if "logp" in cotangents:
        chosen = jax.nn.one_hot(tokens_BT, logp.shape[-1], dtype=logp.dtype)
        gradient += cotangents["logp"][..., None] * (chosen - jnp.exp(logp))
    if "local" in cotangents:
        logq = _log_softmax(_logits(teacher, signal.teacher_temperature)) if teacher is not None else None
        gradient += cotangents["local"][..., None] * _local(logp, logq, tokens_BT, signal)[1]
    gradient /= signal.student_temperature
    if isinstance(student, Head) and student.softcap is not None:
        capped = _logits(dataclasses.replace(student, valid_V=None), student.softcap)
        gradient *= 1 - jnp.square(capped)
    return gradient


# ---- all tiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _statistics(student, teacher, tokens_BT, signal: Signal, wanted: tuple[str, ...], tile: int) -> list[jax.Array]:
    def one(_, inputs):
        return None, _tile_values(*inputs, signal, wanted)

    return _over_tiles(one, None, (student, teacher, tokens_BT), tokens_BT.shape[1], tile)[1]


def _statistics_forward(student, teacher, tokens_BT, signal, wanted, tile):
    return _statistics(student, teacher, tokens_BT, signal, wanted, tile), (student, teacher, tokens_BT)


def _statistics_backward(signal, wanted, tile, residuals, cotangents):
    student, teacher, tokens_BT = residuals
    cotangents = {name: c for name, c in zip(wanted, cotangents, strict=True) if name in _DIFFERENTIABLE}
    backward = _dense_gradient if isinstance(student, DenseHead) else _head_gradient
    return backward(student, teacher, tokens_BT, cotangents, signal, tile), None, None


def _dense_gradient(student: DenseHead, teacher, tokens_BT, cotangents, signal: Signal, tile: int) -> DenseHead:
    def one(_, inputs):
        return None, _tile_logit_gradient(*inputs, signal).astype(student.logits_BTV.dtype)

    inputs = (student, teacher, tokens_BT, cotangents)
    return DenseHead(_over_tiles(one, None, inputs, tokens_BT.shape[1], tile)[1], None)


def _head_gradient(student: Head, teacher, tokens_BT, cotangents, signal: Signal, tile: int) -> Head:
    """Gradients over hidden states and unembedding; the latter is summed over tiles in float32."""
    accumulate = jnp.promote_types(student.hidden_BTD.dtype, jnp.float32)

    def one(total_DV, inputs):
        head = inputs[0]
        gradient = _tile_logit_gradient(*inputs, signal).astype(head.hidden_BTD.dtype)
        hidden = jnp.einsum("btv,dv->btd", gradient, head.unembed_DV, preferred_element_type=accumulate)
        total_DV += jnp.einsum("btd,btv->dv", head.hidden_BTD, gradient, preferred_element_type=accumulate)
        return total_DV, hidden.astype(head.hidden_BTD.dtype)

    total_DV = jnp.zeros(student.unembed_DV.shape, accumulate)
    inputs = (student, teacher, tokens_BT, cotangents)
    total_DV, hidden_BTD = _over_tiles(one, total_DV, inputs, tokens_BT.shape[1], tile)
    return Head(hidden_BTD, total_DV.astype(student.unembed_DV.dtype), student.softcap, None)


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _over_tiles(function, carry, inputs, length: int, tile: int):
    """Runs function(carry, inputs of a tile) -> (carry, arrays [B, t, ...]) along T; the arrays come back whole, [B, T, ...]."""
    full, rest = divmod(length, tile)
    if full == 1:
        carry, whole = function(carry, _window(inputs, 0, tile))
    else:
        carry, pieces = jax.lax.scan(lambda c, i: function(c, _window(inputs, i * tile, tile)), carry, jnp.arange(full))
        whole = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], full * tile, *x.shape[3:]), pieces)
    if rest:
        carry, last = function(carry, _window(inputs, full * tile, rest))
        whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), whole, last)
    return carry, whole


def _window(inputs, start, size: int):
    """Positions [start, start + size) of everything that has a T axis; unembedding and valid rows are shared by all tiles."""

    def cut(x):
        if isinstance(x, Head):
            return dataclasses.replace(x, hidden_BTD=cut(x.hidden_BTD))
        if isinstance(x, DenseHead):
            return dataclasses.replace(x, logits_BTV=cut(x.logits_BTV))
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    return jax.tree.map(cut, inputs, is_leaf=lambda x: isinstance(x, Head | DenseHead))


# ---- vocabularies


def _vocabulary(head: Head | DenseHead) -> int:
    return (head.logits_BTV if isinstance(head, DenseHead) else head.unembed_DV).shape[-1]


def _share_vocabulary(student, teacher):
    """Cuts both heads to the rows that both have."""
    if teacher is None:
        return student, None
    common = min(_vocabulary(student), _vocabulary(teacher))
    return _first_rows(student, common), _first_rows(teacher, common)


def _first_rows(head, rows: int):
    if _vocabulary(head) == rows:
        return head
    valid_V = None if head.valid_V is None else head.valid_V[:rows]
    if isinstance(head, DenseHead):
        return DenseHead(head.logits_BTV[..., :rows], valid_V)
    return dataclasses.replace(head, unembed_DV=head.unembed_DV[:, :rows], valid_V=valid_V)
