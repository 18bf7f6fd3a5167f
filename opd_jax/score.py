"""Any model on a rollout, given a prompt of its own: log-probs, the top-k with the mass outside, annotations, or hidden states."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from opd_jax.models import forward
from opd_jax.models.config import ModelConfig
from opd_jax.numerics import token_stats as stats_lib
from opd_jax.numerics.token_stats import Head, Signal
from opd_jax.types import Prompts, Rollout, view


@flax.struct.dataclass
class Annotation:
    """What a model thought of each token that stands in a rollout, at temperature 1, in nats; 0 behind it."""

    logp_BT: jax.Array  # log-prob of the token
    entropy_BT: jax.Array  # of the model's law there
    top_ids_BTK: jax.Array | None  # its most probable tokens, best first; None unless asked for
    top_logp_BTK: jax.Array | None


def hidden(params: dict, model_config: ModelConfig, prompts: Prompts, rollout: Rollout) -> Head:
    """The model's head on the completions: entry t of `hidden_BTD` is the state before token t is read."""
    return forward.hidden(params, model_config, view(prompts, rollout))


@functools.partial(jax.jit, static_argnames="model_config")
def logprobs(params: dict, model_config: ModelConfig, prompts: Prompts, rollout: Rollout) -> jax.Array:
    """Log-prob [B, T] of each completion token at temperature 1, in nats; 0 where the rollout's mask is False."""
    head = hidden(params, model_config, prompts, rollout)
    stats = stats_lib.token_stats(head, None, rollout.tokens_BT, signal=Signal("nll"), needs=("logp",))
    return jnp.where(rollout.mask_BT, stats.logp_BT, 0)


@functools.partial(jax.jit, static_argnames=("model_config", "k"))
def topk(params: dict, model_config: ModelConfig, prompts: Prompts, rollout: Rollout, *, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids [B, T, K], log-probs [B, T, K], log of the mass outside them [B, T]) of the model's k most probable tokens.

    The log-probs are normalised over the whole vocabulary: logit - logsumexp.
    """
    return stats_lib.topk(hidden(params, model_config, prompts, rollout), k=k)


@functools.partial(jax.jit, static_argnames=("model_config", "k"))
def annotate(params: dict, model_config: ModelConfig, prompts: Prompts, rollout: Rollout, *, k: int = 0) -> Annotation:
    """The log-prob of each completion token, the model's entropy there, and its k most probable tokens (all, where it has fewer)."""
    head = hidden(params, model_config, prompts, rollout)
    stats = stats_lib.token_stats(head, None, rollout.tokens_BT, signal=Signal("nll"), needs=("logp", "entropy"))
    k = min(k, model_config.valid_vocab_size or model_config.vocab_size)
    top_ids_BTK, top_logp_BTK = stats_lib.topk(head, k=k)[:2] if k else (None, None)
    values = Annotation(stats.logp_BT, stats.entropy_BT, top_ids_BTK, top_logp_BTK)
    standing_BT = rollout.standing_BT
    return jax.tree.map(lambda x: jnp.where(standing_BT.reshape(*standing_BT.shape, *(1,) * (x.ndim - 2)), x, 0), values)
