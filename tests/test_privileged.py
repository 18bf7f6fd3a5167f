"""What a teacher reads beside the question: who may read whose attempt, layouts that keep every text as it is, prompts that fit."""

import itertools
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_jax import config as config_lib
from opd_jax.config import ConfigError
from opd_jax.data import privileged, tokenizer
from opd_jax.data.privileged import COMPACT, KINDS, LAYOUTS, WORDS, Attempt, Fitted, Sections
from opd_jax.data.tasks import Example
from opd_jax.types import UserError

EXAMPLE = Example(id=0, prompt="17+25?", solution="42")
GROUP = [Attempt("a", 0.0, "a is wrong"), Attempt("b", 1.0), Attempt("c", 0.5, "c is half"), Attempt("d", 1.0, "d is long")]


def gather(*kinds, group=GROUP, own=0, example=EXAMPLE, success=1.0, feedback_with_solution=False, strip_thinking=True, **written):
    return privileged.gather(
        kinds,
        example,
        group,
        own,
        success=success,
        feedback_with_solution=feedback_with_solution,
        strip_thinking=strip_thinking,
        **written,
    )


# ---- sections


def test_solution_and_demonstration_are_the_examples_solution():
    assert gather("solution") == Sections(solution="42")
    assert gather("demonstration", "solution", group=[], own=0) == Sections(solution="42", demonstration="42")
    for none in (None, "", " \n"):
        assert gather("solution", "demonstration", example=Example(0, "p", none)) == Sections()


@pytest.mark.parametrize("own, sibling", [(0, "b"), (1, "d"), (2, "b"), (3, "b")])
def test_the_sibling_is_the_first_other_success(own, sibling):
    assert gather("sibling", own=own).sibling == sibling


@pytest.mark.parametrize("rewards", list(itertools.product([0.0, 0.5, 1.0], repeat=3)), ids=str)
def test_nobody_reads_the_own_attempt_and_a_lone_success_reads_none(rewards):
    group = [Attempt(f"text {i}", reward) for i, reward in enumerate(rewards)]
    for own in range(3):
        solved = [i for i in range(3) if i != own and rewards[i] >= 0.5]
        expected = f"text {solved[0]}" if solved else None
        assert gather("sibling", group=group, own=own, success=0.5).sibling == expected


def test_a_wrong_index_is_no_other_attempt():
    for own in (-1, 4):
        with pytest.raises(IndexError, match=f"own_index = {own} in a group of 4"):
            gather("sibling", own=own)


@pytest.mark.parametrize(
    "text, kept",
    [
        ("42", "42"),
        (" <think>hm</think>\n42 ", "42"),
        ("<think>a<think>b</think>c</think>42", "42"),
        ("41 <think>or</think> 42<think>!</think>.", "41  42."),
        ("42 <think>is it", "42"),
        ("<think>a<think>b</think>42", ""),
        ("it began in the prompt</think>42", "42"),
        ("<think>a</think>b</think>42", "42"),
        ("41<think>a</think>b</think>42", "42"),
        ("<think></think>", ""),
        ("<THINK>42</THINK>", "<THINK>42</THINK>"),
    ],
)
def test_thinking_is_stripped(text, kept):
    assert privileged.without_thinking(text) == kept
    group = [Attempt("wrong", 0.0), Attempt(text, 1.0), Attempt("next", 1.0)]
    assert gather("sibling", group=group).sibling == (kept or "next")  # one that has only thought shows nothing
    assert gather("sibling", group=group, strip_thinking=False).sibling == text


def test_feedback_gives_way_to_a_right_answer():
    assert gather("feedback") == Sections(feedback="a is wrong")
    assert gather("feedback", own=1) == Sections()
    lone = [GROUP[0], GROUP[2]]
    for kinds, group in (("solution", lone), ("demonstration", lone), ("sibling", GROUP)):
        assert gather(kinds, "feedback", group=group).feedback is None
        assert gather(kinds, "feedback", group=group, feedback_with_solution=True).feedback == "a is wrong"
    assert gather("sibling", "feedback", group=lone) == Sections(feedback="a is wrong")
    assert gather("solution", "feedback", group=lone, example=Example(0, "p")) == Sections(feedback="a is wrong")
    assert gather("critique", "feedback", critique="vague") == Sections(critique="vague", feedback="a is wrong")


def test_what_is_not_asked_for_is_not_there():
    for kind in KINDS:
        found = gather(kind, critique="vague", analysis="deep")
        assert [name for name, text in vars(found).items() if text is not None] == [kind]
    assert gather("critique", group=[]) == Sections()
    assert gather(critique="vague") == Sections()


# ---- layouts

ALL = Sections("SOL", "DEMO", "FEED", "SIB", "CRIT")


def test_compact_has_a_mark_for_each_section_and_ends_with_the_prompt():
    assert privileged.render(COMPACT, "314=", ALL) == "=SOL\n>DEMO\n!FEED\n+SIB\n?CRIT\n314="
    assert privileged.render(COMPACT, "314=", Sections(sibling="159")) == "+159\n314="


def test_words_are_sentences_around_what_there_is():
    assert privileged.render(WORDS, "17+25?", Sections(solution="42")) == (
        "17+25?\n\nThis solution is known to be right:\n42\n\nNow answer from the beginning, in words of your own."
    )
    shown = privileged.render(WORDS, "17+25?", ALL)
    places = [shown.index(text) for text in ("17+25?", "SOL", "DEMO", "SIB", "FEED", "CRIT", "Now")]
    assert places == sorted(places)
    assert "\n\n\n" not in shown and len(shown.split("\n\n")) == 7


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_nothing_to_read_is_no_prompt(layout):
    assert privileged.render(layout, "17+25?", Sections()) is None


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("text", ["{{ 7 * 6 }}", "{% if true %}x{% endif %}", "{# gone #}", "<b>&amp;'\"", "\r\n\ttab\n", "{{ prompt }}"])
def test_texts_are_never_evaluated_nor_escaped(layout, text):
    for kind in KINDS:
        shown = privileged.render(layout, f"P{text}", Sections(**{kind: f"S{text}"}))
        assert f"P{text}" in shown and f"S{text}" in shown


def test_the_layouts_of_the_house_show_everything():
    for name, layout in LAYOUTS.items():
        privileged.check_layout(layout, KINDS, name=name)


@pytest.mark.parametrize(
    "layout, kinds, message",
    [
        ("{{ solution }}", ["solution"], "does not show prompt as it is, given solution; correct the layout"),
        ("{{ prompt }}", ["solution"], "does not show solution as it is, given solution"),
        (
            "{{ prompt }}{% if solution %}{{ solution }}{% else %}{{ sibling }}{% endif %}",
            ["solution", "sibling"],
            "does not show sibling as it is, given solution, sibling",
        ),
        ("{{ prompt }}{{ solution }}{{ sibling }}", ["solution", "sibling"], "it prints a section that is not there"),
        ("{{ prompt }}{{ solution | e }}", ["solution"], "does not show solution as it is"),
        ("{{ prompt }}{{ solution | truncate(20) }}", ["solution"], "does not show solution as it is"),
        ("{{ prompt }}{{ answer }}", ["solution"], "cannot be rendered ('answer' is undefined)"),
        ("{% if %}", ["solution"], "the layout cannot be rendered (Expected an expression"),
        ("{{ prompt }}{{ solution.__class__.__mro__ }}", ["solution"], "access to attribute '__class__' of 'str' object is unsafe"),
        ("{% include '/etc/hostname' %}", ["solution"], "no loader for this environment specified"),
    ],
)
def test_layouts_that_lose_or_change_a_text_are_refused(layout, kinds, message):
    with pytest.raises(ConfigError) as error:
        privileged.check_layout(layout, kinds, name="mine.jinja")
    assert str(error.value).startswith("config field context.privileged.layout = 'mine.jinja': ") and message in str(error.value)


def test_a_layout_may_be_a_file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("Grüße: {{ prompt }}\n{{ feedback }}\n", encoding="utf-8")
    layout = privileged.layout_text(str(path))
    privileged.check_layout(layout, ["feedback"], name=str(path))
    assert privileged.render(layout, "P", Sections(feedback="F")) == "Grüße: P\nF"
    assert privileged.layout_text("words") == WORDS
    path.write_bytes(b"\xe9")
    for name, why in (("wrods", "No such file"), (str(tmp_path), "Is a directory"), (str(path), "not UTF-8")):
        with pytest.raises(
            UserError, match=rf"context.privileged.layout = .*: cannot be read \(.*{why}.*\); give words, compact or a UTF-8"
        ):
            privileged.layout_text(name)


# ---- the room that there is


def fit(sections, room, *, prompt="P", layout=COMPACT, length_of=len):
    return privileged.fit(layout, prompt, sections, length_of=length_of, room=room)


def test_what_fits_is_not_touched():
    whole = privileged.render(COMPACT, "P", ALL)
    assert fit(ALL, len(whole)) == Fitted(whole)
    assert fit(Sections(), 100) == Fitted(None, dropped="no_section")


def test_feedback_and_critique_lose_their_end_to_the_last_character_that_fits():
    long = Sections(solution="42", feedback="0123456789", critique="abcdefghij")
    assert fit(long, 29) == Fitted("=42\n!0123456789\n?abcdefghij\nP")
    assert fit(long, 28) == Fitted("=42\n!01234 ...\n?abcde ...\nP", shortened=True)
    assert fit(long, 19) == Fitted("=42\n!0 ...\n?a ...\nP", shortened=True)
    assert fit(long, 18) == Fitted("=42\nP", shortened=True)
    assert fit(long, 5) == Fitted("=42\nP", shortened=True)
    assert fit(long, 4) == Fitted(None, dropped="too_long")


def test_one_that_is_short_stays_whole_while_the_other_is_cut():
    assert fit(Sections(feedback="ab", critique="0123456789"), 15) == Fitted("!ab\n?0123 ...\nP", shortened=True)


def test_a_question_without_room_for_its_only_section_has_no_prompt():
    assert fit(Sections(feedback="0123456789"), 7) == Fitted(None, dropped="too_long")
    assert fit(Sections(feedback="0123456789"), 8) == Fitted("!0 ...\nP", shortened=True)
    assert fit(Sections(feedback="0123456789"), 0) == Fitted(None, dropped="too_long")
    assert fit(Sections(feedback="    56789"), 8) == Fitted(None, dropped="too_long")  # white space alone is nothing


def test_the_room_is_counted_in_the_readers_tokens():
    long = Sections(feedback="é" * 100)
    length_of = lambda text: len(tokenizer.byte().encode_prompt(text))
    assert fit(long, 40, length_of=length_of) == Fitted("!" + "é" * 16 + " ...\nP", shortened=True)


texts = st.text(st.characters(codec="utf-8"), max_size=30)
maybe = st.none() | texts.filter(str.strip)
LENGTHS = {
    "characters": len,
    "bytes": lambda text: len(text.encode()),
    "pieces": lambda text: -(-len(text) // 3),
    "words": lambda text: len(text.split()),
}


@settings(max_examples=300, deadline=None)
@given(
    prompt=texts,
    sections=st.builds(Sections, maybe, maybe, maybe, maybe, maybe),
    room=st.integers(0, 200),
    layout=st.sampled_from(list(LAYOUTS.values())),
    length_of=st.sampled_from(list(LENGTHS.values())),
)
def test_question_solution_and_sibling_are_whole_or_there_is_no_prompt(prompt, sections, room, layout, length_of):
    fitted = privileged.fit(layout, prompt, sections, length_of=length_of, room=room)
    whole = privileged.render(layout, prompt, sections)
    kept = Sections(sections.solution, sections.demonstration, None, sections.sibling, None)
    least = privileged.render(layout, prompt, kept)
    if fitted.text is None:
        assert fitted.dropped == ("no_section" if whole is None else "too_long") and not fitted.shortened
        assert whole is None or length_of(whole) > room
        assert least is None or length_of(least) > room
        return
    assert length_of(fitted.text) <= room and not fitted.dropped
    assert fitted.shortened == (fitted.text != whole)
    for text in (prompt, *filter(None, vars(kept).values())):
        assert text in fitted.text
    if not fitted.shortened:
        assert length_of(whole) <= room
        return
    heads = [
        [text] if text is None else [text, None, *(f"{text[:k].rstrip()} ..." for k in range(1, len(text)))]
        for text in (sections.feedback, sections.critique)
    ]
    possible = [
        Sections(kept.solution, kept.demonstration, feedback, kept.sibling, critique) for feedback in heads[0] for critique in heads[1]
    ]
    assert fitted.text in [privileged.render(layout, prompt, one) for one in possible]


# ---- the config


def settings_of(*, group_size=2, **values):
    c = config_lib.default()
    c.rollout.group_size, c.teacher.path = group_size, "somewhere"
    c.context.privileged.update(values)
    return config_lib.parse(c)


def task(*, verifiable=True, solution="s"):
    return types.SimpleNamespace(verifiable=verifiable, examples=lambda split: [Example(0, "p"), Example(1, "p", solution)])


def test_a_teacher_reads_the_question_alone_unless_told_otherwise():
    parsed = settings_of(group_size=1)
    assert parsed.context.privileged.reads == ""
    privileged.check(parsed, task(verifiable=False, solution=None))


def test_what_can_be_had_is_accepted():
    assert privileged.kinds_of(" sibling,feedback ,") == ("sibling", "feedback")
    privileged.check(settings_of(reads=",".join(KINDS)), task())
    privileged.check(settings_of(reads="solution,demonstration", group_size=1, layout="compact"), task(verifiable=False))
    privileged.check(settings_of(reads="feedback", group_size=1), task(solution=None))


@pytest.mark.parametrize(
    "values, given, message",
    [
        (
            {"reads": "solution,siblings"},
            {},
            "config field context.privileged.reads = 'siblings' is not known; valid: solution, demonstration, feedback, sibling, critique, "
            "analysis; did you mean sibling?",
        ),
        (
            {"reads": "sibling", "group_size": 1},
            {},
            "config field context.privileged.reads = 'sibling': a sibling needs rollout.group_size of at least 2, it is 1; raise it",
        ),
        (
            {"reads": "solution,feedback"},
            {"verifiable": False},
            "config field context.privileged.reads = 'solution,feedback': feedback needs rewards, but task.name = 'arithmetic' has no "
            "verifier; choose another task",
        ),
        (
            {"reads": "sibling"},
            {"verifiable": False},
            "config field context.privileged.reads = 'sibling': sibling needs rewards, but task.name = 'arithmetic' has no verifier; "
            "choose another task",
        ),
        (
            {"reads": "demonstration"},
            {"solution": None},
            "config field context.privileged.reads = 'demonstration': no training example of task.name = 'arithmetic' has a solution to "
            "read as demonstration; add them",
        ),
        (
            {"reads": "analysis"},
            {"solution": None},
            "config field context.privileged.reads = 'analysis': no training example of task.name = 'arithmetic' has a solution to read as "
            "analysis; add them",
        ),
        (
            {"reads": "solution", "layout": "nowhere.jinja"},
            {},
            "config field context.privileged.layout = 'nowhere.jinja': cannot be read (No such file or directory); give words, compact or "
            "a UTF-8 file with a Jinja template",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_had_is_refused(values, given, message):
    with pytest.raises(UserError) as error:
        privileged.check(settings_of(**values), task(**given))
    assert str(error.value) == message


def test_a_layout_without_a_section_that_is_read_is_refused(tmp_path):
    (tmp_path / "l.jinja").write_text("{{ prompt }}{{ solution }}")
    privileged.check(settings_of(reads="solution", layout=str(tmp_path / "l.jinja")), task())
    with pytest.raises(ConfigError, match="does not show sibling as it is, given sibling|prints a section that is not there"):
        privileged.check(settings_of(reads="solution,sibling", layout=str(tmp_path / "l.jinja")), task())
