"""One turn of tool use, as in ToolAlpaca: a prompt that documents tools, and the calls that answer it.

Lines have `prompt` and `answer`, a list of {"Action": name, "Action_Input": JSON object}, as JSON or as text that holds it. A completion
names its calls in the same words: "Action: NAME" and after it "Action Input: {...}".
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from opd_jax import files
from opd_jax.data.tasks import Example, Verdict, lines
from opd_jax.types import UserError

OPTIONAL = "[Optional]"  # before a name: the call may be left out

Call = tuple[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ToolUse:
    split: lines.Split
    name = "tooluse"
    verifiable = True

    @property
    def digest(self) -> str:
        return self.split.digest

    def examples(self, split: str) -> Sequence[Example]:
        return self.split.examples(split)

    def verify(self, example: Example, text: str) -> Verdict:
        """1 where the calls are those of the answer, in any order, with the same arguments. The feedback names the first that is not."""
        try:
            given = calls_in(text)
        except ValueError as error:
            return Verdict(0.0, str(error))
        missing = [(name, json.loads(arguments)) for name, arguments in json.loads(example.answer)]
        for name, arguments in given:
            found = next((call for call in missing if same(call, (name, arguments))), None)
            if found is None:
                expected = next((a for n, a in missing if n.removeprefix(OPTIONAL) == name), None)
                wrong = f"its arguments should be {json.dumps(expected)}" if expected is not None else "it should not be called"
                return Verdict(0.0, f"call {name} with {json.dumps(arguments)}: {wrong}")
            missing.remove(found)
        absent = [name for name, _ in missing if not name.startswith(OPTIONAL)]
        return Verdict(0.0, f"{absent[0]} is not called") if absent else Verdict(1.0)


def read(path: str, *, train_size: int, eval_size: int) -> ToolUse:
    """Reads a file; see lines.read for what is held out. Raises UserError."""
    holds = "`prompt` and `answer`"
    return ToolUse(lines.read(path, task="tooluse", holds=holds, make=_example, train_size=train_size, eval_size=eval_size))


def _example(line: lines.Line, index: int) -> Example:
    calls = _reference(line)
    solution = "\n".join(f"Action: {name.removeprefix(OPTIONAL)}\nAction Input: {arguments}" for name, arguments in calls)
    return Example(id=index, prompt=line.required("prompt"), solution=solution, answer=json.dumps(calls))


def _reference(line: lines.Line) -> list[tuple[str, str]]:
    """[(name, arguments as JSON text)] of a line's answer."""
    remedy = 'write [{"Action": name, "Action_Input": {...}}]'
    answer = line.fields.get("answer")
    try:
        answer = files.parse_json(answer) if isinstance(answer, str) else answer
        calls = []
        for call in answer if isinstance(answer, list) else []:
            arguments = call["Action_Input"]
            arguments = files.parse_json(arguments) if isinstance(arguments, str) else arguments
            if not isinstance(call["Action"], str) or not isinstance(arguments, dict):
                raise ValueError("a name is not text, or its input is not an object")
            calls.append((call["Action"], json.dumps(arguments)))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{line.where}: `answer` cannot be read ({files.reason(error)}); {remedy}") from None
    if not calls:
        raise UserError(f"{line.where}: `answer` has no calls; {remedy}")
    return calls


def calls_in(text: str) -> list[Call]:
    """The calls of a completion, in order. Raises ValueError that says, for the model that wrote it, what cannot be read."""
    calls: list[Call] = []
    decoder = json.JSONDecoder()
    for match in re.finditer(r"^[ \t]*Action:[ \t]*(.+?)[ \t]*$", text, flags=re.MULTILINE):
        name = match.group(1)
        given = re.match(r"\s*Action Input:\s*", text[match.end() :])
        if given is None:
            raise ValueError(f"no `Action Input:` follows `Action: {name[:80]}`")
        try:
            arguments, _ = decoder.raw_decode(text[match.end() + given.end() :])
        except (ValueError, RecursionError):
            raise ValueError(f"the input of {name[:80]} is not JSON") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"the input of {name[:80]} is not a JSON object")
        calls.append((name, arguments))
    if not calls:
        raise ValueError("no line begins with `Action:`")
    return calls


def same(reference: Call, call: Call) -> bool:
    """Names without the mark of an optional call; arguments as JSON values, where 1 and 1.0 are one number and true is none."""
    return reference[0].removeprefix(OPTIONAL) == call[0] and _equal(reference[1], call[1])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b
