"""The phases of a step as this library runs them: the functions that training calls, on random models and prompts."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from opd_jax import config as config_lib
from opd_jax import learner, objective, parallel, rollout, teachers
from opd_jax.bench import shapes
from opd_jax.bench.shapes import Shape
from opd_jax.models import forward
from opd_jax.numerics.estimators import Context
from opd_jax.numerics.heads import Head
from opd_jax.numerics.targets import Target
from opd_jax.types import Prompts, Rollout, View, view


class Phases:
    """Each phase is a function without arguments that does its work once, and returns arrays to wait for."""

    def __init__(self, shape: Shape, dtype: str, mesh: Mesh):
        self._shape, self._mesh = shape, mesh
        self._student, self._teacher = (dataclasses.replace(one, compute_dtype=dtype) for one in (shape.student, shape.teacher))
        params, teacher = shapes.models(shape, mesh)
        self._frozen = {"teacher": jax.tree.map(lambda x: x.astype(dtype), teacher)}
        rows = jnp.arange(shape.batch_size, dtype=jnp.uint32)
        prompts = Prompts(jnp.asarray(shapes.prompts(shape), jnp.int32), jnp.ones((shape.batch_size, shape.prompt), bool), rows)
        self._prompts = parallel.shard_batch(prompts, mesh)
        self._objective = objective.from_config(_config(shape), has_teacher=True)
        self._optimizer = learner.make_optimizer(_config(shape).learner, steps=10**6)
        self._state = learner.init_state(params, self._optimizer, self._bank)
        self._update = learner.make_update(
            self._objective, self._student, self._bank, self._optimizer, microbatches=shape.microbatches, state=self._state
        )
        self._steps = 0
        self._made = {}

    @property
    def _bank(self) -> teachers.Bank:
        return teachers.single(self._teacher)

    def phase(self, name: str) -> Callable:
        """prefill, generate, teacher, gradient, optimizer, update or step."""
        if name not in self._made:
            self._made[name] = getattr(self, f"_{name}_phase")()
        return self._made[name]

    # ---- whole batches

    def _prefill_phase(self) -> Callable:
        length = self._shape.prompt + self._shape.new_tokens
        read = jax.jit(functools.partial(forward.prefill, config=self._student, cache_length=length))
        return lambda: read(self._state.params, tokens_BS=self._prompts.tokens_BS, mask_BS=self._prompts.mask_BS)

    def _generate_phase(self) -> Callable:
        return self._sample

    def _sample(self) -> Rollout:
        self._steps += 1
        key = jax.random.fold_in(jax.random.key(3), self._steps)
        return rollout.sample(self._state.params, self._student, self._prompts, key=key, max_new_tokens=self._shape.new_tokens)

    def _batch(self, completions: Rollout) -> learner.Batch:
        context = Context(
            mask_BT=completions.mask_BT,
            behaviour_logp_BT=completions.behaviour_logp_BT,
            group_B=jnp.arange(self._shape.batch_size),
        )
        read = view(self._prompts, completions)
        return learner.place(self._mesh, learner.make_batch(self._objective, read, read, context))

    def _learn(self, batch: learner.Batch) -> dict:
        self._state, metrics = self._update(self._state, self._frozen, batch)
        return metrics

    def _update_phase(self) -> Callable:
        batch = self._batch(self._sample())
        return lambda: (self._learn(batch), self._state)

    def _step_phase(self) -> Callable:
        return lambda: (self._learn(self._batch(self._sample())), self._state)

    # ---- a microbatch

    def _rows(self) -> learner.Batch:
        whole = self._batch(self._sample())
        return whole if self._shape.microbatches == 1 else jax.tree.map(lambda x: x[: self._shape.rows] if x.ndim else x, whole)

    def _read(self, view: View) -> Callable:
        return jax.jit(lambda params: forward.hidden(params, self._teacher, view).hidden_BTD)

    def _teacher_phase(self) -> Callable:
        """Hidden states: the loss makes the teacher's logits, tile by tile."""
        read = self._read(self._rows().teacher)
        return lambda: read(self._frozen["teacher"])

    def _gradient_phase(self) -> Callable:
        """Forward and backward with the full-vocabulary reverse KL to a teacher whose hidden states are there."""
        batch = self._rows()
        teacher = jax.jit(lambda params: forward.hidden(params, self._teacher, batch.teacher))(self._frozen["teacher"])

        def loss(params, head: Head):
            student = forward.hidden(params, self._student, batch.student)
            targets = {"teacher": Target((head,)), "reference": None}
            return objective.loss(self._objective, student, targets, batch.student.completion_BT, batch.mask_BT, batch.shares)

        differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return lambda: differentiate(self._state.params, teacher)

    def _optimizer_phase(self) -> Callable:
        def advance(params, opt_state, grads):
            updates, opt_state = self._optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        run = jax.jit(advance, donate_argnums=(0, 1))
        grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), self._state.params)

        def once():
            params, opt_state = run(self._state.params, self._state.opt_state, grads)
            self._state = self._state.replace(params=params, opt_state=opt_state)
            return params

        return once

    def first_loss(self) -> float:
        """Of a batch of completions at the models as they are, as an update computes it: what peers' losses are compared with."""
        self._steps = 0  # the same draws, whatever was timed before
        metrics = self._learn(self._batch(self._sample()))
        return float(metrics["train/loss"])


def _config(shape: Shape) -> config_lib.Config:
    """Full-vocabulary reverse KL, mean per token, AdamW with clipping; a learning rate that leaves the models random."""
    return config_lib.Config(
        teacher=config_lib.Teacher(path="bench"),
        rollout=config_lib.Rollout(batch_size=shape.batch_size, max_new_tokens=shape.new_tokens),
        learner=config_lib.Learner(learning_rate=1e-6, schedule="constant", microbatches=shape.microbatches),
    )


def clock(run: Callable) -> float:
    """Seconds until the results of a run are there."""
    begin = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begin


class Compilations:
    """Seconds that jax spent on tracing and compiling, and bytes of temporaries of what it compiled, since it was last asked."""

    def __init__(self):
        self._seconds = 0.0
        self._known = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, name: str, seconds: float, **_) -> None:
        if name.startswith("/jax/core/compile/"):
            self._seconds += seconds

    def take(self) -> dict[str, float]:
        executables = jax.devices()[0].client.live_executables()
        new = [one for one in executables if not any(one is known for known in self._known)]
        seconds, self._seconds, self._known = self._seconds, 0.0, executables
        temporary = [one.get_compiled_memory_stats().temp_size_in_bytes for one in new]
        return {"compile_seconds": seconds, "temp_bytes": max(temporary, default=0)}
