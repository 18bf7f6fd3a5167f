"""Three exact facts about distillation as reinforcement learning, on students whose completions can all be listed.

Each function takes an `Enumerable` (analysis/enumeration.py); laws over its completions are [N] and sum to 1. Use under `jax.enable_x64`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from opd_jax.analysis.enumeration import Enumerable
from opd_jax.numerics import credit as credit_lib
from opd_jax.numerics.estimators import Term, loss_B
from opd_jax.numerics.token_stats import DenseHead, Signal, Stats, Target, token_stats


def _chosen(logits_NTV: jax.Array, model: Enumerable) -> jax.Array:
    """log-probability of each token of each completion, [N, T]; 0 where the mask is 0."""
    logp_NT = jnp.take_along_axis(jax.nn.log_softmax(logits_NTV), model.tokens_NT[..., None], axis=-1)[..., 0]
    return jnp.where(model.mask_NT, logp_NT, 0)


def _score_gradients(model: Enumerable, advantage_NT: jax.Array) -> jax.Array:
    """-sum_t A_t grad log pi(y_t) of each completion, [N, F * V], through the loss that trains."""

    def loss(theta_FV):
        stats = Stats(logp_BT=_chosen(model.logits(theta_FV), model))
        return loss_B(stats, Term(model.mask_NT, advantage_BT=advantage_NT))

    return jax.jacrev(loss)(model.theta_FV).reshape(len(advantage_NT), -1)


# ---- the entropy-regularised reading


def entropy_reading(model: Enumerable) -> dict[str, float]:
    """-KL(pi || q) = E[sum_t log q(y_t) + H(pi_t)]: on-policy distillation is RL with reward log q(y_t) and an entropy bonus.

    `value` is the difference of both sides. Of their gradients: `entropy_differentiated` takes the bonus for a function of the parameters,
    `sampled_reward` has the reward log q - log pi of the sampled token (`to_go`), `entropy_as_reward` adds H(pi_t) to the reward of step t
    and differentiates the score alone, which misses E sum_t grad H(pi_t). Each is the norm of the error, relative to the gradient's.
    Source: by definition of the entropy; the reading is Liu et al.'s, Theory of On-Policy Distillation (2026).
    """
    return {name: float(value) for name, value in jax.jit(lambda theta: _readings(_with(model, theta)))(model.theta_FV).items()}


def _with(model: Enumerable, theta_FV: jax.Array) -> Enumerable:
    return dataclasses.replace(model, theta_FV=theta_FV)


def _readings(model: Enumerable) -> dict[str, jax.Array]:
    def bonus(theta_FV, held):
        logits_NTV = model.logits(theta_FV)
        logp_NTV = jax.nn.log_softmax(logits_NTV)
        entropy_NT = jnp.where(model.mask_NT, -jnp.sum(jnp.exp(logp_NTV) * logp_NTV, axis=-1), 0)
        entropy_NT = jax.lax.stop_gradient(entropy_NT) if held else entropy_NT
        reward_N = jnp.sum(_chosen(model.teacher_logits_NTV, model) + entropy_NT, axis=1)
        return jnp.exp(model.log_probability(logits_NTV)) @ reward_N

    exact = model.exact_gradient("sequence_reverse_kl")
    log_ratio_NT = _chosen(model.teacher_logits_NTV, model) - _chosen(model.logits(model.theta_FV), model)
    sampled = model.probability_N @ _score_gradients(model, credit_lib.advantages(log_ratio_NT, model.mask_NT, credit="to_go"))
    differentiated, as_reward = (-jax.grad(bonus)(model.theta_FV, held).ravel() for held in (False, True))
    error = lambda gradient: jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)
    return {
        "value": bonus(model.theta_FV, False) + model.objective("sequence_reverse_kl", model.theta_FV),
        "entropy_differentiated": error(differentiated),
        "sampled_reward": error(sampled),
        "entropy_as_reward": error(as_reward),
    }


# ---- extrapolation beyond the teacher (ExOPD)


def extrapolated_logits(reference_NTV: jax.Array, teacher_NTV: jax.Array, strength: float) -> jax.Array:
    """lambda log q + (1 - lambda) log ref of every token, without log Z of its prefix (log_softmax gives the normalised target)."""
    return strength * jax.nn.log_softmax(teacher_NTV) + (1 - strength) * jax.nn.log_softmax(reference_NTV)


def extrapolation_gradient(model: Enumerable, reference_NTV: jax.Array, strength: float, *, credit: str, normalise: bool) -> jax.Array:
    """Expected gradient of ExOPD at a student, [F * V]: reward lambda (log q - log ref) - (log pi - log ref) of the sampled token.

    `normalise` takes log Z(prefix) off the reward: the target is then the law ref^(1-lambda) q^lambda / Z at each prefix.
    Source: G-OPD, arXiv 2602.12125.
    """
    target_NTV = extrapolated_logits(reference_NTV, model.teacher_logits_NTV, strength)
    if normalise:
        target_NTV = jax.nn.log_softmax(target_NTV)
    target_NT = jnp.where(model.mask_NT, jnp.take_along_axis(target_NTV, model.tokens_NT[..., None], axis=-1)[..., 0], 0)
    log_ratio_NT = target_NT - _chosen(model.logits(model.theta_FV), model)
    advantage_NT = credit_lib.advantages(log_ratio_NT, model.mask_NT, credit=credit)
    return model.probability_N @ _score_gradients(model, advantage_NT)


def extrapolated_law(model: Enumerable, reference_NTV: jax.Array, strength: float, *, normalise: bool) -> jax.Array:
    """What a tabular student converges to, [N]: normalised at every prefix (also the token-level fixed point of either form), or once, over
    whole completions, where rewards to go let a prefix with a large Z gather mass."""
    logits_NTV = extrapolated_logits(reference_NTV, model.teacher_logits_NTV, strength)
    if normalise:
        return jnp.exp(model.log_probability(logits_NTV))
    chosen_NT = jnp.take_along_axis(logits_NTV, model.tokens_NT[..., None], axis=-1)[..., 0]
    return jax.nn.softmax(jnp.sum(jnp.where(model.mask_NT, chosen_NT, 0), axis=1))


def conditionals(model: Enumerable, law_N: jax.Array) -> jax.Array:
    """Log-probabilities [F, V] of the next token at every prefix of a tabular model under a law over completions."""
    tokens_NTV = jax.nn.one_hot(model.tokens_NT, model.theta_FV.shape[1], dtype=law_N.dtype) * model.mask_NT[..., None]
    joint_FV = jnp.einsum("n,ntf,ntv->fv", law_N, model.features_NTF, tokens_NTV)
    reached_F1 = jnp.sum(joint_FV, axis=1, keepdims=True) > 0  # a prefix after the stop token has no law: uniform
    return jnp.where(reached_F1, jnp.log(joint_FV) - jnp.log(jnp.sum(joint_FV, axis=1, keepdims=True)), 0)


def at_law(model: Enumerable, law_N: jax.Array) -> Enumerable:
    """The tabular student whose completions have this law."""
    return _with(model, conditionals(model, law_N))


# ---- behaviour corrections


WEIGHTS = ("none", "token", "before", "through", "sequence")


def ratios(model: Enumerable, behaviour_NTV: jax.Array) -> dict[str, jax.Array]:
    """WEIGHTS [N, T] of each token: 1, rho_t, rho_{<t}, rho_{<=t}, and rho_{<=T} of the whole completion; rho = pi / behaviour."""
    log_NT = _chosen(model.logits(model.theta_FV), model) - _chosen(behaviour_NTV, model)
    through_NT = jnp.cumsum(log_NT, axis=1)
    logs = {"none": jnp.zeros_like(log_NT), "token": log_NT, "before": through_NT - log_NT, "through": through_NT}
    logs["sequence"] = jnp.broadcast_to(through_NT[:, -1:], log_NT.shape)
    return {name: jnp.exp(value) for name, value in logs.items()}


TERMS = {"local": "token_reverse_kl", "token": "token_reverse_kl", "to_go": "sequence_reverse_kl"}  # term -> the gradient it is for


def off_policy(model: Enumerable, behaviour_NTV: jax.Array) -> list[dict]:
    """For each term and each weight, when completions come from another law: norm of the bias relative to the term's own gradient, and
    trace variance of one completion's estimate.

    `local` is the exact per-prefix KL, `token` and `to_go` are sampled. The local term needs rho_{<t}, which the prefix's law asks for; a
    sampled token needs rho_{<=t}; rewards to go reach to the end and need the ratio of the sequence. The token ratio rho_t corrects none.
    """
    found = jax.jit(lambda theta: _biases(_with(model, theta), behaviour_NTV))(model.theta_FV)
    places = [(term, name) for term in TERMS for name in WEIGHTS]
    return [{"term": t, "weight": w, "bias": float(found[t][w][0]), "variance": float(found[t][w][1])} for t, w in places]


def _biases(model: Enumerable, behaviour_NTV: jax.Array) -> dict[str, dict[str, tuple[jax.Array, jax.Array]]]:
    behaviour_N = jnp.exp(model.log_probability(behaviour_NTV))

    def measure(term, exact, weight_NT):
        gradients = _weighted_gradients(model, term, weight_NT)
        mean = behaviour_N @ gradients
        variance = behaviour_N @ jnp.sum(jnp.square(gradients - mean[None]), axis=1)
        return jnp.linalg.norm(mean - exact) / jnp.linalg.norm(exact), variance

    weights = ratios(model, behaviour_NTV)
    stacked = jnp.stack([weights[name] for name in WEIGHTS])
    found = {}
    for term, target in TERMS.items():
        bias, variance = jax.vmap(functools.partial(measure, term, model.exact_gradient(target)))(stacked)
        found[term] = {name: (bias[i], variance[i]) for i, name in enumerate(WEIGHTS)}
    return found


def _weighted_gradients(model: Enumerable, term: str, weight_NT: jax.Array) -> jax.Array:
    """The estimate of every completion, [N, F * V], by the statistics and the loss that train."""
    target = Target((DenseHead(model.teacher_logits_NTV),))

    def loss(theta_FV):
        student, needs = DenseHead(model.logits(theta_FV)), {"logp", "local", "target_logp"}
        stats = token_stats(student, target, model.tokens_NT, signal=Signal("reverse_kl"), needs=needs)
        if term == "local":
            return loss_B(stats, Term(model.mask_NT, local_BT=stats.local_BT, w_local_BT=weight_NT))
        log_ratio_NT = jax.lax.stop_gradient(stats.target_logp_BT - stats.logp_BT)
        advantage_NT = credit_lib.advantages(log_ratio_NT, model.mask_NT, credit=term)
        return loss_B(stats, Term(model.mask_NT, advantage_BT=advantage_NT, w_score_BT=weight_NT))

    return jax.jacrev(loss)(model.theta_FV).reshape(len(weight_NT), -1)
