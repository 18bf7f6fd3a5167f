"""Tasks: where prompts come from, and how a completion is judged. One file each; `make` builds one by name."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from opd_jax.config import check_choice


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt. `id` is unique within its split and drives the random draws of its rollouts."""

    id: int
    prompt: str
    solution: str | None = None  # a completion to learn from
    answer: str | None = None  # what `verify` compares with


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`reward` 1 is a success. `feedback` says in words what was wrong."""

    reward: float
    feedback: str = ""


class Task(Protocol):
    """What the trainer needs of a task. Examples are random-access and made lazily; a task may be unlimited (a very long sequence)."""

    name: str
    verifiable: bool
    digest: str  # of the data that the task reads; empty where it makes its examples

    def examples(self, split: str) -> Sequence[Example]:
        """The examples of split "train" or "eval"; the two never share a prompt, unless all prompts are one."""
        ...

    def verify(self, example: Example, text: str) -> Verdict:
        """Judges a completion."""
        ...


def make(name: str, *, path: str, level: int, metric: str, train_size: int, eval_size: int, seed: int) -> Task:
    """The task of a config's `task` block. Raises UserError for an unknown name, or for data that cannot be used."""
    from opd_jax.data.tasks import arithmetic, jsonl, math, text, tooluse, unconditional

    makers: dict[str, Callable[[], Task]] = {
        "arithmetic": lambda: arithmetic.Arithmetic(level=level, train_size=train_size, eval_size=eval_size, seed=seed),
        "jsonl": lambda: jsonl.read(path, train_size=train_size, eval_size=eval_size),
        "math": lambda: math.read(path, train_size=train_size, eval_size=eval_size),
        "text": lambda: text.read(path, metric=metric, train_size=train_size, eval_size=eval_size),
        "tooluse": lambda: tooluse.read(path, train_size=train_size, eval_size=eval_size),
        "unconditional": lambda: unconditional.Unconditional(train_size=train_size, eval_size=eval_size),
    }
    check_choice("task.name", name, tuple(makers))
    return makers[name]()
