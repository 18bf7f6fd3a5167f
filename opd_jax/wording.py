"""How completions are written: repetition, diversity, words of reflection."""

import re
from collections.abc import Sequence

import numpy as np

from opd_jax.diagnostics import repeated_ngrams, without_stop

# Words with which a model stops to look at what it wrote, as whole words in any case.
REFLECTION = (
    "wait",
    "hmm+",
    "hold on",
    "on second thought",
    "let me (?:re-?|double[- ])?check",
    "let me (?:verify|reconsider|think again|re-?think|re-?examine|start over|try again)",
    "i made (?:a mistake|an error)",
)
_REFLECTION = re.compile(rf"\b(?:{'|'.join(REFLECTION)})\b", re.IGNORECASE)


def reflects(text: str) -> bool:
    """Whether a completion has a word of REFLECTION."""
    return _REFLECTION.search(text) is not None


def distinct(completions: Sequence[Sequence[int]], n: int = 2) -> float | None:
    """Distinct n-grams / n-grams of completions of one prompt taken together; None below n tokens. Source: Li et al. 2016, distinct-n."""
    grams = [gram for ids in completions for gram in zip(*(ids[start:] for start in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else None


def metrics(ids: Sequence[list[int]], texts: Sequence[str], *, samples: int, stop_ids: Sequence[int]) -> dict[str, float]:
    """Of completions, `samples` of each prompt one after the other; a quantity for which all of them are too short is left out."""
    rows = without_stop(ids, stop_ids)
    values = {
        "eval/repetition": [repeated_ngrams(row) for row in rows],
        "eval/distinct_2": [distinct(rows[start : start + samples]) for start in range(0, len(rows), samples)],
        "eval/reflection": [float(reflects(text)) for text in texts],
    }
    known = {name: [value for value in found if value is not None] for name, found in values.items()}
    return {name: float(np.mean(found)) for name, found in known.items() if found}
