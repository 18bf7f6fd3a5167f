"""Tool calls written as text: "Action: NAME" and "Action Input: {JSON}", compared with the calls of the reference.

`task.path` is a file of lines with `prompt`, which tells the format, and `answer`: a JSON list of {"Action": name, "Action_Input": JSON
text}. All calls must be there, each name with its own arguments, no others, in any order. Arguments are compared as JSON: the order of
keys and the spelling of numbers (1, 1.0) do not matter, everything else does. A call whose name begins with "[Optional]" may be left out.
"""

import dataclasses
import json
import re
from collections.abc import Sequence

from opd_jax import files
from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.tasks.lines import FileTask, Line, hold_out
from opd_jax.data.tasks.lines import read as read_lines
from opd_jax.types import UserError

OPTIONAL = "[Optional]"
# The name ends with its line; the arguments are the JSON value that follows.
_CALL = re.compile(r"^[ \t*]*Action[ \t]*:[ \t*]*(?P<name>[^\n]*?)[ \t*]*\n\s*[*]*Action[ \t_]Input[ \t]*:[* \t]*", re.MULTILINE)
_ACTION = re.compile(r"^[ \t*]*Action[ \t]*:", re.MULTILINE)
Call = tuple[str, str]  # name, arguments as canonical JSON


@dataclasses.dataclass(frozen=True)
class ToolUse(FileTask):
    name = "tooluse"

    def verify(self, example: Example, text: str) -> Verdict:
        """The calls are those of the reference; the feedback names the first that is missing or should not be there."""
        try:
            given = calls_of(text)
        except ValueError as error:
            return Verdict(0.0, str(error), well_formed=False)
        for call, needed in _reference(example.answer):
            if call in given:
                given.remove(call)
            elif needed:
                return Verdict(0.0, _difference(call, given))
        return Verdict(1.0) if not given else Verdict(0.0, f"the call {given[0][0]} {given[0][1][:200]} should not be there")


def calls_of(text: str) -> list[Call]:
    """The calls of a completion, in order. Raises ValueError, with words for the feedback, where one cannot be read."""
    calls, starts = [], [match.start() for match in _ACTION.finditer(text)]
    if not starts:
        raise ValueError('there is no line "Action: ..."')
    for start in starts:
        match = _CALL.match(text, start)
        if match is None or not match["name"]:
            raise ValueError(f'the lines from {text[start : start + 60]!r} are not "Action: NAME" and "Action Input: JSON"')
        calls.append((match["name"], _canonical(_json_at(text, match.end(), match["name"]))))
    return calls


def _json_at(text: str, start: int, name: str) -> dict:
    end = next((match.start() for match in _ACTION.finditer(text, start)), len(text))
    try:
        value, _ = json.JSONDecoder(parse_int=_number, parse_float=_number).raw_decode(
            text[start:end].removeprefix("```json").lstrip("`\n ")
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the input of {name} is not JSON ({files.reason(error)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"the input of {name} is a JSON {type(value).__name__}, it must be an object")
    return value


def _number(text: str) -> int | float:
    if len(text) > 400:
        raise ValueError("a number is too long")
    return int(text) if float(text) == float("inf") or not re.search("[.eE]", text) else _whole(float(text))


def _whole(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _canonical(arguments: dict) -> str:
    return json.dumps(arguments, sort_keys=True)


def _reference(answer: str) -> Sequence[tuple[Call, bool]]:
    """(call, whether it is needed); needed calls first, so that an optional one never takes the place of an equal one that is needed."""
    found = [(tuple(call), needed) for *call, needed in json.loads(answer)]
    return sorted(found, key=lambda item: not item[1])


def _difference(call: Call, given: list[Call]) -> str:
    name, arguments = call
    same = next((others for other, others in given if other == name), None)
    if same is not None:
        return f"the input of {name} is {same[:200]}, it should be {arguments}"
    return f"the call {name} {arguments} is missing" + (f"; there is {given[0][0]}" if given else "")


def read(path: str, *, train_size: int, eval_size: int) -> ToolUse:
    """Reads a file; the last lines are held out, see lines.hold_out. Raises UserError."""
    lines, digest = read_lines(path, task="tooluse", holds="`prompt` and `answer`")
    examples = [_example(line, index) for index, line in enumerate(lines)]
    return ToolUse(*hold_out(path, examples, train_size=train_size, eval_size=eval_size), digest)


def _example(line: Line, index: int) -> Example:
    """The solution writes every call down in the format that the prompt tells."""
    wrong = f'{line.where}: `answer` must be a list of {{"Action": name, "Action_Input": JSON text}}'
    value = line.fields.get("answer")
    try:
        value = files.parse_json(value) if isinstance(value, str) else value
        pairs = [(call["Action"], call["Action_Input"]) for call in value]
        shown = [f"Action: {name.removeprefix(OPTIONAL)}\nAction Input: {arguments}" for name, arguments in pairs]
        calls = [[name.removeprefix(OPTIONAL), _canonical(_json_at(text, 0, name)), not name.startswith(OPTIONAL)] for name, text in pairs]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{wrong} ({files.reason(error)}); correct the line") from None
    if not calls:
        raise UserError(f"{wrong}; it is empty")
    prompt = line.required("prompt")
    return Example(index, prompt, solution="\n".join(shown) + "\n", answer=json.dumps(calls))
