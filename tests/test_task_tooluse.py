"""Tool calls: read from completions, compared as JSON values, in any order."""

import json

import pytest

from opd_jax.data.tasks import tooluse as lib
from opd_jax.types import UserError

CALLS = [
    {"Action": "search", "Action_Input": '{"query": "cats", "page": 1, "tags": ["a", "b"]}'},
    {"Action": "[Optional]log", "Action_Input": {"level": 2, "on": True}},
]
SEARCH = 'Action: search\nAction Input: {"page": 1.0, "tags": ["a", "b"],\n "query": "cats"}'
LOG = 'Action: log\nAction Input: {"level": 2, "on": true}'


@pytest.fixture
def task(tmp_path):
    return read(tmp_path, [{"prompt": "Find cats.", "answer": json.dumps(CALLS)}, {"prompt": "Again.", "answer": CALLS[:1]}])


def read(tmp_path, rows):
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return lib.read(str(tmp_path / "d.jsonl"), train_size=0, eval_size=1)


@pytest.mark.parametrize(
    "text",
    [
        f"Thought: search first.\n{SEARCH}\n\nThought: then log.\n{LOG}\n",
        f"{LOG}\n{SEARCH}",  # in any order
        SEARCH,  # an optional call may be left out
        f"  Action:  search  \n\n  Action Input: {SEARCH.split('Input: ')[1]} and some words",
    ],
)
def test_the_right_calls_are_accepted(task, text):
    (example,) = task.examples("train")
    assert task.verify(example, text).reward == 1


@pytest.mark.parametrize(
    "text, feedback",
    [
        ("I would search.", "no line begins with `Action:`"),
        ("Action: search", "no `Action Input:` follows `Action: search`"),
        ("Action: search\nAction Input: {page: 1}", "the input of search is not JSON"),
        ("Action: search\nAction Input: [1]", "the input of search is not a JSON object"),
        (LOG, "search is not called"),
        (SEARCH.replace("cats", "dogs"), 'call search with {"page": 1.0, "tags": ["a", "b"], "query": "dogs"}: its arguments should be '),
        (SEARCH.replace("1.0", "true"), "call search with"),
        (SEARCH.replace('"a", "b"', '"b", "a"'), "call search with"),
        (f"{SEARCH}\n{SEARCH}", "it should not be called"),
        (f"{SEARCH}\nAction: delete\nAction Input: {{}}", "call delete with {}: it should not be called"),
        (SEARCH.replace("search", "Search"), "call Search with"),
        ("Action: search\nAction Input: " + "[" * 100_000, "the input of search is not JSON"),
    ],
)
def test_other_calls_are_not_and_the_feedback_says_why(task, text, feedback):
    verdict = task.verify(task.examples("train")[0], text)
    assert verdict.reward == 0 and feedback in verdict.feedback


def test_a_solution_to_learn_from_is_made_of_the_calls(task):
    for split in ("train", "eval"):
        (example,) = task.examples(split)
        assert task.verify(example, example.solution).reward == 1 and "[Optional]" not in example.solution


@pytest.mark.parametrize(
    "answer, message",
    [
        (None, r"line 1: `answer` has no calls; write \[\{\"Action\""),
        ([], "`answer` has no calls"),
        ("no json", "`answer` cannot be read"),
        ([{"Action": "a"}], "`answer` cannot be read .*Action_Input"),
        ([{"Action": 1, "Action_Input": {}}], "a name is not text"),
        ([{"Action": "a", "Action_Input": "[]"}], "its input is not an object"),
        (["a"], "`answer` cannot be read"),
    ],
)
def test_answers_that_are_no_calls_are_named(answer, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path, [{"prompt": "a", "answer": answer}])


def perturbed(calls):
    """Another name; another value of an argument; an argument less; a call less."""
    name, arguments = calls[0]
    values = json.loads(arguments)
    yield [(name + "s", arguments), *calls[1:]]
    yield [(name, json.dumps(values | {"one more": 1})), *calls[1:]]
    if values:
        key = next(iter(values))
        yield [(name, json.dumps(values | {key: "something else"})), *calls[1:]]
        yield [(name, json.dumps({k: v for k, v in values.items() if k != key})), *calls[1:]]
    if len(calls) > 1:
        yield [call for call in calls if call is not calls[0]]


@pytest.mark.shared
def test_every_gold_answer_verifies_and_perturbed_ones_do_not(shared_data):
    task = lib.read(str(shared_data / "tools" / "tooluse_test.jsonl"), train_size=0, eval_size=0)
    examples = task.examples("train")
    assert len(examples) == 68 and all(task.verify(e, e.solution).reward == 1 for e in examples)
    wrong = 0
    for example in examples:
        for calls in perturbed(json.loads(example.answer)):
            text = "\n".join(f"Action: {name.removeprefix(lib.OPTIONAL)}\nAction Input: {arguments}" for name, arguments in calls)
            assert task.verify(example, text).reward == 0, text
            wrong += 1
    assert wrong > 3 * len(examples)
