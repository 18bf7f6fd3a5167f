"""Gradient estimators: per-token statistics -> the terms of a loss, each with its claim about the gradient that it follows."""

from opd_jax.numerics.estimators.base import TARGETS, Context, Estimator, Term, loss_B
from opd_jax.numerics.estimators.building import build
from opd_jax.numerics.estimators.local import Local, LogRatioLoss, LogRatioReward, MultiSample
from opd_jax.numerics.estimators.preference import Preference
from opd_jax.numerics.estimators.registry import REGISTRY
from opd_jax.numerics.estimators.rewarded import Rewarded
from opd_jax.numerics.estimators.score import LocalToGo, ScoreFunction

__all__ = [
    "REGISTRY",
    "TARGETS",
    "Context",
    "Estimator",
    "Local",
    "LocalToGo",
    "LogRatioLoss",
    "LogRatioReward",
    "MultiSample",
    "Preference",
    "Rewarded",
    "ScoreFunction",
    "Term",
    "build",
    "loss_B",
]
