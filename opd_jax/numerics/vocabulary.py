"""Statistics from tiles of the vocabulary, for vocabularies of which no tile holds enough positions whole; the same numbers as in
token_stats.py to rounding, at one more product with each unembedding.

Two passes over the vocabulary: the first finds the normalisers, the log-probs of the tokens and what is largest, the second sums what needs
log-probs. A loss on a few entries (a top-k, the sampled token) is made from those entries and one for all others, by the same code as on a
whole vocabulary: off its entries the gradient is in proportion to p. So every gradient over a tile of logits is, with c per position,
    c_local slope + c p + (values at a few ids),
and the backward pass makes each tile of the student once more, and of the teacher where `slope` is that of the whole vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.numerics import columns as columns_lib
from opd_jax.numerics import entries, heads, supports
from opd_jax.numerics.columns import Columns, add_log_sum, log_sum, look_up, no_log_sum, over_columns
from opd_jax.numerics.heads import Head
from opd_jax.numerics.signals import Signal
from opd_jax.numerics.targets import SparseTarget, Target, TokenTarget

_FORMS = frozenset(
    ("logp", "local", "extra_logp", "target_logp", "extra_target_logp", "kl", "entropy", "target_entropy", "mass", "target_mass", "overlap")
)


def has_form(student, target, needs) -> bool:
    """Whether these statistics can be made so: of heads, not of logits or pooled laws, and without those of gradients and of members."""
    one_law = not isinstance(target, Target) or (target.weight_MBT is None and isinstance(target.heads[0], Head))
    return isinstance(student, Head) and one_law and set(needs) <= _FORMS


class Seen(NamedTuple):
    """What the first pass has found of a law."""

    normaliser_BT: jax.Array | None  # log-sum-exp of its logits; None of a law that comes from a cache
    asked_logp_BTP: jax.Array | None  # log-probs of the sampled and the extra tokens
    top_logp_BTK: jax.Array | None
    top_ids_BTK: jax.Array | None
    rest: columns_lib.LogSum | None = None  # of what is outside the top, of a law that comes from a cache


class Found(NamedTuple):
    """What the backward pass needs of the forward one."""

    normaliser_BT: jax.Array
    target_normaliser_BT: jax.Array | None
    slope_BT: jax.Array  # the gradient of `local` is pull at ids, and -slope p everywhere; of a whole vocabulary its own slope beside that
    ids_BTM: jax.Array | None
    pull_BTM: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What there is to find, from the signal and the statistics that are wanted."""

    whole: bool  # `local` is a sum over the whole vocabulary
    student_top: int  # k of the student's law, 0: none
    target_top: int
    on_student: bool  # the support has the student's top
    on_target: bool
    token: bool  # the sampled token is one of the entries
    on_token: bool  # and on the support


def _plan(signal: Signal, wanted: tuple[str, ...], vocab: int) -> _Plan:
    few = bool({"local", "mass", "target_mass"} & set(wanted))  # statistics of the entries, where there are few
    best = "local" in wanted and signal.kind == "top1_cross_entropy"
    label = "local" in wanted and signal.kind == "nll"
    topk = signal.is_topk and signal.k < vocab
    name = signal.support.removesuffix("+token")
    on_student, on_target = (few and topk and name in (own, "topk_union") for own in ("topk_student", "topk_teacher"))
    overlap = topk and "overlap" in wanted
    sampled = few and signal.support == "sampled"
    return _Plan(
        whole="local" in wanted and not (topk or sampled or best or label),
        student_top=signal.k if on_student or overlap else 0,
        target_top=signal.k if on_target or overlap else int(best),
        on_student=on_student,
        on_target=on_target or best,
        token=sampled or label or (few and topk and signal.reads_tokens),
        on_token=sampled or signal.adds_token,
    )


# ---- forward


def statistics(student: Head, target, tokens, signal: Signal, wanted: tuple[str, ...], width: int) -> tuple[list[jax.Array], Found]:
    """(the wanted statistics of some positions, what the backward pass needs)."""
    tokens_BT, extra_BTN = tokens
    plan = _plan(signal, wanted, heads.vocabulary(student))
    asked_BTP = tokens_BT[..., None] if extra_BTN is None else jnp.concatenate([tokens_BT[..., None], extra_BTN], axis=-1)
    laws = [(student, signal.student_temperature, plan.student_top)]
    if isinstance(target, Target):
        laws.append((target.heads[0], signal.teacher_temperature, plan.target_top))
    seen = _first_pass(laws, asked_BTP, width)
    own, other = (*seen, _cached(target, plan.target_top))[:2]
    few = _entries(plan, tokens_BT, own, other)
    sums = _second_pass(laws, seen, few, plan, signal, wanted, width)
    values, slope_BT, pull_BTM = _local(plan, signal, tokens_BT, own, other, few, sums)
    make = values | {
        "logp": lambda: own.asked_logp_BTP[..., 0],
        "extra_logp": lambda: own.asked_logp_BTP[..., 1:],
        "target_logp": lambda: other.asked_logp_BTP[..., 0],
        "extra_target_logp": lambda: other.asked_logp_BTP[..., 1:],
        "kl": lambda: sums["kl"],
        "entropy": lambda: sums["entropy"],
        "target_entropy": lambda: sums["target_entropy"],
        "overlap": lambda: _overlap(own, other, signal.k),
    }
    found = Found(own.normaliser_BT, other.normaliser_BT if plan.whole and other else None, slope_BT, few and few[0], pull_BTM)
    return [make[name]() for name in wanted], found


def _first_pass(laws, asked_BTP: jax.Array, width: int) -> list[Seen]:
    """Normalisers, log-probs of the asked tokens, and the k largest, of one law or two."""
    vocab = heads.vocabulary(laws[0][0])

    def start(head, _, k):
        shape, dtype = columns_lib.begin(head)
        top = columns_lib.no_top(shape, k, vocab, dtype) if k else None
        return no_log_sum(shape, dtype), jnp.zeros(asked_BTP.shape, dtype), top

    def see(seen, columns: Columns):
        found = []
        for (head, temperature, k), (total, asked, top) in zip(laws, seen, strict=True):
            z_BTW = heads.logits(columns.of(head), temperature)
            top = columns_lib.add_top(top, z_BTW, columns) if k else None
            found.append((add_log_sum(total, z_BTW), asked + look_up(z_BTW, asked_BTP, columns), top))
        return found

    result = []
    for total, asked, top in over_columns(see, [start(*law) for law in laws], vocab, width):
        normaliser_BT = log_sum(total)
        less = lambda x, n=normaliser_BT: x - n[..., None]
        result.append(Seen(normaliser_BT, less(asked), *((less(top[0]), top[1]) if top else (None, None))))
    return result


def _cached(target, k: int) -> Seen | None:
    """What a cached law knows."""
    if isinstance(target, TokenTarget):
        return Seen(None, target.logp_BT[..., None], None, None)
    if not isinstance(target, SparseTarget):
        return None
    if not k:
        return Seen(None, None, None, None)
    top_BTK, places_BTK = jax.lax.top_k(target.logp_BTK, k)
    outside = jnp.put_along_axis(target.logp_BTK, places_BTK, -jnp.inf, axis=-1, inplace=False)
    rest = add_log_sum(no_log_sum(outside.shape[:2], outside.dtype), jnp.concatenate([outside, target.rest_BT[..., None]], axis=-1))
    return Seen(None, None, top_BTK, jnp.take_along_axis(target.ids_BTK, places_BTK, axis=-1), rest)


class _Few(NamedTuple):
    """The entries of a support, each id once."""

    ids_BTM: jax.Array
    first_BTM: jax.Array  # bool: no earlier entry has this id
    on_M: tuple[bool, ...]  # whether it is on the support


def _entries(plan: _Plan, tokens_BT: jax.Array, own: Seen, other: Seen | None) -> _Few | None:
    """The tops that the support consists of, and the token where it is asked for; None where there are none."""
    groups = [(own.top_ids_BTK, True)] if plan.on_student else []
    groups += [(other.top_ids_BTK, True)] if plan.on_target else []
    groups += [(tokens_BT[..., None], plan.on_token)] if plan.token else []
    if not groups:
        return None
    first, seen = [], None
    for ids, _ in groups:  # ids of one group differ
        twice = jnp.zeros(ids.shape, bool) if seen is None else jnp.any(ids[..., :, None] == seen[..., None, :], axis=-1)
        first.append(~twice)
        seen = ids if seen is None else jnp.concatenate([seen, ids], axis=-1)
    on = tuple(on for ids, on in groups for _ in range(ids.shape[-1]))
    return _Few(seen, jnp.concatenate(first, axis=-1), on)


def _second_pass(laws, seen: list[Seen], few: _Few | None, plan: _Plan, signal: Signal, wanted, width: int) -> dict:
    """Sums of what needs log-probs; {} where nothing does."""
    kl = entries.entry("reverse_kl", None)
    whole = supports.entry_of(signal) if plan.whole else None
    crossed = plan.on_student or plan.on_target  # log-probs at ids that the first pass has found
    asked = [name for name in ("kl", "entropy", "target_entropy") if name in wanted]

    def make(columns: Columns, seen_so_far: dict) -> dict:
        law = [heads.logits(columns.of(h), t) - s.normaliser_BT[..., None] for (h, t, _), s in zip(laws, seen, strict=True)]
        logp, logq = (*law, None)[:2]
        values = {"kl": lambda: kl(logp, logq)[0], "entropy": lambda: _surprise(logp), "target_entropy": lambda: _surprise(logq)}
        sums = {name: jnp.sum(values[name](), axis=-1) for name in asked}
        if whole:
            sums["local"], sums["slope"] = (jnp.sum(x, axis=-1) for x in whole(logp, logq))
        if crossed:
            sums |= {f"at {i}": look_up(x, few.ids_BTM, columns) for i, x in enumerate(law)}
        sums = jax.tree.map(jnp.add, {name: seen_so_far[name] for name in sums}, sums)
        if crossed and signal.tail == "bucket":
            outside = [columns_lib.put(x, few.ids_BTM, -jnp.inf, columns) for x in law]
            sums |= {f"rest {i}": add_log_sum(seen_so_far[f"rest {i}"], x) for i, x in enumerate(outside)}
        return sums

    names = [*asked, *(["local", "slope"] if whole else [])]
    shape, dtype = columns_lib.begin(laws[0][0])
    start = {name: jnp.zeros(shape, dtype) for name in names}
    if crossed:
        start |= {f"at {i}": jnp.zeros(few.ids_BTM.shape, dtype) for i in range(len(laws))}
        start |= {f"rest {i}": no_log_sum(shape, dtype) for i in range(len(laws)) if signal.tail == "bucket"}
    return over_columns(lambda sums, columns: make(columns, sums), start, heads.vocabulary(laws[0][0]), width) if start else {}


def _surprise(logp: jax.Array) -> jax.Array:
    return -jnp.where(jnp.isneginf(logp), 0, jnp.exp(logp) * logp)


def _local(plan: _Plan, signal: Signal, tokens_BT, own: Seen, other: Seen | None, few: _Few | None, sums: dict):
    """(how to make `local` and the masses, slope [B, t] and pull [B, t, M] of Found)."""
    ones = lambda: jnp.ones(tokens_BT.shape, own.normaliser_BT.dtype)
    if few is None:
        make = {"local": lambda: sums["local"], "mass": ones, "target_mass": ones}
        return make, sums.get("slope", jnp.zeros(tokens_BT.shape, own.normaliser_BT.dtype)), None
    logp = _with_rest(few, sums.get("at 0", own.asked_logp_BTP[..., :1]), sums.get("rest 0"))
    logq = None
    if other is not None and (other.asked_logp_BTP is not None or plan.on_target):  # of a top from a cache the token's is not known
        at_BTM = sums.get("at 1", other.top_logp_BTK if plan.on_target else other.asked_logp_BTP[..., :1])
        logq = _with_rest(few, at_BTM, sums.get("rest 1", other.rest))
    on_BTM = jnp.pad(few.first_BTM & jnp.array(few.on_M)[None, None], ((0, 0), (0, 0), (0, 1)))
    place_BT = jnp.argmax(few.ids_BTM == tokens_BT[..., None], axis=-1)
    if signal.kind == "top1_cross_entropy":  # the only entry is the label
        signal, place_BT = dataclasses.replace(signal, kind="nll"), jnp.zeros_like(place_BT)
    whole = signal.support == "full"
    make = {
        "mass": ones if whole else lambda: supports.mass(logp, on_BTM),
        "target_mass": ones if whole else lambda: supports.mass(logq, on_BTM),
    }
    loss_BT, gradient = supports.on_support(logp, logq, place_BT, on_BTM, signal)
    p = jnp.exp(logp)
    share_BT = jnp.where(p[..., -1] > 0, gradient[..., -1] / jnp.where(p[..., -1] > 0, p[..., -1], 1), 0)
    pull_BTM = jnp.where(few.first_BTM, gradient[..., :-1] - p[..., :-1] * share_BT[..., None], 0)
    return make | {"local": lambda: loss_BT}, -share_BT, pull_BTM


def _with_rest(few: _Few, logp_BTM: jax.Array, rest) -> jax.Array:
    """Log-probs of the entries, an id's second one without mass, and of all other tokens together, [B, t, M + 1]."""
    logp_BTM = jnp.where(few.first_BTM, logp_BTM, -jnp.inf)
    # What depends on the last bits of the rest has summed it outside.
    rest_BT = log_sum(rest) if rest is not None else jnp.log(jnp.maximum(1 - jnp.sum(jnp.exp(logp_BTM), axis=-1), 0))
    return jnp.concatenate([logp_BTM, rest_BT[..., None]], axis=-1)


def _overlap(own: Seen, other: Seen, k: int) -> jax.Array:
    if own.top_ids_BTK is None:
        return jnp.ones(own.normaliser_BT.shape, own.normaliser_BT.dtype)
    same = own.top_ids_BTK[..., :, None] == other.top_ids_BTK[..., None, :]
    return jnp.sum(same, axis=(-2, -1), dtype=own.normaliser_BT.dtype) / k


# ---- backward


def gradient(student: Head, target, tokens, cotangents: dict, found: Found, signal: Signal, total_DV: jax.Array, width: int):
    """(total_DV with the gradient over the unembedding added, that over the hidden states [B, t, D] in float32) of some positions."""

    def one(carry, columns: Columns):
        hidden_BTD, total_DV = carry
        tile = columns.of(student)
        gradient_BTW = _logit_gradient(tile, target, tokens, cotangents, found, signal, columns).astype(tile.hidden_BTD.dtype)
        hidden, unembed = heads.operand_gradients(tile, gradient_BTW)
        return hidden_BTD + hidden, columns.add(total_DV, unembed, dtype)

    dtype = total_DV.dtype
    start = jnp.zeros(student.hidden_BTD.shape, columns_lib.begin(student)[1]), columns_lib.bits(total_DV)
    hidden_BTD, total_DV = over_columns(one, start, heads.vocabulary(student), width)
    return columns_lib.of_bits(total_DV, dtype), hidden_BTD


def _logit_gradient(tile: Head, target, tokens, cotangents: dict, found: Found, signal: Signal, columns: Columns) -> jax.Array:
    """Gradient over hidden @ unembed of one tile, [B, t, W]."""
    tokens_BT, extra_BTN = tokens
    logp = heads.logits(tile, signal.student_temperature) - found.normaliser_BT[..., None]
    pulls, weight_BT = [], jnp.zeros_like(found.normaliser_BT)
    gradient = jnp.zeros_like(logp)
    if "logp" in cotangents:
        pulls.append((tokens_BT[..., None], cotangents["logp"][..., None]))
        weight_BT += cotangents["logp"]
    if "extra_logp" in cotangents:
        pulls.append((extra_BTN, cotangents["extra_logp"]))
        weight_BT += jnp.sum(cotangents["extra_logp"], axis=-1)
    if "local" in cotangents:
        # A masked token's loss may be infinite: it must not reach the gradient as 0 * inf.
        cotangent_BT = cotangents["local"]
        times = lambda x: jnp.where(cotangent_BT[..., None] != 0, cotangent_BT[..., None] * x, 0)
        weight_BT += times(found.slope_BT[..., None])[..., 0]
        if found.pull_BTM is not None:
            pulls.append((found.ids_BTM, times(found.pull_BTM)))
        else:
            gradient = times(supports.entry_of(signal)(logp, _target_logp(target, found, signal, columns))[1])
    gradient -= weight_BT[..., None] * jnp.exp(logp)
    for ids, values in pulls:
        gradient = columns_lib.put(gradient, ids, values, columns, add=True)
    return heads.through_softcap(tile, gradient / signal.student_temperature)


def _target_logp(target, found: Found, signal: Signal, columns: Columns) -> jax.Array | None:
    if found.target_normaliser_BT is None:
        return None
    return heads.logits(columns.of(target.heads[0]), signal.teacher_temperature) - found.target_normaliser_BT[..., None]
