"""Logged samples for the page: how much of them is shown, text made safe to look at, and the tokens that the teacher likes least."""

import collections
import json
import math
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import Any

from opd_jax.analysis.runs import Run

SCALE = 3.0  # nats of log-ratio at which the colour is full
STEPS, SAMPLES, TOKENS = 24, 4, 1000  # shown at most: steps of a run, samples of a step, tokens of a sample
PAGE_TOKENS = 30_000  # shown at most in all, some 130 bytes each
PROMPT_CHARACTERS = 2000  # its last ones are shown
WORST, AROUND = 12, 40  # tokens listed, characters of context before each
COLUMNS = {"student_logp": "s", "student_entropy": "h", "teacher_logp": "q", "teacher_entropy": "g"}

Sample = dict[str, Any]


# ---- text


def visible(text: str, *, breaks: str = "\n") -> str:
    """Text in which nothing hides: control characters as their pictures, format characters (direction overrides, zero widths) and broken
    surrogates as ⟨U+202E⟩. A line break becomes `breaks`; a tab stays."""
    return "".join(_visible(character, breaks) for character in text)


def _visible(character: str, breaks: str) -> str:
    if character == "\n":
        return breaks
    category = unicodedata.category(character)
    if character == "\t" or category not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def token_text(token: str, *, breaks: str = "⏎") -> str:
    """A token that can be pointed at: made visible, and combining marks alone on a dotted circle instead of the token before them."""
    marks = token and all(unicodedata.category(character).startswith("M") for character in token)
    return ("◌" if marks else "") + visible(token, breaks=breaks)


def script_json(value: Any) -> str:
    """JSON for the inside of a <script> element: ASCII alone, and nothing that could end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ---- what is shown


def tokens_of(sample: Sample) -> list[str] | None:
    """The tokens of a sample if it has a value of the student for each; None for a line of text alone."""
    return (sample.get("tokens") or None) if "student_logp" in sample else None


def log_ratios(sample: Sample) -> list[float | None]:
    """log q - log pi of each token; None where one of them is not known."""
    own = sample["student_logp"]
    return [None if None in (q, p) else q - p for q, p in zip(sample.get("teacher_logp", [None] * len(own)), own, strict=True)]


def choose(run: Run, runs: int) -> tuple[dict[int, list[Sample]], int, str]:
    """(samples by step, tokens shown of each, what was left out, in words) of one of so many runs on a page.

    Steps are evenly spaced through training; the first and the last are always among them.
    """
    by_step: dict[int, list[Sample]] = {}
    for sample in run.samples:
        by_step.setdefault(sample["step"], []).append(sample)
    if not by_step:
        return {}, 0, ""
    logged = sorted(by_step)
    share = PAGE_TOKENS // runs
    limit = max(min(TOKENS, share // (2 * SAMPLES)), 1)
    cost = max(sum(min(len(tokens_of(s) or ()), limit) for s in by_step[step][:SAMPLES]) for step in logged)
    count = max(min(STEPS, len(logged), share // max(cost, 1)), 2)
    steps = sorted({logged[round(i * (len(logged) - 1) / (count - 1))] for i in range(count)})
    shown = {step: by_step[step][:SAMPLES] for step in steps}
    return shown, limit, _left_out(by_step, shown, limit)


def _left_out(by_step: dict[int, list[Sample]], shown: dict[int, list[Sample]], limit: int) -> str:
    parts = []
    if len(shown) < len(by_step):
        parts.append(f"{len(shown)} of {len(by_step)} logged steps")
    most = max(map(len, by_step.values()))
    if most > SAMPLES:
        parts.append(f"{SAMPLES} of up to {most} samples of each step")
    longest = max(len(tokens_of(sample) or ()) for samples in shown.values() for sample in samples)
    if longest > limit:
        parts.append(f"the first {limit:,} tokens of samples with up to {longest:,}")
    return f"Shown: {', '.join(parts)}; samples.jsonl in the run directory has them all." if parts else ""


def note(run: Run, left_out: str) -> str:
    """What a reader of the run's samples has to know."""
    template = run.config["context.student.template"]
    if template == "none" or not run.samples:
        return left_out
    name = pathlib.PurePath(template).name
    said = f"Prompts are the task's; the student read each of them inside a chat template (context.student.template: {name})."
    return f"{said} {left_out}".rstrip()


def page_data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script of the page reads: names are short because there is one for every token."""
    data = []
    for run in runs:
        shown, limit, left_out = choose(run, len(runs))
        texts: dict[str, int] = {}
        steps = [{"step": step, "samples": [_entry(sample, limit, texts) for sample in samples]} for step, samples in shown.items()]
        data.append(
            {"name": visible(run.name), "steps": steps, "texts": [token_text(text) for text in texts], "note": visible(note(run, left_out))}
        )
    return {"scale": SCALE, "runs": data}


def _entry(sample: Sample, limit: int, texts: dict[str, int]) -> dict[str, Any]:
    """One sample: prompt, then for each token its text and values; or, where no values were logged, the completion's text."""
    entry = {"prompt": prompt_of(sample)}
    tokens = tokens_of(sample)
    if tokens is None:
        return entry | {"text": completion_of(sample)}
    entry |= {"t": [token_text(token, breaks="⏎\n") for token in tokens[:limit]], "more": max(len(tokens) - limit, 0)}
    entry["special"] = [position for position in sample.get("special", []) if position < limit]
    for name, short in COLUMNS.items():
        if name in sample:
            entry[short] = [None if value is None else float(f"{value:.4g}") for value in sample[name][:limit]]
    if "teacher_top" in sample:
        tops = sample["teacher_top"][:limit]
        entry["top"] = [[x for text, p in top for x in (texts.setdefault(text, len(texts)), p)] for top in tops]
    return entry


def prompt_of(sample: Sample) -> str:
    prompt = sample["prompt"]
    cut = "… " if len(prompt) > PROMPT_CHARACTERS else ""
    return cut + visible(prompt[-PROMPT_CHARACTERS:])


def completion_of(sample: Sample, characters: int = 4 * TOKENS) -> str:
    completion = sample["completion"]
    return visible(completion[:characters]) + (" …" if len(completion) > characters else "")


# ---- worst tokens


def worst_tokens(run: Run) -> list[dict[str, Any]]:
    """Tokens by the sum of their log-ratios over all logged samples, the most negative first: count, sum, mean, lowest with its context.

    By the mean the tokens that were drawn once would come first.
    """
    found: dict[tuple[str, bool], list[tuple[float, Sample, int]]] = collections.defaultdict(list)
    for sample in run.samples:
        if tokens_of(sample) is None:
            continue
        special, given = (set(sample.get(name, ())) for name in ("special", "given"))  # what the student did not write says nothing of it
        for position, ratio in enumerate(log_ratios(sample)):
            if ratio is not None and sample["tokens"][position] and position not in given:
                found[sample["tokens"][position], position in special].append((ratio, sample, position))
    rows = []
    for (token, special), seen in found.items():
        lowest, sample, position = min(seen, key=lambda one: one[0])
        total = math.fsum(ratio for ratio, _, _ in seen)
        before = (sample["prompt"] + "".join(sample["tokens"][:position]))[-AROUND:]
        after = "".join(sample["tokens"][position + 1 : position + 6])
        context = {"before": visible(before, breaks="⏎"), "after": visible(after, breaks="⏎")}
        text = {"token": token_text(token), "special": special, "step": sample["step"]}
        rows.append(text | {"count": len(seen), "total": total, "mean": total / len(seen), "lowest": lowest, **context})
    rows = [row for row in rows if row["total"] < 0]
    return sorted(rows, key=lambda row: (row["total"], row["token"]))[:WORST]
