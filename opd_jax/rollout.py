"""Where completions come from: sample() from any model, and the rollout sources of a config (student, teacher, dataset)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import config as config_lib
from opd_jax import parallel, sampler
from opd_jax.data import pipeline
from opd_jax.data.tasks import Example
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.models.config import ModelConfig
from opd_jax.types import Prompts, Rollout, UserError

# (student parameters, teacher parameters, batch of prompts, step) -> completions
Source = Callable[[dict, dict | None, pipeline.Batch, int], Rollout]


def sample(
    params: dict,
    model_config: ModelConfig,
    prompts: Prompts,
    *,
    key: jax.Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] = (),
) -> Rollout:
    """Samples a completion for every row of left-padded prompts; `tokens_BT` is [B, max_new_tokens].

    A token depends on `key` (a typed key), the row's `id_B`, its position and the model alone. temperature 0 and top_k 1 are greedy. The
    stop token is part of the completion, also where it is the padding token. Raises UserError for a law that does not exist, prompts
    without tokens, or prompts that with max_new_tokens exceed the model's context.
    """
    law = sampler.Law(float(temperature), float(top_p), int(top_k), float(min_p))
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens!r} must be at least 1")
    lengths = np.asarray(prompts.mask_BS).sum(1)
    if lengths.min(initial=1) < 1 or not np.asarray(prompts.mask_BS)[:, -1].all():
        raise UserError("prompts.mask_BS must be True in the last column: prompts are padded on the left, and have a token at least")
    context = model_config.max_position_embeddings
    if lengths.max(initial=0) + max_new_tokens > context:
        raise UserError(
            f"a prompt of {lengths.max()} tokens and max_new_tokens = {max_new_tokens} exceed the model's context of {context} tokens; "
            "shorten the prompt or lower max_new_tokens"
        )
    pad_id = model_config.pad_token_id or 0
    return sampler.sample_tokens(
        params, model_config, prompts, key=key, max_new_tokens=max_new_tokens, law=law, stop_ids=tuple(map(int, stop_ids)), pad_id=pad_id
    )


def from_completions(tokens_BT: jax.Array, mask_BT: jax.Array, stopped_B: jax.Array, id_B: jax.Array) -> Rollout:
    """A rollout of completions that no model of ours sampled: both log-probs are 0, the law being unknown."""
    zeros_BT = jnp.zeros(tokens_BT.shape, jnp.float32)
    return Rollout(tokens_BT, mask_BT, zeros_BT, zeros_BT, id_B, stopped_B)


def check_solutions(examples: Sequence[Example]) -> None:
    """Raises UserError for an example without a solution, which rollout.source = 'dataset' needs."""
    for example in examples:
        if example.solution is None:
            raise UserError(
                f"rollout.source = 'dataset': the example with prompt {example.prompt[:40]!r} has no solution to learn from; add one"
            )


def make_source(
    settings: config_lib.Rollout, *, tokenizer: Tokenizer, student: ModelConfig, teacher: ModelConfig | None, seed: int, mesh: Mesh
) -> Source:
    """The rollout source of a config. Call it under `jax.set_mesh(mesh)`."""
    law = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")}

    def sampled(model_config: ModelConfig, params: dict, prompts: Prompts, step: int) -> Rollout:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return sample(params, model_config, parallel.shard_batch(prompts, mesh), key=key, stop_ids=tokenizer.eos_ids, **law)

    def dataset(_, __, batch: pipeline.Batch, step: int) -> Rollout:
        check_solutions(batch.examples)
        texts = [example.solution for example in batch.examples for _ in range(settings.group_size)]
        tokens_BT, mask_BT, stopped_B = pipeline.encode_completions(texts, tokenizer, max_new_tokens=settings.max_new_tokens)
        arrays = parallel.shard_batch((tokens_BT, mask_BT, stopped_B, batch.prompts.id_B), mesh)
        return from_completions(*arrays)

    return {
        "student": lambda params, _, batch, step: sampled(student, params, batch.prompts, step),
        "teacher": lambda _, params, batch, step: sampled(teacher, params, batch.teacher_prompts, step),
        "dataset": dataset,
    }[settings.source]
