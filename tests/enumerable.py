"""Instances and shorthands that the files of enumerated facts share. Variance is the trace of the covariance of one rollout's estimate."""

import numpy as np

from opd_jax.analysis import values

RAGGED = {
    "stop token": {"stop": 2, "length": 4, "seed": 3},
    "stop token, shared parameters": {"stop": 0, "features": 3, "length": 4, "seed": 4},
    "observations": {"observed": (1,), "length": 4, "features": 3, "seed": 5},
    "observations and a stop token": {"observed": (0, 2), "stop": 1, "length": 5, "seed": 6},
}
FIXED = {"tabular": {"length": 4, "seed": 2}, "shared parameters": {"length": 4, "features": 6, "seed": 5}}


def discounted(own_NT, gamma):
    """sum_{u >= t} gamma^(u - t) l_u on completions without a gap."""
    total = own_NT.copy()
    for t in range(own_NT.shape[1] - 2, -1, -1):
        total[:, t] += gamma * total[:, t + 1]
    return total


def mean_of(model, advantage_NT):
    return values.mean_and_trace(model, values.score_gradients(model, advantage_NT))[0]


def trace_of(model, advantage_NT):
    return values.mean_and_trace(model, values.score_gradients(model, advantage_NT))[1]


def exact(model, target="sequence_reverse_kl", law=None):
    return np.asarray(model.exact_gradient(target, law=law))


def distance(a, b):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
