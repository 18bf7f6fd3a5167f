"""The laboratory on models so small that all completions can be listed: the same statistics, against exact gradients."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.analysis import gradient_stats
from opd_jax.analysis.enumeration import Enumerable
from opd_jax.analysis.gradient_stats import Laboratory, Reference, Units
from opd_jax.analysis.study_conditions import ARGUMENTS, SEQUENCE, Condition, Shadow, resolve, variants
from opd_jax.analysis.study_tables import Row, numbers
from opd_jax.numerics.estimators import Estimator
from opd_jax.types import UserError


def enumerated(
    model: Enumerable,
    estimators: Sequence[str] = ("sequence", "to_go", "rao_blackwell_to_go", "token", "token_full"),
    *,
    rollouts: int = 1024,
    group_size: int = 1,
    exact: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """The table of an enumerable model: from sampled rollouts against the exact gradients, or (`exact`) without a sample at all.

    Batch-wide baselines see all rollouts. Raises UserError for names or sizes that cannot be used, and for `exact` with an estimator that
    looks across rows, whose expectation is over tuples of rollouts.
    """
    shadows = variants(resolve(estimators, ARGUMENTS))
    if not exact:
        return measured(model, shadows, rollouts=rollouts, group_size=group_size, resamples=resamples, seed=seed)[0]
    setting = Condition(model.tokens_NT.shape[1], group_size)
    with jax.enable_x64(True):
        return [_exact_row(model, one, setting) for one in shadows]


def measured(
    model: Enumerable, shadows: Sequence[Shadow], *, rollouts: int, group_size: int, resamples: int, seed: int
) -> tuple[list[Row], Laboratory]:
    """(a row per estimator, what they were read from) of sampled rollouts."""
    if rollouts % group_size or rollouts // group_size < gradient_stats.LEAST_UNITS:
        raise UserError(
            f"rollouts = {rollouts} must be a multiple of group_size = {group_size}, at least {gradient_stats.LEAST_UNITS} times as many"
        )
    chosen = [one.estimator for one in shadows]
    targets = list(dict.fromkeys([*(e.target for e in chosen), SEQUENCE]))
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        probability_N = np.asarray(model.probability_N)
        index_B = rng.choice(len(probability_N), size=rollouts, p=probability_N / probability_N.sum())
        vectors_BED = np.stack([rollout_gradients(model, e, index_B, group_size) for e in chosen], axis=1)
        exact_TD = np.stack([np.asarray(model.exact_gradient(target)) for target in targets])
    # No controls: that an estimator's mean is the exact gradient is what the table is to show.
    streams = {target: Reference(len(chosen) + i, None) for i, target in enumerate(targets)}
    units = units_of_vectors(vectors_BED, exact_TD, group_size)
    laboratory = Laboratory(units, gradient_stats.resample(rollouts // group_size, resamples, seed))
    setting, named = Condition(model.tokens_NT.shape[1], group_size), dict.fromkeys(targets, "exact")
    return [numbers(laboratory, e, one, setting, streams, named, rollouts // group_size) for e, one in enumerate(shadows)], laboratory


def rollout_gradients(model: Enumerable, estimator: Estimator, index_B: np.ndarray, group_size: int = 1) -> np.ndarray:
    """The estimates [B, D] of completions that are given by number, groups side by side."""
    rows = (model.features_NTF, model.teacher_logits_NTV, model.tokens_NT, model.mask_NT)
    group_B = jnp.arange(len(index_B)) // group_size
    return np.asarray(_enumerated_gradients(estimator, model.theta_FV, *(x[index_B] for x in rows), group_B))


@functools.partial(jax.jit, static_argnames="estimator")
def _enumerated_gradients(estimator, theta_FV, features_BTF, teacher_BTV, tokens_BT, mask_BT, group_B):
    # What a row takes from others is constant, so that the gradient of the sum by a row's logits is that row's alone.
    total = lambda logits_BTV: jnp.sum(estimator.surrogate(logits_BTV, teacher_BTV, tokens_BT, mask_BT, group_B=group_B))
    at_logits_BTV = jax.grad(total)(jnp.einsum("btf,fv->btv", features_BTF, theta_FV))
    return jnp.einsum("btf,btv->bfv", features_BTF, at_logits_BTV).reshape(len(tokens_BT), -1)


def units_of_vectors(vectors_BED: np.ndarray, exact_TD: np.ndarray, group_size: int) -> Units:
    """Units from whole gradients [B, E, D]; exact gradients [targets, D] are streams without noise."""
    grouped_PGED = vectors_BED.reshape(-1, group_size, *vectors_BED.shape[1:])
    exact_PTD = np.broadcast_to(exact_TD, (len(grouped_PGED), *exact_TD.shape))
    streams_PSD = np.concatenate([grouped_PGED.mean(1), exact_PTD], axis=1)
    mean_SD = streams_PSD.mean(0)
    return Units(
        rollouts=group_size,
        mean_gram_SS=mean_SD @ mean_SD.T,
        gram_PSS=streams_PSD @ streams_PSD.swapaxes(1, 2),
        sketch_PSR=streams_PSD,
        second_PE=np.square(grouped_PGED).sum(3).mean(1),
        parts={},
    )


def _exact_row(model: Enumerable, one: Shadow, setting: Condition) -> Row:
    estimator = one.estimator
    if estimator.looks_across:
        raise UserError(f"estimators: {estimator.name!r} looks across rows, so that it has no exact value here; sample it (exact=False)")
    mean_D, variance = (np.asarray(x) for x in (model.expected_gradient(estimator), model.trace_covariance(estimator)))
    targets = {"": estimator.target, "_sequence": SEQUENCE}
    found = {"variance": variance, "variance_batch": variance, "snr": mean_D @ mean_D / variance}
    for suffix, target in targets.items():
        target_D = np.asarray(model.exact_gradient(target))
        found[f"bias{suffix}"] = np.linalg.norm(mean_D - target_D)
        found[f"cosine{suffix}"] = mean_D @ target_D / (np.linalg.norm(mean_D) * np.linalg.norm(target_D))
    row = {"name": estimator.name, **setting.keys(one), "target": estimator.target, "unbiased": estimator.unbiased}
    row |= {"reference": "exact", "reference_sequence": "exact", "prompts": None, "rollouts": None}
    for name, value in found.items():
        row |= gradient_stats.Value(float(value), float(value), float(value)).keys(name)
    return row
