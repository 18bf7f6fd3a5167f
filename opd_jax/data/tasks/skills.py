"""Several small skills on strings of digits in one task, to learn one after the other, to forget, and to merge experts of.

`task.skills` names them; example i belongs to skill i mod n and carries its name as `tag`. With `task.learn` the training prompts are of
some of them only, and evaluation still of all: what is learnt, and what is forgotten. A prompt begins with the mark of its skill:

| skill | prompt | completion |
|---|---|---|
| chain | c314= | running values, as in `arithmetic`: 304 |
| reverse | r314= | 413 |
| sort | s314= | 134 |
| add | a27+15= | the digits of the sum from the last column to the first, as it is worked out; one more than the numbers have: 240 |
| shift | h394= | each digit + 1 mod 10: 405 |
| facts | f of kibo= | a number that is looked up and cannot be inferred |

`task.level` is the length of an input: digits, or letters of the name in a fact. An input that is held out is so for all skills. The facts,
drawn by `task.seed`, are the same in both splits, since others cannot be known; held out is the wording: "f on kibo=". Training goes
through several wordings, because a small model that sees one learns it with the fact and knows nothing in another.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from opd_jax.config import check_choice
from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.tasks.arithmetic import running_values
from opd_jax.data.tasks.generated import GeneratedTask, judge_digits, random_digits
from opd_jax.types import UserError

FACTS = 32  # entries of the table
FACT_DIGITS = 2  # of a value
WORDINGS = {"train": ("f of {}=", "f at {}=", "f in {}=", "f by {}="), "eval": ("f on {}=",)}
_LETTERS = ("bdfgklmnprstvz", "aeiou")  # in turn, so that a name can be pronounced


def column_sum(text: str) -> str:
    """The digits of "27+15" from the last column to the first, the last carry included: "240"."""
    first, second = text.split("+")
    carry, digits = 0, []
    for a, b in zip(reversed(first), reversed(second), strict=True):
        carry, digit = divmod(int(a) + int(b) + carry, 10)
        digits.append(str(digit))
    return "".join([*digits, str(carry)])


# Per skill: its mark, how many inputs it takes, and the completion.
SKILLS: dict[str, tuple[str, int, Callable[[str], str]]] = {
    "chain": ("c", 1, running_values),
    "reverse": ("r", 1, lambda text: text[::-1]),
    "sort": ("s", 1, lambda text: "".join(sorted(text))),
    "add": ("a", 2, column_sum),
    "shift": ("h", 1, lambda text: "".join(str((int(digit) + 1) % 10) for digit in text)),
}
NAMES = (*SKILLS, "facts")


@dataclasses.dataclass(frozen=True)
class Skills(GeneratedTask):
    skills: str  # names, with commas between them
    learn: str = ""  # those that training is of; empty: all
    name = "skills"

    def __post_init__(self):
        self.check_level(2, 20, "characters")
        for name in self.chosen:
            check_choice("task.skills", name, NAMES)
            if self.chosen.count(name) > 1:
                raise UserError(f"config field task.skills = {self.skills!r} has {name} twice; name each skill once")
        for name in self.of("train"):
            check_choice("task.learn", name, tuple(self.chosen))

    @property
    def chosen(self) -> list[str]:
        return [name.strip() for name in self.skills.split(",")]

    def of(self, split: str) -> list[str]:
        """The skills whose examples are in a split."""
        return [name.strip() for name in self.learn.split(",")] if self.learn and split == "train" else self.chosen

    def example(self, split: str, index: int) -> Example:
        skills = self.of(split)
        turn, which = divmod(index, len(skills))
        tag = skills[which]
        if tag == "facts":
            again, place = divmod(turn, FACTS)
            entity, solution = facts(self.seed, self.level)[place]
            prompt = WORDINGS[split][again % len(WORDINGS[split])].format(entity)
        else:
            mark, inputs, solve = SKILLS[tag]
            text = self.draw(split, index, lambda rng: "+".join(random_digits(rng, self.level) for _ in range(inputs)))
            prompt, solution = f"{mark}{text}=", solve(text)
        return Example(index, prompt, solution, solution, tag)

    def verify(self, example: Example, text: str) -> Verdict:
        """Exact match; the feedback names the first character that is no digit (not well formed), otherwise the first wrong digit."""
        return judge_digits(text, example.answer, unit="digit")

    def vote(self, text: str) -> str | None:
        return text or None


@functools.cache
def facts(seed: int, length: int) -> tuple[tuple[str, str], ...]:
    """The table: (name of `length` letters, value of FACT_DIGITS digits), names are distinct."""
    rng = np.random.default_rng([seed, length, 2])  # examples end in 0 or 1
    table: dict[str, str] = {}
    while len(table) < FACTS:
        name = "".join(rng.choice(list(_LETTERS[i % 2])) for i in range(length))
        table.setdefault(name, random_digits(rng, FACT_DIGITS))
    return tuple(table.items())
