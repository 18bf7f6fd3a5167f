"""Countdown: "3 5 7=22:" -> "3*5+7", an expression that has the value and uses every number once, with + - * and parentheses.

* binds stronger than + and -, as everywhere; there are no signs before a number. Any such expression is right, the numbers in any order.
The solution keeps their order and needs no parentheses: the first in the order of +, -, *, so that a prompt has one. `task.level` is how
many numbers there are, each from 1 to 9; the value is from 0 to 99.
"""

import dataclasses
import itertools
import operator
import re

import numpy as np

from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.tasks.generated import DIGITS, GeneratedTask

MAX_CHARACTERS = 200  # of a completion that is meant to be an expression
HIGHEST = 99  # value
OPERATORS = {"+": (1, operator.add), "-": (1, operator.sub), "*": (2, operator.mul)}  # how strongly it binds, what it does
_TOKEN = re.compile(r"0|[1-9][0-9]*|[-+*()]")


@dataclasses.dataclass(frozen=True)
class Countdown(GeneratedTask):
    name = "countdown"

    def __post_init__(self):
        self.check_level(2, 6, "numbers")

    def example(self, split: str, index: int) -> Example:
        problem = self.draw(split, index, lambda rng: _problem(rng, self.level))
        return Example(index, f"{problem}:", solution=first_solution(problem), answer=problem)

    def verify(self, example: Example, text: str) -> Verdict:
        """The feedback says what it is not: an expression (not well formed), of these numbers, of this value; or it is right."""
        numbers, target = _read(example.answer)
        found = evaluate(text)
        if found is None:
            return Verdict(0.0, "it is not an expression of numbers, + - * and parentheses", well_formed=False)
        used, value = found
        if sorted(used) != sorted(numbers):
            return Verdict(0.0, f"it uses {_shown(used)}, it should use {_shown(numbers)}"[:200])
        return Verdict(1.0) if value == target else Verdict(0.0, f"its value is {value}, it should be {target}")


def _problem(rng: np.random.Generator, count: int) -> str:
    while True:
        numbers = rng.integers(1, 10, count).tolist()
        _, value = evaluate(_join(numbers, rng.choice(list(OPERATORS), count - 1)))
        if 0 <= value <= HIGHEST:
            return f"{_shown(numbers)}={value}"


def _read(problem: str) -> tuple[list[int], int]:
    numbers, _, target = problem.partition("=")
    return [int(number) for number in numbers.split()], int(target)


def _shown(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _join(numbers, operators) -> str:
    return "".join(f"{sign}{number}" for sign, number in zip(["", *operators], numbers, strict=True))


def first_solution(problem: str) -> str:
    """The first expression that solves "3 5 7=22" with the numbers as they stand."""
    numbers, target = _read(problem)
    candidates = (_join(numbers, signs) for signs in itertools.product(OPERATORS, repeat=len(numbers) - 1))
    return next(text for text in candidates if evaluate(text)[1] == target)


def evaluate(text: str) -> tuple[list[int], int] | None:
    """(the numbers in order, the value) of an expression; None where it is none. Without recursion, which nesting could exhaust."""
    tokens = _TOKEN.findall(text)
    if len(text) > MAX_CHARACTERS or "".join(tokens) != text.replace(" ", ""):
        return None
    numbers, values, waiting, value_is_next = [], [], [], True
    for token in tokens:
        if (token == "(" or token[0] in DIGITS) != value_is_next:
            return None
        if token == "(":
            waiting.append(token)
        elif token == ")":
            _apply(waiting, values, strength=1)
            if not waiting:
                return None
            waiting.pop()
        elif token in OPERATORS:
            _apply(waiting, values, strength=OPERATORS[token][0])
            waiting.append(token)
            value_is_next = True
        else:
            numbers.append(int(token))
            values.append(int(token))
            value_is_next = False
    if value_is_next:
        return None
    _apply(waiting, values, strength=1)
    return None if waiting else (numbers, values[0])


def _apply(waiting: list[str], values: list[int], *, strength: int) -> None:
    """Works out the operators that wait since the last open parenthesis and bind at least so strongly."""
    while waiting and waiting[-1] != "(" and OPERATORS[waiting[-1]][0] >= strength:
        right, left = values.pop(), values.pop()
        values.append(OPERATORS[waiting.pop()][1](left, right))
