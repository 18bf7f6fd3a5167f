"""The host's part of log.diagnostics: what can be read off the completions one step late, and the record of all diagnostics."""

import logging
import math
from collections.abc import Sequence

import numpy as np

from opd_jax.data.tokenizer import Tokenizer
from opd_jax.numerics.diagnostics import OUTLIER
from opd_jax.types import Rollout, one_line

log = logging.getLogger(__name__)

NGRAM = 4  # tokens
OF_OWN_DRAWS = ("diag/ess_token", "diag/ess_sequence")
LOOP_REPEATS, LOOP_TOKENS, LOOP_PERIOD = 3, 12, 64  # a loop: so many repeats at least, so many tokens at least, a block of so many at most


def repeated_ngrams(ids: Sequence[int], n: int = NGRAM) -> float | None:
    """1 - distinct n-grams / n-grams of a completion; None below n tokens. Source: Welleck et al. 2020, seq-rep-n."""
    grams = list(zip(*(ids[start:] for start in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else None


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether the last tokens are a block of at most LOOP_PERIOD tokens, LOOP_REPEATS times or more, LOOP_TOKENS tokens or more."""
    ids = np.asarray(ids)
    for period in range(1, min(LOOP_PERIOD, len(ids) // LOOP_REPEATS) + 1):
        size = max(LOOP_REPEATS * period, LOOP_TOKENS)
        if size <= len(ids) and (ids[-size + period :] == ids[-size:-period]).all():
            return True
    return False


def without_stop(rows: Sequence[list[int]], stop_ids: Sequence[int]) -> list[list[int]]:
    """Completions without the stop token at their end, where they have one."""
    return [ids[:-1] if ids and ids[-1] in stop_ids else ids for ids in rows]


def repetition(tokens_BT: np.ndarray, standing_BT: np.ndarray, stop_ids: Sequence[int]) -> dict[str, float]:
    """Means over completions: of the share of repeated n-grams (where a completion has one), and of those that end in a loop.

    The stop token is left out: a loop that was stopped is a loop.
    """
    rows = without_stop([tokens[mask].tolist() for tokens, mask in zip(tokens_BT, standing_BT, strict=True)], stop_ids)
    shares = [share for ids in rows if (share := repeated_ngrams(ids)) is not None]
    loops = {"diag/terminal_loops": float(np.mean([ends_in_loop(ids) for ids in rows]))}
    return loops | ({"diag/repeated_ngrams": float(np.mean(shares))} if shares else {})


def lowest_special(log_ratio_BT: np.ndarray, tokens_BT: np.ndarray, mask_BT: np.ndarray, special_ids) -> tuple[int, float] | None:
    """(token, log-ratio) of the special token that the teacher finds least likely beside the student; None where there is none."""
    at = mask_BT & np.isin(tokens_BT, list(special_ids))
    if not at.any():
        return None
    values = np.where(at, log_ratio_BT, np.inf)
    place = np.unravel_index(np.argmin(values), values.shape)
    return int(tokens_BT[place]), float(values[place])


class Diagnostics:
    """Records of a run. Warns once of each special token that the teacher all but rules out: often two models that end in other ways."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._warned: set[int] = set()

    def record(self, measured: dict, completions: Rollout, *, own_draws: bool) -> dict[str, float]:
        """Metrics of what the update measured (it gives log_ratio_BT beside them) and of its completions; only those that there are.

        own_draws: the student wrote the completions.
        """
        mask_BT, tokens_BT = np.asarray(completions.mask_BT), np.asarray(completions.tokens_BT)
        values = {name: float(value) for name, value in measured.items() if name != "log_ratio_BT"}
        values |= repetition(tokens_BT, np.asarray(completions.standing_BT), self._tokenizer.eos_ids)
        if "log_ratio_BT" in measured:
            values |= self._special(np.asarray(measured["log_ratio_BT"]), tokens_BT, mask_BT)
        if not own_draws:
            values = {name: value for name, value in values.items() if name not in OF_OWN_DRAWS}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def _special(self, log_ratio_BT: np.ndarray, tokens_BT: np.ndarray, mask_BT: np.ndarray) -> dict[str, float]:
        lowest = lowest_special(log_ratio_BT, tokens_BT, mask_BT, self._tokenizer.special_ids)
        if lowest is None:
            return {}
        token, value = lowest
        if value < -OUTLIER and token not in self._warned:
            self._warned.add(token)
            piece = one_line(repr(self._tokenizer.piece(token)))
            log.warning("the teacher gives the special token %s (id %d) a log-ratio of %.1f nats: do both end alike?", piece, token, value)
        return {"diag/special_log_ratio_min": value, "diag/special_token_min": token}
