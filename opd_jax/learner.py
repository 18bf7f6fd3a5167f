"""One update: microbatches, global denominators, clipping, AdamW, and a flag that keeps the state good when a gradient is not finite."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opd_jax import config as config_lib
from opd_jax import objective as objective_lib
from opd_jax import parallel
from opd_jax.models import forward
from opd_jax.models.config import ModelConfig
from opd_jax.numerics.estimators import Context
from opd_jax.numerics.token_stats import Target
from opd_jax.types import TrainState, View

# (frozen base, trained parameters) -> parameters of the model
Attach = Callable[[dict, dict], dict] | None


@flax.struct.dataclass
class Batch:
    """One update's input: what each model reads, and what looks across rows, made before the microbatch split."""

    student: View
    teacher: View | None
    context: Context
    weights_BT: jax.Array
    denominator: jax.Array


def make_batch(objective: objective_lib.Objective, student: View, teacher: View | None, context: Context) -> Batch:
    """Adds the weights and the global denominator of the objective's normaliser."""
    weights_BT, denominator = objective_lib.normalise(objective, context)
    return Batch(student, teacher, context, weights_BT, denominator)


def make_schedule(settings: config_lib.Learner, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates done."""
    span = settings.decay_steps or steps
    decay = max(span - settings.warmup_steps, 1)
    peak, end = settings.learning_rate, settings.learning_rate * settings.final_fraction
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay, alpha=settings.final_fraction),
    }[settings.schedule]()
    if not settings.warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, settings.warmup_steps), after], [settings.warmup_steps])


def make_optimizer(settings: config_lib.Learner, steps: int) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm; weight decay on weight matrices alone, not on norms and biases."""
    adamw = optax.adamw(
        make_schedule(settings, steps),
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw) if settings.clip_norm else adamw


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update; the optimizer's moments are born where their parameters lie."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(params, optimizer))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step, finite = jax.device_put((jnp.int32(0), jnp.bool_(True)), (shardings.step, shardings.finite))
    return TrainState(step, params, opt_state, finite)


def abstract_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and shardings of the state for parameters, real or abstract: moments like their parameters, scalars on every device."""
    first = jax.tree.leaves(params)[0].sharding
    everywhere = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first

    def like(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: like(moment, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: like(leaf, everywhere),
    )
    scalar = {dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere) for dtype in (jnp.int32, jnp.bool_)}
    return TrainState(scalar[jnp.int32], jax.tree.map(lambda p: like(p, p.sharding), params), opt_state, scalar[jnp.bool_])


def make_update(
    objective: objective_lib.Objective,
    student_config: ModelConfig,
    teacher_config: ModelConfig | None,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int,
    state: TrainState,
    attach: Attach = None,
) -> Callable:
    """The jitted update (state, teacher_params, batch, base=None) -> (state, metrics). The state is donated; it comes back where it lay.

    `attach(base, trained parameters)` gives the student's parameters; without it they are what is trained.
    """
    update = _update_function(objective, student_config, teacher_config, optimizer, microbatches, attach)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def gradient(*arguments, **settings):
    """(loss, sums of per-token statistics, gradient by `params`) of a batch, the same at any number of microbatches."""
    return gradient_and_statistics(*arguments, **settings)[0]


def gradient_and_statistics(
    objective,
    student_config,
    teacher_config,
    params,
    teacher_params,
    batch: Batch,
    *,
    microbatches: int = 1,
    attach: Attach = None,
    base=None,
):
    """(what `gradient` gives, for the diagnostics: per-token statistics [B, T], squared norms of the microbatches' gradients [M])."""
    read = functools.partial(_heads, student_config, teacher_config, teacher_params, attach, base)

    def piece(micro: Batch):
        def loss(params):
            head, target = read(params, micro)
            value, sums = objective_lib.loss(
                objective, head, target, micro.student.completion_BT, micro.context, micro.weights_BT, micro.denominator
            )
            return value, (sums, objective_lib.look(objective, head, target, micro.student.completion_BT))

        (value, (sums, stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return (value, sums, grads), stats

    if microbatches == 1:
        total, stats = piece(batch)
        return total, (stats, None)
    if objective.estimator.looks_across:
        batch = _prepare(objective, functools.partial(read, params), batch, microbatches)
    pieces = _split(batch, microbatches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(piece, jax.tree.map(lambda x: x[0], pieces))[0])

    def add(total, micro):
        share, stats = piece(micro)
        # Without the barrier the compiler may merge a share with the sum, or with its norm: the rounding would depend on who looks on.
        share = jax.tree.map(jax.lax.optimization_barrier, share)
        square = optax.tree.norm(share[2], squared=True) if objective.diagnostics else None
        return jax.tree.map(jnp.add, total, share), (stats, square)

    total, (stats, square_M) = jax.lax.scan(add, zeros, pieces)
    return total, (jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), stats), square_M)


def _heads(student_config, teacher_config, teacher_params, attach: Attach, base, params, micro: Batch):
    """(what the student says, what it is compared with) for some rows; the teacher has no gradient."""
    target = None
    if teacher_config is not None:
        target = Target((jax.lax.stop_gradient(forward.hidden(teacher_params, teacher_config, micro.teacher)),))
    return forward.hidden(attach(base, params) if attach else params, student_config, micro.student), target


def _prepare(objective: objective_lib.Objective, read: Callable, batch: Batch, microbatches: int) -> Batch:
    """What looks across rows, made before the batch is split: one more pass of student and teacher, without gradients."""

    def piece(_, micro: Batch):
        head, target = read(micro)
        return None, objective_lib.statistics(objective, head, target, micro.student.completion_BT)

    _, stats = jax.lax.scan(piece, None, _split(batch, microbatches))
    whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), stats)
    return batch.replace(context=objective_lib.prepared(objective, whole, batch.context))


def _split(batch: Batch, microbatches: int) -> Batch:
    """[B, ...] -> [M, B/M, ...] with rows dealt out in turn, so that every microbatch lies across all devices."""

    def deal(x):
        if x.ndim == 0:
            return jnp.broadcast_to(x, (microbatches,))
        pieces = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return pieces
        return parallel.constrain(pieces, None, "batch", *(None,) * (pieces.ndim - 2))

    return jax.tree.map(deal, batch)


def _update_function(objective, student_config, teacher_config, optimizer, microbatches, attach):
    def update(state: TrainState, teacher_params, batch: Batch, base=None) -> tuple[TrainState, dict]:
        settings = {"microbatches": microbatches, "attach": attach, "base": base}
        (loss, sums, grads), statistics = gradient_and_statistics(
            objective, student_config, teacher_config, state.params, teacher_params, batch, **settings
        )
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # The host sees metrics one step late: until then a bad gradient, and what follows it, must leave the state as it was.
        metrics = {"train/loss": loss, "train/grad_norm": grad_norm, **objective_lib.metrics(sums)}
        finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, metrics.values()), state.finite)
        moved = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, finite)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state.replace(finite=finite))
        if objective.diagnostics:  # beside the others: a quantity that does not exist is NaN, and no reason to stop
            metrics["diagnostics"] = objective_lib.diagnose(*statistics, grad_norm, batch.context)
        return state, metrics

    return update


def place(mesh: Mesh, batch: Batch) -> Batch:
    """Rows of a batch over the batch axes of the mesh."""
    scalar = parallel.replicate(batch.denominator, mesh)
    rows = parallel.shard_batch(batch.replace(denominator=None), mesh)
    return rows.replace(denominator=scalar)
