"""Recovery after an injected error: prompts that end within a solution in which one token was replaced, and what should follow it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.data import pipeline
from opd_jax.data.tasks import Example
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class Injected:
    """N examples with an error. Arrays are NumPy's."""

    prompts: Prompts  # [N, S + T]: the prompt, the solution up to the error, the error
    gold_NT: np.ndarray  # the solution after it, its stop token included, from column 0 on
    mask_NT: np.ndarray  # True on that

    def take(self, row_B: np.ndarray) -> "Injected":
        """Rows by their numbers."""
        prompts = Prompts(self.prompts.tokens_BS[row_B], self.prompts.mask_BS[row_B], self.prompts.id_B[row_B])
        return Injected(prompts, self.gold_NT[row_B], self.mask_NT[row_B])

    def matches(self, tokens_NT: np.ndarray, mask_NT: np.ndarray) -> np.ndarray:
        """[N] how many tokens of continuations are those of the solution, place by place."""
        return ((tokens_NT == self.gold_NT) & mask_NT & self.mask_NT).sum(1)


def inject(prompts: Prompts, examples: Sequence[Example], tokenizer: Tokenizer, *, max_new_tokens: int, seed: int) -> Injected | None:
    """One error in each solution that has two tokens or more; examples without are left out. None where nothing is left.

    `prompts` are those of the examples, row by row. The place is uniform over all tokens but the last, so that something follows; the
    error is uniform over the other tokens that the solutions consist of (a digit for a digit), stop tokens aside. Both are functions of
    the seed and the example's id.
    """
    kept = [row for row, example in enumerate(examples) if example.solution is not None]
    if not kept:
        return None
    tokens_NT, mask_NT, _ = pipeline.encode_completions([examples[row].solution for row in kept], tokenizer, max_new_tokens=max_new_tokens)
    alphabet = np.setdiff1d(tokens_NT[mask_NT], tokenizer.eos_ids)
    rows = []
    for row, tokens, mask in zip(kept, tokens_NT, mask_NT, strict=True):
        rng = np.random.default_rng([seed, examples[row].id, 0xE44])
        gold = tokens[mask]
        place = int(rng.integers(len(gold) - 1)) if len(gold) > 1 else 0
        others = np.setdiff1d(alphabet, gold[place])
        if len(gold) > 1 and len(others):
            start = prompts.tokens_BS[row][prompts.mask_BS[row]]
            rows.append((row, np.concatenate([start, gold[:place], [rng.choice(others)]]), gold[place + 1 :]))
    return _padded(rows, prompts, max_new_tokens, tokenizer.pad_id) if rows else None


def _padded(rows: list[tuple], prompts: Prompts, max_new_tokens: int, pad_id: int) -> Injected:
    kept, starts, golds = zip(*rows, strict=True)
    width = prompts.tokens_BS.shape[1] + max_new_tokens
    start_mask_NS = np.arange(width)[None, :] >= width - np.array([len(start) for start in starts])[:, None]
    gold_mask_NT = np.arange(max_new_tokens)[None, :] < np.array([len(gold) for gold in golds])[:, None]
    start_NS, gold_NT = np.full(start_mask_NS.shape, pad_id, np.int32), np.full(gold_mask_NT.shape, pad_id, np.int32)
    start_NS[start_mask_NS], gold_NT[gold_mask_NT] = np.concatenate(starts), np.concatenate(golds)
    return Injected(Prompts(start_NS, start_mask_NS, prompts.id_B[list(kept)]), gold_NT, gold_mask_NT)
