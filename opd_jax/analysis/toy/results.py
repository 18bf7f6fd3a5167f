"""What the toy study found, as numbers with intervals over seeds, and the paper's statements with how often each held."""

from collections.abc import Sequence

import numpy as np

from opd_jax.analysis import stats
from opd_jax.analysis.toy.learning import Evaluation, Training
from opd_jax.analysis.toy.settings import Settings

TASKS = ("left", "right")
REACHED = 1.0  # positions; a policy whose mean |last position - target| is at most this has reached its target
SPIKE = 10.0  # the early maximum over the late median, from which on the start counts as a spike
ORDERS = 2.0  # powers of ten, the least that the paper calls the rise from small to large gamma


def interval(values_S: Sequence[float] | np.ndarray) -> list[float] | None:
    """[geometric mean, low, high] of positive values over seeds: Student's t of their logarithms; None where a seed diverged.

    Values of exactly 0 have no logarithm (teachers of the chain can be that near): then the mean and Student's t of the values themselves,
    cut off at 0.
    """
    values_S = np.asarray(values_S, np.float64)
    if not np.all(np.isfinite(values_S)):
        return None
    if not np.all(values_S > 0):
        return [max(float(x), 0.0) for x in stats.t_interval(values_S)]
    return [float(10.0**x) for x in stats.t_interval(np.log10(values_S))]


def windows(settings: Settings, variance_GSI: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(early median, late median, early maximum) of the gradient variance, [gammas, seeds, tasks]; early and late: first and last tenth."""
    variance_GSI = np.where(np.isfinite(variance_GSI), variance_GSI, np.inf)
    by_task = [variance_GSI[..., task::2] for task in range(len(TASKS))]  # the first iteration is on the left task
    count = settings.iterations // 20  # of a tenth, those of one task
    pick = lambda function, part: np.stack([function(x[..., part], axis=-1) for x in by_task], axis=-1)
    return pick(np.median, slice(None, count)), pick(np.median, slice(-count, None)), pick(np.max, slice(None, count))


def summary(settings: Settings, training: Training, evaluation: Evaluation) -> dict:
    """Per gamma: variance (geometric mean over tasks), its ratio to gamma = 0 within seeds, distances, spread and KL; then the claims."""
    variance_GSI, kl_GSK, position_GSKE, teacher_SKE = (
        np.asarray(x, np.float64)
        for x in (training.variance_GSI, evaluation.reverse_kl_GSK, evaluation.position_GSKE, evaluation.teacher_position_SKE)
    )
    early_GSK, late_GSK, spike_GSK = windows(settings, variance_GSI)
    target_K1 = np.asarray(settings.targets)[:, None]
    distance_GSK, teacher_SK = (np.abs(x - target_K1).mean(-1) for x in (position_GSKE, teacher_SKE))
    with np.errstate(divide="ignore"):  # a student that ran away may have no gradient left: its mean is 0
        early_GS, late_GS = (np.exp(np.log(x).mean(-1)) for x in (early_GSK, late_GSK))
    rows, zero = [], settings.gammas.index(0.0)
    for g, gamma in enumerate(settings.gammas):
        row = {"gamma": gamma, "early_variance": interval(early_GS[g]), "late_variance": interval(late_GS[g])}
        with np.errstate(invalid="ignore", divide="ignore"):  # inf / inf of two that diverged
            row["early_ratio"], row["late_ratio"] = (interval(x[g] / x[zero]) for x in (early_GS, late_GS))
        row["distance"] = {task: interval(distance_GSK[g, :, k]) for k, task in enumerate(TASKS)}
        row["distance_per_seed"], row["spread_per_seed"] = finite(distance_GSK[g]), finite(position_GSKE[g].std(-1))
        row["reverse_kl"] = interval(kl_GSK[g].mean(-1))
        row["largest_variance_per_seed"] = finite(variance_GSI[g].max(-1))
        row["diverged_seeds"] = int(np.sum(~np.isfinite(distance_GSK[g]).all(-1)))
        rows.append(row)
    told = claims(settings, early_GSK, late_GSK, spike_GSK, distance_GSK, position_GSKE.std(-1))
    return {"gammas": rows, "teacher_distance": {task: interval(teacher_SK[:, k]) for k, task in enumerate(TASKS)}, "claims": told}


def finite(values: np.ndarray) -> list:
    """Nested lists for JSON; None for what is not finite."""
    return np.where(np.isfinite(values), values, None).tolist()


def claims(settings: Settings, early_GSK, late_GSK, spike_GSK, distance_GSK, spread_GSK) -> list[dict]:
    """Each qualitative statement of the paper (section 2.1, appendix E), the rule by which it is judged, and in how many cases it held.

    Cases are (seed, task), of spikes with the gamma, of the rise early and late. A policy that diverged reaches nothing.
    """
    few, many = ([g for g, gamma in enumerate(settings.gammas) if abs(gamma - end) <= 0.25] for end in (0, 1))
    names = lambda indices: "/".join(f"{settings.gammas[g]:g}" for g in indices)
    middle = len(settings.gammas) // 2
    with np.errstate(invalid="ignore", divide="ignore"):
        rise_KSW = np.stack([np.log10(x[many]).mean(0) - np.log10(x[few]).mean(0) for x in (early_GSK, late_GSK)], axis=-1)
        ordered_SK = np.all(np.diff(late_GSK, axis=0) > 0, axis=0)
        spikes_GSK = spike_GSK / late_GSK > SPIKE
    reached_GSK = distance_GSK <= REACHED
    diffuse_SK = reached_GSK[middle] & (spread_GSK[middle] > spread_GSK[0])
    near = f"mean |last position - target| at most {REACHED:g}"
    told = [
        ("the variance rises with gamma", "late medians rise strictly over all gammas", ordered_SK),
        (
            f"from gamma {names(few)} to {names(many)} it rises by 2 to 3 orders of magnitude",
            f"geometric means of the medians, early and late, rise by at least 10^{ORDERS:g}",
            rise_KSW >= ORDERS,
        ),
        ("every gamma has an early spike", f"the early maximum is over {SPIKE:g} times the late median", spikes_GSK),
        ("gamma = 0 reaches the targets", near, reached_GSK[0]),
        (f"gamma = {settings.gammas[middle]:g} reaches them too", near, reached_GSK[middle]),
        ("more diffusely than gamma = 0", "it reaches them, and its last positions have the larger standard deviation", diffuse_SK),
        (
            "gamma = 1 drifts and settles elsewhere",
            "gamma = 0 reaches the target and gamma = 1 does not",
            reached_GSK[0] & ~reached_GSK[-1],
        ),
    ]
    return [{"published": said, "rule": rule, "held": int(np.sum(held)), "of": int(held.size)} for said, rule, held in told]
