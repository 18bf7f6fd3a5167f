"""The programs of a config compiled ahead of time, from shapes and shardings alone: whether they compile, and what XLA says they need."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opd_jax import config as config_lib
from opd_jax import learner, objective, parallel, refill, rollout, sampler, teachers
from opd_jax.config import Config
from opd_jax.models import lora
from opd_jax.numerics.estimators import Context
from opd_jax.outlines import Outlines
from opd_jax.types import Prompts, View


def update(config: Config, models: Outlines, mesh: Mesh) -> jax.stages.Compiled:
    """The update of a run: teachers, loss, gradient and optimizer in one program.

    For runs whose teachers read the completions (not rollout.source=cache, nor rollout.aggregate).
    """
    bank = teachers.make_bank(config, models.members, models.reference)
    optimizer = learner.make_optimizer(config.learner, config.steps)
    state = learner.abstract_state(models.trained(mesh), optimizer, bank)
    frozen = {name: models.parameters(models.model(name), mesh) for name in models.frozen}
    made = objective.from_config(config, has_teacher=config_lib.has_teacher(config))
    attach = functools.partial(lora.attach, config=models.adapter) if models.adapter else None
    settings = {"microbatches": config.learner.microbatches, "state": state, "attach": attach}
    with jax.set_mesh(mesh):
        run = learner.make_update(made, models.student, bank, optimizer, **settings)
        return run.lower(state, frozen, _batch(config, made, models, mesh), models.base(mesh)).compile()


def sampling(config: Config, models: Outlines, mesh: Mesh) -> jax.stages.Compiled:
    """The sampling of a batch of completions by the student."""
    rows, width = config.rollout.batch_size, prompt_width(config, models)
    prompts = Prompts(np.zeros((rows, width), np.int32), np.ones((rows, width), bool), np.arange(rows, dtype=np.uint32))
    law = sampler.Law(config.rollout.temperature, config.rollout.top_p, config.rollout.top_k, config.rollout.min_p)
    slots = rollout.slots_of(config.rollout, mesh)
    key = jax.device_put(jax.random.key(0), NamedSharding(mesh, PartitionSpec()))
    settings = {"max_new_tokens": config.rollout.max_new_tokens, "law": law, "stop_ids": models.student.eos_token_ids, "pad_id": 0}

    def run(params, base, prompts, key):
        params = lora.attach(base, params, models.adapter) if models.adapter else params
        if slots:
            return refill.sample_tokens(params, models.student, prompts, slots=slots, key=key, **settings)
        return sampler.sample_tokens(params, models.student, prompts, key=key, **settings)

    with jax.set_mesh(mesh):
        arguments = (models.trained(mesh), models.base(mesh), parallel.shard_batch(prompts, mesh), key)
        return jax.jit(run).lower(*arguments).compile()


PROGRAMS: dict[str, Callable] = {"writing": sampling, "learning": update}


def prompt_width(config: Config, models: Outlines) -> int:
    """Tokens of the longest prompt that a run may have."""
    return min(config.rollout.max_prompt_length, models.student.max_position_embeddings - config.rollout.max_new_tokens)


def _batch(config: Config, made: objective.Objective, models: Outlines, mesh: Mesh) -> learner.Batch:
    """A batch of the widths of a run's longest: its arrays are small beside the models."""
    rows, new, width = config.rollout.batch_size, config.rollout.max_new_tokens, prompt_width(config, models)
    view = View(np.zeros((rows, width), np.int32), np.ones((rows, width), bool), np.zeros((rows, new), np.int32))
    zeros_BT = jnp.zeros((rows, new), jnp.float32)
    context = Context(
        mask_BT=jnp.ones((rows, new), bool), behaviour_logp_BT=zeros_BT, group_B=jnp.arange(rows) // config.rollout.group_size
    )
    pairs = {"partner_B": jnp.arange(rows) ^ 1, "sign_B": jnp.where(jnp.arange(rows) % 2 == 0, 1, -1)}
    contexts = {"reward": dataclasses.replace(context, advantage_BT=zeros_BT), "preference": dataclasses.replace(context, **pairs)}
    route_B = jnp.zeros(rows, jnp.int32) if len(models.members) > 1 and config.teacher.combine == "route" else None
    batch = learner.make_batch(made, view, view if made.has_teacher else None, context, contexts=contexts, route_B=route_B)
    return learner.place(mesh, batch)
