"""A task whose training prompts have, in part, something beside the question: so a model learns to read what self-teachers will read.

Self-distillation is vacuous on a model that makes nothing of its context. With `task.informed` a share of the training prompts, and all of
those with a tag in `task.informed_tags`, are laid out as the prompts of a teacher (data/privileged.py), each with one kind of section:

    solution, demonstration, sibling   the example's solution
    feedback                           what the verifier says of that solution with one character replaced by another of its kind

What follows is the solution as before. Held-out prompts are the question alone. An example's section is a function of its id and the seed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax.config import ConfigError
from opd_jax.data import privileged
from opd_jax.data.tasks import Example, Lazy, Task, Verdict

KINDS = ("solution", "demonstration", "sibling", "feedback")


@dataclasses.dataclass(frozen=True)
class Informed:
    """The task `inner` with sections. Raises UserError."""

    inner: Task
    share: float  # of the training prompts
    tags: tuple[str, ...]  # whose training prompts all have a section
    kinds: tuple[str, ...]
    layout: str  # name or file
    seed: int

    def __post_init__(self):
        field = "config field task.informed_reads"
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            what = unknown[0] if unknown else "nothing"
            raise ConfigError(f"{field} = {','.join(self.kinds)!r}: {what!r} cannot be read; give some of {', '.join(KINDS)}")
        if "feedback" in self.kinds and not self.inner.verifiable:
            raise ConfigError(f"{field}: feedback needs a verifier, which task.name = {self.inner.name!r} has not; leave it out")
        privileged.check_layout(self._layout, self.kinds, name=self.layout)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def verifiable(self) -> bool:
        return self.inner.verifiable

    @property
    def digest(self) -> str:
        return self.inner.digest

    @property
    def _layout(self) -> str:
        return privileged.layout_text(self.layout)

    def __getattr__(self, name: str):
        if name in ("parallel", "vote", "environment"):  # what a task may have
            return getattr(self.inner, name)
        raise AttributeError(name)

    def examples(self, split: str) -> Sequence[Example]:
        """The inner task's, those to train on with sections."""
        plain = self.inner.examples(split)
        return plain if split == "eval" else Lazy(len(plain), lambda index: self.informed(plain[index]))

    def verify(self, example: Example, text: str) -> Verdict:
        """Whatever its prompt, the example's answer is the same."""
        return self.inner.verify(example, text)

    def informed(self, example: Example) -> Example:
        """The example with a section in its prompt, if it is one that has."""
        rng = np.random.default_rng([self.seed, example.id, 0x1F0])
        if not (rng.random() < self.share or example.tag in self.tags):
            return example
        kind = self.kinds[rng.integers(len(self.kinds))]
        prompt = privileged.render(self._layout, example.prompt, section(self.inner, example, kind, rng))
        return dataclasses.replace(example, prompt=prompt or example.prompt)


def section(task: Task, example: Example, kind: str, rng: np.random.Generator) -> privileged.Sections:
    """What there is of a kind to read, made from the example's solution; nothing where it has none."""
    if example.solution is None:
        return privileged.Sections()
    text = example.solution if kind != "feedback" else task.verify(example, with_error(example.solution, rng)).feedback
    return privileged.Sections(**{kind: text or None})


def with_error(text: str, rng: np.random.Generator) -> str:
    """The text with one character replaced by another of those in it, or, where all are one, of the digits."""
    if not text:
        return text
    place = int(rng.integers(len(text)))
    others = sorted(set(text) - {text[place]}) or sorted(set("0123456789") - {text[place]})
    return text[:place] + others[rng.integers(len(others))] + text[place + 1 :]
