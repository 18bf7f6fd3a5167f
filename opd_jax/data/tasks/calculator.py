"""Sums with a tool: "37+58+21=" -> "<37+58>95;<95+21>116;116". A call stands in < >; "95;" is what the calculator answers to it.

Set rollout.max_turns above the number of calls, so that the environment answers (opd_jax/environments/calculator.py); a solution has one
call for each number but the first. Only the number behind the last answer counts, however it was found. `task.level` is how many numbers
there are, from 10 to 99 each.
"""

import dataclasses

from opd_jax import environments
from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.tasks.generated import DIGITS, GeneratedTask
from opd_jax.environments import calculator


@dataclasses.dataclass(frozen=True)
class CalculatorTask(GeneratedTask):
    name = "calculator"
    environment = calculator.Calculator()

    def __post_init__(self):
        self.check_level(2, 6, "numbers")

    def example(self, split: str, index: int) -> Example:
        problem = self.draw(split, index, lambda rng: "+".join(map(str, rng.integers(10, 100, self.level))))
        return Example(index, f"{problem}=", solution=worked(problem), answer=str(calculator.evaluate(problem)))

    def verify(self, example: Example, text: str) -> Verdict:
        """The number behind the last answer. Not well formed: a call that is none, or no number in the end, whatever the reward."""
        found = environments.turns(self.environment, text)
        refused = next((turn.written for turn in found if turn.observation is not None and turn.observation.error), None)
        answer = self.vote(text)
        reward = float(answer == example.answer)
        if refused is not None:
            return Verdict(reward, f"the call {refused[-40:]!r} is no sum or product of numbers between < and >", well_formed=False)
        if answer is None:
            return Verdict(0.0, f"there is no number in the end, but {text[-40:]!r}", well_formed=False)
        return Verdict(reward, "" if reward else f"the answer is {answer[:40]!r}, it should be {example.answer!r}")

    def vote(self, text: str) -> str | None:
        last = environments.turns(self.environment, text)[-1]
        return last.written if last.observation is None and last.written and set(last.written) <= set(DIGITS) else None


def worked(problem: str) -> str:
    """The calls that add the numbers of "37+58+21" one after the other, with the answers to them, and the sum."""
    first, *others = problem.split("+")
    steps, total = "", first
    for number in others:
        call = f"{calculator.OPENS}{total}+{number}{calculator.CLOSES}"
        answer = CalculatorTask.environment.answer(call).text
        steps, total = f"{steps}{call}{answer}", answer.removesuffix(calculator.ENDS)
    return steps + total
