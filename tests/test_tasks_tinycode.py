"""tinycode: expressions are run against visible and hidden tests; what is hidden never comes out, whatever the program does."""

import dataclasses
import json
import re

import pytest

from opd_jax.data import tasks
from opd_jax.data.tasks import Example, Verdict, tinycode
from opd_jax.environments import sandbox
from opd_jax.types import UserError

HIDDEN = Verdict(0.0, "wrong on a hidden test")
# What each step does, written another way.
BY_HAND = {
    "inc": lambda x: -~x,
    "dec": lambda x: ~-x,
    "double": lambda x: x + x,
    "triple": lambda x: x + x + x,
    "neg": lambda x: 0 - x,
    "half": lambda x: x >> 1,
    "square": lambda x: x * x,
}
# "double,inc", with hidden numbers that cannot be taken for anything else.
ANSWER = {"visible": [[2, 5], [3, 7], [7, 15]], "hidden": [[98765431, 197530863], [-98765432, -197530863]]}
ASKED = Example(0, "f(x):double,inc=", "2*x+1", json.dumps(ANSWER))
MARK = "9876543|1975308"


def make(**changes):
    return tasks.make("tinycode", **({"path": "", "level": 3, "train_size": 0, "eval_size": 400, "seed": 0} | changes))


@pytest.fixture(scope="module")
def judge():
    task = make()
    return lambda text, asked=ASKED: task.verify(asked, text)


@pytest.mark.parametrize("level", [2, 3, 5])
def test_solutions_do_the_steps_and_tests_say_so(level):
    task, prompts, counts = make(level=level), {}, set()
    for split in ("train", "eval"):
        found = [task.examples(split)[i] for i in range(200)]
        prompts[split] = {asked.prompt for asked in found}
        for asked in found:
            steps = re.fullmatch(r"f\(x\):([a-z,]+)=", asked.prompt)[1].split(",")
            counts.add(len(steps))
            for x, y in sum(json.loads(asked.answer).values(), [[x, None] for x in range(-9, 10)]):
                expected = x
                for step in steps:
                    expected = BY_HAND[step](expected)
                assert eval(asked.solution, {"x": x}) == expected and y in (None, expected)
    assert counts == set(range(2, level + 1))
    assert not prompts["train"] & prompts["eval"] and min(map(len, prompts.values())) > 3


def test_golden_examples():
    found = [make().examples(split)[1] for split in ("train", "eval")]
    assert [(asked.prompt, asked.solution) for asked in found] == [
        ("f(x):square,square,triple=", "3*((x**2)**2)"),
        ("f(x):half,half,dec=", "(x//2)//2-1"),
    ]


def test_tests_belong_to_the_prompt_and_hidden_inputs_stand_apart():
    task, seen = make(level=2), {}
    for asked in (task.examples("train")[i] for i in range(200)):
        assert seen.setdefault(asked.prompt, asked) == dataclasses.replace(asked, id=seen[asked.prompt].id)
        visible, hidden = (json.loads(asked.answer)[name] for name in ("visible", "hidden"))
        assert len({x for x, _ in visible}) == 3 and all(0 <= x < 10 for x, _ in visible)
        assert len({abs(x) for x, _ in hidden}) == 5 and all(100 <= abs(x) < 1000 for x, _ in hidden)
        assert len({x > 0 for x, _ in hidden}) == 2
        assert not {abs(x) for x, _ in hidden} & {abs(y) for _, y in visible}
    again = make(level=2, train_size=9).examples("train")
    assert [again[i] for i in range(9)] == [task.examples("train")[i] for i in range(9)]
    assert any(make(level=2, seed=1).examples("train")[i].prompt != again[i].prompt for i in range(9))


@pytest.mark.parametrize("text", ["2*x+1", " (x+x)+1\n", "x-~x", "(lambda y: y + x)(x + 1)", "sum(1 for _ in range(5)) + x + x - 4"])
def test_right_programs(judge, text):
    assert judge(text) == Verdict(1.0)


WRONG = {
    "": Verdict(0.0, "SyntaxError: invalid syntax", well_formed=False),
    "2*(x+1": Verdict(0.0, "SyntaxError: '(' was never closed", well_formed=False),
    "y = 2*x+1": Verdict(0.0, "SyntaxError: invalid syntax", well_formed=False),
    "2*x": Verdict(0.0, "f(2) is 4, it should be 5"),
    "x+3": Verdict(0.0, "f(3) is 6, it should be 7"),
    "1/(x-3)": Verdict(0.0, "f(2) is -1.0, it should be 5"),
    "[5][x-2]": Verdict(0.0, "f(3) raises IndexError: list index out of range, it should be 7"),
    "float(2*x+1)": Verdict(0.0, "f(2) is 5.0, it should be 5"),
    "str(2*x+1)": Verdict(0.0, "f(2) is '5', it should be 5"),
    "2*y+1": Verdict(0.0, "f(2) raises NameError: name 'y' is not defined, it should be 5"),
    "type('Any', (), {'__eq__': lambda a, b: True})()": None,
    "__import__('os')._exit(0)": Verdict(0.0, "the program ends before its tests do"),
    "[print('[1]'), __import__('os')._exit(0)]": Verdict(0.0, "the program ends before its tests do"),
    "print('x' * 10**6)": Verdict(0.0, "the program prints too much"),
    "'x' * 10**5": None,
    "x.bit_length('a' * 1000)": None,
    "\x00": None,
    "(" * 300: None,
    "2*x+1 if x < 10 else 0": HIDDEN,
    "2*x+1 if x < 10 else 1/0": HIDDEN,
    "2*x+1 if x < 10 else int('a%d' % x)": HIDDEN,
    "2*x+1 if x < 10 else __import__('os')._exit(0)": HIDDEN,
    "2*abs(x)+1": HIDDEN,
    "(2*x+1) % 100000": HIDDEN,
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_programs(judge, text):
    verdict = judge(text)
    assert verdict.reward == 0.0 and 0 < len(verdict.feedback) <= 250 and not re.search(MARK, verdict.feedback)
    if WRONG[text] is not None:
        assert verdict == WRONG[text]


# Looks where the tests could be, in open files, variables, constants and frames, and says all that it finds in an error.
LOOK = r"""
import gc, os, re, sys
found, frame = [], sys._getframe()
for descriptor in range(64):
    for read in (lambda d: os.pread(d, 10**6, 0), lambda d: os.read(d, 10**6) if d > 2 else b""):
        try:
            found.append(read(descriptor).decode("utf-8", "replace"))
        except OSError:
            pass
while frame:
    found += [repr(frame.f_code.co_consts), repr(frame.f_locals), repr(list(frame.f_globals.values()))]
    frame = frame.f_back
found += [repr(thing) for thing in gc.get_objects() if type(thing) in (list, tuple) and len(thing) < 50]
raise ValueError(", ".join(re.findall(r"-?(?:98765|19753)\d{3,4}", " ".join(found))) + ".")
"""
REFUSE = "print('\\n' + '{\"refused\": \"%d\"}' % x, flush=True)"
FORGE = "print('\\n' + '{\"results\": [\"is %d\"]}' % x, flush=True)"
ATTACKS = {
    "looks at once": f"exec({LOOK!r})",
    "looks on hidden inputs": f"2*x+1 if x < 10 else exec({LOOK!r})",
    "says the hidden input as a refusal": f"2*x+1 if x < 10 else [{REFUSE}, __import__('os')._exit(0)]",
    "says the hidden input as a result": f"2*x+1 if x < 10 else [{FORGE}, __import__('os')._exit(0)]",
    "crashes with the hidden input": "2*x+1 if x < 10 else __import__('os')._exit(x % 256)",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_programs_that_want_to_carry_the_hidden_tests_out(judge, name):
    verdict = judge(ATTACKS[name])
    assert verdict == (HIDDEN if name != "looks at once" else Verdict(0.0, "f(2) raises ValueError: ., it should be 5"))


def test_feedback_does_not_depend_on_hidden_tests(judge):
    """Whatever is said of a program that fails is said with other hidden tests too, also where those are of another function."""
    other = dataclasses.replace(ASKED, answer=json.dumps(ANSWER | {"hidden": [[11111111, 1], [22222222, 2], [33333333, 3]]}))
    for text in ("2*x", "(", "[5][x-2]", *(text for text, verdict in WRONG.items() if verdict == HIDDEN), *ATTACKS.values()):
        assert judge(text) == judge(text, other)


def test_prompts_hold_no_numbers():
    assert not any(re.search("[0-9]", make().examples(split)[i].prompt) for split in ("train", "eval") for i in range(200))


def test_hidden_inputs_are_in_no_process_whose_words_are_told_and_outputs_in_none(monkeypatch):
    programs, run = [], sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda program, **kwargs: programs.append(program) or run(program, **kwargs))
    task = make()
    assert task.verify(ASKED, "2*x").reward == 0.0 and len(programs) == 1
    assert task.verify(ASKED, "x+x+1").reward == 1.0 and len(programs) == 3
    told, again, untold = programs
    assert not re.search(MARK, told + again) and "98765431, -98765432" in untold and "197530863" not in untold
    assert "[2, 3, 7]" in again and "15" not in again


def test_endless_programs_stop(judge, monkeypatch):
    monkeypatch.setattr(tinycode, "LIMITS", dataclasses.replace(tinycode.LIMITS, cpu_seconds=1))
    assert judge("9**9**9**9") == Verdict(0.0, "the program takes more than 1 seconds")


def test_many_are_judged_in_order():
    texts = ["2*x+1" if i % 2 else "2*x" for i in range(6)]
    assert [verdict.reward for verdict in tasks.verify_many(make(), [ASKED] * 6, texts)] == [0.0, 1.0] * 3


def test_what_is_refused(monkeypatch):
    for level in (1, 6):
        with pytest.raises(UserError, match=f"task.level = {level} must be from 2 to 5 steps for task.name = 'tinycode'"):
            make(level=level)

    def none():
        raise sandbox.SandboxError("programs can be run on Linux and macOS only")

    monkeypatch.setattr(sandbox, "active_layers", none)
    with pytest.raises(UserError, match="task.name = 'tinycode': programs can be run on Linux and macOS only; run it on Linux or macOS"):
        make()
