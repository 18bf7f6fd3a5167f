"""Mathematics with a final answer in a box, such as MATH-500 and AIME: lines with `problem` (or `prompt`, `question`) and `answer`."""

import dataclasses
import fractions
import functools
import re
from collections.abc import Sequence

from opd_jax.data.tasks import Example, Verdict, lines
from opd_jax.data.tasks.equivalence import Judge

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
MAX_ANSWER = 1000  # characters of an answer that is compared


@dataclasses.dataclass(frozen=True)
class Math:
    split: lines.Split
    name = "math"
    verifiable = True

    @property
    def digest(self) -> str:
        return self.split.digest

    def examples(self, split: str) -> Sequence[Example]:
        return self.split.examples(split)

    @functools.cached_property
    def judge(self) -> Judge:
        return Judge()

    def verify(self, example: Example, text: str) -> Verdict:
        """Whether the last \\boxed{} is equivalent to the answer: the same text but for notation, or the same value to math-verify."""
        given = boxed(text)
        if given is None:
            return Verdict(0.0, "there is no final answer in \\boxed{}")
        if len(given) > MAX_ANSWER:
            return Verdict(0.0, f"the answer has {len(given)} characters, more than {MAX_ANSWER}")
        same = same_notation(given, example.answer)
        if same or (same is None and self.judge.equivalent(example.answer, given)):
            return Verdict(1.0)
        return Verdict(0.0, f"the answer is {given[:80]!r}, it should be {example.answer!r}")


def read(path: str, *, train_size: int, eval_size: int) -> Math:
    """Reads a file; see lines.read for what is held out. Raises UserError."""
    holds = "`problem` and `answer`"
    return Math(lines.read(path, task="math", holds=holds, make=_example, train_size=train_size, eval_size=eval_size))


def _example(line: lines.Line, index: int) -> Example:
    """A `prompt` is read as it is; a bare problem gets the usual instruction."""
    problem, answer = line.required("problem", "prompt", "question"), line.required("answer")
    asked = line.text("problem") is None and line.text("prompt") is not None
    solution = line.text("solution") or f"\\boxed{{{answer}}}"
    return Example(id=index, prompt=problem if asked else problem + INSTRUCTION, solution=solution, answer=answer)


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{} whose braces are balanced."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            escaped = text[end - 1] == "\\" and text[end - 2] != "\\"
            depth += 0 if escaped else (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def same_notation(a: str, b: str) -> bool | None:
    """Whether two answers are the same text but for notation, or the same plain number; None where that does not tell.

    Plain numbers are compared exactly, where math-verify rounds to six digits and leaves a base (52_8) out.
    """
    a, b = normalise(a), normalise(b)
    numbers = [_NUMBER.fullmatch(text) for text in (a, b)]
    if a == b or not all(numbers):
        return a == b or None
    (value_a, base_a), (value_b, base_b) = (match.groups() for match in numbers)
    return fractions.Fraction(value_a) == fractions.Fraction(value_b) and (base_a == base_b or None in (base_a, base_b))


_NUMBER = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:_([0-9]+))?")
# Notation that says nothing: sizes of brackets and fractions, spaces, dollars, a unit's degree sign, the full stop.
_NOTATION = re.compile(r"\\(?:left|right|big|Big|,|;|!|:| |\$|%)|\\text(?:bf|rm|it)?\b|\\mathrm\b|\^\{?\\circ\}?|[\s${}]|\.$")


def normalise(answer: str) -> str:
    """An answer without its notation, for comparison by text: what math-verify cannot parse, such as names and choices."""
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer.strip())
    answer = re.sub(r"(?<=\d),(?=\d{3}\b)", "", re.sub(r"\{,\}", ",", answer))
    return _NOTATION.sub("", re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}/{\2}", re.sub(r"\\frac\{([^{}]*)\}\{", r"\\frac{\1}/{", answer)))
