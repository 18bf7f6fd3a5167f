"""skills and countdown: solutions by other means, splits without a common prompt, verdicts that accept all that is right."""

import ast
import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opd_jax.data import tasks
from opd_jax.data.tasks import Verdict, countdown
from opd_jax.data.tasks.skills import FACTS, NAMES
from opd_jax.types import UserError

ALL = ",".join(NAMES)


def make(name="skills", **changes):
    return tasks.make(name, **({"path": "", "level": 3, "train_size": 0, "eval_size": 600, "seed": 0} | changes))


def running(digits):
    """s_i = sum over j <= i of 3^(i-j) d_j, mod 10: the recurrence solved."""
    return "".join(str(sum(3 ** (i - j) * int(digits[j]) for j in range(i + 1)) % 10) for i in range(len(digits)))


ORACLES = {
    "c": running,
    "r": lambda text: "".join(reversed(text)),
    "s": lambda text: "".join(digit * text.count(digit) for digit in "0123456789"),
    "a": lambda text: str(sum(map(int, text.split("+")))).zfill(len(text) // 2 + 1)[::-1],
    "h": lambda text: text.translate(str.maketrans("0123456789", "1234567890")),
}


@pytest.mark.parametrize("level", [2, 3, 7])
def test_skills_by_other_means(level):
    task = make(skills=ALL, level=level)
    for split in ("train", "eval"):
        for index in range(120):
            asked = task.examples(split)[index]
            assert asked.tag == NAMES[index % 6] and asked.id == index and asked.solution == asked.answer
            assert len(asked.prompt.encode()) <= 6 + 2 * level
            assert task.verify(asked, asked.solution) == Verdict(1.0)
            if asked.tag != "facts":
                mark, text = re.fullmatch(r"([a-z])([0-9]+|[0-9]+\+[0-9]+)=", asked.prompt).groups()
                assert {len(part) for part in text.split("+")} == {level}
                assert asked.solution == ORACLES[mark](text)


def test_golden_skills():
    task = make(skills=ALL)
    found = [(e.prompt, e.solution) for split in ("train", "eval") for e in (task.examples(split)[i] for i in (3, 5))]
    assert found == [("a539+266=", "5080"), ("f of nud=", "15"), ("a441+623=", "4601"), ("f on nud=", "15")]


def test_marks_name_skills():
    prompts = {e.tag: e.prompt[0] for e in (make(skills=ALL).examples("train")[i] for i in range(6))}
    assert len(set(prompts.values())) == 6
    alone = [make(skills=name).examples("eval")[i] for name in NAMES for i in range(4)]
    assert all(e.prompt[0] == prompts[e.tag] for e in alone) and [e.tag for e in alone] == [name for name in NAMES for _ in range(4)]


@pytest.mark.parametrize("level", [2, 3])
def test_an_input_that_is_held_out_is_so_for_all_skills(level):
    task = make(skills="chain, reverse,sort,shift,add", level=level)
    inputs = {split: {task.examples(split)[i].prompt[1:] for i in range(600)} for split in ("train", "eval")}
    assert min(map(len, inputs.values())) > 20 and not inputs["train"] & inputs["eval"]


def test_facts_are_asked_in_both_splits_in_other_words():
    def table(split, **changes):
        """{wording: {name: value}} of examples that go eight times through the facts, in order."""
        found = [make(skills="sort,facts", **changes).examples(split)[2 * i + 1] for i in range(8 * FACTS)]
        assert [e.prompt for e in found[: 4 * FACTS]] == [e.prompt for e in found[4 * FACTS :]]
        tables = {}
        for asked in found:
            wording, name = re.fullmatch("f ([a-z]+) ([a-z]+)=", asked.prompt).groups()
            tables.setdefault(wording, {})[name] = asked.solution
        return tables

    train, held_out = table("train"), table("eval")
    (known,) = held_out.values()
    assert len(train) == 4 and not train.keys() & held_out.keys() and all(facts == known for facts in train.values())
    assert len(known) == FACTS and {len(name) for name in known} == {3} and all(re.fullmatch("[0-9]{2}", value) for value in known.values())
    assert len(set(known.values())) > FACTS // 2
    assert table("eval", seed=1) != held_out and table("train", train_size=600) == train
    assert all(len(facts) == FACTS for facts in table("train", level=2).values())


def test_examples_are_a_function_of_seed_split_and_index():
    for name in ("skills", "countdown"):
        few, many = make(name, train_size=50).examples("train"), make(name).examples("train")
        assert len(few) == 50 and list(few) == [many[i] for i in reversed(range(50))][::-1]
        assert [e.prompt for e in few] != [make(name, seed=1).examples("train")[i].prompt for i in range(50)]
        assert [e.prompt for e in few] != [make(name).examples("eval")[i].prompt for i in range(50)]


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("4-1", Verdict(0.0, "character 2 is '-', it should be a digit", well_formed=False)),
        ("431", Verdict(0.0, "digit 2 is '3', it should be '1'")),
        ("41", Verdict(0.0, "2 digits were given, there should be 3")),
        ("4133", Verdict(0.0, "4 digits were given, there should be 3")),
    ],
)
def test_feedback_of_skills(text, verdict):
    assert make().verify(tasks.Example(1, "r314=", "413", "413", "reverse"), text) == verdict


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"level": 1}, "task.level = 1 must be from 2 to 20 characters for task.name = 'skills'"),
        ({"level": 21}, "task.level = 21 must be from 2 to 20"),
        ({"skills": "chain,revers"}, "task.skills = 'revers' is not known; valid: chain, reverse, .* facts; did you mean reverse"),
        ({"skills": ""}, "task.skills = '' is not known"),
        ({"skills": "sort,add,sort"}, "task.skills = 'sort,add,sort' has sort twice; name each skill once"),
        ({"name": "countdown", "level": 1}, "task.level = 1 must be from 2 to 6 numbers for task.name = 'countdown'"),
        ({"name": "countdown", "level": 7}, "task.level = 7 must be from 2 to 6"),
    ],
)
def test_what_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        make(**changes)


def by_python(text):
    """(numbers in order, value) by Python's own parser; None where it finds anything else than + - * of whole numbers."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError):
        return None
    numbers = []

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int and ast.get_source_segment(text.strip(), node).isdigit():
            if ast.get_source_segment(text.strip(), node) != str(node.value):
                raise TypeError  # 00, which Python reads as 0
            numbers.append(node.value)
            return node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            left, right = value(node.left), value(node.right)
            return {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]
        raise TypeError

    try:
        found = value(tree)
    except TypeError:
        return None
    assert found == eval(text.strip())
    return numbers, found


expressions = st.recursive(
    st.integers(0, 12).map(str),
    lambda inner: st.builds("{}{}{}".format, inner, st.sampled_from(["+", "-", "*", " * "]), inner) | inner.map("({})".format),
    max_leaves=8,
)
spoilt = st.builds(lambda text, i, c: text[:i] + c + text[i + 1 :], expressions, st.integers(0, 9), st.sampled_from("1)(+ *"))


@settings(max_examples=300)
@given(expressions | spoilt | st.text("37 +-*()", max_size=9))
@example("3+")
@example("1-2-3")
@example("1-(2-3)*4")
@example("2)(3")
@example("(1)+(2")
@example("1)+(2)")
@example("3(4)")
@example("-3+5")
@example("03+5")
@example("3**2")
@example("1 2+3")
@example("()")
def test_expressions_are_read_as_python_reads_them(text):
    assert countdown.evaluate(text) == by_python(text)


@pytest.mark.parametrize("text", ["(" * 10**6, "1" * 10**6, "(" * 99 + "1" + ")" * 98, "1;2", "x", "1/1", "٣+1", "1\n+2", "1_0", ""])
def test_other_texts_are_no_expressions(text):
    assert countdown.evaluate(text) is None


def test_deep_expressions_are_read():
    assert countdown.evaluate("(" * 99 + "1" + ")" * 99) == ([1], 1)


@pytest.mark.parametrize("level", [2, 3, 4, 6])
def test_countdown_problems_have_their_solution(level):
    task, prompts = make("countdown", level=level), {}
    for split in ("train", "eval"):
        found = [task.examples(split)[i] for i in range(60)]
        prompts[split] = {e.prompt for e in found}
        for asked in found:
            numbers, target = re.fullmatch(r"([1-9 ]+)=([0-9]{1,2}):", asked.prompt).groups()
            assert len(numbers.split()) == level and len(asked.prompt) <= 15
            assert re.sub(r"[-+*]", " ", asked.solution) == numbers and eval(asked.solution) == int(target)
            assert task.verify(asked, asked.solution) == Verdict(1.0)
            if level == 3:
                orders = (
                    "".join(itertools.chain(*zip(numbers.split(), (*signs, ""), strict=True)))
                    for signs in itertools.product("+-*", repeat=2)
                )
                assert asked.solution == next(text for text in orders if eval(text) == int(target))
    assert not prompts["train"] & prompts["eval"] and min(map(len, prompts.values())) > 10


@pytest.mark.parametrize("problem", ["3 5 7=22", "2 2 3=12", "4 1 5=0", "7 8 9=71"])
def test_countdown_takes_what_is_right_and_nothing_else(problem):
    """All orders, operators and parentheses of three numbers."""
    task, asked = make("countdown"), tasks.Example(0, problem + ":", answer=problem)
    numbers, target = problem.split("=")[0].split(), int(problem.split("=")[1])
    rewards = []
    for a, b, c in itertools.permutations(numbers):
        for p, q in itertools.product("+-*", repeat=2):
            for text in (f"{a}{p}{b}{q}{c}", f"({a}{p}{b}){q}{c}", f"{a} {p} ({b}{q}{c})"):
                verdict = task.verify(asked, text)
                assert verdict == (
                    Verdict(1.0) if eval(text) == target else Verdict(0.0, f"its value is {eval(text)}, it should be {target}")
                )
                rewards.append(verdict.reward)
    assert 0 < sum(rewards) < len(rewards)


def test_feedback_of_countdown():
    task, asked = make("countdown"), tasks.Example(0, "3 5 7=22:", answer="3 5 7=22")
    assert task.verify(asked, "3*5+") == Verdict(0.0, "it is not an expression of numbers, + - * and parentheses", well_formed=False)
    assert task.verify(asked, "3*5+7*1") == Verdict(0.0, "it uses 3 5 7 1, it should use 3 5 7")
    assert task.verify(asked, "22").feedback == "it uses 22, it should use 3 5 7"
    assert task.verify(asked, "3+7*3-2") == Verdict(0.0, "it uses 3 7 3 2, it should use 3 5 7")
    assert task.verify(asked, "3*5+7+3-3").feedback == "it uses 3 5 7 3 3, it should use 3 5 7"  # of the right value
    assert len(task.verify(asked, "+".join("1" * 90)).feedback) <= 200
