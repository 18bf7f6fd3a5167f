"""Batches of prompts as a pure function of (seed, step), so that a resumed run reads what it would have read; shuffling by grain."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import grain
import numpy as np

from opd_jax.data.contexts import Reader
from opd_jax.data.tasks import Example
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.environments import Environment, turns
from opd_jax.types import Prompts, UserError

# Prompt widths are multiples of this, so that ragged prompts compile few programs.
BUCKET = 16
# A finite data set of at most this many prompts is checked before the first step.
CHECKED_AT_ONCE = 100_000


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Prompts of one model: how it reads them, and how long they may be."""

    reader: Tokenizer | Reader
    max_prompt_length: int  # tokens
    overlong: str  # refuse or truncate

    def encode(self, texts: Sequence[str], ids: Sequence[int], *, coarse: bool = False) -> tuple[Prompts, int]:
        """See encode_prompts."""
        settings = {"max_prompt_length": self.max_prompt_length, "overlong": self.overlong}
        return encode_prompts(texts, self.reader, ids=ids, coarse=coarse, **settings)

    def check(self, text: str) -> None:
        """Raises UserError for a prompt that cannot be used."""
        encode_prompt(text, self.reader, max_prompt_length=self.max_prompt_length, overlong=self.overlong)


@dataclasses.dataclass(frozen=True)
class Batch:
    """The prompts of one step, as NumPy arrays: each example's prompt stands in `group_size` rows that follow each other."""

    examples: list[Example]  # P
    prompts: Prompts  # B = P * G rows, as the student reads them
    teacher_prompts: Prompts  # as the teacher reads them; the same object where it reads what the student reads
    truncated: int  # prompts that lost their first tokens


class Pipeline:
    """`batch(step)` for any step, in any order. Several processes read the same examples; each puts its rows on its devices
    (parallel.shard_batch): which rows those are is the mesh's to say, not the pipeline's.

    `ids_below`: every example's id is below it; None: the number of examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        student: Encoder,
        teacher: Encoder | None = None,
        *,
        prompts_per_step: int,
        group_size: int,
        seed: int,
        ids_below: int | None = None,
    ):
        if not len(examples):
            raise UserError("the task has no training examples; give more data, or lower task.eval_size")
        self._student, self._teacher, self._group_size = student, teacher, group_size
        self._per_step = prompts_per_step
        self._ids_below = len(examples) if ids_below is None else ids_below
        self._order = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
        if len(examples) <= CHECKED_AT_ONCE:
            for example in examples:
                for encoder in filter(None, (student, teacher)):
                    encoder.check(example.prompt)

    def batch(self, step: int) -> Batch:
        """The batch of update number `step` (from 0)."""
        examples = [self._order[step * self._per_step + i] for i in range(self._per_step)]
        occurrences = _occurrences([example.id for example in examples])
        # A prompt that comes twice in one step (few prompts, large batch) must not draw the same completion twice.
        ids = [(example.id + self._ids_below * seen) for example, seen in zip(examples, occurrences, strict=True)]
        return self.encode(examples, [i * self._group_size + g for i in ids for g in range(self._group_size)])

    def encode(self, examples: list[Example], rollout_ids: Sequence[int]) -> Batch:
        """A batch of any examples, with the ids of their rollouts."""
        rows = [example.prompt for example in examples for _ in range(self._group_size)]
        prompts, truncated = self._student.encode(rows, rollout_ids)
        teacher_prompts, more = self._teacher.encode(rows, rollout_ids) if self._teacher else (prompts, 0)
        return Batch(examples, prompts, teacher_prompts, max(truncated, more) // self._group_size)


def _occurrences(ids: list[int]) -> list[int]:
    seen: Counter[int] = Counter()
    counts = []
    for i in ids:
        counts.append(seen[i])
        seen[i] += 1
    return counts


def encode_prompt(text: str, tokenizer: Tokenizer | Reader, *, max_prompt_length: int, overlong: str) -> tuple[list[int], bool]:
    """(ids of a prompt, whether it was truncated). One beyond the limit is refused, or loses its first tokens. Raises UserError."""
    ids = tokenizer.encode_prompt(text)
    if not ids:
        raise UserError(
            f"the prompt {text!r} has no tokens, and the tokenizer has no beginning-of-sequence token to start from; give a prompt"
        )
    if len(ids) > max_prompt_length:
        if overlong == "refuse":
            raise UserError(
                f"a prompt has {len(ids)} tokens, at most {max_prompt_length} fit (rollout.max_prompt_length, and the model's context less "
                f"rollout.max_new_tokens): {text[:40]!r}...; raise the limit, or set rollout.overlong=truncate"
            )
        return ids[-max_prompt_length:], True
    return ids, False


def encode_prompts(
    texts: Sequence[str],
    tokenizer: Tokenizer | Reader,
    *,
    ids: Sequence[int],
    max_prompt_length: int,
    overlong: str,
    coarse: bool = False,
) -> tuple[Prompts, int]:
    """(left-padded Prompts as NumPy arrays, how many were truncated). The width is a multiple of BUCKET; `ids` are the rollouts' ids.

    `coarse`: BUCKET times a power of two, or that of the longest prompt allowed, for prompts whose lengths change from step to step.
    """
    rows, cut = zip(
        *(encode_prompt(text, tokenizer, max_prompt_length=max_prompt_length, overlong=overlong) for text in texts), strict=True
    )
    buckets = -(-max(map(len, rows)) // BUCKET)
    if coarse:  # a function of these rows alone: a resumed run pads, and rounds, as it would have
        buckets = min(1 << (buckets - 1).bit_length(), max(-(-max_prompt_length // BUCKET), buckets))
    width = buckets * BUCKET
    mask_BS = np.arange(width)[None, :] >= width - np.array([len(row) for row in rows])[:, None]
    tokens_BS = np.full(mask_BS.shape, tokenizer.pad_id, np.int32)
    tokens_BS[mask_BS] = np.concatenate(rows)
    return Prompts(tokens_BS, mask_BS, np.array(ids, np.uint64).astype(np.uint32)), sum(cut)


def encode_completions(texts: Sequence[str], tokenizer: Tokenizer, *, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [B, T], mask [B, T], stopped [B]) of texts with a stop token after them; what exceeds T is cut off."""
    tokens_BT, mask_BT, stopped_B, _ = _completed([[(text, True)] for text in texts], tokenizer, max_new_tokens)
    return tokens_BT, mask_BT, stopped_B


def encode_solutions(
    texts: Sequence[str], environment: Environment | None, tokenizer: Tokenizer, *, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """(tokens, mask, stopped, present): encode_turns, or without an environment encode_completions and None. Raises UserError."""
    if environment is not None:
        return encode_turns(texts, environment, tokenizer, max_new_tokens=max_new_tokens)
    return *encode_completions(texts, tokenizer, max_new_tokens=max_new_tokens), None


def encode_turns(
    texts: Sequence[str], environment: Environment, tokenizer: Tokenizer, *, max_new_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(tokens [B, T], mask [B, T], stopped [B], present [B, T]) of texts in which an environment has answered: its answers have no mask.

    Turns and answers are split into tokens one by one, as a rollout does. Raises UserError for a call that something else than the
    environment's answer follows.
    """
    rows = []
    for text in texts:
        pieces = []
        for turn in turns(environment, text):
            pieces.append((turn.written, True))
            if turn.observation is not None and not turn.answered:
                raise UserError(
                    f"the solution {text[:80]!r} has a call {turn.written[-40:]!r} that is not followed by the answer of the task's "
                    f"environment, {turn.observation.text!r}; correct the solution"
                )
            pieces += [(turn.observation.text, False)] if turn.observation is not None else []
        rows.append(pieces)
    tokens_BT, mask_BT, stopped_B, learnt_BT = _completed(rows, tokenizer, max_new_tokens)
    return tokens_BT, learnt_BT, stopped_B, mask_BT


def _completed(rows: list[list[tuple[str, bool]]], tokenizer: Tokenizer, max_new_tokens: int) -> tuple[np.ndarray, ...]:
    """(tokens, mask, stopped, which tokens are of pieces marked True or stop tokens) of rows of pieces (text, mark)."""
    stop = [(token, True) for token in tokenizer.eos_ids[:1]]
    marked = [[(token, mark) for text, mark in pieces for token in tokenizer.encode(text)] + stop for pieces in rows]
    stopped_B = np.array([len(row) <= max_new_tokens for row in marked])
    marked = [row[:max_new_tokens] for row in marked]
    mask_BT = np.arange(max_new_tokens)[None, :] < np.array([len(row) for row in marked])[:, None]
    tokens_BT, marks_BT = np.full(mask_BT.shape, tokenizer.pad_id, np.int32), np.zeros(mask_BT.shape, bool)
    tokens_BT[mask_BT] = [token for row in marked for token, _ in row]
    marks_BT[mask_BT] = [mark for row in marked for _, mark in row]
    return tokens_BT, mask_BT, stopped_B, marks_BT
