"""Jitted sampling: prefill, then a decode loop that ends when every row has stopped. Draws are counted, not streamed.

The uniform of a draw is a function of (key, rollout id, position) and of nothing else: not of the row, the batch, the padding, the mesh or
the number of tokens asked for. A token is the inverse of the law's cumulative distribution, in vocabulary order, at that uniform. Where two
models write, a second uniform of the same kind says which of them writes the token. Where the beginning of a completion is given, what
follows it is drawn with the uniforms of its positions, as if the beginning had been drawn.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax import parallel
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
    if law.greedy:
        best_B1 = jnp.argmax(logits_BV, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits_BV.shape[-1])[None, :] == best_B1, 0.0, -jnp.inf)
    logits_BV = logits_BV / law.temperature
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
    return jax.nn.log_softmax(logits_BV, axis=-1)


def uniforms(key: jax.Array, id_B: jax.Array, position: jax.Array) -> jax.Array:
    """Uniforms in [0, 1) for the draws of rollouts `id_B` at a completion position, [B] float32."""
    one = lambda rollout_id: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, rollout_id), position))
    return jax.vmap(one)(id_B)


def draw(logits_BV: jax.Array, uniform_B: jax.Array, law: Law) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens [B], their log-prob under the policy at temperature 1, their log-prob under the law)."""
    behaviour_BV = law_logp(logits_BV, law)
    token_B = _inverse(behaviour_BV, uniform_B)
    return token_B, _policy_logp(logits_BV, token_B), _pick(behaviour_BV, token_B)


def draw_mixture(
    student_BV: jax.Array, teacher_BV: jax.Array, uniform_B: jax.Array, writer_B: jax.Array, beta: jax.Array, law: Law, shared: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens [B], their log-prob under the student's policy at temperature 1, their log-prob under the mixture).

    The mixture is beta q + (1 - beta) p of the probabilities, q and p what `law` makes of teacher and student on the first `shared` rows of
    the vocabulary. The teacher writes where `writer_B` is below beta: at the ends of [0, 1] the draws are those of one model alone.
    """
    width = min(student_BV.shape[-1], teacher_BV.shape[-1])
    known_1V = jnp.arange(width)[None, :] < shared
    p_BV, q_BV = (law_logp(jnp.where(known_1V, x_BV[:, :width], -jnp.inf), law) for x_BV in (student_BV, teacher_BV))
    token_B = _inverse(jnp.where((writer_B < beta)[:, None], q_BV, p_BV), uniform_B)
    behaviour_B = jnp.logaddexp(jnp.log(beta) + _pick(q_BV, token_B), jnp.log1p(-beta) + _pick(p_BV, token_B))
    return token_B, _policy_logp(student_BV, token_B), behaviour_B


def _inverse(logp_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    cumulative_BV = jnp.cumsum(jnp.exp(logp_BV), axis=-1)
    # Scaled by the sum as computed, so that rounding never points past the last token; a token of no mass is never at the first crossing.
    return jnp.sum(cumulative_BV <= (uniform_B * cumulative_BV[:, -1])[:, None], axis=-1).astype(jnp.int32)


def _policy_logp(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return _pick(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=-1)


def _pick(x_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "law", "stop_ids", "pad_id"))
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
    width = prompts.tokens_BS.shape[1] + max_new_tokens
    logits_BV, cache = forward.prefill(params, config, prompts.tokens_BS, prompts.mask_BS, cache_length=width)
    key_of_position = functools.partial(uniforms, key, prompts.id_B)
    write = lambda logits_BV, position: draw(logits_BV, key_of_position(position), law)
    read = lambda token_B, cache: forward.decode_step(params, config, token_B, cache)
    return _generate(logits_BV, cache, prompts.id_B, write, read, max_new_tokens, stop_ids, pad_id, given)


_OF_WRITERS = 0xDA66  # folded into a key, gives the key of the uniforms that say who writes


@functools.partial(jax.jit, static_argnames=("config", "teacher_config", "max_new_tokens", "law", "stop_ids", "pad_id"))
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
    models = ((params, config, prompts), (teacher_params, teacher_config, teacher_prompts))
    begun = [
        forward.prefill(params, config, read.tokens_BS, read.mask_BS, cache_length=read.tokens_BS.shape[1] + max_new_tokens)
        for params, config, read in models
    ]
    shared = min(model.valid_vocab_size or model.vocab_size for model in (config, teacher_config))
    of_writers = jax.random.fold_in(key, _OF_WRITERS)

    def write(logits, position):
        uniform_B, writer_B = (uniforms(one, prompts.id_B, position) for one in (key, of_writers))
        return draw_mixture(*logits, uniform_B, writer_B, beta, law, shared)

    def read(token_B, caches):
        steps = [forward.decode_step(params, config, token_B, cache) for (params, config, _), cache in zip(models, caches, strict=True)]
        return tuple(zip(*steps, strict=True))

    logits, caches = zip(*begun, strict=True)
    return _generate(logits, caches, prompts.id_B, write, read, max_new_tokens, stop_ids, pad_id)


def _generate(
    logits: Any,
    cache: Any,
    id_B: jax.Array,
    write: Callable,
    read: Callable,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    given: Given | None = None,
) -> Rollout:
    """The decode loop. Rows that have stopped write padding; the loop ends when all have.

    `write(logits, position)` gives what `draw` gives; `read(token_B, cache)` the logits after these tokens and the cache with them.
    """
    rows = len(id_B)

    def body(carry):
        position, logits, cache, stopped_B, columns = carry
        token_B, logp_B, behaviour_B = write(logits, position)
        token_B, draws_B, ends_B = _or_given(token_B, ~stopped_B, _is_any(token_B, stop_ids), given, position)
        logp_B, behaviour_B = (jnp.where(draws_B, x_B, 0) for x_B in (logp_B, behaviour_B))
        new = (jnp.where(stopped_B, pad_id, token_B), draws_B, logp_B, behaviour_B, ~stopped_B)
        columns = tuple(
            jax.lax.dynamic_update_slice_in_dim(x_BT, x_B[:, None], position, axis=1) for x_BT, x_B in zip(columns, new, strict=False)
        )
        stopped_B |= ends_B
        logits, cache = read(new[0], cache)
        return position + 1, logits, cache, stopped_B, columns

    def unfinished(carry):
        return (carry[0] < max_new_tokens) & ~jnp.all(carry[3])

    shape = (rows, max_new_tokens)
    columns = (jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
    columns += (jnp.zeros(shape, bool),) if given is not None else ()  # what stands there is more than what is drawn
    columns = tuple(parallel.constrain(x, "batch", None) for x in columns)
    stopped_B = jnp.zeros(rows, bool) if given is None or given.ended_B is None else given.ended_B & (given.length_B == 0)
    stopped_B = parallel.constrain(stopped_B, "batch")
    *_, stopped_B, columns = jax.lax.while_loop(unfinished, body, (jnp.int32(0), logits, cache, stopped_B, columns))
    return Rollout(*columns[:4], id_B, stopped_B, *columns[4:])


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


def _is_any(token_B: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    return jnp.any(token_B[:, None] == jnp.array(ids, jnp.int32)[None, :], axis=1) if ids else jnp.zeros(token_B.shape, bool)
