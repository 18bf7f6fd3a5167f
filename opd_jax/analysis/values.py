"""Exact action values, state values and optimal baselines of an `Enumerable`, by conditional expectations over its completions.

Plain NumPy float64, apart from the code that trains: estimators are compared with it. Arrays [N, T] hold one number for each token of each
completion; an advantage of that shape becomes gradients of a loss by `score_gradients`.
Source: Liu et al., Theory of On-Policy Distillation (2026), Theorem 1; optimal baseline: Greensmith, Bartlett and Baxter (JMLR 2004).
"""

import numpy as np

from opd_jax.analysis.enumeration import Enumerable


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def student_logp(model: Enumerable) -> np.ndarray:
    """log pi of every token before each position, [N, T, V]."""
    return log_softmax(np.einsum("ntf,fv->ntv", model.features_NTF, model.theta_FV))


def log_ratio(model: Enumerable) -> np.ndarray:
    """l_t = log q(y_t) - log pi(y_t), [N, T]."""
    difference_NTV = log_softmax(np.asarray(model.teacher_logits_NTV)) - student_logp(model)
    picked_NT = np.take_along_axis(difference_NTV, np.asarray(model.tokens_NT)[..., None], axis=-1)[..., 0]
    return np.where(model.mask_NT, picked_NT, 0)


def kl(model: Enumerable) -> np.ndarray:
    """K_t = KL(pi || q) at each prefix, [N, T]."""
    logp_NTV = student_logp(model)
    kl_NT = np.sum(np.exp(logp_NTV) * (logp_NTV - log_softmax(np.asarray(model.teacher_logits_NTV))), axis=-1)
    return np.where(model.mask_NT, kl_NT, 0)


def later(x_NT: np.ndarray) -> np.ndarray:
    """sum_{u > t} x_u at every position, [N, T]; masked positions of x hold 0, so that the sum crosses them."""
    return np.cumsum(x_NT[:, ::-1], axis=1)[:, ::-1] - x_NT


def given_state(model: Enumerable, x_NT: np.ndarray) -> np.ndarray:
    """E[x_t | c_t], [N, T]."""
    return _conditional_mean(model, x_NT, known=0)


def given_action(model: Enumerable, x_NT: np.ndarray) -> np.ndarray:
    """E[x_t | c_t, y_t], [N, T]."""
    return _conditional_mean(model, x_NT, known=1)


def action_value(model: Enumerable) -> np.ndarray:
    """Q_t = l_t - E[sum_{u > t} K_u | c_t, y_t]: of all unbiased advantages that know c_t and y_t alone, the one without noise."""
    return np.where(model.mask_NT, log_ratio(model) - given_action(model, later(kl(model))), 0)


def state_value(model: Enumerable) -> np.ndarray:
    """V(c_t) = -E[sum_{u >= t} K_u | c_t], the mean of Q_t over y_t."""
    kl_NT = kl(model)
    return np.where(model.mask_NT, -given_state(model, kl_NT + later(kl_NT)), 0)


def optimal_baseline(model: Enumerable, advantage_NT: np.ndarray) -> np.ndarray:
    """b*(c_t) = E[A_t |s_t|^2 | c_t] / E[|s_t|^2 | c_t], s_t = grad log pi(y_t).

    Of all state baselines it leaves the least E|(A_t - b) s_t|^2 at each prefix; for a tabular student, whose scores at different prefixes
    are orthogonal, the least trace of the covariance.
    """
    square_NT = np.sum(np.square(_logit_score(model)), axis=-1)
    return np.where(model.mask_NT, given_state(model, advantage_NT * square_NT) / given_state(model, square_NT), 0)


def score_gradients(model: Enumerable, advantage_NT: np.ndarray) -> np.ndarray:
    """-sum_t A_t s_t of every completion, [N, F * V]: what a score-function estimator with these advantages says."""
    advantage_NT = np.where(model.mask_NT, advantage_NT, 0)
    gradient_NFV = -np.einsum("ntf,ntv->nfv", model.features_NTF, advantage_NT[..., None] * _logit_score(model))
    return gradient_NFV.reshape(len(gradient_NFV), -1)


def mean_and_trace(model: Enumerable, gradients_NG: np.ndarray) -> tuple[np.ndarray, float]:
    """(mean [G], trace of the covariance) of a vector that each completion gives, under the student."""
    probability_N = np.asarray(model.probability_N)
    mean_G = probability_N @ gradients_NG
    return mean_G, float(probability_N @ np.sum((gradients_NG - mean_G) ** 2, axis=1))


def _logit_score(model: Enumerable) -> np.ndarray:
    """Gradient of log pi(y_t) over the logits of its position, [N, T, V]."""
    logp_NTV = student_logp(model)
    return np.eye(logp_NTV.shape[-1])[np.asarray(model.tokens_NT)] - np.exp(logp_NTV)


def _conditional_mean(model: Enumerable, x_NT: np.ndarray, known: int) -> np.ndarray:
    """E[x_t | first t + known tokens], [N, T]: the mean over the completions that begin with the same tokens."""
    tokens_NT, probability_N = np.asarray(model.tokens_NT), np.asarray(model.probability_N)
    mean_NT = np.empty(x_NT.shape)
    for t in range(tokens_NT.shape[1]):
        _, group_N = np.unique(tokens_NT[:, : t + known], axis=0, return_inverse=True)
        group_N = group_N.ravel()
        mass = np.bincount(group_N, probability_N)
        mean_NT[:, t] = (np.bincount(group_N, probability_N * x_NT[:, t]) / mass)[group_N]
    return mean_NT
