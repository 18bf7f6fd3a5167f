"""Heads and targets -> per-token statistics: the only loss code that sees the vocabulary axis, in proofs and in training.

Logits are made and used tile by tile (heads.tiling), in the forward pass and again in the backward pass. One custom VJP has cotangents for
the student's log-probs of the sampled and of the extra tokens and for the local divergence; everything else, the target first of all, is
constant. Reverse mode only.
"""

import dataclasses
import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from opd_jax.numerics import columns, entries, heads, supports, targets, vocabulary
from opd_jax.numerics.heads import TILE_BYTES, DenseHead, Head, Tiling, pick
from opd_jax.numerics.signals import SUPPORTS, TAILS, Signal
from opd_jax.numerics.targets import AnyTarget, SparseTarget, Target, TokenTarget

__all__ = [
    "STATISTICS",
    "SUPPORTS",
    "TAILS",
    "TILE_BYTES",
    "DenseHead",
    "Head",
    "Signal",
    "SparseTarget",
    "Stats",
    "Target",
    "TokenTarget",
    "token_stats",
    "topk",
]

_DIFFERENTIABLE = ("logp", "local", "extra_logp")


@dataclasses.dataclass(frozen=True)
class Stats:
    """Per-token statistics in nats, at the signal's temperatures; None unless asked for. Only the first three have gradients."""

    logp_BT: jax.Array | None = None  # log pi(y)
    local_BT: jax.Array | None = None  # the signal's per-token loss
    extra_logp_BTN: jax.Array | None = None  # log pi of the extra tokens
    target_logp_BT: jax.Array | None = None  # log q(y)
    extra_target_logp_BTN: jax.Array | None = None  # log q of the extra tokens
    kl_BT: jax.Array | None = None  # KL(pi || q) over the whole vocabulary, whatever the signal
    entropy_BT: jax.Array | None = None  # of pi
    target_entropy_BT: jax.Array | None = None  # of q
    mass_BT: jax.Array | None = None  # of pi on the signal's support; of support "sampled" pi(y)
    target_mass_BT: jax.Array | None = None  # of q there
    overlap_BT: jax.Array | None = None  # |top-k of pi and of q| / k, of a top-k signal
    optimal_baseline_BT: jax.Array | None = (
        None  # E[w l] / E[w] over y ~ pi, w = |e_y - pi|^2 (logit-score proxy), l = log q(y) - log pi(y)
    )
    gradient_square_BT: jax.Array | None = None  # |h|^2, h the gradient of local by the student's logits, those divided by the temperature
    full_gradient_square_BT: jax.Array | None = None  # |g|^2, g the same with support "full"
    gradient_dot_BT: jax.Array | None = None  # <h, g>
    disagreement_BT: jax.Array | None = None  # of the target's members: Jensen-Shannon divergence with uniform weights; of one 0


# Name of a statistic in `needs` -> its field.
_FIELDS = {field.name.rsplit("_", 1)[0]: field.name for field in dataclasses.fields(Stats)}
STATISTICS = tuple(_FIELDS)
_OF_TARGET = {"target_logp", "extra_target_logp", "kl", "target_entropy", "target_mass", "overlap", "optimal_baseline", "disagreement"}
_OF_LOSS = {"local", "gradient_square", "full_gradient_square", "gradient_dot"}
_OF_EXTRA = {"extra_logp", "extra_target_logp"}
jax.tree_util.register_dataclass(Stats, data_fields=list(_FIELDS.values()), meta_fields=[])


def token_stats(
    student: Head | DenseHead,
    target: AnyTarget | None,
    tokens_BT: jax.Array,
    *,
    signal: Signal,
    needs: Collection[str],
    extra_tokens_BTN: jax.Array | None = None,
    mask_BT: jax.Array | None = None,
    tile: int | None = None,
    tile_columns: int | None = None,
) -> Stats:
    """Statistics of completion tokens [B, T], and of N extra tokens at each position, under the student's law and the target's.

    `needs` names what is wanted, from STATISTICS, and nothing else is computed. Where `mask_BT` is False nobody may look: tiles without a
    True, such as those behind the longest completion, are not made, and have zeros. `tile` is the number of positions made at once, whole
    vocabularies or `tile_columns` of them (both None: see heads.tiling). Heads may differ in width and in padded vocabulary rows; rows
    beyond the smaller vocabulary have no mass.
    `target` may be None when neither the signal nor `needs` compares with one. Arithmetic is float32, or float64 for float64 heads.
    Raises ValueError for `overlap` without a top-k signal, and for what a target that is known in part cannot tell.
    """
    wanted = tuple(name for name in STATISTICS if name in needs)
    assert set(wanted) == set(needs), f"unknown statistics {set(needs) - set(wanted)}"
    compares = (_OF_LOSS & set(needs) and signal.needs_target) or ("mass" in needs and signal.is_topk) or _OF_TARGET & set(needs)
    assert target is not None or not compares, f"{set(needs)} of {signal} need a target"
    assert extra_tokens_BTN is not None or not _OF_EXTRA & set(needs), "extra log-probs need extra_tokens_BTN"
    if "overlap" in needs and not signal.is_topk:
        raise ValueError(f"the statistic 'overlap' needs a top-k support, signal.support = {signal.support!r} has no k")
    targets.check(target, signal, needs)
    student, target = targets.share_vocabulary(student, jax.lax.stop_gradient(target))
    by_columns = vocabulary.has_form(student, target, needs)
    assert by_columns or not tile_columns, f"{set(needs)} of {signal} have no form by tiles of the vocabulary"
    tiling = heads.tiling(*tokens_BT.shape, heads.vocabulary(student), columns=by_columns)
    if tile or tile_columns:
        tiling = Tiling(min(tile or tokens_BT.shape[1], tokens_BT.shape[1]), tile_columns)
    tokens = (tokens_BT, extra_tokens_BTN)
    values = _statistics(student, target, tokens, mask_BT, signal, wanted, tiling)
    named = zip(wanted, values, strict=True)
    return Stats(**{_FIELDS[name]: value if name in _DIFFERENTIABLE else jax.lax.stop_gradient(value) for name, value in named})


def topk(head: Head | DenseHead, *, k: int, tile: int | None = None, tile_columns: int | None = None) -> tuple[jax.Array, ...]:
    """(ids [B, T, K], log-probs [B, T, K], log of the mass outside [B, T]) of the k most probable tokens at temperature 1.

    Ties go to the lower id. `tile` and `tile_columns` are those of `token_stats`.
    """
    shape_BT = (head.logits_BTV if isinstance(head, DenseHead) else head.hidden_BTD).shape[:2]
    tiling = heads.tiling(*shape_BT, heads.vocabulary(head), columns=isinstance(head, Head))
    if tile or tile_columns:
        tiling = Tiling(min(tile or shape_BT[1], shape_BT[1]), tile_columns)
    make = (lambda head: columns.topk(head, k, tiling.columns)) if tiling.columns else (lambda head: heads.topk(head, k))
    return heads.over_tiles(lambda _, head: (None, make(head)), None, head, shape_BT[1], tiling.positions)[1]


# ---- one tile


def _tile_values(student, target, tokens, signal: Signal, wanted: tuple[str, ...]) -> list[jax.Array]:
    tokens_BT, extra_BTN = tokens
    logp = heads.log_softmax(heads.logits(student, signal.student_temperature))
    logq = targets.log_law(target, tokens_BT, logp.shape[-1], signal) if target is not None else None
    make = {
        "logp": lambda: pick(logp, tokens_BT),
        "local": lambda: supports.local(logp, logq, tokens_BT, signal)[0],
        "extra_logp": lambda: jnp.take_along_axis(logp, extra_BTN, axis=-1),
        "target_logp": lambda: pick(logq, tokens_BT),
        "extra_target_logp": lambda: jnp.take_along_axis(logq, extra_BTN, axis=-1),
        "kl": lambda: jnp.sum(entries.entry("reverse_kl", None)(logp, logq)[0], axis=-1),
        "entropy": lambda: _entropy(logp),
        "target_entropy": lambda: _entropy(logq),
        "mass": lambda: supports.mass(logp, supports.members(logp, logq, tokens_BT, signal)),
        "target_mass": lambda: supports.mass(logq, supports.members(logp, logq, tokens_BT, signal)),
        "overlap": lambda: supports.overlap(logp, logq, signal.k),
        "optimal_baseline": lambda: _optimal_baseline(logp, logq),
        "gradient_square": lambda: supports.gradient_products(logp, logq, tokens_BT, signal)[0],
        "full_gradient_square": lambda: supports.gradient_products(logp, logq, tokens_BT, signal)[1],
        "disagreement": lambda: targets.disagreement(target, signal),
        "gradient_dot": lambda: supports.gradient_products(logp, logq, tokens_BT, signal)[2],
    }
    return [make[name]() for name in wanted]


def _entropy(logp: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.where(jnp.isneginf(logp), 0, jnp.exp(logp) * logp), axis=-1)


def _optimal_baseline(logp: jax.Array, logq: jax.Array) -> jax.Array:
    """E[w l] / E[w], w = |e_y - p|^2 = (1 - p_y)^2 + sum of the other p^2; 0 for a law of a single token, whose score is 0."""
    p = jnp.exp(logp)
    others = jnp.maximum(jnp.sum(jnp.square(p), axis=-1, keepdims=True) - jnp.square(p), 0)
    weight = p * (jnp.square(1 - p) + others)
    total = jnp.sum(weight, axis=-1)
    log_ratio = jnp.where(p > 0, logq - logp, 0)
    return jnp.where(total > 0, jnp.sum(weight * log_ratio, axis=-1) / jnp.where(total > 0, total, 1), 0)


def _tile_logit_gradient(student, target, tokens, cotangents: dict[str, jax.Array], signal: Signal) -> jax.Array:
    """Gradient over hidden @ unembed (or over the dense logits) of one tile, [B, t, V]."""
    tokens_BT, extra_BTN = tokens
    logp = heads.log_softmax(heads.logits(student, signal.student_temperature))
    gradient = jnp.zeros_like(logp)
    if "logp" in cotangents:
        chosen = jax.nn.one_hot(tokens_BT, logp.shape[-1], dtype=logp.dtype)
        gradient += cotangents["logp"][..., None] * (chosen - jnp.exp(logp))
    if "extra_logp" in cotangents:
        cotangent_BTN = cotangents["extra_logp"]
        add = jax.vmap(jax.vmap(lambda row_V, ids_N, values_N: row_V.at[ids_N].add(values_N)))
        gradient = add(gradient, extra_BTN, cotangent_BTN) - jnp.sum(cotangent_BTN, axis=-1, keepdims=True) * jnp.exp(logp)
    if "local" in cotangents:
        logq = targets.log_law(target, tokens_BT, logp.shape[-1], signal) if target is not None else None
        cotangent_BT1 = cotangents["local"][..., None]
        # A masked token's loss may be infinite: it must not reach the gradient as 0 * inf.
        gradient += jnp.where(cotangent_BT1 != 0, cotangent_BT1 * supports.local(logp, logq, tokens_BT, signal)[1], 0)
    gradient /= signal.student_temperature
    return heads.through_softcap(student, gradient) if isinstance(student, Head) else gradient


# ---- all tiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _statistics(student, target, tokens, mask_BT, signal: Signal, wanted: tuple[str, ...], tiling: Tiling) -> list[jax.Array]:
    return _values_and_found(student, target, tokens, mask_BT, signal, wanted, tiling)[0]


def _values_and_found(student, target, tokens, mask_BT, signal, wanted, tiling):
    """(the statistics, what the backward pass needs beside the inputs)."""

    def one(_, inputs):
        if tiling.columns is None:
            return None, (_tile_values(*inputs, signal, wanted), None)
        return None, vocabulary.statistics(*inputs, signal, wanted, tiling.columns)

    return heads.over_tiles(one, None, (student, target, tokens), tokens[0].shape[1], tiling.positions, mask_BT)[1]


def _statistics_forward(student, target, tokens, mask_BT, signal, wanted, tiling):
    inputs = jax.tree.map(lambda x: x.value, (student, target, tokens, mask_BT), is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    values, found = _values_and_found(*inputs, signal, wanted, tiling)
    return values, (*inputs, found)


def _statistics_backward(signal, wanted, tiling, residuals, cotangents):
    student, target, tokens, mask_BT, found = residuals
    # Zeros that jax knows of, such as those of a statistic that only metrics read, cost no work over the vocabulary.
    used = {n: c for n, c in zip(wanted, cotangents, strict=True) if n in _DIFFERENTIABLE and not isinstance(c, SymbolicZero)}
    if isinstance(student, DenseHead):
        return _dense_gradient(student, target, tokens, mask_BT, used, signal, tiling), None, None, None
    return _head_gradient(student, target, tokens, mask_BT, used, found, signal, tiling), None, None, None


def _dense_gradient(student: DenseHead, target, tokens, mask_BT, cotangents, signal: Signal, tiling: Tiling) -> DenseHead:
    def one(_, inputs):
        return None, _tile_logit_gradient(*inputs, signal).astype(student.logits_BTV.dtype)

    inputs = (student, target, tokens, cotangents)
    return DenseHead(heads.over_tiles(one, None, inputs, tokens[0].shape[1], tiling.positions, mask_BT)[1], None)


def _head_gradient(student: Head, target, tokens, mask_BT, cotangents, found, signal: Signal, tiling: Tiling) -> Head:
    """Gradients over hidden states and unembedding; the latter is summed over tiles in float32, where there are several."""
    length, dtype = tokens[0].shape[1], student.hidden_BTD.dtype

    def one(total_DV, inputs):
        head, target, tokens, cotangents, found = inputs
        if tiling.columns is None:
            gradient = _tile_logit_gradient(head, target, tokens, cotangents, signal).astype(dtype)
            hidden_BTD, unembed_DV = heads.operand_gradients(head, gradient)
            total_DV += unembed_DV
        else:
            total_DV, hidden_BTD = vocabulary.gradient(head, target, tokens, cotangents, found, signal, total_DV, tiling.columns)
        return total_DV, hidden_BTD.astype(dtype)

    single = tiling.positions >= length and tiling.columns
    total_DV = jnp.zeros(student.unembed_DV.shape, student.unembed_DV.dtype if single else jnp.promote_types(dtype, jnp.float32))
    inputs = (student, target, tokens, cotangents, found)
    total_DV, hidden_BTD = heads.over_tiles(one, total_DV, inputs, length, tiling.positions, mask_BT)
    return Head(hidden_BTD, total_DV.astype(student.unembed_DV.dtype), student.softcap, None)


_statistics.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)
