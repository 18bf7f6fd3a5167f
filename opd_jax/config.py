"""Every field of an experiment with its unit; ConfigDict -> frozen dataclasses, once; nothing below this file sees a ConfigDict.

A file in `configs/` starts from `default()` (an ml_collections.ConfigDict that holds every field below), changes what it needs and returns
it from `get_config(arg)`. The trainer turns it into a `Config` with `parse()`, which refuses unknown
fields, wrong types and bad values.
"""

import dataclasses
import difflib
import math
from typing import Any

from ml_collections import ConfigDict

from opd_jax.types import UserError


class ConfigError(UserError):
    """A config field that cannot be used; the message names the field, its value, what is valid and the remedy."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shape of a model with random weights; field names as in a Hugging Face config.json."""

    model_type: str = "llama"  # llama, mistral, qwen2, qwen3, qwen3_moe, gemma2 or gemma3_text
    hidden_size: int = 64  # width of the residual stream
    intermediate_size: int = 192  # width of the gated feed-forward layer
    num_hidden_layers: int = 3  # layers
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 4  # key and value heads; divides the query heads
    head_dim: int = 0  # width of a head; 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 256  # tokens, prompt and completion together
    tie_word_embeddings: bool = True  # the unembedding is the embedding
    initializer_range: float = 0.02  # standard deviation of the initial weights
    num_experts: int = 0  # experts of a layer, of qwen3_moe alone; 0 in other families
    num_experts_per_tok: int = 0  # experts that a token passes through
    moe_intermediate_size: int = 0  # width of one expert


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = 0  # of the update W + alpha / rank * B A that is trained in place of the weights; 0: all weights are trained
    alpha: float = 32.0  # scale of the update, divided by the rank
    targets: str = "all"  # projections that are adapted: all, or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj


@dataclasses.dataclass(frozen=True)
class Student:
    path: str = ""  # Hugging Face folder or hub id, or a run directory; empty: see `recipe`, then `init`
    recipe: str = ""  # without a path: configs/FILE.py[:arg] of a run that makes the student on first use (kept under `cache_dir`)
    tokenizer: str = "byte"  # tokenizer of a model made from `init`: "byte", or a Hugging Face folder or hub id
    lora: Lora = Lora()  # a teacher with the same path is the model without the update, at no cost of memory
    init: Architecture = Architecture()  # shape of a model with random weights, when neither path nor recipe is set


@dataclasses.dataclass(frozen=True)
class Teacher:
    path: str = ""  # Hugging Face folder or hub id, or a run directory; empty: see `recipe`; both empty: no teacher
    recipe: str = ""  # without a path: configs/FILE.py[:arg] of a run that makes the teacher on first use (kept under `cache_dir`)


@dataclasses.dataclass(frozen=True)
class Reader:
    template: str = "none"  # none: the task's prompt as it is; chat: in the tokenizer's chat template; or a file with a Jinja chat template
    system: str = ""  # system message of a chat template
    thinking: str = ""  # on or off: the template's switch enable_thinking; empty: as the template has it


@dataclasses.dataclass(frozen=True)
class Context:
    student: Reader = Reader()
    teacher: Reader = Reader(template="student")  # student: the ids that the student reads; otherwise as above, with its own tokenizer


@dataclasses.dataclass(frozen=True)
class Rollout:
    source: str = "student"  # who writes the completions: student (on-policy), teacher (SeqKD), dataset (SFT)
    batch_size: int = 64  # rollouts per step
    group_size: int = 1  # rollouts per prompt; divides batch_size
    max_new_tokens: int = 64  # tokens per completion at most, stop token included
    max_prompt_length: int = 256  # tokens per prompt at most
    overlong: str = "refuse"  # prompts beyond max_prompt_length: refuse, or truncate (their first tokens are dropped, and counted)
    temperature: float = 1.0  # of the sampling law; 0 is greedy
    top_p: float = 1.0  # nucleus mass kept by the sampling law; 1 keeps all
    top_k: int = 0  # tokens kept by the sampling law; 0 keeps all
    stop: str = "same"  # stop tokens: same (the student's; a teacher with others is refused), or union (any of student's and teacher's)
    min_p: float = 0.0  # tokens kept have at least this share of the largest probability; 0 keeps all


@dataclasses.dataclass(frozen=True)
class Signal:
    # reverse_kl, forward_kl, jsd, jsd_continuous, skew_forward_kl, skew_reverse_kl; without a teacher nll, negative_entropy; cross_entropy
    divergence: str = "reverse_kl"  # which per-token loss compares student and teacher
    support: str = "full"  # full: sum over the vocabulary; sampled: the sampled token alone (unbiased in expectation)
    beta: float = 0.5  # mixing weight of jsd, jsd_continuous and the skewed divergences; others ignore it


@dataclasses.dataclass(frozen=True)
class Loss:
    student_temperature: float = 1.0  # softmax temperature of the student in the loss
    teacher_temperature: float = 1.0  # softmax temperature of the teacher in the loss
    normaliser: str = "token_mean"  # token_mean, sequence_mean, sequence_sum, constant; denominators are global


@dataclasses.dataclass(frozen=True)
class Estimator:
    credit: str = "token"  # which log-ratios a token answers for: token, to_go, discounted, sequence
    gamma: float = 0.9  # discount per token of credit=discounted


@dataclasses.dataclass(frozen=True)
class Learner:
    learning_rate: float = 1e-3  # peak of the schedule (AdamW)
    schedule: str = "cosine"  # constant, linear or cosine, after the warm-up
    warmup_steps: int = 0  # updates from 0 to the peak
    decay_steps: int = 0  # updates that the schedule spans, warm-up included; 0: `steps`
    final_fraction: float = 0.0  # learning rate at the end of the schedule, as a fraction of the peak
    weight_decay: float = 0.0  # decoupled, on matrices only (not on norms, biases)
    b1: float = 0.9  # AdamW, decay of the first moment
    b2: float = 0.99  # AdamW, decay of the second moment
    eps: float = 1e-8  # AdamW, added to the root of the second moment
    clip_norm: float = 1.0  # global gradient norm above which gradients are scaled down; 0: off
    microbatches: int = 1  # pieces of a step's batch that are differentiated one after the other; changes memory, not the gradient


@dataclasses.dataclass(frozen=True)
class Model:
    compute_dtype: str = "float32"  # float32 or bfloat16 arithmetic; the student's parameters, log-probs and losses stay float32
    remat: bool = False  # recompute each layer's activations in the backward pass


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = 1  # devices along the batch, parameters replicated
    fsdp: int = 1  # devices along the batch, parameters sharded
    tensor: int = 1  # devices along heads, feed-forward width and vocabulary


@dataclasses.dataclass(frozen=True)
class Eval:
    every: int = 0  # updates between evaluations; 0: before the first and after the last update only
    prompts: int = 64  # held-out prompts; 0: no evaluation
    samples: int = 4  # sampled completions per prompt (avg@k, pass@k, KL), at temperature 1
    batch_size: int = 64  # rollouts evaluated at once


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 100  # updates between checkpoints; one is always written at the end
    keep: int = 2  # newest checkpoints that are kept, at least 2


@dataclasses.dataclass(frozen=True)
class Log:
    samples_every: int = 50  # updates between logged samples; 0: none
    samples: int = 4  # completions per logged step
    tensorboard: bool = False  # event files for TensorBoard beside metrics.jsonl, in the run's tensorboard/ (package tensorboardX)
    wandb: bool = False  # the same for Weights & Biases (package wandb); WANDB_MODE=offline keeps it on this machine
    wandb_project: str = "opd_jax"  # project of the run there; WANDB_ENTITY names the team


@dataclasses.dataclass(frozen=True)
class Task:
    name: str = "arithmetic"  # arithmetic, jsonl, math, text, tooluse or unconditional
    path: str = ""  # file of lines of jsonl, math, text and tooluse
    metric: str = "rouge"  # reward of task.name=text: rouge or bleu
    level: int = 12  # digits of an arithmetic prompt
    train_size: int = 0  # prompts to train on, drawn again and again; 0: as many as the task has (arithmetic: unlimited)
    eval_size: int = 64  # prompts held out from training; of a file at most half of its lines
    seed: int = 0  # of generated prompts


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0  # of initial weights, prompt order and all draws
    steps: int = 100  # updates
    cache_dir: str = "runs/cache"  # where the models of recipes are kept
    student: Student = Student()
    teacher: Teacher = Teacher()
    context: Context = Context()
    rollout: Rollout = Rollout()
    signal: Signal = Signal()
    loss: Loss = Loss()
    estimator: Estimator = Estimator()
    learner: Learner = Learner()
    model: Model = Model()
    mesh: Mesh = Mesh()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    task: Task = Task()


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")  # what student.init can make
_EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
# Fields that do not change the numbers of an update (a mesh: but by rounding): they may differ when a run is resumed. `steps` may grow.
FREE_ON_RESUME = ("eval.", "log.", "checkpoint.", "mesh.", "cache_dir")


def default() -> ConfigDict:
    """All fields at their defaults, as the ConfigDict that a config file edits."""
    return ConfigDict(dataclasses.asdict(Config()))


def parse(config: ConfigDict) -> Config:
    """The frozen, validated Config of a ConfigDict. Raises ConfigError."""
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"config is a {type(config).__name__}, it must be the ConfigDict of opd_jax.config.default(); correct get_config")
    parsed = _build(Config, config.to_dict(), "")
    validate(parsed)
    return parsed


def _build(cls: type, fields: Any, prefix: str):
    if not isinstance(fields, dict):
        raise ConfigError(f"config field {prefix[:-1]} = {fields!r} must be a block with the fields {', '.join(_names(cls))}")
    names = _names(cls)
    for name in fields:
        if name not in names:
            raise ConfigError(unknown_field(prefix + name, [prefix + n for n in names]))
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in fields:
            values[field.name] = _convert(field.type, fields[field.name], prefix + field.name)
    return cls(**values)


def _convert(kind: type, value: Any, name: str):
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name + ".")
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config field {name} = {value!r} has type {type(value).__name__}, it must be {kind.__name__}")
    return kind(value)


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def unknown_field(name: str, valid: list[str]) -> str:
    """The message for a field that does not exist, with the nearest name that does."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"
    return f"config field {name} does not exist; {hint}"


def flatten(config: Config | dict, prefix: str = "") -> dict[str, Any]:
    """{"rollout.batch_size": 64, ...}"""
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def differences(old: dict, new: dict) -> list[str]:
    """Fields of two nested config dicts that differ and that a resumed run may not change, as `name: old -> new`."""
    old, new = flatten(old), flatten(new)
    changed = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        grown = name == "steps" and before is not None and after is not None and after >= before
        if before != after and not grown and not name.startswith(FREE_ON_RESUME):
            changed.append(f"{name}: {before!r} -> {after!r}")
    return changed


def parse_arg(arg: str | None, **declared):
    """Parses the text after the colon of `--config=FILE.py:arg` into a ConfigDict.

    Each keyword declares a name with its default. A tuple declares choices, the first one is the default, and a bare choice selects it:
    `parse_arg("sft,tiny,seed=2", role=("opd", "sft"), tiny=False, seed=0)` gives role="sft", tiny=True, seed=2.
    """
    result = {name: value[0] if isinstance(value, tuple) else value for name, value in declared.items()}
    choices = {choice: name for name, value in declared.items() if isinstance(value, tuple) for choice in value}
    for part in filter(None, (arg or "").split(",")):
        name, given, text = part.partition("=")
        if not given and name in choices:
            result[choices[name]] = name
        elif not given and isinstance(declared.get(name), bool):
            result[name] = True
        elif given and name in declared:
            result[name] = _parse_value(name, text, declared[name])
        else:
            flags = [n for n, v in declared.items() if isinstance(v, bool)]
            valid = [*choices, *flags, *(f"{n}=..." for n in declared if n not in flags)]
            raise ConfigError(f"config argument {part!r} is not known; valid: {', '.join(valid)}")
    return ConfigDict(result)


def _parse_value(name: str, text: str, default: Any):
    if isinstance(default, tuple):
        check_choice(f"argument {name}", text, default)
        return text
    kind = type(default)
    if kind is bool:
        check_choice(f"argument {name}", text, ("true", "false"))
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"config argument {name} = {text!r} must be {kind.__name__}") from None


def check_choice(field: str, value: str, valid: tuple[str, ...]) -> None:
    """Refuses a name that is not among `valid`, with the nearest one."""
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"config field {field} = {value!r} is not known; valid: {', '.join(valid)}{hint}")


def _check_range(flat: dict[str, Any]) -> None:
    positive = [
        "rollout.batch_size",
        "rollout.group_size",
        "rollout.max_new_tokens",
        "rollout.max_prompt_length",
        "learner.microbatches",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "eval.samples",
        "eval.batch_size",
        "checkpoint.every",
        "log.samples",
        "task.level",
        "student.init.hidden_size",
        "student.init.intermediate_size",
        "student.init.num_hidden_layers",
        "student.init.num_attention_heads",
        "student.init.num_key_value_heads",
        "student.init.max_position_embeddings",
    ]
    zero_or_more = [
        "seed",
        "steps",
        "rollout.top_k",
        "learner.warmup_steps",
        "learner.decay_steps",
        "eval.every",
        "eval.prompts",
        "log.samples_every",
    ]
    zero_or_more += ["task.train_size", "task.eval_size", "task.seed", "student.init.head_dim", "student.lora.rank"]
    zero_or_more += [f"student.init.{name}" for name in _EXPERT_FIELDS]
    for name in positive:
        _require(flat[name] >= 1, name, flat[name], "must be at least 1")
    for name in zero_or_more:
        _require(flat[name] >= 0, name, flat[name], "must be 0 or more")
    for name in ("seed", "task.seed"):
        _require(flat[name] < 2**31, name, flat[name], "must be below 2**31")
    for name, value in flat.items():
        _require(not isinstance(value, float) or math.isfinite(value), name, value, "must be a finite number")
    for name in (
        "learner.learning_rate",
        "loss.student_temperature",
        "loss.teacher_temperature",
        "learner.eps",
        "student.lora.alpha",
        "student.init.initializer_range",
    ):
        _require(flat[name] > 0, name, flat[name], "must be above 0")
    temperature = flat["rollout.temperature"]
    _require(temperature == 0 or temperature >= 1e-4, "rollout.temperature", temperature, "must be 0 (greedy) or at least 0.0001")
    for name in ("learner.weight_decay", "learner.clip_norm"):
        _require(flat[name] >= 0, name, flat[name], "must be 0 or more")
    for name in ("rollout.min_p", "estimator.gamma", "learner.final_fraction", "signal.beta"):
        _require(0 <= flat[name] <= 1, name, flat[name], "must be between 0 and 1")
    for name in ("learner.b1", "learner.b2"):
        _require(0 <= flat[name] < 1, name, flat[name], "must be at least 0 and below 1")
    _require(0 < flat["rollout.top_p"] <= 1, "rollout.top_p", flat["rollout.top_p"], "must be above 0 and at most 1")
    _require(flat["checkpoint.keep"] >= 2, "checkpoint.keep", flat["checkpoint.keep"], "must be at least 2")


def _require(condition: bool, name: str, value: Any, valid: str) -> None:
    if not condition:
        raise ConfigError(f"config field {name} = {value!r} {valid}")


def validate(config: Config) -> None:
    """Refuses values out of range and fields that contradict each other. Raises ConfigError."""
    _check_range(flatten(config))
    check_choice("rollout.source", config.rollout.source, ("student", "teacher", "dataset"))
    check_choice("rollout.overlong", config.rollout.overlong, ("refuse", "truncate"))
    check_choice("rollout.stop", config.rollout.stop, ("same", "union"))
    check_choice("task.metric", config.task.metric, ("rouge", "bleu"))
    check_choice("loss.normaliser", config.loss.normaliser, ("token_mean", "sequence_mean", "sequence_sum", "constant"))
    check_choice("learner.schedule", config.learner.schedule, ("constant", "linear", "cosine"))
    check_choice("model.compute_dtype", config.model.compute_dtype, ("float32", "bfloat16"))
    check_choice("student.init.model_type", config.student.init.model_type, FAMILIES)
    _check_experts(config.student.init)
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
        f"/ learner.microbatches = {micro} must be divisible by mesh.data * mesh.fsdp = {ways}",
    )
    evaluated = config.eval.batch_size
    _require(evaluated % ways == 0, "eval.batch_size", evaluated, f"must be divisible by mesh.data * mesh.fsdp = {ways}")
    span = learner.decay_steps or config.steps
    _require(learner.warmup_steps <= span, "learner.warmup_steps", learner.warmup_steps, f"must be at most the schedule's {span} steps")
    _check_teacher(config)
    _check_context(config)
    lora, base = config.student.lora, config.student.path or config.student.recipe
    _require(not lora.rank or bool(base), "student.lora.rank", lora.rank, "needs weights to adapt, but student.path and recipe are empty")


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
    has_teacher = bool(config.teacher.path or config.teacher.recipe)
    source = config.rollout.source
    _require(
        has_teacher or source != "teacher", "teacher.path", "", "must name a model, because rollout.source = 'teacher' needs a teacher"
    )
    own = "signal.support = 'sampled'" if config.signal.support == "sampled" else ""
    own = f"estimator.credit = {config.estimator.credit!r}" if config.estimator.credit != "token" else own
    _require(source == "student" or not own, "rollout.source", source, f"must be 'student', because {own} needs draws of the student")
    greedy = config.rollout.temperature == 0 or config.rollout.top_k == 1
    _require(not (greedy and own), "rollout.temperature", config.rollout.temperature, f"is greedy, but {own} needs draws from the policy")
