"""Gradients of single rollouts under many estimators at once, through the code that trains, and what is kept of them.

Student and teacher read a rollout once; each estimator then costs one pass back through the student. Of the gradients only sums stay:
inner products, squared norms by parameter group and by position, a running mean, and a sketch per prompt. Memory does not grow with P.

Beside the letters of types.py: U prompts of a microbatch, E estimators, S streams (those of the estimators on the rollouts, then those of
the references on draws of their own), N parameters or the numbers that stand for them, R numbers of a sketch, I parts of a completion.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.models import forward
from opd_jax.numerics.estimators import Context, Estimator, loss_B
from opd_jax.numerics.token_stats import Target, token_stats
from opd_jax.types import View

GROUPS = ("embedding", "attention", "mlp", "norm", "unembedding", "other")


# ---- from a tree to a vector


def group_of(path: str) -> str:
    """The parameter group of a leaf: the embedding is also the unembedding where the two are tied."""
    *_, name = parts = path.split("/")
    if name.endswith("norm"):
        return "norm"
    known = {"embed": "embedding", "unembed": "unembedding"} | {group: group for group in GROUPS}
    return next((known[part] for part in parts if part in known), "other")


@dataclasses.dataclass(frozen=True)
class Projection:
    """What stands for a gradient: all its numbers, or beyond `exact_parameters` a sketch of each group. Hashable."""

    groups: tuple[str, ...]  # those that the model has
    leaf_groups: tuple[int, ...]  # of each leaf of the tree
    leaf_sizes: tuple[int, ...]
    width: int  # R
    exact: bool
    seed: int

    @property
    def parameters(self) -> int:
        return sum(self.leaf_sizes)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Where each group stands in `vector`, [start, end)."""
        sizes = [sum(s for s, g in zip(self.leaf_sizes, self.leaf_groups, strict=True) if g == i) for i in range(len(self.groups))]
        ends = [sum(sizes[: i + 1]) if self.exact else self.width * (i + 1) for i in range(len(sizes))]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def norm_error(self) -> float:
        """Relative standard error of a squared norm that is read from a sketch in place of the gradient; 0 where it is not."""
        return 0.0 if self.exact else math.sqrt(2 / self.width)

    @property
    def sketch_error(self) -> float:
        """The same of the sketches that intervals are made from."""
        return math.sqrt(2 / self.width) if self.parameters > self.width else 0.0

    def vector(self, gradient: Any) -> jax.Array:
        """[N] of one gradient, the leaves of a group side by side; or a sketch of each group."""
        leaves = jax.tree.leaves(gradient)
        members = [[i for i, g in enumerate(self.leaf_groups) if g == group] for group in range(len(self.groups))]
        if self.exact:
            return jnp.concatenate([leaves[i].ravel() for group in members for i in group])
        sketches = [sum(count_sketch(leaves[i].ravel(), self.width, self.seed + i) for i in group) for group in members]
        return jnp.concatenate(sketches)

    def squares(self, gradient: Any) -> jax.Array:
        """Squared norm of each group, exact at any size."""
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)]
        return jnp.stack([sum(squares[i] for i, g in enumerate(self.leaf_groups) if g == group) for group in range(len(self.groups))])

    def squares_of_vector(self, vector: jax.Array) -> jax.Array:
        """Squared norm of each group, [..., groups], of `vector`s [..., N]."""
        return jnp.stack([jnp.sum(jnp.square(vector[..., start:end]), axis=-1) for start, end in self.segments], axis=-1)

    def compress(self, vector_N: jax.Array) -> jax.Array:
        """The sketch [R] of a vector; a vector that is no longer than a sketch stays what it is."""
        if not self.exact:
            return jnp.sum(vector_N.reshape(len(self.groups), self.width), axis=0)
        return count_sketch(vector_N, self.width, self.seed) if self.parameters > self.width else vector_N


def make_projection(params: Any, *, width: int, exact_parameters: int, seed: int) -> Projection:
    """The projection of gradients of these parameters, real or abstract."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params), strict=True)
    names = [group_of(jax.tree_util.keystr(path, simple=True, separator="/")) for path in paths]
    groups = tuple(group for group in GROUPS if group in names)
    sizes = tuple(leaf.size for leaf in leaves)
    return Projection(groups, tuple(map(groups.index, names)), sizes, width, sum(sizes) <= exact_parameters, seed)


def count_sketch(x_N: jax.Array, width: int, seed: int | jax.Array) -> jax.Array:
    """[R] sums of x with random signs, each number in one of them: <sketch x, sketch y> has the mean <x, y> over seeds.

    Numbers less than R apart never share a sum, others do with chance 1/R: the standard error of |x|^2 is at most sqrt(2 / R) |x|^2.
    Source: Charikar, Chen, Farach-Colton, Finding frequent items in data streams (2002).
    """
    rows = -(-x_N.size // width)
    # Behind a barrier, so that the compiler does not fold signs of the size of the model into the program.
    seed = jax.lax.optimization_barrier(_mix(jnp.asarray(seed, jnp.uint32) + jnp.uint32(0x9E3779B9)))
    index_N = jnp.arange(rows * width, dtype=jnp.uint32)
    sign_N = 1 - 2 * (_mix(index_N ^ seed) >> 31).astype(x_N.dtype)
    row_N, column_N = index_N // width, index_N % width
    turned_N = row_N * width + (column_N + _mix(row_N ^ _mix(seed))) % width
    signed_N = jnp.pad(x_N, (0, rows * width - x_N.size)) * sign_N
    return jnp.sum(jnp.take(signed_N, turned_N.astype(jnp.int32)).reshape(rows, width), axis=0)


def _mix(x: jax.Array) -> jax.Array:
    """A 32-bit hash (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# ---- the gradients of rollouts


@flax.struct.dataclass
class Rows:
    """Rollouts as the models read them, and what each estimator may look at; a leading axis of rollouts throughout."""

    student: View
    teacher: View
    contexts: dict[str, Context]  # by position in the list of estimators: variants of one estimator share its name


@dataclasses.dataclass(frozen=True)
class Models:
    """The static halves of student and teacher."""

    student: Any
    teacher: Any


@flax.struct.dataclass
class Gradients:
    """Of one rollout (or of many, with an axis before these), under each estimator."""

    vector_EN: jax.Array
    squares_EG: jax.Array  # squared norm by parameter group
    position_EI: jax.Array  # inner product of what the tokens of a part contribute with the whole
    position_sketch_EIR: jax.Array


def prepare(estimators: tuple[Estimator, ...], models: Models, params, teacher_params, student: View, teacher: View, context: Context):
    """{position in the list: its context}, from the statistics of the whole batch."""
    contexts = {}
    for number, estimator in enumerate(estimators):
        made = context
        if estimator.looks_across:
            head = forward.hidden(params, models.student, student)
            target = Target((forward.hidden(teacher_params, models.teacher, teacher),))
            stats = token_stats(head, target, student.completion_BT, signal=estimator.signal, needs={"logp", *estimator.needs})
            made = estimator.prepare(jax.lax.stop_gradient(stats), context)
        contexts[str(number)] = made
    return contexts


def rollout_gradients(
    estimators: tuple[Estimator, ...], models: Models, projection: Projection, parts: int, params, teacher_params, rows: Rows
) -> Gradients:
    """The gradients of single rollouts, [B, ...]: the rows of a batch are independent once their contexts are prepared."""
    one = functools.partial(_gradients_of_one, estimators, models, projection, parts, params, teacher_params)
    return jax.vmap(one)(rows)


def _gradients_of_one(estimators, models: Models, projection: Projection, parts: int, params, teacher_params, row: Rows) -> Gradients:
    row = jax.tree.map(lambda x: x[None], row)
    target = Target((jax.lax.stop_gradient(forward.hidden(teacher_params, models.teacher, row.teacher)),))
    tokens_BT = row.student.completion_BT

    def read(params):
        head = forward.hidden(params, models.student, row.student)
        return dataclasses.replace(head, valid_V=None), head.valid_V

    head, pull_back, valid_V = jax.vjp(read, params, has_aux=True)

    def loss(estimator, context, head, part_BT):
        whole = dataclasses.replace(head, valid_V=valid_V)
        stats = token_stats(whole, target, tokens_BT, signal=estimator.signal, needs={"logp", *estimator.needs})
        term = estimator.terms(stats, context)
        return loss_B(stats, dataclasses.replace(term, mask_BT=term.mask_BT * part_BT))[0]

    at_head = [jax.grad(functools.partial(loss, e, row.contexts[str(i)])) for i, e in enumerate(estimators)]
    parts_IBT = _parts(parts, tokens_BT.shape[1])[:, None, :]

    def one(number):
        """Forwards nothing: the cotangent at the head is the estimator's, the pass back through the student is the same for all."""

        def add(total, part_BT):
            gradient = pull_back(jax.lax.switch(number, at_head, head, part_BT))[0]
            return jax.tree.map(jnp.add, total, gradient), projection.vector(gradient)

        total, vector_IN = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts_IBT)
        vector_N = projection.vector(total)
        inner_I = jnp.einsum("in,n->i", vector_IN, vector_N, precision="highest")
        return Gradients(vector_N, projection.squares(total), inner_I, jax.vmap(projection.compress)(vector_IN))

    return jax.lax.map(one, jnp.arange(len(estimators)))


def _parts(parts: int, length: int) -> jax.Array:
    """[I, T] of 0 and 1: equal parts of a completion, the longer ones first."""
    return (jnp.arange(parts)[:, None] == (jnp.arange(length) * parts // length)[None, :]).astype(jnp.float32)


# ---- what stays of them


@flax.struct.dataclass
class Running:
    """Means over the prompts so far; of the streams, and of the sketches of the parts."""

    count: jax.Array
    stream_SN: jax.Array
    position_EIR: jax.Array


@flax.struct.dataclass
class Kept:
    """Of each prompt of a microbatch. A stream's vector is the mean over the prompt's rollouts."""

    gram_USS: jax.Array  # inner products of the streams
    sketch_USR: jax.Array
    second_UEG: jax.Array  # mean over rollouts of the squared norm, by parameter group
    unit_UEG: jax.Array  # squared norm of the mean, by parameter group
    position_second_UEI: jax.Array  # mean over rollouts of <part, whole>
    position_unit_UEI: jax.Array  # <mean of the part, mean of the whole>, from sketches


def start(projection: Projection, streams: int, estimators: int, parts: int, dtype) -> Running:
    """Before the first prompt."""
    width = min(projection.width, projection.parameters) if projection.exact else projection.width
    return Running(
        jnp.zeros((), dtype), jnp.zeros((streams, projection.segments[-1][1]), dtype), jnp.zeros((estimators, parts, width), dtype)
    )


@functools.partial(
    jax.jit, static_argnames=("estimators", "references", "models", "projection", "parts", "units"), donate_argnames="running"
)
def measure(
    running: Running,
    params,
    teacher_params,
    rows: Rows,
    reference_rows: Rows | None,
    *,
    estimators: tuple[Estimator, ...],
    references: tuple[Estimator, ...],
    models: Models,
    projection: Projection,
    parts: int,
    units: int,
) -> tuple[Running, Kept]:
    """Adds a microbatch of `units` prompts, whose rollouts stand side by side: (the running means, what is kept of each prompt)."""

    def of_units(x):
        return jnp.mean(x.reshape(units, -1, *x.shape[1:]), axis=1)

    found = rollout_gradients(estimators, models, projection, parts, params, teacher_params, rows)
    vectors, sketches = of_units(found.vector_EN), of_units(found.position_sketch_EIR)
    streams = vectors
    if references:
        independent = rollout_gradients(references, models, projection, 1, params, teacher_params, reference_rows)
        streams = jnp.concatenate([vectors, of_units(independent.vector_EN)], axis=1)
    compressed = jax.vmap(jax.vmap(projection.compress))(streams)
    kept = Kept(
        gram_USS=jnp.einsum("usn,utn->ust", streams, streams, precision="highest"),
        sketch_USR=compressed,
        second_UEG=of_units(found.squares_EG),
        unit_UEG=projection.squares_of_vector(vectors),
        position_second_UEI=of_units(found.position_EI),
        position_unit_UEI=jnp.einsum("ueir,uer->uei", sketches, compressed[:, : len(estimators)], precision="highest"),
    )
    count = running.count + units
    toward = lambda mean, new: mean + jnp.sum(new - mean[None], axis=0) / count
    return Running(count, toward(running.stream_SN, streams), toward(running.position_EIR, sketches)), kept
