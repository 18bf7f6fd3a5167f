"""A calculator for models: "<12+7>" is answered by "19;", and what it cannot read by "?;".

A call is what stands between the last "<" of the turn and its ">": whole numbers with + - * between them, * binding stronger, no spaces and
no parentheses. It is parsed, never evaluated as a program.
"""

import math
import re

from opd_jax.environments import Observation

OPENS, CLOSES, ENDS, REFUSED = "<", ">", ";", "?"
MAX_DIGITS, MAX_NUMBERS = 18, 8  # of a number, given or found; of a call
_NUMBER = f"[0-9]{{1,{MAX_DIGITS}}}"
_CALL = re.compile(f"-?{_NUMBER}(?:[-+*]{_NUMBER}){{0,{MAX_NUMBERS - 1}}}")
_SUMMAND = re.compile(r"([-+]?)([0-9*]+)")


def evaluate(expression: str) -> int | None:
    """The value of "12+7*3"; None for what is no such expression, or too large."""
    if not _CALL.fullmatch(expression):
        return None
    summands = [(sign, math.prod(map(int, product.split("*")))) for sign, product in _SUMMAND.findall(expression)]
    value = sum(-number if sign == "-" else number for sign, number in summands)
    return value if abs(value) < 10**MAX_DIGITS else None


class Calculator:
    """The environment."""

    closes = CLOSES

    def answer(self, turn: str) -> Observation:
        """The value and ";", or "?;" for a call that it cannot read."""
        _, opened, call = turn.removesuffix(CLOSES).rpartition(OPENS)
        value = evaluate(call) if opened else None
        return Observation(f"{REFUSED}{ENDS}", error=True) if value is None else Observation(f"{value}{ENDS}")
