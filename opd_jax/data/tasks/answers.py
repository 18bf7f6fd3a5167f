"""Final answers in a worked solution: where they stand, and numbers compared exactly (as fractions, never as floats)."""

import re
from fractions import Fraction

# A number as people write it: 1,234.5 or .5 or 3/4; a minus after a digit, letter or bracket is a subtraction.
_NUMBER = re.compile(r"(?:(?<![\w).])[-+]\s?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)|(?=\.\d))(?:\.\d+)?(?:\s?/\s?\d+(?:\.\d+)?)?")
_MAX_DIGITS = 1000  # the time to read an integer grows with the square
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*(-?[\d.,]+)\s*\}")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[\\{}]|[{}]")
_IS = re.compile(r"answer\s+is\s*:?", re.IGNORECASE)


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} (or \fbox) whose braces are balanced; None where there is none."""
    open_braces: list[tuple[bool, int]] = []
    found: tuple[int, int] | None = None
    for match in _BRACE.finditer(text):
        if match.group().endswith("}") and open_braces and not match.group().startswith("\\"):
            box, start = open_braces.pop()
            if box and (found is None or start > found[0]):
                found = start, match.start()
        elif match.group().endswith("{") and match.group() != "\\{":
            open_braces.append((match.group() != "{", match.end()))
    return None if found is None else text[slice(*found)].strip()


def numbers(text: str) -> list[str]:
    """All numbers of a text as they are written, without currency signs."""
    text = text.replace("−", "-").replace("\\!", "").replace("{,}", ",").replace("\\$", "").replace("$", "")
    text = _FRACTION.sub(r"\1/\2", text)
    return [found for match in _NUMBER.finditer(text) if (found := match.group()) and not found.startswith("/")]  # 1/2/3 is 1/2


def exact(number: str) -> Fraction | None:
    """Its value; None for a fraction over zero, or a number too long to be meant."""
    if len(number) > _MAX_DIGITS:
        return None
    above, _, below = re.sub(r"[,\s]", "", number).partition("/")
    denominator = Fraction(below or 1)
    return Fraction(above) / denominator if denominator else None


def final_number(text: str) -> str | None:
    r"""The answer of a solution: after the last `####`, else in the last \boxed{}, else after "the answer is", else the last number."""
    _, marked, after = text.rpartition("####")
    candidates = [after.strip().split("\n")[0]] if marked else []
    candidates += [boxed(text) or ""]
    said = [match.end() for match in _IS.finditer(text)]
    candidates += [text[said[-1] :].strip().split("\n")[0]] if said else []
    for candidate in candidates:
        if found := numbers(candidate):
            return found[0]
    return (numbers(text) or [None])[-1]
