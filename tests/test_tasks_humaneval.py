"""humaneval: programs are cut out of completions and run against hidden tests in the sandbox; what fails says why."""

import ast
import gzip
import json

import pytest

from opd_jax.data import tasks
from opd_jax.data.tasks import humaneval
from opd_jax.types import UserError

PROMPT = '''import math


def helper(x):
    return x + 1


def double(x: int) -> int:
    """Twice x.
    >>> double(2)
    4
    """
'''
TEST = """def check(candidate):
    assert candidate(2) == 4, 'two'
    assert candidate(-3) == -6
    secret_marker = 1
    assert candidate(0) == 0
"""
PROBLEM = {
    "task_id": "x/0",
    "prompt": PROMPT,
    "entry_point": "double",
    "test": TEST,
    "canonical_solution": "    return helper(x) * 2 - 2\n",
}


def write(path, problems=(PROBLEM,)):
    content = "".join(json.dumps(problem) + "\n" for problem in problems).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def read(path):
    return humaneval.read(path, train_size=0, eval_size=0)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    task = read(write(tmp_path_factory.mktemp("data") / "problems.jsonl"))
    return lambda text: task.verify(task.examples("train")[0], text)


RIGHT = {
    "continuation": "    return 2 * x\n",
    "then another function": "    return 2 * x\n\ndef other():\n    broken(\n",
    "then prose": "    return 2 * x\n\n# Explanation\nthis doubles x",
    "then a test": "    return 2 * x\n\nprint(double(1)) or (",
    "then main": "    return 2 * x\n\nif __name__ == '__main__':\n    0/0",
    "a fence that closes": "    return 2 * x\n```\nThat is all.",
    "whole function": "def double(x):\n    return 2 * x\n",
    "whole, with a helper after it": "def double(x):\n    return twice(x)\n\ndef twice(x):\n    return 2 * x\n",
    "fenced": "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.",
    "fenced, helper from the prompt": "```python\ndef double(x):\n    return helper(x) + math.floor(x) - 1\n```",
    "fenced body": "```python\n    return 2 * x\n```",
    "fenced, second": "```python\nprint(1)\n```\nor\n```py\ndef double(x):\n    return 2 * x\n```",
    "fence left open": "```\ndef double(x):\n    return 2 * x",
}
WRONG = {
    "none": ("    return None\n", "a test fails: AssertionError: two"),
    "off by one": ("    return 2 * x + (x < 0)\n", "a test fails: AssertionError"),
    "raises": ("    raise ValueError('bad')\n", "ValueError: bad (in line 13: raise ValueError('bad'))"),
    "name": ("    return y\n", "NameError: name 'y' is not defined (in line 13: return y)"),
    "syntax": ("    return (\n", "SyntaxError: "),
    "empty": ("", "a test fails: AssertionError: two"),
    "prose": ("I cannot do that.", "SyntaxError: "),
    "ends before the tests": ("    return 2 * x\n```\n", None),
    "exits": ("    import os\n    os._exit(0)\n", "the program ends before its tests do"),
    "exits at once": ("```python\nimport sys\ndef double(x): return 0\nsys.exit(0)\n```", "the program ends before its tests do"),
    "exits at once, hard": ("```python\nimport os\ndef double(x): return 0\nos._exit(0)\n```", "the program ends before its tests do"),
    "exits with status": ("    import os\n    os._exit(7)\n", "the program ends with status 7"),
    "prints too much": ("    while True: print('x' * 10**5)\n", "the program prints too much"),
    "crash": ("    import ctypes\n    ctypes.string_at(0)\n", "the program ends with status 139"),
    "fork": ("    import os\n    os.fork()\n", "PermissionError"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs(judge, name):
    assert judge(RIGHT[name]) == tasks.Verdict(1.0)


@pytest.mark.parametrize("name", [name for name, (_, feedback) in WRONG.items() if feedback])
def test_wrong_programs(judge, name):
    text, feedback = WRONG[name]
    verdict = judge(text)
    assert verdict.reward == 0.0 and verdict.feedback.startswith(feedback)


# Every text that frames, constants, variables and containers hold: where a program that wants to pass would look.
LOOK = """import gc, os, re, sys

def texts():
    frame, found = sys._getframe(), []
    while frame:
        found += [*frame.f_code.co_consts, *frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for thing in gc.get_objects():
        found += gc.get_referents(thing)
    return [text for text in found if isinstance(text, str)]

def forge():
    for text in texts():
        for mark in re.findall(r"\\b[0-9a-f]{32}\\b", text):
            print(mark, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("attack", ["def double(x): return 0\nforge()", "def double(x): forge()"])
def test_what_shows_that_the_tests_passed_cannot_be_found_before(judge, attack):
    verdict = judge(f"```python\n{LOOK}\n{attack}\n```")
    assert verdict == tasks.Verdict(0.0, "the program ends before its tests do")


def test_the_tests_are_out_of_sight_while_the_completion_defines(tmp_path):
    """Else what they expect could be read there. It can while they run."""
    task = read(write(tmp_path / "p.jsonl", [PROBLEM | {"test": TEST.replace("'two'", "'words of the test'")}]))
    look = "if any(' '.join(['words', 'of the', 'test']) in text for text in texts()): raise ValueError('seen')\n"
    define = "def double(x):\n    {}    return 2 * x\n"
    programs = {
        name: f"```python\n{LOOK}\n{text}```" for name, text in (("at once", look + define.format("")), ("late", define.format(look)))
    }
    verdicts = {name: task.verify(task.examples("train")[0], text) for name, text in programs.items()}
    assert verdicts["at once"] == tasks.Verdict(1.0)
    assert verdicts["late"].feedback.startswith("ValueError: seen")


def test_an_error_within_the_tests_is_said_as_theirs(tmp_path):
    task = read(write(tmp_path / "p.jsonl", [PROBLEM | {"test": "\n" * 3 + "def check(candidate):\n    candidate(unknown)\n"}]))
    verdict = task.verify(task.examples("train")[0], "    return 2 * x\n")
    assert verdict.feedback == "a test fails: NameError: name 'unknown' is not defined"


def test_hidden_tests_are_not_quoted(judge):
    for text, _ in WRONG.values():
        feedback = judge(text).feedback
        assert "candidate" not in feedback and "secret_marker" not in feedback


def test_endless_programs_stop(judge, monkeypatch):
    monkeypatch.setattr(humaneval, "LIMITS", humaneval.sandbox.Limits(cpu_seconds=1))
    assert judge("    while True: pass\n").feedback == "the program takes more than 1 seconds"


def test_files_plain_and_packed(tmp_path):
    plain, packed = read(write(tmp_path / "p.jsonl")), read(write(tmp_path / "p.jsonl.gz"))
    assert plain.examples("train") == packed.examples("train") and plain.digest == packed.digest
    example = plain.examples("train")[0]
    assert example.prompt == PROMPT and plain.verify(example, example.solution).reward == 1.0


def test_files_that_cannot_be_used(tmp_path, monkeypatch):
    for field in ("prompt", "entry_point", "test"):
        with pytest.raises(UserError, match=f"line 2: has no `{field}` text"):
            read(write(tmp_path / "p.jsonl", [PROBLEM, {k: v for k, v in PROBLEM.items() if k != field}]))
    with pytest.raises(UserError, match="line 1: `entry_point` = 'a b' must be the name of a function"):
        read(write(tmp_path / "p.jsonl", [PROBLEM | {"entry_point": "a b"}]))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-10])
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}\n")
    for name in ("cut", "plain"):
        with pytest.raises(UserError, match=f"{name}.jsonl.gz': cannot be unpacked"):
            read(str(tmp_path / f"{name}.jsonl.gz"))
    with pytest.raises(UserError, match="cannot be read .No such file"):
        read(str(tmp_path / "none.jsonl.gz"))
    monkeypatch.setattr("opd_jax.data.tasks.lines.MAX_UNPACKED_BYTES", 10**6)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 10**7))
    with pytest.raises(UserError, match="cannot be unpacked .it has more than 1000000 bytes"):
        read(str(tmp_path / "bomb.jsonl.gz"))


class OffByOne(ast.NodeTransformer):
    """Adds one to the last integer that a program spells."""

    def __init__(self, tree):
        integers = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is int]
        self.target = max(integers, key=lambda node: (node.lineno, node.col_offset), default=None)

    def visit_Constant(self, node):  # noqa: N802
        return ast.Constant(node.value + 1) if node is self.target else node


class Wrapped(ast.NodeTransformer):
    """Returns a list with the value in place of the value."""

    def visit_Return(self, node):  # noqa: N802
        return ast.Return(ast.List([node.value or ast.Constant(None)], ast.Load()))


def mutations(example):
    """(whether it must fail, text): nothing returned, an exception, a syntax error, a list; one integer more, which may change nothing."""
    tree = ast.parse(example.prompt + example.solution)
    wrapped, more = Wrapped().visit(ast.parse(example.prompt + example.solution)), OffByOne(tree)
    yield True, "    return None\n"
    yield True, "    raise RuntimeError('mutant')\n"
    yield True, example.solution.rstrip() + " ((\n"
    yield True, f"```python\n{ast.unparse(ast.fix_missing_locations(wrapped))}\n```"
    if more.target is not None:
        yield False, f"```python\n{ast.unparse(ast.fix_missing_locations(more.visit(tree)))}\n```"


@pytest.mark.shared
@pytest.mark.slow
def test_the_canonical_solutions_pass_and_mutated_ones_fail(shared_data):
    task = read(str(shared_data / "code" / "HumanEval.jsonl.gz"))
    examples = task.examples("train")
    assert len(examples) == 164
    verdicts = tasks.verify_many(task, examples, [example.solution for example in examples])
    assert [verdict.feedback for verdict in verdicts if verdict.reward < 1] == []
    mutants = [(example, must_fail, text) for example in examples for must_fail, text in mutations(example)]
    verdicts = tasks.verify_many(task, [example for example, _, _ in mutants], [text for _, _, text in mutants])
    failed = {True: [], False: []}
    for (_, must_fail, _), verdict in zip(mutants, verdicts, strict=True):
        failed[must_fail].append(verdict.reward == 0.0)
    counts = ", ".join(f"{sum(values)} of {len(values)}" for values in failed.values())
    print(f"humaneval: 164 of 164 canonical solutions pass; mutants that fail: {counts} with one integer changed")
    assert all(failed[True]) and sum(failed[False]) > 0.8 * len(failed[False])
