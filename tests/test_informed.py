"""Tasks whose training prompts have something beside the question."""

import numpy as np
import pytest

from opd_jax import config as config_lib
from opd_jax.data import privileged, tasks
from opd_jax.data.tasks import informed
from opd_jax.types import UserError


def make(**changes):
    c = config_lib.default()
    c.task.name, c.task.level, c.task.skills, c.task.eval_size = "skills", 4, "reverse,sort", 6
    for name, value in ({"informed": 0.5, "informed_reads": "solution,feedback"} | changes).items():
        setattr(c.task, name, value)
    return tasks.from_config(config_lib.parse(c))


def test_a_share_of_the_training_prompts_and_a_tag_have_sections():
    task, plain = make(informed_tags="sort"), make(informed=0.0)
    assert not isinstance(plain, informed.Informed)
    pairs = [(plain.examples("train")[i], task.examples("train")[i]) for i in range(400)]
    with_section = np.array([one.prompt != other.prompt for one, other in pairs])
    tags = np.array([one.tag for one, _ in pairs])
    assert with_section[tags == "sort"].all()
    assert abs(with_section[tags == "reverse"].mean() - 0.5) < 4 * np.sqrt(0.25 / 200)  # 4 standard errors of 200 draws
    for one, other in pairs:
        assert other.prompt.endswith(one.prompt) and (other.id, other.solution, other.tag) == (one.id, one.solution, one.tag)
    assert list(task.examples("eval")) == list(plain.examples("eval"))


def test_a_section_is_what_a_teacher_reads():
    """The prompt is that of data/privileged.py for the same section; feedback is the verifier's on an answer that is wrong."""
    task = make(informed=1.0, informed_tags="")
    for i in range(50):
        plain, full = task.inner.examples("train")[i], task.examples("train")[i]
        mark, text = full.prompt[0], full.prompt[1:].removesuffix("\n" + plain.prompt)
        assert mark in "=!"
        if mark == "=":
            assert full.prompt == privileged.render(privileged.COMPACT, plain.prompt, privileged.Sections(solution=plain.solution))
        else:
            assert "it should be" in text


def test_examples_are_functions_of_their_index():
    first, again = make().examples("train"), make().examples("train")
    assert [first[i] for i in (5, 3, 5)] == [again[i] for i in (5, 3, 5)]


@pytest.mark.parametrize("text", ["1234", "11", "7", ""])
def test_an_error_changes_one_character(text):
    for seed in range(20):
        wrong = informed.with_error(text, np.random.default_rng(seed))
        assert len(wrong) == len(text) and sum(a != b for a, b in zip(text, wrong, strict=True)) == bool(text)


def test_an_example_without_a_solution_stays_as_it_is():
    assert informed.section(make().inner, tasks.Example(0, "r12="), "solution", np.random.default_rng(0)) == privileged.Sections()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"informed_reads": "solution,critique"}, "task.informed_reads = 'solution,critique': 'critique' cannot be read"),
        ({"informed_reads": ""}, "task.informed_reads = '': 'nothing' cannot be read"),
        ({"informed": 1.5}, "task.informed = 1.5 must be between 0 and 1"),
        ({"informed_layout": "no_such.jinja"}, "no_such.jinja"),
        ({"name": "unconditional", "informed_reads": "feedback"}, "feedback needs a verifier"),
        ({"learn": "add"}, "task.learn = 'add' is not known; valid: reverse, sort"),
        ({"learn": "sort,"}, "task.learn = 'sort,' has a comma with no name beside it"),
        ({"informed_tags": ","}, "task.informed_tags = ',' has a comma with no name beside it"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        make(**changes)


def test_learning_one_skill_and_evaluating_all():
    task = make(informed=0.0, learn="sort")
    assert {task.examples("train")[i].tag for i in range(8)} == {"sort"}
    assert [example.tag for example in task.examples("eval")] == ["reverse", "sort"] * 3
