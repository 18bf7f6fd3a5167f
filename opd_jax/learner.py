"""One update: microbatches, global denominators, clipping, AdamW, and a flag that keeps the state good when a gradient is not finite."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opd_jax import config as config_lib
from opd_jax import objective as objective_lib
from opd_jax import observed, parallel
from opd_jax.models import forward
from opd_jax.models.config import ModelConfig
from opd_jax.numerics.estimators import Context
from opd_jax.numerics.heads import Head
from opd_jax.numerics.targets import SparseTarget, TokenTarget
from opd_jax.objective import Share
from opd_jax.teachers import Bank, Parameters
from opd_jax.types import TrainState, View

# (frozen base, trained parameters) -> parameters of the model
Attach = Callable[[dict, dict], dict] | None


@flax.struct.dataclass
class Batch:
    """One update's input: what each model reads, and what looks across rows, made before the microbatch split."""

    student: View
    teacher: View | None
    mask_BT: jax.Array  # the tokens that the student, or who wrote in its place, has drawn
    shares: tuple[Share, ...]  # of the parts of the objective
    route_B: jax.Array | None = None  # number of the teacher of each row, where there are several
    compared_B: jax.Array | None = None  # False on rows that no teacher is for, of which the metrics say nothing; None: on none
    scores: SparseTarget | TokenTarget | None = None  # what is known of the teacher's law, where the teacher does not read the completions


def make_batch(
    objective: objective_lib.Objective,
    student: View,
    teacher: View | None,
    context: Context,
    *,
    contexts: dict[str, Context] | None = None,
    route_B: jax.Array | None = None,
    compared_B: jax.Array | None = None,
    domain_B: jax.Array | None = None,
    scores: SparseTarget | TokenTarget | None = None,
) -> Batch:
    """Adds the weights and global denominators of the parts' normalisers. `contexts`: of parts that have one of their own, by name.

    `domain_B`: numbers of domains, of which each is to have the same share of a part's weights (loss.balance).
    """
    own = contexts or {}
    shares = (objective_lib.share(part, own.get(part.name, context), objective.max_length, domain_B) for part in objective.parts)
    return Batch(student, teacher, context.mask_BT, tuple(shares), route_B, compared_B, scores)


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


def init_state(params: dict, optimizer: optax.GradientTransformation, bank: Bank | None = None) -> TrainState:
    """The state before the first update; the optimizer's moments are born where their parameters lie."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(params, optimizer))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step, finite = (parallel.put(x, shardings.step) for x in (jnp.int32(0), jnp.bool_(True)))
    kept = bank.begin(params) if bank is not None else {}
    adaptive = bank.rule.begin() if bank is not None and bank.rule else {}
    return TrainState(step, params, opt_state, finite, kept, jax.tree.map(lambda x: parallel.put(x, shardings.step), adaptive))


def abstract_state(params: dict, optimizer: optax.GradientTransformation, bank: Bank | None = None) -> TrainState:
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
    scalar = {dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere) for dtype in (jnp.int32, jnp.bool_, jnp.float32)}
    abstract = jax.tree.map(lambda p: like(p, p.sharding), params)
    kept = abstract if bank is not None and bank.keeps else {}
    adaptive = jax.tree.map(lambda x: scalar[jnp.float32], bank.rule.begin()) if bank is not None and bank.rule else {}
    return TrainState(scalar[jnp.int32], abstract, opt_state, scalar[jnp.bool_], kept, adaptive)


def make_update(
    objective: objective_lib.Objective,
    student_config: ModelConfig,
    bank: Bank | None,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int,
    state: TrainState,
    attach: Attach = None,
) -> Callable:
    """The jitted update (state, frozen, batch, base=None) -> (state, metrics). The state is donated; it comes back where it lay.

    `frozen` has the parameters of the bank's members, and of its reference, by name. `attach(base, trained parameters)` gives the
    student's parameters; without it they are what is trained.
    """
    update = _update_function(objective, student_config, bank, optimizer, microbatches, attach)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def gradient(*arguments, **settings):
    """(loss, sums of per-token statistics, gradient by `params`) of a batch, the same at any number of microbatches."""
    return gradient_and_statistics(*arguments, **settings)[0]


def gradient_and_statistics(
    objective,
    student_config,
    bank: Bank | None,
    params,
    frozen: dict,
    batch: Batch,
    *,
    kept=None,
    adaptive=None,
    microbatches: int = 1,
    attach: Attach = None,
    base=None,
):
    """(what `gradient` gives, for the diagnostics: per-token statistics [B, T], squared norms of the microbatches' gradients [M])."""
    models = _Models(params, frozen, kept, base)
    readers = _Readers(objective, student_config, bank, attach, adaptive)

    def piece(models: _Models, micro: Batch):
        outside = None if readers.rule_looks else readers.targets(models, micro)

        def loss(params):
            head, tokens_BT = readers.student(models._replace(params=params), micro), micro.student.completion_BT
            targets, seen = outside or readers.targets(models, micro, head)
            value, sums = objective_lib.loss(objective, head, targets, tokens_BT, micro.mask_BT, micro.shares, micro.compared_B)
            return value, (sums | seen, observed.look(objective, head, targets["teacher"], tokens_BT))

        (value, (sums, stats)), grads = jax.value_and_grad(loss, has_aux=True)(models.params)
        return (value, sums, grads), stats

    if microbatches == 1:
        total, stats = piece(models, batch)
        return total, (stats, None)
    if objective.looks_across:
        batch = _prepare(readers, models, batch, microbatches)
    pieces = _split(batch, microbatches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(piece, models, jax.tree.map(lambda x: x[0], pieces))[0])

    def add(total, micro):
        share, stats = piece(parallel.within_loop(models, micro), micro)
        # Without the barrier the compiler may merge a share with the sum, or with its norm: the rounding would depend on who looks on.
        share = jax.tree.map(jax.lax.optimization_barrier, share)
        square = optax.tree.norm(share[2], squared=True) if objective.diagnostics else None
        return jax.tree.map(jnp.add, total, share), (stats, square)

    total, (stats, square_M) = jax.lax.scan(add, zeros, pieces)
    return total, (jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), stats), square_M)


class _Models(NamedTuple):
    """Parameters: what is trained, of the bank's members, of a copy of the student that follows it, and what adapters are on."""

    params: dict
    frozen: dict
    kept: dict | None
    base: dict | None


@dataclasses.dataclass(frozen=True)
class _Readers:
    """How some rows are read."""

    objective: objective_lib.Objective
    student_config: ModelConfig
    bank: Bank | None
    attach: Attach
    adaptive: dict | None  # state of an adaptive extrapolation

    def _whole(self, trained: dict, models: _Models) -> dict:
        return self.attach(models.base, trained) if self.attach else trained

    def student(self, models: _Models, micro: Batch) -> Head:
        """The student, whose parameters alone have a gradient."""
        return forward.hidden(self._whole(models.params, models), self.student_config, micro.student)

    @property
    def rule_looks(self) -> bool:
        """Whether the targets depend on what the student says. Others are made outside of what has a gradient."""
        return self.bank is not None and self.bank.rule is not None

    def targets(self, models: _Models, micro: Batch, student: Head | None = None) -> tuple[objective_lib.Targets, dict[str, jax.Array]]:
        """(what the student is compared with, sums for an adaptive rule, which looks at `student`); all of it is constant."""
        targets, seen, bank, models = {"teacher": micro.scores, "reference": None}, {}, self.bank, jax.lax.stop_gradient(models)
        if bank is None:
            return targets, seen
        gain = bank.rule.gain(self.adaptive) if bank.rule else None
        kept = self._whole(models.kept, models) if bank.keeps else {}
        parameters = Parameters(models.frozen, kept, self._whole(models.params, models), gain)
        if micro.teacher is not None:
            views = (micro.teacher, micro.student, micro.route_B)
            compared_BT = micro.mask_BT if micro.compared_B is None else micro.mask_BT & micro.compared_B[:, None]
            targets["teacher"], seen = bank.target(parameters, *views, student=student, mask_BT=compared_BT)
        if self.objective.has_reference:
            targets["reference"] = bank.reference_target(parameters, micro.student)
        return targets, seen


def _prepare(readers: _Readers, models: _Models, batch: Batch, microbatches: int) -> Batch:
    """What looks across rows, made before the batch is split: one more pass of student and teacher, without gradients."""
    objective = readers.objective

    def piece(_, micro: Batch):
        near = parallel.within_loop(models, micro)
        head = readers.student(near, micro)
        targets, _ = readers.targets(near, micro, head)
        return None, objective_lib.statistics(objective, head, targets, micro.student.completion_BT, micro.mask_BT, micro.shares)

    _, stats = jax.lax.scan(piece, None, _split(batch, microbatches))
    whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), stats)
    return batch.replace(shares=objective_lib.prepared(objective, whole, batch.shares))


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


def _update_function(objective, student_config, bank, optimizer, microbatches, attach):
    def update(state: TrainState, frozen, batch: Batch, base=None) -> tuple[TrainState, dict]:
        settings = {"kept": state.kept, "adaptive": state.adaptive, "microbatches": microbatches, "attach": attach, "base": base}
        (loss, sums, grads), statistics = gradient_and_statistics(objective, student_config, bank, state.params, frozen, batch, **settings)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # The host sees metrics one step late: until then a bad gradient, and what follows it, must leave the state as it was.
        metrics = {"train/loss": loss, "train/grad_norm": grad_norm, **observed.metrics(sums)}
        finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, metrics.values()), state.finite)
        params = optax.apply_updates(state.params, updates)
        kept = bank.advance(state.kept, params, state.step + 1) if bank is not None else state.kept
        adaptive = bank.rule.advance(state.adaptive, sums) if bank is not None and bank.rule else state.adaptive
        if adaptive:
            metrics["extrapolation/gain"] = bank.rule.gain(state.adaptive)
        moved = TrainState(state.step + 1, params, opt_state, finite, kept, adaptive)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state.replace(finite=finite))
        if objective.diagnostics:  # beside the others: a quantity that does not exist is NaN, and no reason to stop
            metrics["diagnostics"] = observed.diagnose(*statistics, grad_norm, batch.shares[0].context)
        return state, metrics

    return update


def place(mesh: Mesh, batch: Batch) -> Batch:
    """Rows of a batch over the batch axes of the mesh, scalars on every device."""
    return jax.tree.map(lambda x: parallel.shard_batch(x, mesh) if jnp.ndim(x) else parallel.replicate(x, mesh), batch)
