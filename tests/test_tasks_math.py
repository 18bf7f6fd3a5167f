r"""math: answers in \boxed{}, equal by value, with limits that hold against hostile expressions, from any thread."""

import json
import re
import subprocess
import sys
import threading
import time

import pytest

from opd_jax.data import tasks
from opd_jax.data.tasks import Example, math, math_checker
from opd_jax.types import UserError

EQUAL = [
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "1/2"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("\\{1,2\\}", "\\{2,1\\}"),
    ("70", "070"),
    ("0.5", "+.50"),
    ("52_8", "52_{8}"),
    ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)"),
    ("5", "x=5"),
]
DIFFERENT = [
    ("\\frac{1}{2}", "\\frac{2}{1}"),
    ("70", "71"),
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("x+1", "x-1"),
    ("52_8", "52_9"),
    (".0000672", ".0000673"),
    ("\\text{Evelyn}", "\\text{Evelin}"),
    ("5", ""),
    ("5", "\\frac{}{}"),
    ("5", "__import__('os')._exit(0)"),
]


@pytest.fixture(scope="module")
def task():
    yield math.Math((), (), "")
    math_checker.shared().close()


def judge(task, answer, text):
    return task.verify(Example(0, "", answer=answer), text)


@pytest.mark.parametrize("reference, answer", EQUAL)
def test_equal_expressions(task, reference, answer):
    assert judge(task, reference, f"so \\boxed{{{answer}}}.").reward == 1.0


@pytest.mark.parametrize("reference, answer", DIFFERENT)
def test_different_expressions(task, reference, answer):
    verdict = judge(task, reference, f"so \\boxed{{{answer}}}.")
    assert verdict.reward == 0.0 and f"it should be {reference}" in verdict.feedback


def test_numbers_that_are_too_long_are_not_equal(task):
    assert judge(task, "1" * 1500, "\\boxed{" + "2" * 1500 + "}").reward == 0.0


def test_the_last_box_counts(task):
    assert judge(task, "2", "\\boxed{1} no, \\boxed{2} and \\boxed{").reward == 1.0
    assert judge(task, "1", "\\boxed{1} no, \\boxed{2}").reward == 0.0
    verdict = judge(task, "2", "it is 2")
    assert verdict == tasks.Verdict(0.0, "there is no \\boxed{} with the answer, which is 2", well_formed=False)
    assert judge(task, "2", "\\boxed{1}").well_formed


@pytest.mark.slow
@pytest.mark.parametrize("hostile", ["9^{9^{9^{9}}}", "10^{10^{10}}!", "{" * 900])
def test_hostile_expressions_end_and_the_next_one_is_compared(hostile):
    checker = math_checker.Checker(1)
    assert checker.equal("2", "2.0") is True
    start = time.monotonic()
    assert checker.equal("5", hostile) is None
    assert time.monotonic() - start < math_checker.WALL_SECONDS / 2  # it is the processor time that ended it
    assert checker.equal("2", "2.0") is True and checker.equal("2", "3") is False
    checker.close()


def test_no_text_of_a_model_is_evaluated(monkeypatch):
    """sympy reads its numerals by evaluating them as Python; nothing else may come there."""
    import math_verify.parser
    import sympy.physics.units  # noqa: F401  (it reads names of its own in the same way when it is imported)
    from sympy.parsing import sympy_parser

    from opd_jax.data.tasks import math_worker

    seen, evaluate = [], sympy_parser.eval_expr
    monkeypatch.setattr(sympy_parser, "eval_expr", lambda code, *others: (seen.append(code), evaluate(code, *others))[1])
    handed = []
    monkeypatch.setattr(math_verify.parser, "parse_expr_cached", lambda text: handed.append(text))
    texts = [
        "__import__('os')._exit(0)",
        "().__class__",
        "[1]*3",
        "2**9",
        "(1+2)*3",
        "0x10",
        "1if 1else 2",
        "\\text{__import__('os')}",
        "os",
    ]
    texts += ["=2/\n/5 5 ", "\n9^-\n=\\}", "\\}}$ 3*4295 the answer is "]  # in which LaTeX finds nothing, and the other way does
    for text in texts:
        assert not math_worker.compare("5", text) and not math_worker.compare(text, "5")
    assert math_worker.compare("\\frac{1}{2}", "0.5") and seen
    assert all(re.fullmatch(r"(Integer|Float) \('?[\d.]+'? \)", code) for code in seen)
    assert handed == []


def test_long_expressions_are_not_looked_at():
    checker = math_checker.Checker(1)
    assert checker.equal("5", "1+" * 1001 + "1") is None
    assert checker._idle.get() is None  # no process was started


def test_a_worker_that_died_is_replaced_and_none_is_left():
    checker = math_checker.Checker(1)
    assert checker.equal("1/2", "0.5") is True
    worker = checker._idle.get()
    worker.kill()
    worker.wait()
    checker._idle.put(worker)
    assert checker.equal("1/2", "0.5") is True
    worker = checker._idle.get()
    checker._idle.put(worker)
    checker.close()
    assert worker.poll() is not None and checker.equal("1/2", "0.5") is True
    checker.close()


def test_many_threads_share_few_workers(task):
    """The verdicts come back in order, also outside the main thread, where signals do not work."""
    examples = [Example(i, "", answer=f"\\frac{{{i}}}{{4}}") for i in range(40)]
    texts = [f"\\boxed{{{i / 4 if i % 3 else i + 1}}}" for i in range(40)]
    results = []
    thread = threading.Thread(target=lambda: results.extend(tasks.verify_many(task, examples, texts)))
    thread.start()
    thread.join()
    assert [verdict.reward for verdict in results] == [float(i % 3 > 0) for i in range(40)]


def test_workers_end_with_the_process():
    code = "from opd_jax.data.tasks import math_checker as m\nc = m.shared()\nprint(c.equal('1/2', '0.5'))\n"
    code += "w = c._idle.get(); c._idle.put(w); print(w.pid)"
    answer, pid = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert answer == "True"
    alive = subprocess.run(["ps", "-o", "args=", "-p", pid], capture_output=True, text=True).stdout
    assert "math_worker" not in alive


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


def read(path, **sizes):
    return math.read(path, **({"train_size": 0, "eval_size": 1} | sizes))


def test_lines_become_examples(tmp_path):
    lines = [
        {"prompt": "Add. Put it in \\boxed{}.", "answer": " 3 "},
        {"problem": "Subtract.", "answer": 4, "solution": "7-3=\\boxed{4}"},
        {"question": "Multiply.", "answer": "5"},
    ]
    task = read(write(tmp_path / "data.jsonl", lines))
    first, second = task.examples("train")
    assert first == Example(0, "Add. Put it in \\boxed{}.", "\\boxed{3}", "3")
    assert second == Example(1, f"Subtract.\n{math.INSTRUCTION}\n", "7-3=\\boxed{4}", "4")
    assert task.examples("eval")[0].id == 2
    for example in (first, second):
        assert task.verify(example, example.solution).reward == 1.0


def test_broken_lines(tmp_path):
    for line, words in [
        ({"answer": "1"}, "line 2: has no `prompt`, `problem`, `question` text"),
        ({"prompt": "a"}, "line 2: has no `answer` text"),
        ({"prompt": "a", "answer": " "}, "line 2: has no `answer` text"),
        ({"prompt": "a", "answer": [1]}, "line 2: `answer` is list"),
    ]:
        with pytest.raises(UserError, match=words):
            read(write(tmp_path / "data.jsonl", [{"prompt": "a", "answer": "b"}, line]))
    with pytest.raises(UserError, match="task.path = '' must name a file of lines with `prompt` and `answer` for task.name = 'math'"):
        read("")


def perturbations(answer):
    """The first digit, and the last one, made another; where there is none, one is added."""
    places = [i for i, char in enumerate(answer) if char.isdigit()]
    changed = [answer[:i] + str((int(answer[i]) + 1) % 10) + answer[i + 1 :] for i in {places[0], places[-1]}] if places else []
    return [*changed, answer + "+1"]


# Taken for equal by math-verify, which drops powers of units.
LENIENT = {("864 \\mbox{ inches}^2", "864 \\mbox{ inches}^3"), ("15\\mbox{ cm}^2", "15\\mbox{ cm}^3")}


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize("file, problems", [("math500", 500), ("aime24", 30), ("aime25", 30)])
def test_all_references_verify_and_perturbed_ones_do_not(task, shared_data, file, problems):
    data = read(str(shared_data / "math" / f"{file}.jsonl"), eval_size=10**6)
    examples = [*data.examples("train"), *data.examples("eval")]
    assert len(examples) == problems
    verdicts = tasks.verify_many(data, examples, [f"Thus \\boxed{{{example.answer}}}." for example in examples])
    assert all(verdict.reward == 1.0 for verdict in verdicts)
    assert all(math_checker.shared().equal(example.answer, example.answer) for example in examples)  # by value too, not by text alone
    pairs = [(example, text) for example in examples for text in perturbations(example.answer)]
    verdicts = tasks.verify_many(data, [example for example, _ in pairs], [f"Thus \\boxed{{{text}}}." for _, text in pairs])
    taken = {(example.answer, text) for (example, text), verdict in zip(pairs, verdicts, strict=True) if verdict.reward == 1.0}
    print(f"{file}: {problems} of {problems} references verify, {len(pairs) - len(taken)} of {len(pairs)} perturbed ones are refused")
    assert taken <= LENIENT
