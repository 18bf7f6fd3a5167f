"""What a teacher reads beside the question: a solution, a demonstration, feedback, another attempt, what it wrote. From texts to a text.

The student never reads any of it. A rollout for which there is nothing to read is masked out of the teacher's term by the caller.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence

from opd_jax import config as config_lib
from opd_jax import files
from opd_jax.config import ConfigError, check_choice
from opd_jax.data.contexts import read_template
from opd_jax.data.tasks import Example, Task

KINDS = ("solution", "demonstration", "feedback", "sibling", "critique", "analysis")
_GOLD = ("solution", "demonstration")  # the example's solution, in other words
_JUDGED = ("feedback", "sibling")  # need the verdict of a verifier
WRITTEN = ("critique", "analysis")  # by the first teacher, before it scores
_CUTTABLE = ("feedback", *WRITTEN)
NO_SECTION, TOO_LONG = "no_section", "too_long"  # why a rollout has no teacher prompt

_FIELD = "context.privileged"
_LOOKED_AT = 10_000  # training examples among which one must have a solution
_CUT = " ..."  # ends what was shortened
_THINK = re.compile(r"</?think>")
# Every line break, quote and bracket must come through a layout as it is.
_PROBE = 'the {0} <of> "probe" & {{{{ 1 + 1 }}}}\nand its\tsecond line'

WORDS = """{{ prompt }}
{% if solution %}

This solution is known to be right:
{{ solution }}
{% endif %}
{% if demonstration %}

This is how a good answer reads:
{{ demonstration }}
{% endif %}
{% if sibling %}

Another attempt was accepted:
{{ sibling }}
{% endif %}
{% if feedback %}

What a check of an earlier attempt has shown:
{{ feedback }}
{% endif %}
{% if critique %}

What a reader of an earlier attempt remarks:
{{ critique }}
{% endif %}
{% if analysis %}

What a reader of the solution says of it:
{{ analysis }}
{% endif %}

Now answer from the beginning, in words of your own.
"""
# For models too small to read sentences: each section behind a mark, and the prompt last, so that it goes on as after the plain prompt.
COMPACT = "".join(f"{{% if {kind} %}}{mark}{{{{ {kind} }}}}\n{{% endif %}}" for kind, mark in zip(KINDS, "=>!+?~", strict=True))
COMPACT += "{{ prompt }}"
LAYOUTS = {"words": WORDS, "compact": COMPACT}

# What the first teacher reads before it writes: with the layout compact, and with every other.
WRITING = {
    "critique": """{{ prompt }}

This answer was given:
{{ attempt }}
{% if solution %}

This solution is known to be right:
{{ solution }}
{% endif %}

Say what is wrong with the answer, and how to mend it.
""",
    "analysis": """{{ prompt }}

This solution is known to be right:
{{ solution }}

Explain, step by step, why it is right.
""",
}
WRITING_COMPACT = {
    "critique": "{% if solution %}={{ solution }}\n{% endif %}{{ prompt }}{{ attempt }}?",
    "analysis": "={{ solution }}\n{{ prompt }}~",
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A completion as text, with its verdict."""

    text: str
    reward: float  # 1 is a success
    feedback: str = ""  # what was wrong, in words
    well_formed: bool = True  # the verifier could read it


@dataclasses.dataclass(frozen=True)
class Sections:
    """What there is to read beside the prompt of one rollout; None: nothing of this kind."""

    solution: str | None = None
    demonstration: str | None = None
    feedback: str | None = None
    sibling: str | None = None
    critique: str | None = None
    analysis: str | None = None


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A teacher prompt that fits, or the reason why there is none."""

    text: str | None
    shortened: bool = False  # feedback, critique or analysis lost their end
    dropped: str = ""  # where text is None: NO_SECTION or TOO_LONG


def kinds_of(reads: str) -> tuple[str, ...]:
    """The kinds that context.privileged.reads names. Raises ConfigError for one that is not known."""
    kinds = tuple(kind.strip() for kind in reads.split(",") if kind.strip())
    for kind in kinds:
        check_choice(f"{_FIELD}.reads", kind, KINDS)
    return kinds


def written(reads: str) -> tuple[str, ...]:
    """Those of them that the first teacher writes."""
    return tuple(kind for kind in WRITTEN if kind in kinds_of(reads))


def gather(
    kinds: Sequence[str],
    example: Example,
    attempts_of_the_group: Sequence[Attempt],
    own_index: int,
    *,
    success: float,
    feedback_with_solution: bool,
    strip_thinking: bool,
    critique: str | None = None,
    analysis: str | None = None,
) -> Sections:
    """The sections of rollout `own_index` (from 0) of a group, as far as `kinds` names them; a text of white space is none.

    The sibling is the first other attempt with a reward of at least `success` (and a text, without its thinking), so that a lone success
    has none. Feedback is that of the own attempt, by default only where no right answer (solution, demonstration or sibling) is read.
    Source: Huebotter et al. 2026 (SDPO), arXiv 2601.20802; in TRL dont_reprompt_on_self_success and
    environment_feedback_only_without_solution.
    """
    if any(kind in kinds for kind in _JUDGED) and not 0 <= own_index < len(attempts_of_the_group):
        raise IndexError(f"own_index = {own_index} in a group of {len(attempts_of_the_group)}")
    found = {kind: _text(example.solution) for kind in _GOLD if kind in kinds}
    if "sibling" in kinds:
        others = [attempt for i, attempt in enumerate(attempts_of_the_group) if i != own_index]
        found["sibling"] = _solved(others, success, strip_thinking)
    if "feedback" in kinds and (feedback_with_solution or not any(found.values())):
        found["feedback"] = _text(attempts_of_the_group[own_index].feedback)
    if "critique" in kinds:
        found["critique"] = _text(critique)
    if "analysis" in kinds:
        found["analysis"] = _text(analysis)
    return Sections(**found)


def _solved(attempts: Sequence[Attempt], success: float, strip_thinking: bool) -> str | None:
    """The first that succeeded and has a text."""
    texts = (attempt.text for attempt in attempts if attempt.reward >= success)
    return next((text for text in map(without_thinking if strip_thinking else str, texts) if _text(text)), None)


def _text(text: str | None) -> str | None:
    return text if text and text.strip() else None


def without_thinking(text: str) -> str:
    """The text without what stands between <think> and </think>, also nested, and without white space around what is left.

    What is never closed runs to the end; what is closed without having been opened began in the prompt, as chat templates have it.
    """
    kept, depth, start = [], 0, 0
    for tag in _THINK.finditer(text):
        if tag.group() == "<think>":
            if depth == 0:
                kept.append(text[start : tag.start()])
            depth += 1
        else:
            if depth == 0:
                kept.clear()
            depth, start = max(depth - 1, 0), tag.end()
    return "".join([*kept, text[start:] if depth == 0 else ""]).strip()


def layout_text(name: str) -> str:
    """Jinja text of a built-in layout, or of a file. Raises UserError for a file that cannot be read."""
    if name in LAYOUTS:
        return LAYOUTS[name]
    remedy = f"give {', '.join(LAYOUTS)} or a UTF-8 file with a Jinja template"
    return read_template(name, where=f"config field {_FIELD}.layout = {name!r}", remedy=remedy)


def file_text(settings: config_lib.Privileged) -> str:
    """The text of a layout that is read from a file; empty where none is. Raises UserError."""
    return layout_text(settings.layout) if settings.reads and settings.layout not in LAYOUTS else ""


def render(layout: str, prompt: str, sections: Sections) -> str | None:
    """The teacher's prompt by a layout (Jinja text); None where there is no section. Raises ConfigError for one that cannot be rendered.

    The layout sees `prompt` and a variable of each kind, which is None where there is nothing; to print None is an error.
    """
    texts = vars(sections)
    if not any(texts.values()):
        return None
    try:
        return _compiled(layout).render(prompt=prompt, **texts)
    except Exception as error:  # a template is a program, and may raise what it likes
        raise ConfigError(f"the layout cannot be rendered ({files.reason(error)}); correct it, or give another layout") from None


@functools.lru_cache(maxsize=8)
def _compiled(layout: str):
    import jinja2
    import jinja2.sandbox

    def shown(value):
        if value is None:
            raise jinja2.UndefinedError("it prints a section that is not there")
        return value

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, finalize=shown, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(layout)


def writing_prompt(kind: str, layout: str, prompt: str, *, attempt: str | None, solution: str | None) -> str | None:
    """What the first teacher reads before it writes a critique of `attempt` or an analysis of `solution`; None without what it is of.

    `layout` is a name of context.privileged.layout. Sources: critiques as in G-OPD's code (Yang et al. 2026), an analysis before scoring as
    in that of OPSD (Zhao et al. 2026, reason_first).
    """
    if not _text(attempt if kind == "critique" else solution):
        return None
    template = (WRITING_COMPACT if layout == "compact" else WRITING)[kind]
    return _compiled(template).render(prompt=prompt, attempt=attempt, solution=_text(solution))


def check_layout(layout: str, kinds: Sequence[str], *, name: str) -> None:
    """Refuses a layout that changes or leaves out the prompt or a section, whichever of `kinds` there are. Raises ConfigError."""
    where = f"config field {_FIELD}.layout = {name!r}"
    probe = _PROBE.format
    for size in range(1, len(kinds) + 1):
        for present in itertools.combinations(kinds, size):
            try:
                rendered = render(layout, probe("prompt"), Sections(**{kind: probe(kind) for kind in present}))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
            missing = [what for what in ("prompt", *present) if probe(what) not in rendered]
            if missing:
                raise ConfigError(f"{where}: does not show {', '.join(missing)} as it is, given {', '.join(present)}; correct the layout")


def fit(layout: str, prompt: str, sections: Sections, *, length_of: Callable[[str], int], room: int) -> Fitted:
    """The teacher's prompt in at most `room` tokens; `length_of` counts those of a rendered prompt as the teacher reads it.

    Feedback, critique and analysis lose their end where they must (all are cut to one number of characters, found by bisection); question,
    solution, demonstration and sibling are whole, or there is no prompt.
    """
    whole = render(layout, prompt, sections)
    if whole is None:
        return Fitted(None, dropped=NO_SECTION)
    if length_of(whole) <= room:
        return Fitted(whole)
    fits = render(layout, prompt, _cut(sections, 0))
    if fits is not None and length_of(fits) > room:
        return Fitted(None, dropped=TOO_LONG)
    low, high = 0, max(len(getattr(sections, kind) or "") for kind in _CUTTABLE)  # characters: `low` fit, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        tried = render(layout, prompt, _cut(sections, middle))
        if tried is None or length_of(tried) <= room:
            low, fits = middle, tried
        else:
            high = middle
    return Fitted(None, dropped=TOO_LONG) if fits is None else Fitted(fits, shortened=True)


def _cut(sections: Sections, characters: int) -> Sections:
    return dataclasses.replace(sections, **{kind: _head(getattr(sections, kind), characters) for kind in _CUTTABLE})


def _head(text: str | None, characters: int) -> str | None:
    if text is None or len(text) <= characters:
        return text
    kept = text[:characters].rstrip()
    return kept + _CUT if kept else None


def check(config: config_lib.Config, task: Task) -> None:
    """Refuses, before any work, what context.privileged asks for and the run cannot give. Raises UserError."""
    settings = config.context.privileged
    kinds = kinds_of(settings.reads)
    reads = f"config field {_FIELD}.reads = {settings.reads!r}"
    if "sibling" in kinds and config.rollout.group_size < 2:
        raise ConfigError(f"{reads}: a sibling needs rollout.group_size of at least 2, it is {config.rollout.group_size}; raise it")
    for kind in _JUDGED:
        if kind in kinds and not (task.verifiable or config.reward.judge):
            raise ConfigError(f"{reads}: {kind} needs rewards, but task.name = {config.task.name!r} has no verifier; choose another task")
    gold = [kind for kind in (*_GOLD, "analysis") if kind in kinds]
    if gold and all(example.solution is None for example in itertools.islice(task.examples("train"), _LOOKED_AT)):
        raise ConfigError(f"{reads}: no training example of task.name = {config.task.name!r} has a solution to read as {gold[0]}; add them")
    if kinds:
        check_layout(layout_text(settings.layout), kinds, name=settings.layout)
