"""Teachers by REINFORCE and students by on-policy distillation, on any world. Everything is one program over gammas and seeds at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from opd_jax.analysis.toy import network
from opd_jax.analysis.toy.settings import CHUNKS, Settings
from opd_jax.analysis.toy.worlds import World
from opd_jax.numerics import credit
from opd_jax.numerics.estimators import Term, loss_B
from opd_jax.numerics.token_stats import Stats

SIGNS = (-1.0, 1.0)  # of the left and the right task, as the network reads them
TEACHER, STUDENT, EVALUATION = range(3)  # streams of random numbers of a seed


@dataclasses.dataclass(frozen=True)
class Training:
    """Students on their way. Leaves of `snapshots` are [CHUNKS + 1, gammas, seeds, ...], from the initial to the last student."""

    teachers: network.Params  # leaves [seeds, 2 tasks, ...]
    snapshots: network.Params
    variance_GSI: jax.Array  # gradient variance of each update's output layer, by the paper's formula
    reverse_kl_GSI: jax.Array  # -sum_t l_t, mean over the trajectories of each update; an estimate of the sequence KL

    @property
    def students(self) -> network.Params:
        """Leaves [gammas, seeds, ...]."""
        return jax.tree.map(lambda x: x[-1], self.snapshots)


# ---- trajectories and losses


def rollout(world: World, params: network.Params, task, key: jax.Array, settings: Settings, batch: int) -> tuple[jax.Array, jax.Array]:
    """(positions [batch, horizon + 1], actions [batch, horizon]) of a policy from the start of task 0 (left) or 1 (right)."""
    noise = world.noise(key, (settings.horizon, batch))
    sign, start = jnp.asarray(SIGNS)[task], jnp.asarray(settings.starts)[task]

    def step(position_B, inputs):
        t, noise_B = inputs
        action_B = world.act(network.apply(params, sign, position_B, t / settings.horizon), noise_B)
        following_B = world.move(position_B, action_B)
        return following_B, (following_B, action_B)

    first_B = jnp.full((batch,), start)
    _, (later_TB, actions_TB) = jax.lax.scan(step, first_B, (jnp.arange(settings.horizon), noise))
    return jnp.concatenate([first_B[:, None], later_TB.T], axis=1), actions_TB.T


def outputs(params: network.Params, task, positions_BT: jax.Array, horizon: int) -> jax.Array:
    """Outputs of a policy before each step, [B, T, outputs]."""
    return network.apply(params, jnp.asarray(SIGNS)[task], positions_BT, jnp.arange(horizon)[None, :] / horizon)


def policy_loss(world: World, params, task, positions_BT, actions_BT, advantage_BT) -> jax.Array:
    """-sum_t sg(A_t) log pi, mean over trajectories: the training code's loss of a score-function term."""
    logp_BT = world.log_prob(outputs(params, task, positions_BT, actions_BT.shape[1]), actions_BT)
    return jnp.mean(loss_B(Stats(logp_BT=logp_BT), Term(jnp.ones(logp_BT.shape), advantage_BT=advantage_BT)))


def gradient_variance(gradients_MP: jax.Array) -> jax.Array:
    """(1/M) sum_m |g_m - mean|^2 over microbatches: the trace of their covariance with divisor M (Fu et al., appendix E)."""
    mean_P = jnp.mean(gradients_MP, axis=0)
    return jnp.mean(jnp.sum(jnp.square(gradients_MP - mean_P[None]), axis=1))


def _microbatch_gradients(world: World, settings: Settings, params, task, *arrays_BT) -> network.Params:
    """Gradients of the microbatches, leaves [M, ...]."""
    pieces = [x.reshape(settings.microbatches, -1, x.shape[1]) for x in arrays_BT]
    return jax.vmap(lambda *piece: jax.grad(functools.partial(policy_loss, world))(params, task, *piece))(*pieces)


# ---- teachers


@functools.partial(jax.jit, static_argnames=("world", "settings"))
def teachers(world: World, settings: Settings) -> network.Params:
    """Policies trained by REINFORCE to reach and hold their task's target, one per seed and task; leaves [seeds, 2, ...]."""
    optimizer = optax.adam(settings.teacher_learning_rate)

    def train(seed, task):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), TEACHER), task)
        params = network.init(key, width=settings.width, outputs=world.outputs)
        step = functools.partial(_teacher_step, world, settings, optimizer, task, key)
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1, settings.teacher_iterations + 1))
        return params

    return jax.vmap(jax.vmap(train, in_axes=(None, 0)), in_axes=(0, None))(jnp.asarray(settings.seeds), jnp.arange(len(SIGNS)))


def _teacher_step(world: World, settings: Settings, optimizer, task, key, carry, iteration):
    params, opt_state = carry
    positions_BT, actions_BT = rollout(world, params, task, jax.random.fold_in(key, iteration), settings, settings.batch)
    reward_BT = -jnp.abs(positions_BT[:, 1:] - jnp.asarray(settings.targets)[task])
    return_BT = credit.advantages(reward_BT, jnp.ones(reward_BT.shape), credit="to_go")
    advantage_BT = return_BT - jnp.mean(return_BT, axis=0, keepdims=True)
    grads = jax.grad(functools.partial(policy_loss, world))(params, task, positions_BT[:, :-1], actions_BT, advantage_BT)
    updates, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(params, updates), opt_state), None


# ---- students


def students(world: World, settings: Settings, teacher_params: network.Params) -> Training:
    """Trains one student per gamma and seed, in CHUNKS pieces; students of one seed begin alike and draw the same noise."""
    optimizer = make_optimizer(settings)

    def begin(seed):
        params = network.init(_student_key(seed), width=settings.width, outputs=world.outputs)
        return params, optimizer.init(params)

    begun = jax.vmap(begin)(jnp.asarray(settings.seeds))
    carry = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(settings.gammas), *x.shape)), begun)
    snapshots, measured = [carry[0]], []
    for iterations in jnp.arange(1, settings.iterations + 1).reshape(CHUNKS, -1):
        carry, one = _advance(world, settings, carry, teacher_params, iterations)
        snapshots.append(carry[0])
        measured.append(one)
    variance_GSI, reverse_kl_GSI = (jnp.concatenate(x, axis=2) for x in zip(*measured, strict=True))
    return Training(teacher_params, jax.tree.map(lambda *x: jnp.stack(x), *snapshots), variance_GSI, reverse_kl_GSI)


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    return {"adam": optax.adam, "sgd": optax.sgd}[settings.optimizer](settings.learning_rate)


@functools.partial(jax.jit, static_argnames=("world", "settings"))
def _advance(world: World, settings: Settings, carry, teacher_params: network.Params, iterations: jax.Array):
    """Some iterations of all students, [gammas, seeds, ...]."""

    def one(carry, gamma_index, seed, taught):
        return jax.lax.scan(functools.partial(student_step, world, settings, gamma_index, seed, taught), carry, iterations)

    each = jax.vmap(jax.vmap(one, in_axes=(0, None, 0, 0)), in_axes=(0, 0, None, None))
    return each(carry, jnp.arange(len(settings.gammas)), jnp.asarray(settings.seeds), teacher_params)


def _student_key(seed) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), STUDENT)


def student_step(world: World, settings: Settings, gamma_index, seed, taught, carry, iteration):
    """One update: odd iterations on the left task, even ones on the right; the advantages are those of the training code."""
    params, opt_state = carry
    task = (iteration + 1) % 2
    teacher = jax.tree.map(lambda x: x[task], taught)
    key = jax.random.fold_in(_student_key(seed), iteration)
    positions_BT, actions_BT = rollout(world, params, task, key, settings, settings.batch)
    positions_BT = positions_BT[:, :-1]
    logp_BT, target_logp_BT = (world.log_prob(outputs(p, task, positions_BT, settings.horizon), actions_BT) for p in (params, teacher))
    log_ratio_BT = jax.lax.stop_gradient(target_logp_BT - logp_BT)
    # `advantages` checks gamma on the host, so every gamma is computed and one taken: little work beside the network.
    mask_BT = jnp.ones(log_ratio_BT.shape)
    each_GBT = jnp.stack([credit.advantages(log_ratio_BT, mask_BT, credit="discounted", gamma=gamma) for gamma in settings.gammas])
    grads_M = _microbatch_gradients(world, settings, params, task, positions_BT, actions_BT, each_GBT[gamma_index])
    last = grads_M[network.LAYERS[-1]]
    variance = gradient_variance(jnp.concatenate([x.reshape(settings.microbatches, -1) for x in jax.tree.leaves(last)], axis=1))
    updates, opt_state = make_optimizer(settings).update(jax.tree.map(lambda g: jnp.mean(g, axis=0), grads_M), opt_state)
    return (optax.apply_updates(params, updates), opt_state), (variance, -jnp.mean(jnp.sum(log_ratio_BT, axis=1)))


# ---- what has been learnt


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of students and teachers. G gammas, S seeds, K tasks, E trajectories, T times (the start is one), X bins of `world.edges`."""

    position_GSKE: jax.Array  # last positions of the students
    reverse_kl_GSK: jax.Array  # nats per trajectory: mean of sum_t KL(pi || q), each exact at its prefix
    visits_GSTX: jax.Array  # share of the trajectories of both tasks in each bin; what is outside is not counted
    teacher_position_SKE: jax.Array
    teacher_visits_STX: jax.Array


def evaluate(world: World, settings: Settings, training: Training) -> Evaluation:
    """Fresh trajectories of the last students and of their teachers, on both tasks."""
    # Teachers are one more row of policies beside the gammas, each with a policy of its own for either task.
    both = lambda x: jnp.broadcast_to(x[:, :, None], (*x.shape[:2], len(SIGNS), *x.shape[2:]))
    policies = jax.tree.map(lambda s, t: jnp.concatenate([both(s), t[None]]), training.students, training.teachers)
    position, kl, visits = _evaluated(world, settings, policies, training.teachers)
    return Evaluation(position[:-1], kl[:-1], visits[:-1], position[-1], visits[-1])


@functools.partial(jax.jit, static_argnames=("world", "settings"))
def _evaluated(world: World, settings: Settings, policies: network.Params, teacher_params: network.Params) -> tuple[jax.Array, ...]:
    """(last positions [policies, seeds, tasks, E], KL to the teacher [policies, seeds, tasks], visits [policies, seeds, T, X])."""

    def one(policy, teacher, seed, task):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EVALUATION), task)
        positions_BT, _ = rollout(world, policy, task, key, settings, settings.evaluation_batch)
        own, taught = (outputs(p, task, positions_BT[:, :-1], settings.horizon) for p in (policy, teacher))
        kl = jnp.mean(jnp.sum(world.kl(own, taught), axis=1))
        histogram = jax.vmap(lambda x: jnp.histogram(x, bins=jnp.asarray(world.edges))[0], in_axes=1)
        return positions_BT[:, -1], kl, histogram(positions_BT) / (len(SIGNS) * settings.evaluation_batch)

    each = jax.vmap(jax.vmap(jax.vmap(one), in_axes=(0, 0, 0, None)), in_axes=(0, None, None, None))
    seeds_SK = jnp.broadcast_to(jnp.asarray(settings.seeds)[:, None], (len(settings.seeds), len(SIGNS)))
    position, kl, visits = each(policies, teacher_params, seeds_SK, jnp.arange(len(SIGNS)))
    return position, kl, visits.sum(2)
