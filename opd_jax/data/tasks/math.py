r"""Problems whose answer is an expression: what stands in the last \boxed{} is compared with the reference by math-verify.

`task.path` is a file of lines with `prompt`, `problem` or `question`, and `answer`; optionally `solution` to learn from (without it, the
boxed answer). A completion without \boxed{} is wrong; problems that do not ask for it are given a sentence that does.
"""

import dataclasses
import re

from opd_jax.data.tasks import Example, Verdict, answers, math_checker
from opd_jax.data.tasks.lines import FileTask, Line, hold_out
from opd_jax.data.tasks.lines import read as read_lines

INSTRUCTION = r"Think step by step, and put the final answer in \boxed{}."

_PLAIN = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")  # which the library would round to six digits
_IN_BASE = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")  # 52_8, whose base the library would drop


@dataclasses.dataclass(frozen=True)
class Math(FileTask):
    name = "math"
    parallel = True  # each comparison waits for another process

    def verify(self, example: Example, text: str) -> Verdict:
        """Equal text is right; otherwise the two expressions must be equal. What cannot be compared within limits is wrong."""
        given = answers.boxed(text)
        if given is None:
            return Verdict(0.0, rf"there is no \boxed{{}} with the answer, which is {example.answer}", well_formed=False)
        if given == example.answer:
            return Verdict(1.0)
        equal = _equal(example.answer, given)
        if equal:
            return Verdict(1.0)
        reason = f"the answer is {given[:80]}, it should be {example.answer}"
        return Verdict(0.0, reason if equal is not None else f"{reason}; the two cannot be compared")

    def vote(self, text: str) -> str | None:
        """The boxed answer as it is written: two ways to write one wrong answer are two answers, which only that answer's votes notice."""
        return answers.boxed(text)


def _equal(reference: str, given: str) -> bool | None:
    if _PLAIN.fullmatch(reference) and _PLAIN.fullmatch(given):
        expected, found = answers.exact(reference), answers.exact(given)
        return expected == found if expected is not None else None
    expected, found = _IN_BASE.fullmatch(reference), _IN_BASE.fullmatch(given)
    if expected and found:
        return expected.groups() == found.groups()
    return math_checker.shared().equal(reference, given)


def read(path: str, *, train_size: int, eval_size: int) -> Math:
    """Reads a file; the last lines are held out, see lines.hold_out. Raises UserError."""
    lines, digest = read_lines(path, task="math", holds="`prompt` and `answer`")
    examples = [_example(line, index) for index, line in enumerate(lines)]
    return Math(*hold_out(path, examples, train_size=train_size, eval_size=eval_size), digest)


def _example(line: Line, index: int) -> Example:
    problem, answer = line.required("prompt", "problem", "question"), line.required("answer").strip()
    prompt = problem if "\\boxed" in problem else f"{problem}\n{INSTRUCTION}\n"
    return Example(index, prompt, solution=line.text("solution") or f"\\boxed{{{answer}}}", answer=answer)
