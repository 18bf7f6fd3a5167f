"""Tasks: solutions that verify, splits that do not overlap, and files with mistakes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.data import tasks
from opd_jax.data.tasks import Example, Verdict, arithmetic, gsm8k, jsonl, math
from opd_jax.types import UserError


def make(name="arithmetic", **changes):
    return tasks.make(name, **({"path": "", "level": 12, "metric": "rouge", "train_size": 0, "eval_size": 64, "seed": 0} | changes))


@given(st.text("0123456789", min_size=1, max_size=30))
def test_running_values_by_their_definition(digits):
    values = arithmetic.running_values(digits)
    assert len(values) == len(digits)
    for i, (digit, value) in enumerate(zip(digits, values, strict=True)):
        assert int(value) == (3 * (int(values[i - 1]) if i else 0) + int(digit)) % 10


def test_arithmetic_example_by_hand():
    assert arithmetic.running_values("314") == "304"  # 3; 3*3+1 = 10; 3*0+4 = 4


def test_arithmetic_solutions_verify_and_perturbed_ones_do_not():
    task = make()
    for split in ("train", "eval"):
        for index in range(20):
            example = task.examples(split)[index]
            assert task.verify(example, example.solution).reward == 1.0
            for place in (0, 5, 11):
                wrong = example.solution[:place] + str((int(example.solution[place]) + 1) % 10) + example.solution[place + 1 :]
                verdict = task.verify(example, wrong)
                assert verdict.reward == 0.0 and f"value {place + 1} is" in verdict.feedback
            assert task.verify(example, example.solution[:-1]).reward == 0.0
            assert task.verify(example, example.solution + "0").reward == 0.0


def test_arithmetic_tells_a_wrong_format_from_a_wrong_value():
    task, example = make(level=3), Example(0, "314=", "304", "304")
    assert task.verify(example, "3x4") == Verdict(0.0, "character 2 is 'x', it should be a digit", well_formed=False)
    assert task.verify(example, "9 4").feedback.startswith("character 2 is ' '")  # before the value that is wrong too
    assert task.verify(example, "3٠4").well_formed is False  # a digit of another script
    assert task.verify(example, "314") == Verdict(0.0, "value 2 is '1', it should be '0'")
    assert task.verify(example, "30") == Verdict(0.0, "2 values were given, there should be 3")
    assert task.verify(example, "").well_formed is False


def test_golden_arithmetic_prompts():
    prompts = [make().examples(split)[index].prompt for split in ("train", "eval") for index in (0, 1)]
    assert prompts == ["865230001869=", "589538298002=", "668634792454=", "059436970711="]


def test_arithmetic_splits_do_not_overlap_and_are_seeded():
    task = make(level=3)
    train = {task.examples("train")[i].prompt for i in range(2000)}
    held_out = {example.prompt for example in task.examples("eval")}
    assert len(train) > 500 and not train & held_out
    assert task.examples("train")[7] == make(level=3).examples("train")[7]
    assert [e.prompt for e in make(seed=1).examples("eval")] != [e.prompt for e in make().examples("eval")]


def test_train_size_fixes_the_set_of_prompts():
    few, many = make(train_size=48).examples("train"), make().examples("train")
    assert len(few) == 48 and len(many) > 10**6
    assert [few[i] for i in range(48)] == [many[i] for i in range(48)]
    with pytest.raises(IndexError):
        few[48]


def test_unconditional_prompts_are_empty_with_ids_of_their_own():
    examples = make("unconditional", train_size=5).examples("train")
    assert [e.prompt for e in examples] == [""] * 5 and [e.id for e in examples] == list(range(5))


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_jsonl_lines_become_examples(tmp_path):
    lines = [{"prompt": "1+1=", "answer": 2}, "", {"prompt": "x", "answer": " y "}, {"prompt": "p", "answer": "q", "solution": "long q"}]
    task = jsonl.read(write(tmp_path / "data.jsonl", lines), train_size=0, eval_size=1)
    assert task.examples("train") == (Example(0, "1+1=", "2", "2"), Example(1, "x", " y ", " y "))
    assert task.examples("eval") == (Example(2, "p", "long q", "q"),)
    assert task.verify(task.examples("train")[1], "y\n").reward == 1.0
    assert "should be '2'" in task.verify(task.examples("train")[0], "3").feedback


def test_jsonl_without_answers_has_nothing_to_verify(tmp_path):
    task = jsonl.read(write(tmp_path / "data.jsonl", [{"prompt": "a"}, {"prompt": "b", "answer": "c"}]), train_size=0, eval_size=0)
    assert not task.verifiable and task.examples("train")[0].solution is None


@pytest.mark.parametrize("lines, held_out", [(1, 0), (2, 1), (7, 3), (600, 256)])
def test_at_most_half_of_a_file_is_held_out(tmp_path, lines, held_out):
    path = write(tmp_path / "data.jsonl", [{"prompt": str(i)} for i in range(lines)])
    task = jsonl.read(path, train_size=0, eval_size=256)
    assert (len(task.examples("train")), len(task.examples("eval"))) == (lines - held_out, held_out)


def test_a_prompt_that_is_held_out_is_not_trained_on(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": p} for p in ("a", "b", "c", "b")])
    task = jsonl.read(path, train_size=0, eval_size=1)
    assert [e.prompt for e in task.examples("train")] == ["a", "c"] and [e.prompt for e in task.examples("eval")] == ["b"]


def test_line_separators_within_a_text_are_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "a\u2028b\u0085"}\r\n{"prompt": "c"}\r\n'.encode())
    assert [e.prompt for e in jsonl.read(str(path), train_size=0, eval_size=0).examples("train")] == ["a\u2028b\u0085", "c"]


def test_the_digest_tells_files_apart(tmp_path):
    digests = [jsonl.read(write(tmp_path / "d.jsonl", [{"prompt": p}]), train_size=0, eval_size=0).digest for p in ("a", "b", "a")]
    assert digests[0] == digests[2] != digests[1]


BROKEN = {
    "no JSON": ('{"prompt": "a"', "line 2: is not JSON"),
    "a list": ("[1]", "line 2: has no `prompt`, but is a list; write one object per line"),
    "no prompt": ('{"question": "a"}', "line 2: has no `prompt` text"),
    "prompt of another type": ('{"prompt": 3}', "line 2: has no `prompt` text"),
    "half a surrogate pair": ('{"prompt": "\\ud800x"}', "line 2: `prompt` holds half of a surrogate pair"),
    "answer of another type": ('{"prompt": "a", "answer": ["b"]}', "line 2: `answer` is list"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_by_its_number(case, tmp_path):
    line, words = BROKEN[case]
    with pytest.raises(UserError, match=words):
        jsonl.read(write(tmp_path / "data.jsonl", [{"prompt": "fine"}, line]), train_size=0, eval_size=0)


def test_files_that_cannot_be_used(tmp_path):
    read = lambda path, **k: jsonl.read(str(path), **({"train_size": 0, "eval_size": 1} | k))
    with pytest.raises(UserError, match="task.path = '' must name a file"):
        read("")
    with pytest.raises(UserError, match="cannot be read .No such file"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="cannot be read .Is a directory"):
        read(tmp_path)
    with pytest.raises(UserError, match="has no lines"):
        read(write(tmp_path / "empty.jsonl", ["", " "]))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "café"}'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 at byte 15"):
        read(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match="has 2 examples, 1 of them to train on; lower task.train_size = 5"):
        read(write(tmp_path / "two.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), train_size=5)


def test_unknown_task_and_level_are_refused():
    with pytest.raises(UserError, match="task.name = 'aritmetic' is not known.*did you mean arithmetic"):
        make("aritmetic")
    with pytest.raises(UserError, match="task.level = 1 must be from 2 to 100"):
        make(level=1)


@pytest.mark.parametrize(
    ("task", "texts", "expected"),
    [
        (make(), ["304", "", "304 "], ["304", None, "304 "]),  # exact match: white space makes another answer
        (jsonl.Jsonl((), (), ""), [" a\n", "a", " \n"], ["a", "a", None]),
        (
            gsm8k.Gsm8k((), (), ""),
            ["so\n#### 1,000.0", "it is 1000", "nothing", "1/2", "0.5", "1/0"],
            ["1000", "1000", None, "1/2", "1/2", None],
        ),
        (math.Math((), (), ""), ["\\boxed{1} or \\boxed{ x+1 }", "x+1"], ["x+1", None]),
    ],
    ids=["arithmetic", "jsonl", "gsm8k", "math"],
)
def test_votes_are_the_answers_that_verify_compares(task, texts, expected):
    assert tasks.votes(task, texts) == expected


def test_a_task_that_does_not_say_what_an_answer_is_has_no_votes():
    assert tasks.votes(make("unconditional"), ["a"]) is None
