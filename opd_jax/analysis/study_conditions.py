"""What a study compares, and on how much: conditions, variants of estimators, references, and the sizes of its sample."""

import dataclasses
import difflib
import numbers as numbers_lib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from opd_jax.analysis import shadow
from opd_jax.analysis.gradient_stats import LEAST_UNITS
from opd_jax.config import Config, ConfigError
from opd_jax.numerics.estimators import REGISTRY, Estimator
from opd_jax.types import UserError

SEQUENCE = "sequence_reverse_kl"
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Condition:
    """What needs rollouts of its own."""

    T: int  # tokens per completion at most
    group_size: int = 1  # rollouts per prompt
    temperature: float = 1.0
    top_p: float = 1.0
    step: int | None = None  # of the run that trained the student; None: the student as given

    @property
    def on_policy(self) -> bool:
        """Whether completions are drawn from the policy itself, which the registry's claims are about."""
        return (self.temperature, self.top_p) == (1.0, 1.0)

    def keys(self, one: "Shadow | None") -> dict[str, Any]:
        """The condition of a row."""
        found = dataclasses.asdict(self)
        return {"T": found.pop("T"), "gamma": one and one.gamma, "k": one and one.k, **found}


@dataclasses.dataclass(frozen=True)
class Shadow:
    """An estimator of the registry, or one with another gamma or k."""

    estimator: Estimator
    default: bool = True

    @property
    def gamma(self) -> float | None:
        """The discount; None where the estimator has none."""
        return getattr(self.estimator, "gamma", None) if _discounts(REGISTRY[self.estimator.name]) else None

    @property
    def k(self) -> int | None:
        return getattr(self.estimator.signal, "k", None)


def _discounts(estimator: Estimator) -> bool:
    return getattr(estimator, "gamma", 1.0) != 1.0


@dataclasses.dataclass(frozen=True)
class Words:
    """What messages call the choices of a study: the fields of a config, or the arguments of a function."""

    prefix: str = "config field "
    estimators: str = "study.estimators"
    gammas: str = "study.gammas"
    top_ks: str = "study.top_ks"
    temperatures: str = "study.temperatures"
    rollouts: str = "study.rollouts"
    batch_size: str = "rollout.batch_size"
    microbatch: str = "study.microbatch"
    reference: str = "study.reference"
    devices: str = "mesh.data * mesh.fsdp"


FIELDS = Words()
ARGUMENTS = Words(
    prefix="",
    estimators="estimators",
    gammas="gammas",
    top_ks="top_ks",
    temperatures="temperatures",
    rollouts="len(prompts) * min(group_sizes)",
    batch_size="plan.batch_size",
    microbatch="plan.microbatch",
    reference="plan.reference",
    devices="data * fsdp of the mesh",
)


def resolve(names: Sequence[str], words: Words = FIELDS) -> list[Estimator]:
    """Estimators by name; `all` is the whole registry. Raises ConfigError with the nearest name."""
    field, valid = words.prefix + words.estimators, (ALL, *REGISTRY)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{field} = {names!r} must be a list of names, such as ['token', 'to_go']; valid: {', '.join(valid)}")
    for name in names:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1, cutoff=0)[0]
            raise ConfigError(f"{field}: {name!r} is not known; did you mean {near}? Valid: {', '.join(valid)}")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"{field} = {','.join(names)!r} must hold different names; valid: {', '.join(valid)}")
    return list(REGISTRY.values()) if ALL in names else [REGISTRY[name] for name in names]


def variants(
    estimators: Sequence[Estimator], gammas: Sequence[float] = (), top_ks: Sequence[int] = (), words: Words = FIELDS
) -> list[Shadow]:
    """The estimators as they are, then those with a discount at each gamma, and those with a top-k at each k. Raises ConfigError."""
    discounted = [e for e in estimators if _discounts(e)]
    truncated = [e for e in estimators if getattr(e.signal, "k", None)]
    for field, values, having, what in (
        (words.gammas, gammas, discounted, "discount"),
        (words.top_ks, top_ks, truncated, "top-k"),
    ):
        if len(values) and not having:
            given = ",".join(map(str, values))
            raise ConfigError(f"{words.prefix}{field} = {given!r}, but none of {words.estimators} has a {what}; add one")
    others = [dataclasses.replace(e, gamma=float(gamma)) for e in discounted for gamma in gammas]
    others += [dataclasses.replace(e, signal=dataclasses.replace(e.signal, k=k)) for e in truncated for k in top_ks]
    return [Shadow(e) for e in estimators] + [Shadow(e, default=False) for e in dict.fromkeys(others) if e not in estimators]


def conditions(
    base: Condition,
    *,
    lengths: Sequence[int] = (),
    group_sizes: Sequence[int] = (),
    temperatures: Sequence[float] = (),
    top_ps: Sequence[float] = (),
    steps: Sequence[int] = (),
) -> list[Condition]:
    """The base, then for each further value of a field the base with that value."""
    swept = {"T": lengths, "group_size": group_sizes, "temperature": temperatures, "top_p": top_ps, "step": steps}
    return list(dict.fromkeys([base, *(dataclasses.replace(base, **{name: v}) for name, values in swept.items() for v in values)]))


def references_of(estimators: Sequence[Estimator]) -> dict[str, Estimator]:
    """{target: the unbiased estimator that stands for it}, of the targets of these estimators and of the sequence-level reverse KL.

    What is summed over the vocabulary is the conditional mean of what samples it, so that it goes first; a target for which nothing in the
    registry is unbiased has none.
    """
    found = {}
    for target in dict.fromkeys([*(e.target for e in estimators), SEQUENCE]):
        fitting = [e for e in REGISTRY.values() if e.target == target and e.unbiased and not e.looks_across]
        fitting.sort(key=lambda e: not ("local" in e.needs and e.signal.support == "full"))
        if fitting:
            found[target] = fitting[0]
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a sample. Raises ConfigError from `check`."""

    reference: int = 4  # further rollouts per prompt, of other draws, for the references
    batch_size: int = 64  # rollouts that a baseline across rows sees, and that are sampled at once
    microbatch: int = 8  # rollouts that are differentiated at once
    position_parts: int = 4  # equal parts of a completion, whose shares of the variance are told
    sketch: int = 2048  # numbers of a gradient's sketch
    exact_parameters: int = 2_000_000  # of a student up to which sums of gradients are kept whole
    resamples: int = 1000
    seed: int = 0

    def projection(self, params) -> shadow.Projection:
        """The same signs for every `seed`, so that studies that differ in it are one program."""
        return shadow.make_projection(params, width=self.sketch, exact_parameters=self.exact_parameters, seed=0)

    def batches(self, setting: Condition, prompts: int) -> int:
        return prompts * setting.group_size // self.batch_size

    def check(self, settings: Sequence[Condition], rollouts: int, prompts: int, mesh: Mesh, words: Words = FIELDS) -> None:
        """Refuses sizes that do not divide each other, and samples too small for an interval."""
        field = words.prefix
        _divides(words.batch_size, self.batch_size, field + words.rollouts, rollouts)
        _divides(words.microbatch, self.microbatch, field + words.batch_size, self.batch_size)
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        for setting in settings:
            group = setting.group_size
            _divides("the group size", group, field + words.microbatch, self.microbatch)
            if not setting.temperature > 0:
                raise ConfigError(f"{field}{words.temperatures}: {setting.temperature} is greedy; an estimator needs draws of the policy")
            if not LEAST_UNITS <= rollouts // group <= prompts:
                raise ConfigError(
                    f"{field}{words.rollouts} = {rollouts} with {group} per prompt are {rollouts // group} prompts; valid: from "
                    f"{LEAST_UNITS}, which a bootstrap needs, to {prompts}, which there are; change {words.rollouts} or the prompts"
                )
            if self.microbatch % ways or self.microbatch // group * self.reference % ways:
                raise ConfigError(
                    f"{field}{words.microbatch} = {self.microbatch} (and {words.reference} = {self.reference} per {group} of them) "
                    f"must be divisible by {words.devices} = {ways}"
                )


def _divides(small: str, size: int, large: str, whole: int) -> None:
    if whole % size or whole < size:
        raise ConfigError(f"{large} = {whole} must be a multiple of {small} = {size}")


# What the numbers of a sweep may be: (type, in words, test).
SWEPT = {
    "lengths": (int, "tokens, at least 1", lambda v: v > 0),
    "group_sizes": (int, "rollouts per prompt, at least 1", lambda v: v > 0),
    "temperatures": (float, "numbers from 0.0001", lambda v: 1e-4 <= v < float("inf")),
    "top_ps": (float, "numbers above 0 and at most 1", lambda v: 0 < v <= 1),
    "steps": (int, "steps of checkpoints", lambda v: v >= 0),
    "gammas": (float, "numbers from 0 to 1", lambda v: 0 <= v <= 1),
    "top_ks": (int, "numbers of tokens, at least 1", lambda v: v > 0),
}


def numbers(text: str, name: str) -> list:
    """The numbers of the field study.`name`, with commas between them. Raises ConfigError."""
    kind, valid, fits = SWEPT[name]
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = None
    if values is None or not all(fits(value) for value in values):
        raise ConfigError(f"config field study.{name} = {text!r} must be {valid}, with commas between them, or empty")
    return values


def checked_numbers(values: Any, name: str, *, least: int = 0) -> list:
    """The numbers of the argument `name` of a function. Raises UserError for what is no list of at least `least` of them."""
    kind, valid, fits = SWEPT[name]
    kinds = numbers_lib.Integral if kind is int else numbers_lib.Real
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise UserError(f"{name} = {values!r} must be a list ({valid}); write {name}=({values!r},)")
    if len(values) < least or not all(isinstance(v, kinds) and not isinstance(v, bool) and fits(v) for v in values):
        raise UserError(f"{name} = {values!r} must be a list of {valid}" + ("; the first is the base condition" if least else ""))
    return [kind(value) for value in values]


def enumerable(config: Config) -> bool:
    """Whether no model is named, so that a small random pair is studied whose completions can be listed."""
    return not any((config.student.path, config.student.recipe, config.teacher.path, config.teacher.recipe))


def from_config(config: Config) -> tuple[list[Shadow], list[Condition], Plan]:
    """What a validated config asks for. Raises ConfigError, before any work."""
    asked, law = config.study, config.rollout
    if not enumerable(config) and not (config.teacher.path or config.teacher.recipe):
        raise ConfigError("config field teacher.path = '' must name a model, because estimators compare the student with a teacher")
    if enumerable(config) and config.task.name != Config().task.name:
        raise ConfigError(
            f"config fields student.path = '' and teacher.path = '' must name models, because task.name = {config.task.name!r} has prompts "
            "for them; give both, or leave out the task (or the argument after the colon of --config) for the small random pair"
        )
    for name, value, whole in (("top_k", law.top_k, 0), ("min_p", law.min_p, 0.0), ("source", law.source, "student")):
        if value != whole:
            raise ConfigError(f"config field rollout.{name} = {value!r} must be {whole!r} in a study; vary temperature and top_p")
    if config.student.lora.rank:
        raise ConfigError(f"config field student.lora.rank = {config.student.lora.rank} must be 0: a study differentiates all weights")
    asked_for = {name: numbers(getattr(asked, name), name) for name in SWEPT}
    gammas, top_ks = asked_for.pop("gammas"), asked_for.pop("top_ks")
    shadows = variants(resolve([name.strip() for name in asked.estimators.split(",") if name.strip()]), gammas, top_ks)
    base = Condition(law.max_new_tokens, law.group_size, law.temperature, law.top_p)
    plan = Plan(
        reference=asked.reference,
        batch_size=law.batch_size,
        microbatch=asked.microbatch,
        position_parts=asked.position_parts,
        sketch=asked.sketch,
        exact_parameters=asked.exact_parameters,
        resamples=asked.resamples,
        seed=config.seed,
    )
    return shadows, conditions(base, **asked_for), plan
