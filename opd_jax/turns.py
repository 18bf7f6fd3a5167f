"""Completions in several turns: a model writes up to a call, the environment answers, the model goes on after the answer.

Each turn samples the whole completion again with all that stands in it given: what a turn draws depends on the text before it and on the
positions alone, not on how the turns before were made.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax import parallel, processes
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.environments import Environment
from opd_jax.sampler import Given
from opd_jax.types import Rollout, UserError


@dataclasses.dataclass(frozen=True)
class Turns:
    """How the completions of a run are written where its task has an environment."""

    environment: Environment
    tokenizer: Tokenizer
    max_turns: int  # pieces that the model writes at most; a call at the end of the last one is not answered
    mesh: Mesh

    @functools.cached_property
    def pauses(self) -> tuple[int, ...]:
        """The tokens that end a turn: their text ends in the closing mark. One with text behind the mark makes no call."""
        mark, special = self.environment.closes, self.tokenizer.special_ids
        named = [i for token, i in self.tokenizer.vocabulary().items() if mark in token and i not in special]
        found = tuple(sorted(i for i in named if self.tokenizer.decode([i]).endswith(mark)))
        if not found:
            raise UserError(f"rollout.max_turns = {self.max_turns}: the tokenizer has no token that ends in {mark!r}, by which calls end")
        return found

    def write(self, sample: Callable[..., Rollout], id_B: jax.Array, max_new_tokens: int) -> Rollout:
        """Completions of which `sample(stop_ids=..., given=...)` writes the turns; observations stand there and have no mask.

        A row ends at its stop token, at a call that its last turn makes, or that leaves no room for the answer and a token after it, and
        where max_new_tokens cut it off; `stopped_B` is True for the first of these.
        """
        stop_ids = (*self.tokenizer.eos_ids, *self.pauses)
        log = _Log.empty(len(id_B), max_new_tokens)
        for turn in range(self.max_turns):
            given = parallel.shard_batch(Given(log.tokens_BT, log.length_B, log.ended_B), self.mesh)
            log.take(sample(stop_ids=stop_ids, given=given), self.tokenizer.eos_ids)
            self._answer(log, last=turn == self.max_turns - 1)
            if log.ended_B.all():
                break
        present_BT = np.arange(max_new_tokens)[None, :] < log.length_B[:, None]
        arrays = (log.tokens_BT, log.mask_BT, log.logp_BT, log.behaviour_logp_BT, processes.to_host(id_B), log.stopped_B, present_BT)
        return Rollout(*parallel.shard_batch(arrays, self.mesh))

    def _answer(self, log: "_Log", *, last: bool) -> None:
        """Appends what the environment says to the rows that have made a call, and ends the others. Each process asks for its part."""
        turns = {row: log.tokens_BT[row, log.begun_B[row] : log.length_B[row]].tolist() for row in np.flatnonzero(~log.ended_B)}
        calls = {row: turn for row, turn in turns.items() if not last and turn[-1] in self.pauses}
        said = lambda calls: [self.environment.answer(self.tokenizer.decode(turn)).text for turn in calls]
        answers = dict(zip(calls, processes.divide(said, list(calls.values())), strict=True))
        for row in turns:
            answer, end = self.tokenizer.encode(answers[row]) if row in answers else [], log.length_B[row]
            if row not in answers or end + len(answer) >= log.tokens_BT.shape[1]:
                log.ended_B[row] = True
                continue
            log.tokens_BT[row, end : end + len(answer)] = answer
            log.begun_B[row] = log.length_B[row] = end + len(answer)


@dataclasses.dataclass
class _Log:
    """Completions while they are being written, as NumPy arrays."""

    tokens_BT: np.ndarray
    mask_BT: np.ndarray  # drawn, in this turn or an earlier one
    logp_BT: np.ndarray
    behaviour_logp_BT: np.ndarray
    length_B: np.ndarray  # tokens that stand there
    begun_B: np.ndarray  # where the current turn begins
    ended_B: np.ndarray
    stopped_B: np.ndarray

    @classmethod
    def empty(cls, rows: int, length: int) -> "_Log":
        of_tokens = [np.zeros((rows, length), kind) for kind in (np.int32, bool, np.float32, np.float32)]
        return cls(*of_tokens, *(np.zeros(rows, kind) for kind in (np.int32, np.int32, bool, bool)))

    def take(self, written: Rollout, eos_ids: tuple[int, ...]) -> None:
        """Adds what a turn drew; rows that have ended draw nothing."""
        written = processes.to_host(written)
        new_BT = written.mask_BT
        self.tokens_BT = np.array(written.tokens_BT)
        self.logp_BT = np.where(new_BT, written.logp_BT, self.logp_BT)
        self.behaviour_logp_BT = np.where(new_BT, written.behaviour_logp_BT, self.behaviour_logp_BT)
        self.mask_BT |= new_BT
        self.length_B = written.standing_BT.sum(1, dtype=np.int32)
        final_B = self.tokens_BT[np.arange(len(new_BT)), self.length_B - 1]
        self.stopped_B |= ~self.ended_B & np.isin(final_B, eos_ids)
        self.ended_B = self.ended_B | self.stopped_B
