"""Mathematics: what stands in the box, when two answers are the same, and answers that would take for ever."""

import json
import re
import time

import pytest

from opd_jax.data import tasks
from opd_jax.data.tasks import Example, equivalence
from opd_jax.data.tasks import math as lib
from opd_jax.types import UserError


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("math") / "data.jsonl"
    path.write_text('{"problem": "1+1?", "answer": 2}\n{"prompt": "2+2? Box it.", "answer": "4", "solution": "It is \\\\boxed{4}."}\n')
    return lib.read(str(path), train_size=0, eval_size=1)


def reward(task, answer, text):
    return task.verify(Example(0, "", answer=answer), text).reward


def test_problems_get_an_instruction_and_prompts_do_not(task):
    (train,), (held_out,) = task.examples("train"), task.examples("eval")
    assert train.prompt == "1+1?" + lib.INSTRUCTION and train.solution == "\\boxed{2}" and train.answer == "2"
    assert held_out.prompt == "2+2? Box it." and held_out.solution == "It is \\boxed{4}."
    assert task.verify(train, train.solution).reward == task.verify(held_out, held_out.solution).reward == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{1}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"so \boxed {x^{2}}.", "x^{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{3} and \boxed{4", "3"),  # the last one is cut off
        ("the answer is 3", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text, expected):
    assert lib.boxed(text) == expected


@pytest.mark.parametrize(
    "a, b",
    [
        (r"\frac{14}{3}", "14/3"),
        (r"\dfrac12", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        ("1,000", "1000"),
        (r"10{,}000", "10000.0"),
        (r"90^\circ", "90"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "(C)"),
        (r"3\sqrt{13}", r"\sqrt{117}"),
        (r"\{1,2,3\}", r"\{3,2,1\}"),
        (r"(-\infty, 2]", r"(-\infty,2]"),
        (r"x^2-1", "(x-1)(x+1)"),
        (r"\$5", "5"),
        ("52_8", "52_{8}"),
        ("52", "52_{8}"),
    ],
)
def test_equal_answers_in_other_words(task, a, b):
    assert reward(task, a, rf"\boxed{{{b}}}") == reward(task, b, rf"\boxed{{{a}}}") == 1


@pytest.mark.parametrize(
    "a, b",
    [
        ("5", "-5"),
        ("0.3333333", r"\frac{1}{3} + 1"),
        (".0000672", ".00006721"),
        ("52_8", "52_9"),
        ("(1, 2)", "(2, 1)"),
        (r"\text{Evelyn}", "Briana"),
        ("x^2", "x^3"),
        ("[0, 1)", "(0, 1)"),
        ("12", "1 2"[::-1]),
        ("7", "77"),
    ],
)
def test_other_answers_are_not_equal(task, a, b):
    assert reward(task, a, rf"\boxed{{{b}}}") == 0


def test_feedback_says_what_was_wrong(task):
    assert task.verify(Example(0, "", answer="3"), "I think 3").feedback == "there is no final answer in \\boxed{}"
    assert task.verify(Example(0, "", answer="3"), "\\boxed{4}").feedback == "the answer is '4', it should be '3'"
    assert "1001 characters" in task.verify(Example(0, "", answer="3"), f"\\boxed{{{'x' * 1001}}}").feedback


@pytest.mark.slow
@pytest.mark.parametrize("hostile", ["9^{9^{9^{9}}}", "10^{10^{10}}!", "(((((" * 150, r"\sqrt" * 150, "__import__('os').system('false')"])
def test_hostile_answers_end_and_the_next_one_is_judged(hostile):
    """Well within a minute each, a limit that a hang would break; nothing is evaluated as Python."""
    judge = equivalence.Judge(seconds=4.0)
    start = time.monotonic()
    assert not judge.equivalent("5", hostile)
    assert judge.equivalent("x^2-1", "(x-1)(x+1)")
    assert time.monotonic() - start < 60
    judge.close()


def test_a_judge_that_was_killed_starts_again():
    judge = equivalence.Judge()
    assert judge.equivalent("1/2", "0.5")
    judge._process.kill()
    judge._process.wait()
    assert judge.equivalent("1/2", "0.5")
    process = judge._process
    judge.close()
    assert process.poll() is not None


def test_lines_without_problem_or_answer_are_named(tmp_path):
    path = tmp_path / "d.jsonl"
    for line, message in (('{"answer": "1"}', "has no `problem`; valid: problem, prompt, question"), ('{"problem": "a"}', "no `answer`")):
        path.write_text(line)
        with pytest.raises(UserError, match=f"line 1: has{message.removeprefix('has')}" if message.startswith("has") else message):
            lib.read(str(path), train_size=0, eval_size=0)
    with pytest.raises(UserError, match="task.path = '' must name a file of lines with `problem` and `answer` for task.name = 'math'"):
        tasks.make("math", path="", level=2, metric="rouge", train_size=0, eval_size=0, seed=0)


def perturbed(answer):
    """One more in the last number, or a term more; a digit more."""
    numbers = list(re.finditer(r"\d+", answer))
    if numbers:
        last = numbers[-1]
        yield answer[: last.start()] + str(int(last.group()) + 1) + answer[last.end() :]
    yield answer + "1" if answer[-1].isdigit() else answer + " + 1"


# \sqrt21 is sqrt(2) times 1 in LaTeX; math-verify leaves units out.
ALSO_ACCEPTED = {r"11\sqrt21", r"864 \mbox{ inches}^3", r"15\mbox{ cm}^3"}


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name, count", [("math500", 500), ("aime24", 30), ("aime25", 30)])
def test_every_reference_verifies_and_perturbed_ones_do_not(name, count, shared_data, task):
    answers = [str(json.loads(line)["answer"]) for line in (shared_data / "math" / f"{name}.jsonl").read_text().splitlines()]
    assert len(answers) == count
    assert sum(reward(task, answer, rf"Thus \boxed{{{answer}}}.") for answer in answers) == count
    assert all(task.judge.equivalent(answer, answer) for answer in answers)  # also where the text alone would do
    wrong = [(answer, other) for answer in answers for other in perturbed(answer) if reward(task, answer, rf"\boxed{{{other}}}")]
    assert {other for _, other in wrong} <= ALSO_ACCEPTED
    whole = lib.read(str(shared_data / "math" / f"{name}.jsonl"), train_size=0, eval_size=10)
    assert len(whole.examples("train")) == count - 10 and len(whole.examples("eval")) == 10
