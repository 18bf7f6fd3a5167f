"""Exact bias and variance of the discounted estimators on the chain, by dynamic programming over its 17 places.

Letters: T steps, S places, A actions, P parameters. With the return A_t = l_t + gamma A_{t+1} and the estimate G_t = A_t s_t + G_{t+1}
(s_t the score), the moments E[A], E[A^2], E[G], E[A G] and E|G|^2 given the place obey backward recursions that close, so the mean and
the trace of the covariance of one trajectory's estimate need no samples. Use under `jax.enable_x64`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.analysis.toy import network
from opd_jax.analysis.toy.learning import SIGNS
from opd_jax.analysis.toy.settings import Settings
from opd_jax.analysis.toy.worlds import LIMIT, Chain

PLACES = np.arange(-LIMIT, LIMIT + 1)
NEXT_SA = np.clip(PLACES[:, None] + np.array([-1, 0, 1])[None], -LIMIT, LIMIT) + LIMIT  # index of the place that follows


def log_law(params: network.Params, task, horizon: int) -> jax.Array:
    """log pi of every action at every time and place, [T, S, A]."""
    time_T1 = jnp.arange(horizon)[:, None] / horizon
    position_TS = jnp.broadcast_to(jnp.asarray(PLACES, time_T1.dtype)[None], (horizon, len(PLACES)))
    return jax.nn.log_softmax(network.apply(params, jnp.asarray(SIGNS)[task], position_TS, time_T1))


def scores(params: network.Params, task, horizon: int, layers: tuple[str, ...] = network.LAYERS) -> jax.Array:
    """Gradient of log pi by the parameters of `layers` at every time and place, [T, S, A, P]."""

    def one(position, time):
        gradient = jax.jacrev(lambda p: jax.nn.log_softmax(network.apply(p, jnp.asarray(SIGNS)[task], position, time)))(params)
        wanted = jax.tree.leaves({name: gradient[name] for name in layers})
        return jnp.concatenate([x.reshape(Chain.outputs, -1) for x in wanted], axis=1)

    times = jnp.arange(horizon) / horizon
    places = jnp.asarray(PLACES, times.dtype)
    return jax.vmap(lambda time: jax.vmap(lambda place: one(place, time))(places))(times)


def occupancy(logp_TSA: jax.Array, start) -> jax.Array:
    """Probability of each place before each step, [T, S], from place number `start`."""
    move_SAX = jax.nn.one_hot(NEXT_SA, len(PLACES), dtype=logp_TSA.dtype)

    def step(here_S, logp_SA):
        return jnp.einsum("s,sa,sax->x", here_S, jnp.exp(logp_SA), move_SAX), here_S

    return jax.lax.scan(step, jax.nn.one_hot(start, len(PLACES), dtype=logp_TSA.dtype), logp_TSA)[1]


def trajectory_kl(logp_TSA: jax.Array, logq_TSA: jax.Array, start, *, frozen: bool = False) -> jax.Array:
    """KL(pi || q) over trajectories, nats; `frozen` takes the occupancy for a constant, which leaves the gradient of token-level OPD."""
    visited_TS = occupancy(logp_TSA, start)
    if frozen:
        visited_TS = jax.lax.stop_gradient(visited_TS)
    return jnp.sum(visited_TS * jnp.sum(jnp.exp(logp_TSA) * (logp_TSA - logq_TSA), axis=-1))


def moments(logp_TSA: jax.Array, logq_TSA: jax.Array, score_TSAP: jax.Array, start, gamma) -> tuple[jax.Array, jax.Array]:
    """(mean [P], trace of the covariance) of the gradient estimate -sum_t A_t s_t of one trajectory from place number `start`."""

    def step(later, inputs):
        mean_S, square_S, estimate_SP, product_SP, norm_S = later
        logp_SA, logq_SA, score_SAP = inputs
        ratio_SA, probability_SA = logq_SA - logp_SA, jnp.exp(logp_SA)
        advantage_SA = ratio_SA + gamma * mean_S[NEXT_SA]
        advantage2_SA = ratio_SA**2 + 2 * gamma * ratio_SA * mean_S[NEXT_SA] + gamma**2 * square_S[NEXT_SA]
        cross_SAP = ratio_SA[..., None] * estimate_SP[NEXT_SA] + gamma * product_SP[NEXT_SA]  # E[A_t G_{t+1}]
        own_SA = advantage2_SA * jnp.sum(score_SAP**2, axis=-1) + 2 * jnp.sum(score_SAP * cross_SAP, axis=-1)
        average = functools.partial(jnp.einsum, "sa,sa...->s...", probability_SA)
        return (
            average(advantage_SA),
            average(advantage2_SA),
            average(advantage_SA[..., None] * score_SAP + estimate_SP[NEXT_SA]),
            average(advantage2_SA[..., None] * score_SAP + cross_SAP),
            average(own_SA + norm_S[NEXT_SA]),
        ), None

    zero_S, zero_SP = jnp.zeros(len(PLACES), logp_TSA.dtype), jnp.zeros((len(PLACES), score_TSAP.shape[-1]), logp_TSA.dtype)
    last = (zero_S, zero_S, zero_SP, zero_SP, zero_S)
    (_, _, estimate_SP, _, norm_S), _ = jax.lax.scan(step, last, (logp_TSA, logq_TSA, score_TSAP), reverse=True)
    return -estimate_SP[start], norm_S[start] - jnp.sum(estimate_SP[start] ** 2)


@functools.partial(jax.jit, static_argnames=("settings",))
def study(params: network.Params, teacher: network.Params, task: jax.Array, *, settings: Settings) -> dict[str, jax.Array]:
    """For one student, each [gammas] but the first: norm of the exact gradient of the trajectory KL; of each estimator the norm of its
    bias to that gradient and the cosine with it, and the trace variance of one trajectory, of all parameters and of the output layer."""
    params, teacher = jax.tree.map(lambda x: x.astype(jnp.float64), (params, teacher))
    start = jnp.asarray(settings.starts, int)[task] + LIMIT
    logq_TSA = log_law(teacher, task, settings.horizon)
    gradient = jax.grad(lambda p: trajectory_kl(log_law(p, task, settings.horizon), logq_TSA, start))(params)
    gradient_P = jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])
    logp_TSA = log_law(params, task, settings.horizon)
    score_TSAP, last_TSAP = (scores(params, task, settings.horizon, layers) for layers in (network.LAYERS, network.LAYERS[-1:]))

    def one(gamma):
        mean_P, variance = moments(logp_TSA, logq_TSA, score_TSAP, start, gamma)
        _, last_variance = moments(logp_TSA, logq_TSA, last_TSAP, start, gamma)
        cosine = mean_P @ gradient_P / (jnp.linalg.norm(mean_P) * jnp.linalg.norm(gradient_P))
        return {"bias": jnp.linalg.norm(mean_P - gradient_P), "cosine": cosine, "variance": variance, "output_variance": last_variance}

    return {"gradient": jnp.linalg.norm(gradient_P), **jax.lax.map(one, jnp.asarray(settings.gammas))}
