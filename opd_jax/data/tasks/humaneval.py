"""Programs that must pass tests (HumanEval, Chen et al. 2021): the completion runs in the sandbox, between its prompt and the hidden tests.

`task.path` is a file of lines (.jsonl or .jsonl.gz) with `prompt` (the head of a function), `entry_point` (its name), `test` (which
defines check(candidate)) and optionally `canonical_solution`. The prompt is given as it is, for a model to continue.

The feedback says what a run of the program says: type and message of the exception and, if the program's own code raised it, that line.
The tests are not quoted; the message of an assertion is, since whoever wrote the tests meant it to be read.

Completion and tests share an interpreter, as in the original. To pass, the program must print a word that is drawn anew for each run and
enters the process only after the tests came to their end; the tests enter after the completion's own statements. So a completion that ends
early, or looks for the word in variables, constants and frames, fails. Not prevented: one that reads the open file from which both come,
changes what the tests call, returns objects that equal everything, or looks up what the tests expect while they call it.
"""

import dataclasses
import json
import re
import secrets

from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.tasks.lines import FileTask, Line, hold_out
from opd_jax.data.tasks.lines import read as read_lines
from opd_jax.environments import sandbox
from opd_jax.types import UserError

# Where a continuation leaves the function that it was to complete (the stop sequences of the paper, and a fence that a chat model closes).
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n@", "\n```")
LIMITS = sandbox.Limits(cpu_seconds=5, wall_seconds=60.0)
_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL | re.IGNORECASE)
_FRAME = re.compile(r'^  File "<(program|then \d+)>", line (\d+)', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class HumanEval(FileTask):
    name = "humaneval"
    parallel = True  # each program runs in a process of its own

    def verify(self, example: Example, text: str) -> Verdict:
        """All tests pass within the limits, and the program comes to their end."""
        problem = json.loads(example.answer)
        program = program_of(example.prompt, text, problem["entry_point"])
        done = secrets.token_hex(16)
        tests = f"{problem['test']}\n\ncheck({problem['entry_point']})\n"
        result = sandbox.run(program, then=(tests, f"print({done!r})"), limits=LIMITS)
        if result.status == "ok" and result.stdout.endswith(done + "\n"):
            return Verdict(1.0)
        return Verdict(0.0, _feedback(result, program))


def program_of(prompt: str, text: str, entry_point: str) -> str:
    """The program of a completion: a fenced block, or a whole function, or a continuation of the prompt up to a stop sequence."""
    defines = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    blocks = list(_FENCE.finditer(text))
    closed = [match[1] for match in blocks if match[2]]  # a fence that stands alone may be the end of a continuation
    block = next((match[1] for match in blocks if defines.search(match[1])), closed[0] if closed else None)
    whole = block if block is not None else text.strip("\n")
    if defines.search(whole):
        head = defines.search(prompt)
        return prompt[: head.start() if head else 0] + whole  # imports and helpers above the function
    continued = prompt + (text if block is None else block)
    stops = [continued.find(stop, len(prompt)) for stop in STOPS] if block is None else []
    return continued[: min((stop for stop in stops if stop >= 0), default=len(continued))]


def _feedback(result: sandbox.Result, program: str) -> str:
    if result.status == "timeout":
        return f"the program takes more than {LIMITS.cpu_seconds} seconds"
    if result.status == "output":
        return "the program prints too much"
    if result.status == "ok":
        return "the program ends before its tests do"
    if "Traceback" not in result.stderr and "Error" not in result.stderr:
        return f"the program ends with status {result.exit_code}"
    lines, message = program.split("\n"), result.stderr.strip().split("\n")[-1][:300]
    frames = _FRAME.findall(result.stderr)
    if frames and frames[-1][0] == "program" and (number := int(frames[-1][1])) <= len(lines):
        return f"{message} (in line {number}: {lines[number - 1].strip()[:200]})"
    return f"a test fails: {message}"


def read(path: str, *, train_size: int, eval_size: int) -> HumanEval:
    """Reads a file; the last lines are held out, see lines.hold_out. Raises UserError, also where no sandbox can be had."""
    lines, digest = read_lines(path, task="humaneval", holds="`prompt`, `entry_point` and `test`")
    examples = [_example(line, index) for index, line in enumerate(lines)]
    try:
        sandbox.active_layers()
    except sandbox.SandboxError as error:
        raise UserError(f"task.name = 'humaneval': {error}; run it on Linux or macOS") from None
    return HumanEval(*hold_out(path, examples, train_size=train_size, eval_size=eval_size), digest)


def _example(line: Line, index: int) -> Example:
    prompt, entry_point, test = (line.required(name) for name in ("prompt", "entry_point", "test"))
    if not entry_point.isidentifier():
        raise UserError(f"{line.where}: `entry_point` = {entry_point[:40]!r} must be the name of a function")
    return Example(index, prompt, solution=line.text("canonical_solution"), answer=json.dumps({"entry_point": entry_point, "test": test}))
