"""Where completions come from: sample() from any model, sample_mixture() and sample_corrected() from two, and the sources of a config."""

import functools
import logging
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import config as config_lib
from opd_jax import parallel, processes, refill, sampler, score
from opd_jax.data import pipeline
from opd_jax.data.tasks import Example
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.environments import Environment
from opd_jax.models.config import ModelConfig
from opd_jax.turns import Turns
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
    given: sampler.Given | tuple[jax.Array, jax.Array] | None = None,
    slots: int = 0,
) -> Rollout:
    """Samples a completion for every row of left-padded prompts; `tokens_BT` is [B, max_new_tokens].

    A token depends on `key` (a typed key), the row's `id_B`, its position and the model alone. temperature 0 and top_k 1 are greedy. The
    stop token is part of the completion, also where it is the padding token. Raises UserError for a law that does not exist, prompts
    without tokens, or prompts that with max_new_tokens exceed the model's context.

    `given`: (tokens [B, max_new_tokens], length [B]), beginnings of the completions that are not drawn and stop nothing. Then
    `present_BT` is True on all tokens that stand in a completion, `mask_BT` on those that were drawn; log-probs of the others are 0.

    `slots`: rows that are written at once, where lengths are ragged: as a completion ends, the next prompt takes its row. The completions
    are the same. 0, or as many as prompts: all at once; so it is with beginnings, on several devices, and with models of the user's.
    """
    law = sampler.Law(float(temperature), float(top_p), int(top_k), float(min_p))
    _check(model_config, prompts, max_new_tokens)
    settings = {"key": key, "max_new_tokens": max_new_tokens, "law": law, "stop_ids": tuple(map(int, stop_ids))}
    settings["pad_id"] = model_config.pad_token_id or 0
    if given is None and 0 < slots < len(prompts.id_B) and isinstance(model_config, ModelConfig) and not parallel.spread():
        return refill.sample_tokens(params, model_config, prompts, slots=slots, **settings)
    given = _checked(given, len(prompts.id_B), max_new_tokens)
    return sampler.sample_tokens(params, model_config, prompts, **settings, given=given)


def sample_mixture(
    params: dict,
    model_config: ModelConfig,
    prompts: Prompts,
    teacher_params: dict,
    teacher_config: ModelConfig,
    teacher_prompts: Prompts,
    *,
    beta: float,
    key: jax.Array,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop_ids: Sequence[int] = (),
) -> Rollout:
    """Samples each token from beta q + (1 - beta) p: q and p are what the sampling law makes of teacher and student.

    As `sample`; beta = 0 draws what `sample` draws from the student, beta = 1 what it draws from the teacher. `logp_BT` is the student's
    policy, `behaviour_logp_BT` the mixture. The teacher reads `teacher_prompts`, row by row for the same completions; only tokens that both
    vocabularies have are drawn. Padding is the student's. A beta that changes compiles nothing. Raises UserError, also for beta outside
    [0, 1] and prompts that are not of the same rows.
    Sources: Ross, Gordon and Bagnell 2011, DAgger; Gu et al. 2024, MiniLLM, 2.2 (teacher-mixed sampling).
    """
    law = sampler.Law(float(temperature), float(top_p), int(top_k), float(min_p))
    if not 0 <= beta <= 1:
        raise UserError(f"beta = {beta!r} must be between 0 and 1")
    if len(prompts.id_B) != len(teacher_prompts.id_B):
        raise UserError(f"teacher_prompts has {len(teacher_prompts.id_B)} rows and prompts {len(prompts.id_B)}; give one for each rollout")
    _check(model_config, prompts, max_new_tokens)
    _check(teacher_config, teacher_prompts, max_new_tokens)
    models = (params, model_config, prompts, teacher_params, teacher_config, teacher_prompts)
    settings = {"max_new_tokens": max_new_tokens, "law": law, "stop_ids": tuple(map(int, stop_ids))}
    return sampler.sample_mixture_tokens(*models, beta=jnp.float32(beta), key=key, **settings, pad_id=model_config.pad_token_id or 0)


CUTS = ("random", "worst")
_OF_CUTS, _OF_CORRECTIONS = 0xC07, 0xC0E  # folded into a key, give those of the uniforms that choose cuts, and of the teacher's draws


def sample_corrected(
    params: dict,
    model_config: ModelConfig,
    prompts: Prompts,
    teacher_params: dict,
    teacher_config: ModelConfig,
    teacher_prompts: Prompts,
    *,
    cut: str,
    key: jax.Array,
    **settings,
) -> Rollout:
    """Completions that the student writes and the teacher, after a prompt of its own, goes on with from a cut: it corrects the rest.

    cut "random" is uniform over the tokens of the student's completion, its stop token included; "worst" is before the token with the
    lowest log q - log pi (teacher q, student pi, at temperature 1). The tokens before the cut stay and are given; `mask_BT` and the
    log-probs are those of the teacher's tokens. The student writes what `sample` draws from it; the draws of the cut and of the teacher
    have keys of their own. `settings` are those of `sample`. Raises UserError as `sample`, and for a cut that does not exist.

    Sources: the expert takes over from a state of the learner as in DAgger (Ross, Gordon and Bagnell 2011), but goes on to the end in place
    of labelling one action; speculative knowledge distillation (SKD) replaces token by token.
    """
    if cut not in CUTS:
        raise UserError(f"cut = {cut!r} is not known; valid: {', '.join(CUTS)}")
    written = sample(params, model_config, prompts, key=key, **settings)
    if cut == "random":
        place_B = sampler.uniforms(jax.random.fold_in(key, _OF_CUTS), prompts.id_B, jnp.int32(0))
        lengths_B = written.mask_BT.sum(1, dtype=jnp.int32)
        kept_B = jnp.minimum((place_B * lengths_B).astype(jnp.int32), lengths_B - 1)
    else:
        ratio_BT = score.logprobs(teacher_params, teacher_config, teacher_prompts, written) - written.logp_BT
        kept_B = jnp.argmin(jnp.where(written.mask_BT, ratio_BT, jnp.inf), axis=1).astype(jnp.int32)
    own = {"key": jax.random.fold_in(key, _OF_CORRECTIONS), "given": sampler.Given(written.tokens_BT, kept_B)}
    return sample(teacher_params, teacher_config, teacher_prompts, **own, **settings)


def _checked(given: tuple | None, rows: int, max_new_tokens: int) -> sampler.Given | None:
    if given is None:
        return None
    given = sampler.Given(*given)
    if given.tokens_BT.shape != (rows, max_new_tokens) or given.length_B.shape != (rows,):
        raise UserError(
            f"given has tokens {given.tokens_BT.shape} and lengths {given.length_B.shape}; give ({rows}, {max_new_tokens}), a row for each "
            f"prompt as wide as a completion, and ({rows},)"
        )
    lengths = processes.to_host(given.length_B)
    if lengths.min(initial=0) < 0 or lengths.max(initial=0) > max_new_tokens:
        raise UserError(f"given has lengths from {lengths.min()} to {lengths.max()}; give 0 to max_new_tokens = {max_new_tokens}")
    return given


def _check(model_config: ModelConfig, prompts: Prompts, max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens!r} must be at least 1")
    mask_BS = processes.to_host(prompts.mask_BS)
    lengths = mask_BS.sum(1)
    if lengths.min(initial=1) < 1 or not mask_BS[:, -1].all():
        raise UserError("prompts.mask_BS must be True in the last column: prompts are padded on the left, and have a token at least")
    context = model_config.max_position_embeddings
    if lengths.max(initial=0) + max_new_tokens > context:
        raise UserError(
            f"a prompt of {lengths.max()} tokens and max_new_tokens = {max_new_tokens} exceed the model's context of {context} tokens; "
            "shorten the prompt or lower max_new_tokens"
        )


def from_completions(
    tokens_BT: jax.Array, mask_BT: jax.Array, stopped_B: jax.Array, id_B: jax.Array, present_BT: jax.Array | None = None
) -> Rollout:
    """A rollout of completions that no model of ours sampled: both log-probs are 0, the law being unknown."""
    zeros_BT = jnp.zeros(tokens_BT.shape, jnp.float32)
    return Rollout(tokens_BT, mask_BT, zeros_BT, zeros_BT, id_B, stopped_B, present_BT)


def make_turns(settings: config_lib.Rollout, environment: Environment | None, tokenizer: Tokenizer, mesh: Mesh) -> Turns | None:
    """How completions are written with the environment of a task; None without one, or where it is not asked."""
    return Turns(environment, tokenizer, settings.max_turns, mesh) if environment is not None and settings.max_turns > 1 else None


def check_solutions(examples: Sequence[Example], source: str) -> None:
    """Raises UserError for an example without a solution, which a rollout.source that takes completions from the data set needs."""
    for example in examples:
        if example.solution is None:
            raise UserError(
                f"rollout.source = {source!r}: the example with prompt {example.prompt[:40]!r} has no solution to learn from; add one"
            )


def writer(settings: config_lib.Rollout, seed: int, step: int) -> str:
    """Who writes the completions of a step (from 0): a name of rollout.source but mix. A function of its arguments: a resume repeats it.

    With source=mix the student writes with probability `student_fraction`, and otherwise the data set, a whole step at a time (Agarwal et
    al. 2024, GKD, algorithm 1).
    """
    if settings.source != "mix":
        return settings.source
    return "student" if np.random.default_rng([seed, step, 0x6BD]).random() < settings.student_fraction else "dataset"


def teacher_share(settings: config_lib.Rollout, step: int) -> float:
    """beta_i of source=dagger: the probability with which the teacher writes a token of step (from 0), in round i = step // round."""
    return settings.beta * settings.beta_decay ** (step // settings.round)


def slots_of(settings: config_lib.Rollout, mesh: Mesh) -> int:
    """Rows that a config's completions are written in, as others wait; 0: all at once. See `sample`."""
    fits = settings.source in ("student", "teacher", "mix") and settings.max_turns == 1 and mesh.size == 1
    return settings.slots if fits and settings.slots < settings.batch_size else 0


def tell_idle_slots(settings: config_lib.Rollout, mesh: Mesh) -> None:
    """A warning where a config's slots change nothing, and why."""
    if not settings.slots or slots_of(settings, mesh):
        return
    reasons = {
        f"there are {mesh.size} devices": mesh.size > 1,
        f"there are no more rollouts (rollout.batch_size = {settings.batch_size})": settings.slots >= settings.batch_size,
        f"completions have several turns (rollout.max_turns = {settings.max_turns})": settings.max_turns > 1,
        f"rollout.source = {settings.source!r} writes all rows at once": True,
    }
    why = next(reason for reason, holds in reasons.items() if holds)
    logging.getLogger(__name__).warning("rollout.slots = %d has no effect: %s", settings.slots, why)


def make_source(
    settings: config_lib.Rollout,
    *,
    tokenizer: Tokenizer,
    student: ModelConfig,
    teacher: ModelConfig | None,
    seed: int,
    mesh: Mesh,
    environment: Environment | None = None,
) -> Source:
    """The rollout source of a config. Call it under `jax.set_mesh(mesh)`. `environment`: of the task, if it has one."""
    turns = make_turns(settings, environment, tokenizer, mesh)
    law = {name: getattr(settings, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")}
    law["stop_ids"] = tokenizer.eos_ids

    def key_of(step: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), step)

    def sampled(model_config: ModelConfig, params: dict, prompts: Prompts, step: int) -> Rollout:
        read = parallel.shard_batch(prompts, mesh)
        write = functools.partial(sample, params, model_config, read, key=key_of(step), slots=settings.slots, **law)
        return write() if turns is None else turns.write(write, prompts.id_B, settings.max_new_tokens)

    def dagger(params: dict, teacher_params: dict, batch: pipeline.Batch, step: int) -> Rollout:
        own, theirs = parallel.shard_batch((batch.prompts, batch.teacher_prompts), mesh)
        beta = teacher_share(settings, step)
        return sample_mixture(params, student, own, teacher_params, teacher, theirs, beta=beta, key=key_of(step), **law)

    def corrected(params: dict, teacher_params: dict, batch: pipeline.Batch, step: int) -> Rollout:
        own, theirs = parallel.shard_batch((batch.prompts, batch.teacher_prompts), mesh)
        return sample_corrected(params, student, own, teacher_params, teacher, theirs, cut=settings.cut, key=key_of(step), **law)

    def dataset(_, __, batch: pipeline.Batch, step: int) -> Rollout:
        check_solutions(batch.examples, settings.source)
        texts = [example.solution for example in batch.examples for _ in range(settings.group_size)]
        size = {"max_new_tokens": settings.max_new_tokens}
        tokens_BT, mask_BT, stopped_B, present_BT = pipeline.encode_solutions(texts, environment, tokenizer, **size)
        return from_completions(*parallel.shard_batch((tokens_BT, mask_BT, stopped_B, batch.prompts.id_B, present_BT), mesh))

    writers = {
        "student": lambda params, _, batch, step: sampled(student, params, batch.prompts, step),
        "teacher": lambda _, params, batch, step: sampled(teacher, params, batch.teacher_prompts, step),
        "dagger": dagger,
        "corrected": corrected,
        "dataset": dataset,
    }
    return lambda params, teacher_params, batch, step: writers[writer(settings, seed, step)](params, teacher_params, batch, step)
