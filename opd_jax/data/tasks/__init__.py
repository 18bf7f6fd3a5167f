"""Tasks: where prompts come from, and how a completion is judged. One file each; `make` builds one by name."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from opd_jax import config as config_lib
from opd_jax.config import ConfigError, check_choice, names_in
from opd_jax.environments import Environment
from opd_jax.types import UserError

OWN = "own:"  # stands before the name of a user's task in config.json, which no built-in name begins with


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt. `id` is unique within its split and drives the random draws of its rollouts."""

    id: int
    prompt: str
    solution: str | None = None  # a completion to learn from
    answer: str | None = None  # what `verify` compares with
    tag: str = ""  # domain of the example, for tasks that have several: routes it to a teacher, and evaluation tells domains apart


@dataclasses.dataclass(frozen=True)
class Lazy(Sequence):
    """Examples that are made when they are asked for."""

    size: int
    make: Callable[[int], Example]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.make(index)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`reward` 1 is a success. `feedback` says in words what was wrong."""

    reward: float
    feedback: str = ""
    well_formed: bool = True  # False: no answer in the task's format at all, which methods may leave out of distillation


class Task(Protocol):
    """What the trainer needs of a task. Examples are random-access and made lazily; a task may be unlimited (a very long sequence).

    `parallel = True`, where it is there, says that `verify` is thread-safe and waits for something else than this process.
    `vote(text)`, where it is there, is the answer that a completion gives, as text that is the same for the same answer, or None.
    `environment`, where it is there, answers calls within a completion where rollout.max_turns is above 1 (opd_jax/environments).
    """

    name: str
    verifiable: bool
    digest: str  # of the data that the task reads; empty where it makes its examples

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of split "train" or "eval"; the two never share a prompt, unless all prompts are one."""
        ...

    def verify(self, example: Example, text: str) -> Verdict:
        """Judges a completion."""
        ...


def make(
    name: str,
    *,
    path: str,
    level: int,
    train_size: int,
    eval_size: int,
    seed: int,
    metric: str = config_lib.Task.metric,
    skills: str = config_lib.Task.skills,
    learn: str = config_lib.Task.learn,
    cache_dir: str = config_lib.Config.cache_dir,
) -> Task:
    """The task of a config's `task` block. Raises UserError for an unknown name, or for data that cannot be used."""
    from opd_jax.data.tasks import arithmetic, calculator, countdown, gsm8k, humaneval, jsonl, math, text, tinycode, tooluse, unconditional
    from opd_jax.data.tasks import skills as skills_task

    sizes = {"train_size": train_size, "eval_size": eval_size}
    generated = sizes | {"level": level, "seed": seed}
    makers: dict[str, Callable[[], Task]] = {
        "arithmetic": lambda: arithmetic.Arithmetic(**generated),
        "calculator": lambda: calculator.CalculatorTask(**generated),
        "countdown": lambda: countdown.Countdown(**generated),
        "gsm8k": lambda: gsm8k.read(path, cache_dir=cache_dir, **sizes),
        "humaneval": lambda: humaneval.read(path, **sizes),
        "jsonl": lambda: jsonl.read(path, **sizes),
        "math": lambda: math.read(path, **sizes),
        "skills": lambda: skills_task.Skills(skills=skills, learn=learn, **generated),
        "text": lambda: text.read(path, metric=metric, **sizes),
        "tinycode": lambda: tinycode.TinyCode(**generated),
        "tooluse": lambda: tooluse.read(path, **sizes),
        "unconditional": lambda: unconditional.Unconditional(**sizes),
    }
    check_choice("task.name", name, tuple(makers))
    return makers[name]()


def from_config(config: config_lib.Config, own: Task | None = None) -> Task:
    """The task of a config, or a user's own, which goes before it; with what is read beside the question. Raises UserError."""
    asked = dataclasses.asdict(config.task)
    share, tags, reads, layout = (asked.pop(f"informed{suffix}") for suffix in ("", "_tags", "_reads", "_layout"))
    for suffix in ("low", "high", "prompts", "samples"):  # which prompts of the task a run trains on, of which the task knows nothing
        del asked[f"difficulty_{suffix}"]
    task = own if own is not None else make(**asked, cache_dir=config.cache_dir)
    if not share and not tags:
        return task
    from opd_jax.data.tasks.informed import Informed

    return Informed(task, share, names_in(tags), names_in(reads), layout, config.task.seed)


def with_own(config: config_lib.Config, own: Task | None) -> config_lib.Config:
    """The config that names a user's own task. Raises UserError for an object that is no task."""
    if own is None:
        return config
    missing = [name for name in ("name", "verifiable", "digest", "examples", "verify") if not hasattr(own, name)]
    if missing:
        raise UserError(f"task = {type(own).__name__}: has no {', '.join(missing)}; opd_jax/data/tasks/README.md has an example")
    return dataclasses.replace(config, task=dataclasses.replace(config.task, name=f"{OWN}{own.name}"))


def environment_of(task: Task) -> Environment | None:
    """What answers calls in the completions of a task; None where nothing does."""
    return getattr(task, "environment", None)


def check_turns(config: config_lib.Config, task: Task) -> None:
    """Refuses turns in a task without an environment that would end them. Raises ConfigError."""
    if config.rollout.max_turns > 1 and environment_of(task) is None:
        raise ConfigError(
            f"config field rollout.max_turns = {config.rollout.max_turns} is for tasks with an environment, and task.name = "
            f"{task.name!r} has none; use 1, or task.name = 'calculator'"
        )


def verify_many(task: Task, examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]:
    """A verdict per completion, in order; a task that says `parallel = True` is asked from a thread per processor core."""
    if not getattr(task, "parallel", False):
        return [task.verify(example, text) for example, text in zip(examples, texts, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(task.verify, examples, texts))


def votes(task: Task, texts: Sequence[str]) -> list[str | None] | None:
    """The answer that each completion gives, for majority votes; None where the task does not say what an answer is."""
    vote = getattr(task, "vote", None)
    return None if vote is None else [vote(text) for text in texts]
