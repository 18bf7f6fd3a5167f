"""Running values: "314=" -> s_1 s_2 s_3 with s_i = (3 s_(i-1) + d_i) mod 10. One wrong value spoils all that follow it.

`task.level` is the number of digits of a prompt.
"""

import dataclasses

from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.tasks.generated import GeneratedTask, judge_digits, random_digits


@dataclasses.dataclass(frozen=True)
class Arithmetic(GeneratedTask):
    name = "arithmetic"

    def __post_init__(self):
        self.check_level(2, 100, "digits")

    def example(self, split: str, index: int) -> Example:
        digits = self.draw(split, index, lambda rng: random_digits(rng, self.level))
        solution = running_values(digits)
        return Example(id=index, prompt=f"{digits}=", solution=solution, answer=solution)

    def verify(self, example: Example, text: str) -> Verdict:
        """Exact match; the feedback names the first character that is no digit (not well formed), otherwise the first wrong value."""
        return judge_digits(text, example.answer, unit="value")

    def vote(self, text: str) -> str | None:
        return text or None


def running_values(digits: str) -> str:
    """s_i = (3 s_(i-1) + d_i) mod 10 with s_0 = 0, as a string of digits."""
    value, values = 0, []
    for digit in digits:
        value = (3 * value + int(digit)) % 10
        values.append(str(value))
    return "".join(values)
