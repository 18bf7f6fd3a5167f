"""Jitted sampling: prefill, then a decode loop that ends when every row has stopped. Draws are counted, not streamed.

The uniform of a draw is a function of (key, rollout id, position) and of nothing else: not of the row, the batch, the padding, the mesh or
the number of tokens asked for. A token is the inverse of the law's cumulative distribution, in vocabulary order, at that uniform. Where two
models write, a second uniform of the same kind says which of them writes the token. Where the beginning of a completion is given, what
follows it is drawn with the uniforms of its positions, as if the beginning had been drawn.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax import parallel
from opd_jax.models import cache as cache_lib
from opd_jax.models import forward
from opd_jax.models.config import ModelConfig
from opd_jax.types import Prompts, Rollout, UserError


@dataclasses.dataclass(frozen=True)
class Law:
    """What is done to the policy before a token is drawn: temperature, then top-k, top-p and min-p on what it left. Raises UserError."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # the most probable tokens up to this mass, the one that crosses it included; 1: all
    top_k: int = 0  # the k most probable tokens; 0: all, 1: greedy
    min_p: float = 0.0  # tokens with at least this share of the largest probability; 0: all

    def __post_init__(self):
        if not (self.temperature == 0 or 1e-4 <= self.temperature < math.inf):
            raise UserError(f"temperature = {self.temperature!r} must be 0 (greedy) or at least 0.0001, and finite")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p!r} must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k!r} must be 0 (all tokens) or more")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p = {self.min_p!r} must be between 0 and 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1


class Given(NamedTuple):
    """The beginning of each completion, which is not drawn. A stop token in it stops nothing."""

    tokens_BT: jax.Array  # int32; what stands behind the beginning is not looked at
    length_B: jax.Array  # int32, tokens of the beginning
    ended_B: jax.Array | None = None  # bool, True: nothing follows the beginning; None: in no row


def law_logp(logits_BV: jax.Array, law: Law) -> jax.Array:
    """Log-probabilities [B, V] of the sampling law, -inf on tokens that it never draws. Ties at a threshold stay."""
    return jax.nn.log_softmax(_kept(logits_BV, law), axis=-1)


def _kept(logits_BV: jax.Array, law: Law) -> jax.Array:
    """Logits [B, V] of the sampling law, -inf on tokens that it never draws; the very array that is given where the law is the policy."""
    if law.greedy:
        best_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits_BV.shape[-1])[None, :] == best_B1, 0.0, -jnp.inf)
    logits_BV = logits_BV if law.temperature == 1 else logits_BV / law.temperature
    if 0 < law.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, law.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if law.top_p < 1:
        descending_BV = -jnp.sort(-logits_BV, axis=-1)
        probability_BV = jax.nn.softmax(descending_BV, axis=-1)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        last_B1 = jnp.sum(before_BV < law.top_p, axis=-1, keepdims=True) - 1
        logits_BV = jnp.where(logits_BV >= jnp.take_along_axis(descending_BV, last_B1, axis=-1), logits_BV, -jnp.inf)
    if law.min_p > 0:
        threshold_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(law.min_p)
        logits_BV = jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)
    return logits_BV


def uniforms(key: jax.Array, id_B: jax.Array, position: jax.Array) -> jax.Array:
    """Uniforms in [0, 1) for the draws of rollouts `id_B` at a completion position, [B] float32."""
    one = lambda rollout_id: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, rollout_id), position))
    return jax.vmap(one)(id_B)


def draw(logits_BV: jax.Array, uniform_B: jax.Array, law: Law) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens [B], their log-prob under the policy at temperature 1, their log-prob under the law)."""
    if law.greedy:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return token_B, _logp(_masses(logits_BV), token_B), jnp.zeros(token_B.shape, logits_BV.dtype)
    kept_BV = _kept(logits_BV, law)
    masses = _masses(kept_BV)
    token_B = _inverse(masses, uniform_B)
    behaviour_B = _logp(masses, token_B)
    return token_B, behaviour_B if kept_BV is logits_BV else _logp(_masses(logits_BV), token_B), behaviour_B


def draw_mixture(
    student_BV: jax.Array, teacher_BV: jax.Array, uniform_B: jax.Array, writer_B: jax.Array, beta: jax.Array, law: Law, shared: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens [B], their log-prob under the student's policy at temperature 1, their log-prob under the mixture).

    The mixture is beta q + (1 - beta) p of the probabilities, q and p what `law` makes of teacher and student on the first `shared` rows of
    the vocabulary. The teacher writes where `writer_B` is below beta: at the ends of [0, 1] the draws are those of one model alone.
    """
    width = min(student_BV.shape[-1], teacher_BV.shape[-1])
    known_1V = jnp.arange(width)[None, :] < shared
    p, q = (_masses(_kept(jnp.where(known_1V, x_BV[:, :width], -jnp.inf), law)) for x_BV in (student_BV, teacher_BV))
    theirs_B = writer_B < beta
    of_writer = lambda q_B, p_B: jnp.where(theirs_B.reshape(-1, *(1,) * (q_B.ndim - 1)), q_B, p_B)
    token_B = _inverse(jax.tree.map(of_writer, q, p), uniform_B)
    behaviour_B = jnp.logaddexp(jnp.log(beta) + _logp(q, token_B), jnp.log1p(-beta) + _logp(p, token_B))
    return token_B, _logp(_masses(student_BV), token_B), behaviour_B


_BLOCK = 128  # tokens; a divisor of most large vocabularies


class _Masses(NamedTuple):
    """The exponentials of a row's logits, not normalised, as their sums over blocks of the vocabulary: they are never written out."""

    logits_BNW: jax.Array  # N blocks of W tokens, -inf behind the last token
    largest_B: jax.Array
    sum_BN: jax.Array  # of exp(logit - largest)


def _masses(logits_BV: jax.Array) -> _Masses:
    rows, vocabulary = logits_BV.shape
    width = _BLOCK if vocabulary > 4 * _BLOCK else vocabulary
    logits_BNW = jnp.pad(logits_BV, ((0, 0), (0, -vocabulary % width)), constant_values=-jnp.inf).reshape(rows, -1, width)
    largest_B = jnp.max(logits_BV, axis=-1)
    return _Masses(logits_BNW, largest_B, jnp.sum(jnp.exp(logits_BNW - largest_B[:, None, None]), axis=-1))


def _inverse(masses: _Masses, uniform_B: jax.Array) -> jax.Array:
    """The tokens at which the cumulative distributions, in vocabulary order, exceed the uniforms.

    First the block, then the token in it: a cumulative sum over the whole vocabulary took a fifth of a decode step on a CPU.
    """
    level_B = uniform_B * jnp.sum(masses.sum_BN, axis=-1)
    block_B, before_B = _first_above(masses.sum_BN, level_B)
    logits_BW = jnp.take_along_axis(masses.logits_BNW, block_B[:, None, None], axis=1)[:, 0]
    token_B, _ = _first_above(jnp.exp(logits_BW - masses.largest_B[:, None]), level_B - before_B)
    return block_B * logits_BW.shape[-1] + token_B


def _first_above(mass_BN: jax.Array, level_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the first entry up to which there is more mass than `level_B`, the mass before it).

    Rounding never points at an entry without mass, nor past the last one with some.
    """
    cumulative_BN = jnp.cumsum(mass_BN, axis=-1)
    reached_BN = jnp.where(mass_BN > 0, cumulative_BN, -jnp.inf)
    above_BN = (reached_BN > level_B[:, None]) | (reached_BN == jnp.max(reached_BN, axis=-1, keepdims=True))
    first_B = jnp.argmax(above_BN, axis=-1).astype(jnp.int32)
    return first_B, _pick(cumulative_BN - mass_BN, first_B)


def _logp(masses: _Masses, token_B: jax.Array) -> jax.Array:
    logits_BV = masses.logits_BNW.reshape(len(token_B), -1)
    return _pick(logits_BV, token_B) - masses.largest_B - jnp.log(jnp.sum(masses.sum_BN, axis=-1))


def _pick(x_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]


@dataclasses.dataclass(frozen=True)
class _How:
    """What is static of a rollout: the models that write it together, the first one's policy being recorded, and how."""

    configs: tuple[ModelConfig | forward.Model, ...]  # one, or student and teacher
    max_new_tokens: int
    law: Law
    stop_ids: tuple[int, ...]
    pad_id: int

    @property
    def ours(self) -> bool:
        """Whether the inside of every cache is known."""
        return all(isinstance(config, ModelConfig) for config in self.configs)


class _Draws(NamedTuple):
    """The random numbers of a rollout, made before its first token, and what is given in place of draws."""

    uniform_TB: jax.Array
    writer_TB: jax.Array | None  # of a mixture, whose share of the teacher is beta
    beta: jax.Array | None
    given: Given | None


class _State(NamedTuple):
    position: jax.Array  # int32 scalar, of the token that is written next
    token_B: jax.Array  # int32, the one before it, which no model has read
    caches: tuple
    stopped_B: jax.Array
    columns: tuple  # the per-token arrays of the Rollout


def sample_tokens(
    params: dict,
    config: ModelConfig,
    prompts: Prompts,
    *,
    key: jax.Array,
    max_new_tokens: int,
    law: Law,
    stop_ids: tuple[int, ...],
    pad_id: int,
    given: Given | None = None,
) -> Rollout:
    """Completions [B, max_new_tokens] of one model, after their beginnings where such are given."""
    how = _How((config,), max_new_tokens, law, stop_ids, pad_id)
    return _sample((params,), (prompts,), how, key, None, given)


def sample_mixture_tokens(
    params: dict,
    config: ModelConfig,
    prompts: Prompts,
    teacher_params: dict,
    teacher_config: ModelConfig,
    teacher_prompts: Prompts,
    *,
    beta: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    law: Law,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """Completions [B, max_new_tokens] that student and teacher write together, token by token, each after a prompt of its own."""
    how = _How((config, teacher_config), max_new_tokens, law, stop_ids, pad_id)
    return _sample((params, teacher_params), (prompts, teacher_prompts), how, key, beta, None)


def _sample(params: tuple, prompts: tuple[Prompts, ...], how: _How, key: jax.Array, beta: jax.Array | None, given: Given | None) -> Rollout:
    """Prompts are read by one program, tokens by others, which serve prompts of other widths too. The host waits for none of them."""
    widths, total = [read.tokens_BS.shape[1] for read in prompts], how.max_new_tokens
    stages = make_stages(widths, total) if how.ours else (Stage(total, tuple(width + total for width in widths)),)
    draws, state = _begin(params, prompts, key, beta, given, how=how, lengths=stages[0].lengths)
    for stage in stages if how.max_new_tokens > 1 else ():
        state = state._replace(caches=_grown(state.caches, stage.lengths)) if stage is not stages[0] else state
        # A cache of the user's may hold what is not its own, such as parameters.
        state = (_decode_in_place if how.ours else _decode)(params, state, draws, jnp.int32(stage.end), how=how)
    return Rollout(*state.columns[:4], jnp.asarray(prompts[0].id_B), state.stopped_B, *state.columns[4:])


class Stage(NamedTuple):
    """Tokens that are written with caches of one length."""

    end: int  # the position that is not written
    lengths: tuple[int, ...]  # slots of each model's cache


_SHORT = 64  # slots; a cache that stays below has its whole length at once


def make_stages(widths: list[int], max_new_tokens: int) -> tuple[Stage, ...]:
    """Of writers with prompts of these widths. Attention reads every slot, full or not, so that a cache grows as it fills; few lengths make
    few programs."""
    width, slots = widths[0], max_new_tokens - 1  # the last token is not read
    length, ends = max(bucket(width + 1), min(_SHORT, bucket(width + slots))), []
    while length < bucket(width + slots):
        ends.append(length - width)
        length = bucket(length + 1)
    return tuple(Stage(min(slots, end) + 1, tuple(bucket(width + end) for width in widths)) for end in (*ends, slots))


def bucket(slots: int) -> int:
    """The next 2^n or 3 * 2^n from 16 on."""
    power = 1 << (max(slots, 16) - 1).bit_length()
    return power * 3 // 4 if power > 16 and power * 3 // 4 >= slots else power


@functools.partial(jax.jit, static_argnames="lengths")
def _grown(caches: tuple, lengths: tuple[int, ...]) -> tuple:
    return tuple(map(cache_lib.grown, caches, lengths))


_OF_WRITERS = 0xDA66  # folded into a key, gives the key of the uniforms that say who writes


@functools.partial(jax.jit, static_argnames=("how", "lengths"))
def _begin(
    params: tuple,
    prompts: tuple[Prompts, ...],
    key: jax.Array,
    beta: jax.Array | None,
    given: Given | None,
    *,
    how: _How,
    lengths: tuple[int, ...],
) -> tuple[_Draws, _State]:
    """Reads the prompts and writes the first token."""
    id_B, shape = prompts[0].id_B, (len(prompts[0].id_B), how.max_new_tokens)
    of_positions = lambda key: jax.vmap(uniforms, in_axes=(None, None, 0))(key, id_B, jnp.arange(how.max_new_tokens))
    draws = _Draws(of_positions(key), None if beta is None else of_positions(jax.random.fold_in(key, _OF_WRITERS)), beta, given)
    columns = (jnp.full(shape, how.pad_id, jnp.int32), jnp.zeros(shape, bool))
    columns += (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
    columns += (jnp.zeros(shape, bool),) if given is not None else ()  # what stands there is more than what is drawn
    columns = tuple(parallel.constrain(x, "batch", None) for x in columns)
    stopped_B = jnp.zeros(shape[0], bool) if given is None or given.ended_B is None else given.ended_B & (given.length_B == 0)
    logits, caches = zip(
        *(
            forward.prefill(params, config, read.tokens_BS, read.mask_BS, cache_length=length)
            for params, config, read, length in zip(params, how.configs, prompts, lengths, strict=True)
        ),
        strict=True,
    )
    state = _State(jnp.int32(0), jnp.zeros(shape[0], jnp.int32), caches, parallel.constrain(stopped_B, "batch"), columns)
    return draws, _written(state, logits, draws, how)


def _until(params: tuple, state: _State, draws: _Draws, end: jax.Array, *, how: _How) -> _State:
    """Reads and writes tokens up to position `end`, or until every row has stopped. Rows that have stopped write padding."""

    def body(state: _State) -> _State:
        each = zip(params, how.configs, state.caches, strict=True)
        steps = [forward.decode_step(params, config, state.token_B, cache) for params, config, cache in each]
        logits, caches = zip(*steps, strict=True)
        return _written(state._replace(caches=caches), logits, draws, how)

    return jax.lax.while_loop(lambda state: (state.position < end) & ~jnp.all(state.stopped_B), body, state)


_decode = jax.jit(_until, static_argnames="how")
_decode_in_place = jax.jit(_until, static_argnames="how", donate_argnames="state")


def _written(state: _State, logits: tuple[jax.Array, ...], draws: _Draws, how: _How) -> _State:
    """The state with one more token in every row that has not stopped."""
    position, stopped_B = state.position, state.stopped_B
    at_B = lambda x_TB: jax.lax.dynamic_index_in_dim(x_TB, position, keepdims=False)
    if draws.beta is None:
        token_B, logp_B, behaviour_B = draw(*logits, at_B(draws.uniform_TB), how.law)
    else:
        shared = min(model.valid_vocab_size or model.vocab_size for model in how.configs)
        uniform_B, writer_B = at_B(draws.uniform_TB), at_B(draws.writer_TB)
        token_B, logp_B, behaviour_B = draw_mixture(*logits, uniform_B, writer_B, draws.beta, how.law, shared)
    token_B, draws_B, ends_B = _or_given(token_B, ~stopped_B, is_any(token_B, how.stop_ids), draws.given, position)
    logp_B, behaviour_B = (jnp.where(draws_B, x_B, 0) for x_B in (logp_B, behaviour_B))
    token_B = jnp.where(stopped_B, how.pad_id, token_B)
    new = (token_B, draws_B, logp_B, behaviour_B, ~stopped_B)
    write = lambda x_BT, x_B: jax.lax.dynamic_update_slice_in_dim(x_BT, x_B[:, None].astype(x_BT.dtype), position, axis=1)
    columns = tuple(map(write, state.columns, new))
    return _State(position + 1, token_B, state.caches, stopped_B | ends_B, columns)


def _or_given(
    token_B: jax.Array, writes_B: jax.Array, stops_B: jax.Array, given: Given | None, position: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the tokens of a position, which of them are drawn, which end their row): of what was drawn, or of what was given in its place."""
    if given is None:
        return token_B, writes_B, stops_B
    inside_B = position < given.length_B
    given_B = jax.lax.dynamic_index_in_dim(given.tokens_BT, position, axis=1, keepdims=False)
    stops_B &= ~inside_B
    if given.ended_B is not None:
        stops_B |= given.ended_B & (position + 1 >= given.length_B)
    return jnp.where(inside_B, given_B, token_B), writes_B & ~inside_B, stops_B


def is_any(token_B: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    return jnp.any(token_B[:, None] == jnp.array(ids, jnp.int32)[None, :], axis=1) if ids else jnp.zeros(token_B.shape, bool)
