"""Continuous batching: fewer slots than rollouts. A slot whose rollout has ended goes on with the next prompt, so that none runs idle.

What is drawn is counted by rollout and position, not by slot: completions are those of sampler.sample_tokens. All prompts are read first.
A slot's tokens stand in its cache up to the index that all slots share, a new prompt right before it; when the cache is full, what stands
in it moves to its front.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax import sampler
from opd_jax.models import cache as cache_lib
from opd_jax.models import transformer
from opd_jax.models.cache import Cache
from opd_jax.models.config import ModelConfig
from opd_jax.sampler import Law
from opd_jax.types import Prompts, Rollout


class _Read(NamedTuple):
    """Rollouts whose prompts have been read, and whose first token is drawn."""

    first: tuple  # what sampler.draw gives
    keys_BKSH: tuple[jax.Array, ...]
    values_BKSH: tuple[jax.Array, ...]


class _Queue(NamedTuple):
    """All N rollouts, those that go on after their first token in front."""

    row_N: jax.Array  # int32
    waiting: jax.Array  # int32 scalar, how many of them go on
    token_N: jax.Array  # int32, the first
    mask_NS: jax.Array
    uniform_NT: jax.Array
    keys_NKSH: tuple[jax.Array, ...]
    values_NKSH: tuple[jax.Array, ...]


class _Slots(NamedTuple):
    row_B: jax.Array  # int32, the rollout of each slot, N: none
    position_B: jax.Array  # int32, of the token that is written next
    token_B: jax.Array  # int32, the one before it, which the model has not read
    cache: Cache
    taken: jax.Array  # int32 scalar, rollouts that have left the queue
    columns: tuple  # tokens, mask, logp, behaviour_logp [N, T] and stopped [N]


def sample_tokens(
    params: dict,
    config: ModelConfig,
    prompts: Prompts,
    *,
    slots: int,
    key: jax.Array,
    max_new_tokens: int,
    law: Law,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """As sampler.sample_tokens, in `slots` rows at once, fewer than there are prompts."""
    rows, mask_NS = len(prompts.id_B), jnp.asarray(prompts.mask_BS).astype(bool)
    uniform_NT = _uniforms(key, prompts.id_B, max_new_tokens)
    read = []
    for start in range(0, rows, slots):
        at = jnp.minimum(jnp.arange(start, start + slots), rows - 1)  # the last ones are filled up, so that nothing recompiles
        read.append(_read(params, jnp.asarray(prompts.tokens_BS)[at], mask_NS[at], uniform_NT[at, 0], config=config, law=law))
    static = {"config": config, "law": law, "slots": slots, "stop_ids": stop_ids, "pad_id": pad_id}
    tokens, mask, logp, behaviour, stopped_N = _run(params, tuple(read), mask_NS, uniform_NT, **static)
    return Rollout(tokens, mask, logp, behaviour, jnp.asarray(prompts.id_B), stopped_N)


def cache_length(prompt: int, max_new_tokens: int) -> int:
    """Places in the cache of each row: those of a rollout, and half a completion more before what stands in it has to move."""
    return sampler.bucket(prompt + max_new_tokens - 1 + max_new_tokens // 2)


@functools.partial(jax.jit, static_argnames="length")
def _uniforms(key: jax.Array, id_N: jax.Array, length: int) -> jax.Array:
    return jax.vmap(sampler.uniforms, in_axes=(None, None, 0), out_axes=1)(key, id_N, jnp.arange(length))


@functools.partial(jax.jit, static_argnames=("config", "law"))
def _read(params: dict, tokens_BS: jax.Array, mask_BS: jax.Array, uniform_B: jax.Array, *, config: ModelConfig, law: Law) -> _Read:
    logits_BV, cache = transformer.prefill(params, config, tokens_BS, mask_BS, cache_length=mask_BS.shape[1])
    return _Read(sampler.draw(logits_BV, uniform_B, law), cache.keys_BKLH, cache.values_BKLH)


@functools.partial(jax.jit, static_argnames=("config", "law", "slots", "stop_ids", "pad_id"))
def _run(
    params: dict,
    read: tuple[_Read, ...],
    mask_NS: jax.Array,
    uniform_NT: jax.Array,
    *,
    config: ModelConfig,
    law: Law,
    slots: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> tuple:
    """Columns of all rollouts."""
    (rows, length), prompt = uniform_NT.shape, mask_NS.shape[1]
    read = jax.tree.map(lambda *x: jnp.concatenate(x)[:rows], *read)
    columns, goes_on_N = _first_column(read, uniform_NT.shape, stop_ids, pad_id)
    order_N, waiting = jnp.argsort(~goes_on_N, stable=True), goes_on_N.sum(dtype=jnp.int32)
    queue = _Queue(order_N, waiting, read.first[0], mask_NS, uniform_NT, read.keys_BKSH, read.values_BKSH)
    longest = prompt + length - 1  # slots of a rollout; its last token is not read
    size = cache_length(prompt, length)

    def step(state: _Slots) -> _Slots:
        logits_BV, cache = transformer.decode_step(params, config, state.token_B, state.cache)
        drawn = sampler.draw(logits_BV, uniform_NT.at[state.row_B, state.position_B].get(mode="clip"), law)
        stops_B = sampler.is_any(drawn[0], stop_ids)
        ends_B = stops_B | (state.position_B == length - 1)
        at = state.row_B, state.position_B
        *per_token, stopped_N = state.columns
        new = (drawn[0], jnp.ones(slots, bool), *drawn[1:])
        columns = [x_NT.at[at].set(x_B, mode="drop") for x_NT, x_B in zip(per_token, new, strict=True)]
        columns = (*columns, stopped_N.at[state.row_B].set(stops_B, mode="drop"))
        return _fill(_Slots(jnp.where(ends_B, rows, state.row_B), state.position_B + 1, drawn[0], cache, state.taken, columns), queue)

    def stretch(state: _Slots) -> _Slots:
        state = jax.lax.while_loop(lambda s: jnp.any(s.row_B < rows) & (s.cache.index < size), step, state)
        return state._replace(cache=cache_lib.moved(state.cache, longest))

    cache = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), cache_lib.from_prompt(*read[1:], mask_NS, prompt))
    cache = cache_lib.grown(cache.replace(index=jnp.int32(longest)), size)
    none_B = jnp.zeros(slots, jnp.int32)
    state = _fill(_Slots(none_B + rows, none_B, none_B, cache, jnp.int32(0), columns), queue)
    return jax.lax.while_loop(lambda state: jnp.any(state.row_B < rows), stretch, state).columns


def _first_column(read: _Read, shape: tuple[int, int], stop_ids: tuple[int, ...], pad_id: int) -> tuple[tuple, jax.Array]:
    """(columns with the first tokens in them, which rollouts go on after theirs)."""
    token_N, *logps = read.first
    stopped_N = sampler.is_any(token_N, stop_ids)
    begin = lambda fill, x_N: jnp.full(shape, fill, x_N.dtype).at[:, 0].set(x_N)
    columns = (begin(pad_id, token_N), begin(False, jnp.ones(shape[0], bool)), *(begin(0, x_N) for x_N in logps), stopped_N)
    return columns, ~stopped_N & (shape[1] > 1)


def _fill(state: _Slots, queue: _Queue) -> _Slots:
    """Puts rollouts of the queue into the slots that have none, one by one."""
    rows = len(queue.row_N)

    def put(state: _Slots) -> _Slots:
        slot, row = jnp.argmax(state.row_B == rows), queue.row_N[state.taken]
        keys, values = ([x_NKSH[row] for x_NKSH in each] for each in (queue.keys_NKSH, queue.values_NKSH))
        cache = cache_lib.placed(state.cache, slot, keys, values, queue.mask_NS[row])
        return _Slots(
            state.row_B.at[slot].set(row),
            state.position_B.at[slot].set(1),
            state.token_B.at[slot].set(queue.token_N[row]),
            cache,
            state.taken + 1,
            state.columns,
        )

    return jax.lax.while_loop(lambda state: (state.taken < queue.waiting) & jnp.any(state.row_B == rows), put, state)
