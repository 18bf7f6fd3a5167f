"""gsm8k: where answers stand and what they are worth, the builder and its cache, the hub's layout, files with mistakes."""

import json
import pathlib
import re
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_jax.data import tasks
from opd_jax.data.tasks import Verdict, answers, gsm8k
from opd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROBLEMS = {
    "train": [
        (f"Ann has {i} pens and buys {i}. How many?", f"She has {i}+{i} = <<{i}+{i}={2 * i}>>{2 * i} pens.\n#### {2 * i}")
        for i in range(1, 9)
    ],
    "test": [
        (f"Bob walks {i} km a day. How far in 3 days? é\u2028", f"3*{i}=<<3*{i}={3 * i}>>{3 * i}\n#### {3 * i:,}") for i in range(500, 504)
    ],
}


def write(folder, problems=PROBLEMS):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in problems.items():
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def make(path, cache, **changes):
    return tasks.make("gsm8k", path=path, cache_dir=str(cache), **({"level": 1, "train_size": 0, "eval_size": 64, "seed": 0} | changes))


@pytest.mark.parametrize(
    "text, number",
    [
        ("so 5 and 6\n#### 72", "72"),
        ("#### 1\nno, wait\n#### 2\n", "2"),
        ("#### $1,234.50.", "1234.5"),
        ("#### -5", "-5"),
        ("#### −5", "-5"),
        ("#### +7", "7"),
        ("#### 18 dollars, not 20", "18"),
        (r"#### \boxed{3}", "3"),
        (r"first \boxed{1}, then \boxed{2}; 9 remain", "2"),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{\$1{,}234}", "1234"),
        (r"\boxed{12\%}", "12"),
        ("The answer is 4. I had 5 at first.", "4"),
        ("The answer is: **12**.", "12"),
        ("the answer is unknown, say 3", "3"),
        ("10 - 8 leaves 2", "2"),
        ("10-8", "8"),
        ("it is x=-3", "-3"),
        ("costs $ .50", "1/2"),
        ("5.0", "5"),
        ("3 / 4", "3/4"),
        ("1,2,3", "3"),
        ("12.", "12"),
    ],
)
def test_where_an_answer_stands_and_what_it_is_worth(text, number):
    assert answers.exact(answers.final_number(text)) == Fraction(number)


def test_texts_without_an_answer():
    assert answers.final_number("no number") is None and answers.final_number("") is None
    assert answers.exact("1/0") is None and answers.exact("9" * 2000) is None
    assert answers.boxed(r"\boxed{x \boxed{") is None and answers.boxed(r"\boxed 5") is None


@pytest.mark.parametrize(
    "text, inner",
    [
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right\}}", r"\left\{ x \right\}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox {7}", "7"),
        (r"} \boxed{ 8 } }", "8"),
    ],
)
def test_boxes_have_balanced_braces(text, inner):
    assert answers.boxed(text) == inner


@given(st.fractions(), st.sampled_from(["#### {}", r"\boxed{{{}}}", "The answer is {}.", "{}"]), st.booleans())
def test_every_fraction_is_read_exactly(value, form, decimal):
    text = f"{value.numerator:,}" if decimal else f"{value.numerator}/{value.denominator}"
    expected = Fraction(value.numerator) if decimal else value
    assert answers.exact(answers.final_number(form.format(text))) == expected


@pytest.mark.parametrize(
    "text, number",
    [
        *((piece * 10**5, None) for piece in ("\\boxed{", "{", "- ", "answer is ", "#### ")),
        ("1," * 10**5, "1"),
        ("1/ " * 10**5, "1/ 1"),
        ("1/2/3", "1/2"),
        ("#### 6/3/", "6/3"),
    ],
)
def test_hostile_texts_take_little_time_and_give_what_can_be_compared(text, number):
    assert answers.final_number(text) == number
    assert number is None or answers.exact(number) is not None


def test_problems_become_examples(tmp_path):
    task = make(write(tmp_path / "data"), tmp_path / "cache")
    train, held_out = task.examples("train"), task.examples("eval")
    assert (len(train), len(held_out), task.verifiable) == (8, 4, True)
    first = train[0]
    assert first.id == 0 and first.answer == "2" and first.solution == "She has 1+1 = 2 pens.\n#### 2"
    assert first.prompt == f"Ann has 1 pens and buys 1. How many?\n{gsm8k.INSTRUCTION}\n"
    assert [example.prompt.split("\n")[0] for example in held_out] == [question for question, _ in PROBLEMS["test"]]
    assert held_out[3].answer == "1,509" and [example.id for example in held_out] == [0, 1, 2, 3]
    for example in [*train, *held_out]:
        assert task.verify(example, example.solution).reward == 1.0
    with pytest.raises(IndexError):
        train[8]
    assert task.verify(first, "3") == Verdict(0.0, "the answer is 3, it should be 2")
    verdict = task.verify(first, "two")
    assert "no number" in verdict.feedback and not verdict.well_formed


def test_sizes(tmp_path):
    path = write(tmp_path / "data")
    task = make(path, tmp_path / "cache", train_size=3, eval_size=2)
    assert (len(task.examples("train")), len(task.examples("eval"))) == (3, 2)
    with pytest.raises(UserError, match="has 8 problems to train on; lower task.train_size = 9"):
        make(path, tmp_path / "cache", train_size=9)


def test_a_held_out_problem_is_not_trained_on(tmp_path):
    rows = {"train": [*PROBLEMS["train"], PROBLEMS["test"][0]], "test": PROBLEMS["test"]}
    task = make(write(tmp_path / "data", rows), tmp_path / "cache")
    assert len(task.examples("train")) == 8


def test_prepared_data_follows_the_content(tmp_path):
    """Same text, same folder, from whichever file; other text, another one."""
    cache = tmp_path / "cache"
    first = make(write(tmp_path / "a"), cache)
    stamp = {path: path.stat().st_mtime_ns for path in cache.rglob("*.array_record*")}
    assert len(stamp) == 2
    again = make(write(tmp_path / "b"), cache)
    assert again.digest == first.digest and stamp == {path: path.stat().st_mtime_ns for path in cache.rglob("*.array_record*")}
    changed = {"train": [("Other?", "#### 1")], "test": PROBLEMS["test"]}
    other = make(write(tmp_path / "a", changed), cache)
    assert other.digest != first.digest and other.examples("train")[0].answer == "1"
    assert first.examples("train")[7].answer == "16"
    assert {path.name for path in (cache / "gsm8k").iterdir()} == {first.digest, other.digest}


def test_damaged_prepared_data_is_refused(tmp_path):
    cache, path = tmp_path / "cache", write(tmp_path / "data")
    make(path, cache)
    file = next(cache.rglob("*train.array_record*"))
    for content in (b"", file.read_bytes()[:-70000], next(cache.rglob("*test.array_record*")).read_bytes()):
        file.write_bytes(content)
        with pytest.raises(UserError, match="cache_dir = .* remove it"):
            make(path, cache)
    next(cache.rglob("dataset_info.json")).unlink()
    with pytest.raises(UserError, match="cache_dir = .* remove it"):
        make(path, cache)


def test_two_processes_prepare_at_once(tmp_path):
    code = "import sys\nfrom opd_jax.data import tasks\n"
    code += "t = tasks.make('gsm8k', path=sys.argv[1], cache_dir=sys.argv[2], level=1, train_size=0, eval_size=9, seed=0)\n"
    code += "print([e.answer for e in t.examples('train')], len(t.examples('eval')))"
    command = [sys.executable, "-c", code, write(tmp_path / "data"), str(tmp_path / "cache")]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [run.communicate()[0] for run in runs]
    assert outputs == [f"{[str(2 * i) for i in range(1, 9)]} 4\n"] * 3
    assert len(list((tmp_path / "cache" / "gsm8k").iterdir())) == 1


def test_who_comes_second_keeps_what_the_first_has_prepared(tmp_path):
    from opd_jax.data.tasks import gsm8k_builder

    gsm8k_builder.open_prepared(PROBLEMS, "digest", tmp_path)
    gsm8k_builder._prepare(PROBLEMS, tmp_path / "gsm8k" / "digest")
    assert [path.name for path in (tmp_path / "gsm8k").iterdir()] == ["digest"]
    assert len(gsm8k_builder.open_prepared(PROBLEMS, "digest", tmp_path)["train"]) == 8


def write_parquet(folder, problems=PROBLEMS):
    import pyarrow
    import pyarrow.parquet

    (folder / "main").mkdir(parents=True)
    for split, rows in problems.items():
        table = pyarrow.table({"question": [q for q, _ in rows], "answer": [a for _, a in rows]})
        pyarrow.parquet.write_table(table, folder / "main" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_the_layout_of_the_hub(tmp_path):
    """The same examples, and the same digest, as from lines."""
    plain = make(write(tmp_path / "lines"), tmp_path / "cache")
    packed = make(write_parquet(tmp_path / "hub"), tmp_path / "cache")
    assert packed.digest == plain.digest and list(packed.examples("eval")) == list(plain.examples("eval"))


def test_a_snapshot_in_the_hubs_cache_is_used_offline(tmp_path, monkeypatch):
    """Laid out as huggingface_hub leaves a download: refs/main names the commit whose snapshot holds the files."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "datasets--openai--gsm8k"
    write_parquet(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for path in ("", "openai/gsm8k"):
        assert len(make(path, tmp_path / "cache").examples("train")) == 8


@pytest.mark.parametrize("path", ["", "openai/gsm8k"])
def test_offline_without_a_snapshot(path, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="openai/gsm8k cannot be fetched from the Hugging Face hub .*; give a folder with train.jsonl"):
        make(path, tmp_path)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="task.path = .*is not a folder; give a folder with train.jsonl"):
        make(str(tmp_path / "no" / "such" / "folder"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"train.jsonl'?: cannot be read \(No such file"):
        make(str(tmp_path / "empty"), tmp_path)
    for line, words in {
        '{"question": "a"}': "line 1: has no `answer` text",
        '{"question": 3.5, "answer": ["b"]}': "line 1: `answer` is list",
        '{"question": "a", "answer": "it is 5"}': 'line 1: `answer` does not end in "#### " and a number',
        '{"question": "a", "answer": "5 #### none"}': 'line 1: `answer` does not end in "#### "',
        "{": "line 1: is not JSON",
    }.items():
        folder = pathlib.Path(write(tmp_path / "broken"))
        (folder / "test.jsonl").write_text(line)
        with pytest.raises(UserError, match=words):
            make(str(folder), tmp_path)


def test_parquet_that_cannot_be_used(tmp_path):
    folder = pathlib.Path(write_parquet(tmp_path / "hub"))
    file = folder / "main" / "test-00000-of-00001.parquet"
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"], "answer": [None]}), file)
    with pytest.raises(UserError, match="must have the columns `question` and `answer` with text"):
        make(str(folder), tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"]}), file)
    with pytest.raises(UserError, match="columns `question` and `answer`|cannot be read"):
        make(str(folder), tmp_path)
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="parquet: cannot be read"):
        make(str(folder), tmp_path)


def perturbed(answer):
    """Answer + 1, sign flipped, a digit appended, two digits swapped where they differ."""
    number = answer.replace(",", "")
    wrong = [str(Fraction(number) + 1), number[1:] if number.startswith("-") else f"-{number}", number + "7"]
    digits = list(number)
    for i in range(len(digits) - 1):
        if digits[i] != digits[i + 1] and digits[i].isdigit() and digits[i + 1].isdigit():
            swapped = digits[:]
            swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
            wrong.append("".join(swapped))
            break
    return [text for text in wrong if Fraction(text) != Fraction(number)]


@pytest.mark.shared
def test_all_references_of_the_test_set_verify_and_perturbed_ones_do_not(shared_data, tmp_path):
    task = make(str(shared_data / "gsm8k"), tmp_path, eval_size=10**6)
    right = wrong = refused = 0
    for example in task.examples("eval"):
        right += task.verify(example, example.solution).reward
        assert "<<" not in example.solution
        for text in perturbed(example.answer):
            wrong += 1
            refused += task.verify(example, re.sub(r"#### .*", f"#### {text}", example.solution)).reward == 0.0
    assert (right, len(task.examples("train"))) == (1319, 7473)
    assert wrong == refused > 4000
    print(f"gsm8k: {right:.0f} of 1319 references verify, {refused} of {wrong} perturbed ones are refused")
