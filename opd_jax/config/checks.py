"""Values out of range, names that do not exist, fields that contradict each other: refused by name, before any work."""

import difflib
import math
from collections.abc import Callable
from typing import Any

from opd_jax.config.fields import Architecture, Config, Signal, flatten
from opd_jax.config.questions import has_teacher, measures_difficulty, needs_solutions, own_draws
from opd_jax.types import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")  # what student.init can make
_EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


class ConfigError(UserError):
    """A config field that cannot be used; the message names the field, its value, what is valid and the remedy."""


def check_choice(field: str, value: str, valid: tuple[str, ...]) -> None:
    """Refuses a name that is not among `valid`, with the nearest one."""
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"config field {field} = {value!r} is not known; valid: {', '.join(valid)}{hint}")


# What numbers may be: (names, test, in words).
_RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        """rollout.batch_size rollout.group_size rollout.max_new_tokens rollout.max_prompt_length learner.microbatches mesh.data mesh.fsdp
        mesh.tensor mesh.sequence eval.samples eval.batch_size checkpoint.every log.samples task.level study.rollouts study.reference
        study.microbatch study.position_parts study.sketch student.init.hidden_size student.init.intermediate_size
        student.init.num_hidden_layers student.init.num_attention_heads student.init.num_key_value_heads
        student.init.max_position_embeddings estimator.clip teacher.every rollout.round context.privileged.write_tokens rollout.max_turns
        task.difficulty_prompts task.difficulty_samples""",
        lambda value: value >= 1,
        "must be at least 1",
    ),
    (
        """seed steps mesh.teacher rollout.top_k learner.warmup_steps learner.decay_steps eval.every eval.prompts log.samples_every signal.k
        task.train_size task.eval_size task.seed student.init.head_dim student.lora.rank study.exact_parameters learner.weight_decay
        learner.clip_norm signal.weight loss.labels reward.weight reward.clip_low reward.clip_high regulariser.kl masking.skip_first
        masking.first_only extrapolation.scale signal.clip gate.threshold gate.gain extra_signal.weight extra_signal.k extra_signal.clip
        extra_signal.gate.threshold extra_signal.gate.gain extrapolation.max_gain teacher.confidence preference.weight
        rollout.slots """
        + " ".join(f"student.init.{name}" for name in _EXPERT_FIELDS),
        lambda value: value >= 0,
        "must be 0 or more",
    ),
    ("seed task.seed", lambda value: value < 2**31, "must be below 2**31"),
    (
        """learner.learning_rate loss.student_temperature loss.teacher_temperature learner.eps student.lora.alpha
        student.init.initializer_range extrapolation.tau preference.beta""",
        lambda value: value > 0,
        "must be above 0",
    ),
    (
        "rollout.temperature context.privileged.write_temperature",
        lambda value: value == 0 or value >= 1e-4,
        "must be 0 (greedy) or at least 0.0001",
    ),
    (
        """rollout.min_p rollout.student_fraction rollout.beta rollout.beta_decay estimator.gamma learner.final_fraction signal.beta
        extra_signal.beta task.difficulty_low task.difficulty_high teacher.rate task.informed""",
        lambda value: 0 <= value <= 1,
        "must be between 0 and 1",
    ),
    ("learner.b1 learner.b2", lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ("rollout.top_p", lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
    ("checkpoint.keep", lambda value: value >= 2, "must be at least 2"),
    ("study.resamples", lambda value: value >= 100, "must be at least 100"),
]


def _check_range(flat: dict[str, Any]) -> None:
    for name, value in flat.items():
        _require(not isinstance(value, float) or math.isfinite(value), name, value, "must be a finite number")
    for names, fits, words in _RANGES:
        for name in names.split():
            _require(fits(flat[name]), name, flat[name], words)


def _require(condition: bool, name: str, value: Any, valid: str) -> None:
    if not condition:
        raise ConfigError(f"config field {name} = {value!r} {valid}")


def validate(config: Config) -> None:
    """Refuses values out of range and fields that contradict each other. Raises ConfigError."""
    flat = flatten(config)
    _check_range(flat)
    for name in ("masking.tags", "reward.tags", "task.learn", "task.informed_tags"):
        parts = flat[name].split(",") if flat[name] else []
        _require(all(part.strip() for part in parts), name, flat[name], "has a comma with no name beside it; remove it")
    check_choice("rollout.source", config.rollout.source, ("student", "teacher", "dataset", "mix", "dagger", "corrected", "cache"))
    check_choice("rollout.cut", config.rollout.cut, ("random", "worst"))
    check_choice("reward.only", config.reward.only, ("all", "solved"))
    check_choice("preference.judge", config.preference.judge, ("teacher", "teacher_mean", "reward"))
    check_choice("loss.balance", config.loss.balance, ("none", "tag"))
    check_choice("regulariser.divergence", config.regulariser.divergence, ("reverse_kl", "forward_kl"))
    for name in ("special_tokens", "malformed", "solved", "failed"):
        check_choice(f"masking.{name}", getattr(config.masking, name), ("keep", "drop"))
    check_choice("rollout.overlong", config.rollout.overlong, ("refuse", "truncate"))
    check_choice("rollout.stop", config.rollout.stop, ("same", "union"))
    check_choice("task.metric", config.task.metric, ("rouge", "bleu"))
    check_choice("loss.normaliser", config.loss.normaliser, ("token_mean", "sequence_mean", "sequence_sum", "constant"))
    check_choice("learner.schedule", config.learner.schedule, ("constant", "linear", "cosine"))
    check_choice("model.compute_dtype", config.model.compute_dtype, ("float32", "bfloat16"))
    check_choice("model.attention", config.model.attention, ("auto", "xla", "cudnn", "flash"))
    check_choice("student.init.model_type", config.student.init.model_type, FAMILIES)
    _check_experts(config.student.init)
    masking, longest = config.masking, config.rollout.max_new_tokens
    ends = min(longest, masking.first_only or longest)
    _require(
        masking.skip_first < ends, "masking.skip_first", masking.skip_first, f"must be below {ends}, or no token is left to learn from"
    )
    rollout, learner = config.rollout, config.learner
    batch = rollout.batch_size
    _require(batch % rollout.group_size == 0, "rollout.group_size", rollout.group_size, f"must divide rollout.batch_size = {batch}")
    _require(batch % learner.microbatches == 0, "learner.microbatches", learner.microbatches, f"must divide rollout.batch_size = {batch}")
    ways = config.mesh.data * config.mesh.fsdp
    micro = batch // learner.microbatches
    _require(
        micro % ways == 0,
        "rollout.batch_size",
        batch,
        f"makes learner.microbatches = {learner.microbatches} of {micro} rollouts each, which mesh.data * mesh.fsdp = {ways} does not "
        "divide; change one of them",
    )
    evaluated = config.eval.batch_size
    _require(evaluated % ways == 0, "eval.batch_size", evaluated, f"must be divisible by mesh.data * mesh.fsdp = {ways}")
    span = learner.decay_steps or config.steps
    _require(learner.warmup_steps <= span, "learner.warmup_steps", learner.warmup_steps, f"must be at most the schedule's {span} steps")
    _check_turns(config)
    _check_teacher(config)
    _check_preference(config)
    low, high = config.task.difficulty_low, config.task.difficulty_high
    _require(low <= high, "task.difficulty_low", low, f"must be at most task.difficulty_high = {high:g}")
    _check_stored(config)
    _check_context(config)
    lora, base = config.student.lora, config.student.path or config.student.recipe
    _require(not lora.rank or bool(base), "student.lora.rank", lora.rank, "needs weights to adapt, but student.path and recipe are empty")


def _check_turns(config: Config) -> None:
    turns, source = config.rollout.max_turns, config.rollout.source
    two = source in ("dagger", "corrected")
    _require(
        not (turns > 1 and two), "rollout.max_turns", turns, f"must be 1, because rollout.source = {source!r} has two writers in a turn"
    )
    injects = turns > 1 and config.eval.inject_error
    _require(not injects, "eval.inject_error", True, f"goes on without an environment, but rollout.max_turns = {turns}; use false")


def _check_context(config: Config) -> None:
    for name, reader in (("context.student", config.context.student), ("context.teacher", config.context.teacher)):
        check_choice(f"{name}.thinking", reader.thinking, ("", "on", "off"))
        chat = reader.template != "none" and (reader.template != "student" or name == "context.student")
        for field in ("system", "thinking"):
            value = getattr(reader, field)
            _require(chat or not value, f"{name}.{field}", value, f"needs a chat template, but {name}.template = {reader.template!r}")
        _require(
            not chat or config.rollout.overlong == "refuse",
            "rollout.overlong",
            config.rollout.overlong,
            f"must be 'refuse', because truncation would cut off the head of {name}.template = {reader.template!r}",
        )


def _check_experts(init: Architecture) -> None:
    for name in _EXPERT_FIELDS:
        value, wanted = getattr(init, name), init.model_type == "qwen3_moe"
        valid = "must be at least 1" if wanted else "must be 0"
        _require((value > 0) == wanted, f"student.init.{name}", value, f"{valid}, because student.init.model_type = {init.model_type!r}")
    chosen, count = init.num_experts_per_tok, init.num_experts
    _require(chosen <= count, "student.init.num_experts_per_tok", chosen, f"must be at most student.init.num_experts = {count}")


def _check_teacher(config: Config) -> None:
    source = config.rollout.source
    writes = source in ("dagger", "teacher", "corrected")
    _require(
        has_teacher(config) or not writes,
        "teacher.path",
        "",
        f"must name a model, because rollout.source = {source!r} needs a teacher",
    )
    members = ", ".join(config.teacher.members)
    _require(not writes or len(config.teacher.members) < 2, "rollout.source", source, f"is one teacher's, not that of {members}")
    reads = config.context.privileged.reads
    _require(not reads or has_teacher(config), "context.privileged.reads", reads, "needs a teacher to read it; set teacher.path")
    _require(
        not (reads and writes),
        "context.privileged.reads",
        reads,
        f"is read where a teacher scores; rollout.source = {source!r} lets it write",
    )
    own = _own_draws("signal", config.signal) or (_own_draws("extra_signal", config.extra_signal) if config.extra_signal.weight else "")
    own = f"estimator.credit = {config.estimator.credit!r}" if config.estimator.credit != "token" else own
    known = source == "dagger" or config.rollout.aggregate  # the law that wrote is, and covers the student's
    corrected = known and config.estimator.importance != "none"
    remedy = "; or let estimator.importance correct for who wrote" if known else ""
    remedy = "; or let rollout.student_fraction be 1" if source == "mix" else remedy
    fits = own_draws(config) or corrected or not own or source == "cache"  # of which the claim says what it spoils
    if source == "student":
        _require(fits, "rollout.aggregate", True, f"must be False, because {own} needs draws of the student as it is{remedy}")
    _require(fits, "rollout.source", source, f"must be 'student', because {own} needs draws of the student{remedy}")
    greedy = config.rollout.temperature == 0 or config.rollout.top_k == 1
    own = f"reward.weight = {config.reward.weight:g}" if config.reward.weight else own
    own = f"preference.weight = {config.preference.weight:g}" if config.preference.weight else own
    _require(not (greedy and own), "rollout.temperature", config.rollout.temperature, f"is greedy, but {own} needs draws from the policy")


def _check_preference(config: Config) -> None:
    settings, rollout = config.preference, config.rollout
    if not settings.weight:
        return
    asked = f"because preference.weight = {settings.weight:g}"
    _require(rollout.group_size > 1, "rollout.group_size", rollout.group_size, f"must be at least 2, {asked} compares rollouts of a prompt")
    _require(not needs_solutions(config), "rollout.source", rollout.source, f"has one completion of a prompt, {asked} compares several")
    _require(rollout.source != "corrected", "rollout.source", rollout.source, f"gives the ends of completions, {asked} compares whole ones")
    ranks = f"preference.judge = {settings.judge!r}"
    _require(settings.judge == "reward" or has_teacher(config), "teacher.path", "", f"must name a model, because {ranks} asks it")
    members = len(config.teacher.members)
    _require(settings.judge == "reward" or members < 2, "preference.judge", settings.judge, f"is one teacher, and there are {members}")


def _check_stored(config: Config) -> None:
    rollout, masking = config.rollout, config.masking
    for name in ("cache", "cache_recipe"):
        value = getattr(rollout, name)
        fits = not value or rollout.source == "cache"
        _require(fits, f"rollout.{name}", value, f"needs rollout.source = 'cache', not {rollout.source!r}")
    given = rollout.cache or rollout.cache_recipe or rollout.source != "cache"
    _require(given, "rollout.cache", "", "must name a folder that experiments/score_cache.py has written, or rollout.cache_recipe a config")
    if rollout.source == "cache":
        low = config.task.difficulty_low
        _require(
            not measures_difficulty(config), "task.difficulty_low", low, "and difficulty_high choose no prompts of a store; use 0 and 1"
        )
    both = masking.solved == masking.failed == "drop"
    _require(not both, "masking.failed", masking.failed, "leaves nothing to learn from beside masking.solved = 'drop'; use 'keep' in one")
    if config.preference.weight and (rollout.aggregate or rollout.source == "cache"):
        judge = config.preference.judge
        _require(judge == "reward", "preference.judge", judge, "asks the teacher, whose scores are stored; use 'reward'")
    if rollout.aggregate:
        fits = rollout.source in ("student", "dagger")
        _require(fits, "rollout.source", rollout.source, "must be 'student' or 'dagger', because rollout.aggregate = True")
        _require(has_teacher(config), "rollout.aggregate", True, "needs a teacher, whose labels it keeps; set teacher.path")
        weight = config.reward.weight
        _require(not weight, "rollout.aggregate", True, f"must be False: reward.weight = {weight:g} is for the student's own completions")


def _own_draws(block: str, signal: Signal) -> str:
    """The field by which a signal needs draws of the student; empty: it does not."""
    if signal.support == "sampled":
        return f"{block}.support = 'sampled'"
    return f"{block}.tail = {signal.tail!r}" if signal.tail.startswith("sampled") else ""
