"""The tables of a study: a row per condition and estimator, ratios of neighbours, exponents of growth."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from opd_jax.analysis import gradient_stats
from opd_jax.analysis.gradient_stats import Laboratory
from opd_jax.analysis.study_conditions import SEQUENCE, Condition, Shadow

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """Rows per condition and estimator; ratios of neighbours' variances; exponents of their growth with T; what it cost."""

    rows: list[Row]
    pairs: list[Row]
    growth: list[Row]
    cost: dict[str, Any]


def numbers(laboratory: Laboratory, e: int, one: Shadow, setting: Condition, streams, named: dict[str, str], prompts: int) -> Row:
    """A row's condition and numbers; `streams` and `named` say where the references stand and what they are."""
    estimator = one.estimator
    row = {"name": estimator.name, **setting.keys(one)}
    row |= {"target": estimator.target, "unbiased": estimator.unbiased, "reference": named.get(estimator.target)}
    row |= {"reference_sequence": named.get(SEQUENCE), "prompts": prompts, "rollouts": prompts * setting.group_size}
    row |= laboratory.variance(e).keys("variance") | laboratory.batch_variance(e).keys("variance_batch") | laboratory.snr(e).keys("snr")
    for target, suffix in ((estimator.target, ""), (SEQUENCE, "_sequence")):
        known = streams.get(target)
        nothing = gradient_stats.Value(None, None, None)
        row |= (laboratory.bias(e, known) if known else nothing).keys(f"bias{suffix}")
        row |= (laboratory.cosine(e, known) if known else nothing).keys(f"cosine{suffix}")
    return row


def neighbours(laboratory: Laboratory, shadows: Sequence[Shadow], setting: Condition) -> list[Row]:
    """Ratios of the variances of neighbours in the list, at their own gamma and k."""
    own = [(e, one) for e, one in enumerate(shadows) if one.default]
    return [
        {"name": a.estimator.name, "other": b.estimator.name, **setting.keys(None)}
        | gradient_stats.ratio(laboratory, i, laboratory, j).keys("ratio")
        for (i, a), (j, b) in zip(own[:-1], own[1:], strict=True)
    ]


def growth_of(laboratories) -> list[Row]:
    """Exponents of the variance's growth with T, of every estimator at its own gamma and k."""
    base = laboratories[0][0]
    over = [entry for entry in laboratories if dataclasses.replace(entry[0], T=base.T) == base]
    if len(over) < 2:
        return []
    over.sort(key=lambda entry: entry[0].T)
    rows = []
    for one in [one for one in laboratories[0][1] if one.default]:
        indices = [shadows.index(one) for _, shadows, _ in over]
        lengths = [setting.T for setting, _, _ in over]
        value = gradient_stats.exponent([laboratory for *_, laboratory in over], indices, lengths)
        rows.append({"name": one.estimator.name, "over": "T", "values": lengths, **value.keys("exponent")})
    return rows
