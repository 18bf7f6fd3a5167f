"""Code in one line: "f(x):double,inc=" -> "2*x+1", a Python expression in x that does the steps one after the other.

The completion runs in the sandbox on a few visible and hidden inputs. The feedback is the compiler's message (not well formed) or what came
out of the first visible input that fails; of hidden ones it says only that one fails. `task.level` is the most steps there are, 2 or more.

Visible inputs are run first, and hidden ones in a process of their own, of which one bit is kept: so nothing that a completion does can
carry a hidden input into the feedback. What should come out is compared outside and is in neither process.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable

import numpy as np

from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.tasks.generated import GeneratedTask
from opd_jax.environments import sandbox
from opd_jax.types import UserError

MAX_FEEDBACK = 250  # characters
VISIBLE, HIDDEN = 3, 5  # tests of a program
LIMITS = sandbox.Limits(cpu_seconds=2, wall_seconds=30.0, memory_bytes=2**28, output_bytes=2**16)
# What each step does, and how it is written around an expression that is a name, a number or in parentheses.
STEPS: dict[str, tuple[Callable[[int], int], str]] = {
    "inc": (lambda x: x + 1, "{}+1"),
    "dec": (lambda x: x - 1, "{}-1"),
    "double": (lambda x: 2 * x, "2*{}"),
    "triple": (lambda x: 3 * x, "3*{}"),
    "neg": (lambda x: -x, "-{}"),
    "half": (lambda x: x // 2, "{}//2"),
    "square": (lambda x: x * x, "{}**2"),
}
# Its last line of output is {"refused": message} or {"results": ["is 7" or "raises ...", one per input]}.
_HARNESS = """
import json

def told(error):
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {message}"[:200]

def result(code, x):
    try:
        return f"is {eval(code, {'x': x})!r}"[:200]
    except Exception as error:
        return f"raises {told(error)}"

def report(text, inputs):
    try:
        code = compile(text, "<completion>", "eval")
    except Exception as error:
        return {"refused": told(error)}
    return {"results": [result(code, x) for x in inputs]}

"""


@dataclasses.dataclass(frozen=True)
class TinyCode(GeneratedTask):
    name = "tinycode"
    parallel = True  # each program runs in a process of its own

    def __post_init__(self):
        self.check_level(2, 5, "steps")
        try:
            sandbox.active_layers()
        except sandbox.SandboxError as error:
            raise UserError(f"task.name = 'tinycode': {error}; run it on Linux or macOS") from None

    def example(self, split: str, index: int) -> Example:
        steps = self.draw(split, index, lambda rng: ",".join(rng.choice(list(STEPS), rng.integers(2, self.level + 1))))
        return Example(index, f"f(x):{steps}=", solution=written(steps), answer=json.dumps(_tests(steps, self.seed)))

    def verify(self, example: Example, text: str) -> Verdict:
        """All tests pass within the limits; hidden ones are run where the visible ones pass."""
        tests = json.loads(example.answer)
        verdict = _judge(text, tests["visible"])
        if verdict.reward == 1.0 and _judge(text, tests["hidden"]).reward < 1.0:
            return Verdict(0.0, "wrong on a hidden test")
        return verdict


def written(steps: str) -> str:
    """The expression of steps in order: "double,inc" -> "2*x+1"."""
    expression = "x"
    for number, step in enumerate(steps.split(",")):
        sums = step in ("inc", "dec")  # everything binds more strongly than these
        expression = STEPS[step][1].format(expression if sums or not number else f"({expression})")
    return expression


def computed(steps: str, x: int) -> int:
    for step in steps.split(","):
        x = STEPS[step][0](x)
    return x


def _tests(steps: str, seed: int) -> dict[str, list[list[int]]]:
    """[input, output] pairs: digits are visible, numbers of three digits with either sign are hidden. The same for a prompt each time."""
    rng = np.random.default_rng([seed, zlib.crc32(steps.encode()), 2])
    visible = _with_outputs(steps, rng.choice(10, VISIBLE, replace=False))
    unseen = np.setdiff1d(np.arange(100, 1000), [abs(y) for _, y in visible])  # no feedback shows the number of a hidden input by chance
    hidden = rng.choice(unseen, HIDDEN, replace=False) * rng.permutation([-1, -1, 1, 1, 1])
    return {"visible": visible, "hidden": _with_outputs(steps, hidden)}


def _with_outputs(steps: str, inputs: np.ndarray) -> list[list[int]]:
    return [[x, computed(steps, x)] for x in inputs.tolist()]


def _judge(text: str, tests: list[list[int]]) -> Verdict:
    """Runs all tests in one process."""
    program = f"{_HARNESS}print('\\n' + json.dumps(report({text.strip()!r}, {[x for x, _ in tests]})))"
    outcome = sandbox.run(program, limits=LIMITS)
    if outcome.status == "timeout":
        return Verdict(0.0, f"the program takes more than {LIMITS.cpu_seconds} seconds")
    if outcome.status == "output":
        return Verdict(0.0, "the program prints too much")
    report = _parsed(outcome.stdout, len(tests))
    if report is None:
        return Verdict(0.0, "the program ends before its tests do")
    if isinstance(report, str):
        return Verdict(0.0, report[:MAX_FEEDBACK], well_formed=False)
    for (x, expected), given in zip(tests, report, strict=True):
        if given != f"is {expected}":
            return Verdict(0.0, f"f({x}) {given[:100]}, it should be {str(expected)[:100]}")
    return Verdict(1.0)


def _parsed(stdout: str, count: int) -> str | list[str] | None:
    """The compiler's message, or the results; None where the program wrote something else."""
    try:
        report = json.loads(stdout.rstrip("\n").rpartition("\n")[2])
    except (ValueError, RecursionError):
        return None
    match report:
        case {"refused": str(message)}:
            return message
        case {"results": [*results]} if len(results) == count and all(isinstance(result, str) for result in results):
            return results
    return None
