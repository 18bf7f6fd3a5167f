"""tooluse: calls are read from text, compared as JSON, in any order, each once."""

import json

import pytest

from opd_jax.data.tasks import Example, tooluse
from opd_jax.types import UserError

CALLS = [{"Action": "find", "Action_Input": '{"q": "a b", "n": 3}'}, {"Action": "show", "Action_Input": '{"ids": [1, 2]}'}]
OPTIONAL = [*CALLS, {"Action": "[Optional]close", "Action_Input": "{}"}]


def make(tmp_path, *answers):
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": "Use tools.", "answer": answer if isinstance(answer, str) else json.dumps(answer)} for answer in answers]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tooluse.read(str(path), train_size=0, eval_size=0)


def call(name, arguments):
    return f"Thought: I must.\nAction: {name}\nAction Input: {arguments}\n"


FIND, SHOW = call("find", '{"q": "a b", "n": 3}'), call("show", '{"ids": [1, 2]}')


@pytest.mark.parametrize(
    "text",
    [
        FIND + SHOW,
        SHOW + FIND,
        call("find", '{ "n":3.0,\n "q" : "a b" }') + SHOW,
        call("find", '```json\n{"q": "a b", "n": 3}\n```') + SHOW,
        "**Action:** find\n**Action Input:** " + '{"q": "a b", "n": 3} and so on\n' + SHOW,
        FIND.replace("Action Input", "Action_Input") + SHOW + "Observation: fine",
    ],
)
def test_the_same_calls(text, tmp_path):
    task = make(tmp_path, CALLS)
    assert task.verify(task.examples("train")[0], text).reward == 1.0


@pytest.mark.parametrize(
    "text, feedback",
    [
        ("", 'there is no line "Action: ..."'),
        ("I would call find.", 'there is no line "Action: ..."'),
        (FIND, "the call show"),
        (FIND + FIND, "the call show"),
        (FIND + SHOW + SHOW, 'the call show {"ids": [1, 2]} should not be there'),
        (FIND + SHOW + call("close", "{}"), "the call close {} should not be there"),
        (call("Find", '{"q": "a b", "n": 3}') + SHOW, "the call find"),
        (call("find", '{"q": "a b", "n": 4}') + SHOW, 'the input of find is {"n": 4, "q": "a b"}, it should be {"n": 3'),
        (call("find", '{"q": "a b", "n": "3"}') + SHOW, "the input of find is"),
        (call("find", '{"q": "a b", "n": true}') + SHOW, "the input of find is"),
        (call("find", '{"q": "a b"}') + SHOW, "the input of find is"),
        (FIND + call("show", '{"ids": [2, 1]}'), "the input of show is"),
        (FIND + call("show", '{"ids": [1, 2]'), "the input of show is not JSON"),
        (FIND + call("show", "[1, 2]"), "the input of show is a JSON list, it must be an object"),
        (FIND + call("show", '{"a":' * 10**5), "the input of show is not JSON"),
        (FIND + call("show", '{"a": ' + "1" * 10**5 + "}"), "the input of show is not JSON"),
        (FIND + "Action: show\n", "the lines from 'Action: show"),
        (FIND + "Action:\nAction Input: {}", "the lines from 'Action:"),
    ],
)
def test_other_calls(text, feedback, tmp_path):
    task = make(tmp_path, CALLS)
    verdict = task.verify(task.examples("train")[0], text)
    assert verdict.reward == 0.0 and verdict.feedback.startswith(feedback)
    assert verdict.well_formed == (" call " in feedback or "should be {" in feedback or feedback.endswith(" is"))


def test_an_optional_call_may_be_left_out(tmp_path):
    task = make(tmp_path, OPTIONAL, [{"Action": "[Optional]a", "Action_Input": "{}"}, {"Action": "a", "Action_Input": "{}"}])
    example, twice = task.examples("train")
    for text in (FIND + SHOW, FIND + SHOW + call("close", "{}")):
        assert task.verify(example, text).reward == 1.0
    assert task.verify(example, FIND + SHOW + call("close", '{"now": 1}')).reward == 0.0
    assert task.verify(example, FIND + call("close", "{}")).reward == 0.0
    assert [task.verify(twice, call("a", "{}") * n).reward for n in (1, 2, 3)] == [1.0, 1.0, 0.0]
    assert example.solution.endswith("Action: close\nAction Input: {}\n") and task.verify(example, example.solution).reward == 1.0


@pytest.mark.parametrize(
    "answer",
    ["[]", "{}", "none", '[{"Action": "a"}]', '[{"Action": "a", "Action_Input": "[1]"}]', '[{"Action": 3, "Action_Input": "{}"}]', "3"],
)
def test_broken_answers_are_named_by_their_line(answer, tmp_path):
    with pytest.raises(UserError, match="line 2: `answer` must be a list of"):
        make(tmp_path, CALLS, answer)


def test_a_list_that_is_not_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": CALLS}) + "\n")
    assert json.loads(tooluse.read(str(path), train_size=0, eval_size=0).examples("train")[0].answer)[1] == [
        "show",
        '{"ids": [1, 2]}',
        True,
    ]


def perturbations(calls):
    """Each call left out, doubled, renamed, with another value for each argument, with an argument more, with each argument left out."""
    needed = [(i, name, json.loads(arguments)) for i, (name, arguments, required) in enumerate(calls) if required]
    plain = [(name, arguments) for name, arguments, _ in calls]
    swap = lambda i, *new: [*plain[:i], *new, *plain[i + 1 :]]
    for i, name, arguments in needed:
        yield swap(i)
        yield swap(i, plain[i], plain[i])
        yield swap(i, (name + "s", plain[i][1]))
        yield swap(i, (name, json.dumps(arguments | {"one more": 1})))
        for key, value in arguments.items():
            yield swap(i, (name, json.dumps(arguments | {key: f"{value} "})))
            yield swap(i, (name, json.dumps({k: v for k, v in arguments.items() if k != key})))


@pytest.mark.shared
def test_all_references_verify_and_perturbed_ones_do_not(shared_data):
    task = tooluse.read(str(shared_data / "tools" / "tooluse_test.jsonl"), train_size=0, eval_size=0)
    examples: tuple[Example, ...] = task.examples("train")
    refused = wrong = 0
    for example in examples:
        assert task.verify(example, example.solution).reward == 1.0
        for calls in perturbations(json.loads(example.answer)):
            wrong += 1
            refused += task.verify(example, "".join(call(*each) for each in calls)).reward == 0.0
    assert len(examples) == 68 and wrong == refused > 800
    print(f"tooluse: 68 of 68 references verify, {refused} of {wrong} perturbed ones are refused")
