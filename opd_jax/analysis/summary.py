"""What runs say in words and tables: sentences with numbers, before and after."""

import pathlib
from collections.abc import Sequence
from typing import Any

from opd_jax.analysis import context_sentence
from opd_jax.analysis.formats import Record, estimate, mean, number
from opd_jax.analysis.runs import EVALUATED, Group

COLUMNS = dict(zip(EVALUATED, ("accuracy, greedy", "accuracy, sampled", "reverse KL", "forward KL", "entropy"), strict=True))
# What a summary tells: the evaluations where there are some, otherwise what training measured.
SPOKEN = {
    "eval/accuracy": "greedy accuracy",
    "eval/sampled_accuracy": "sampled accuracy",
    "eval/reverse_kl": "the reverse KL to the teacher",
    "eval/forward_kl": "the forward KL",
}
GRADED = "text"  # the task whose rewards lie between 0 and 1: greedily what is exact is counted, of samples the mean is taken
SPOKEN_OF_TRAINING = {"train/reverse_kl": "the reverse KL on its own completions", "train/loss": "the loss"}
METHODS = {
    "student": "on-policy distillation",
    "teacher": "distillation on the teacher's samples (SeqKD)",
    "dataset": "fine-tuning on the task's solutions (SFT)",
    "mix": "distillation on its own samples and the task's solutions in turn (GKD)",
    "dagger": "distillation on samples that the teacher has a part in (DAgger)",
    "corrected": "distillation on the teacher's continuations of its own beginnings",
    "cache": "distillation on stored completions (offline)",
}
SIGNALS = {"nll": "negative log-likelihood", "reverse_kl": "reverse KL", "forward_kl": "forward KL", "jsd": "Jensen-Shannon divergence"}


# ---- before and after


def _columns(groups: Sequence[Group]) -> dict[str, str]:
    """{metric: header}; where tasks count different things the header has the names of all."""
    headers = [COLUMNS | (_graded(group)[0] if group.config["task.name"] == GRADED else {}) for group in groups]
    return {name: " or ".join(dict.fromkeys(header[name] for header in headers)) for name in COLUMNS}


def _spoken(group: Group) -> dict[str, str]:
    """{metric: words} of the evaluations, whose teacher reads the question alone and, where it is the student, is as it was at first."""
    of_self, informed = group.config["teacher.path"] == "student_init", group.config["context.privileged.reads"]
    whom = "itself before training, which grows with what it learns," if of_self else "the teacher without its context" if informed else ""
    kls = {f"eval/{kind}_kl": f"the {kind} KL to {whom}" for kind in ("reverse", "forward")} if whom else {}
    return SPOKEN | kls | (_graded(group)[1] if group.config["task.name"] == GRADED else {})


def _graded(group: Group) -> tuple[dict[str, str], dict[str, str]]:
    metric, names = group.config["task.metric"], EVALUATED[:2]
    headers, words = (
        ("exact, greedy", f"mean {metric}, sampled"),
        ("the share of exact greedy completions", f"the mean {metric} of samples"),
    )
    return dict(zip(names, headers, strict=True)), dict(zip(names, words, strict=True))


def table(groups: Sequence[Group]) -> list[list[str]]:
    """Header, then one row per state of a student: before and after each run; rows that say the same are one. The teacher comes last."""
    columns = [name for name in COLUMNS if any(name in r for group in groups for run in group.runs for r in run.evaluations)]
    headers = _columns(groups)
    before: dict[tuple, list[str]] = {}
    after, teacher = [], []
    for group in groups:
        evaluated = group.common()
        if not evaluated:
            continue
        start, end = min(evaluated), max(evaluated)
        last = evaluated[end]
        if start == 0:
            before.setdefault(tuple(_cells(group, evaluated[0], columns)), []).append(group.name)
        if end > 0:
            after.append([group.name, _updates(group, end), *_cells(group, last, columns), *_used(group, end)])
        teacher += [record["eval/teacher_sampled_accuracy"] for record in last if "eval/teacher_sampled_accuracy" in record]
    begin = [["before training" if len(before) == 1 else ", ".join(n) + ", before", "0", *c, "", ""] for c, n in before.items()]
    cells = [number(mean(teacher)) if name == "eval/sampled_accuracy" and teacher else "" for name in columns]
    taught = [["teacher", "", *cells, "", ""]] if teacher else []
    return [["student", "updates", *(headers[name] for name in columns), "tokens", "time"], *begin, *after, *taught]


def _cells(group: Group, records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    return [estimate(group.estimate(name, records)) for name in columns]


def _used(group: Group, until: int) -> list[str]:
    return [f"{_mean_of(group, 'rollout/tokens_total', until):,.0f}", f"{_mean_of(group, 'time/total_seconds', until):.0f} s"]


def _mean_of(group: Group, name: str, until: int | None = None) -> float:
    values = [run.last(name, until) or 0 for run in group.runs]
    return sum(values) / len(values)


def _updates(group: Group, step: int) -> str:
    """`3`, or `2 of 3` where that is not the end."""
    return str(step) if step >= group.config["steps"] else _of(group, step)


def _of(group: Group, step: int) -> str:
    return f"{step} of {group.config['steps']}"


def _one_or_range(values: Sequence[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def caption(groups: Sequence[Group]) -> str:
    """What the numbers of the table are."""
    runs = [run for group in groups for run in group.runs]
    prompts = sorted({int(record["eval/prompts"]) for run in runs for record in run.evaluations if "eval/prompts" in record})
    samples, seeds = (sorted({run.config[name] for run in runs}) for name in ("eval.samples", "seed"))
    single, several = any(len(group.runs) == 1 for group in groups), any(len(group.runs) > 1 for group in groups)
    text = ""
    if single:
        rows = "In rows of one seed, in brackets" if several else "In brackets"
        text = f"{rows}: 95% intervals over the {_either(prompts)} held-out evaluation prompts, not over seeds (seed {_either(seeds)}). "
    if several:
        counts = _either(sorted({len(group.runs) for group in groups if len(group.runs) > 1}))
        text += f"Rows of several seeds: means, in brackets 95% t-intervals over the {counts} seeds; tokens and time are means. "
        if any(len({run.evaluations[-1]["step"] for run in group.runs}) > 1 for group in groups if group.common()):
            text += "Seeds that stopped at different updates stand at the last one that all of them evaluated. "
    text += f"All but the greedy column: samples at temperature 1, {_either(samples)} per prompt. KL to the teacher and entropy: nats per "
    text += "token. Tokens: of completions, whichever parts of the loss learnt from them. Time: training, without evaluations."
    if any(config["teacher.path"] == "student_init" or config["context.privileged.reads"] for config in (run.config for run in runs)):
        text += " The teacher of these numbers reads the question alone, and a self-teacher is as it was before training."
    if any(group.config["task.name"] == GRADED for group in groups):
        text += " Exact: the share of completions that equal their reference."
    trained_on = sorted({run.config["task.train_size"] for run in runs})
    if trained_on == [0]:
        return text
    return f"{text} Training prompts: {_either([size or 'unlimited' for size in trained_on])}, drawn again and again."


def _either(values: Sequence) -> str:
    return " or ".join(str(value) for value in values) or "no"


# ---- sentences


def sentences(groups: Sequence[Group]) -> list[str]:
    """For each group what was trained, what changed and what it cost; then how the groups compare."""
    told = [" ".join(filter(None, (_what(group), context_sentence.of(group), _changes(group), _cost(group)))) for group in groups]
    return told + _comparison(groups)


def _what(group: Group) -> str:
    c = group.config
    signal = SIGNALS.get(c["signal.divergence"], c["signal.divergence"])
    if c["signal.divergence"] != "nll":
        part = f", k = {c['signal.k']}, tail {c['signal.tail']}" if c["signal.support"].startswith("topk") else ""
        signal += " over the whole vocabulary" if c["signal.support"] == "full" else f" ({c['signal.support']} support{part})"
    credit = "" if c["estimator.credit"] == "token" else f", credit {c['estimator.credit']}"
    learns = c["rollout.source"] in ("teacher", "dagger", "corrected") or c["signal.divergence"] != "nll"
    teacher = f" from {name}" if learns and (name := _model(c, "teacher")) else ""
    prompts = f" ({c['task.train_size']:,} training prompts)" if c["task.train_size"] else ""
    done = _one_or_range([run.step for run in group.runs])
    seeds = f", seeds {', '.join(map(str, group.seeds))}" if len(group.runs) > 1 else ""
    method, by = METHODS.get(c["rollout.source"], c["rollout.source"]), f"the {signal}{credit}"
    if not c["signal.weight"]:
        method, by = _undistilled(c)
        teacher = teacher if c["preference.weight"] and c["preference.judge"] != "reward" else ""
    return (
        f"{group.name}: {method} of {_model(c, 'student')}{teacher} on {c['task.name']}{prompts}, "
        f"by {by}; {done} of {c['steps']} updates of {c['rollout.batch_size']} completions of at most "
        f"{c['rollout.max_new_tokens']} tokens{seeds}."
    )


def _undistilled(config: dict[str, Any]) -> tuple[str, str]:
    """(method, what it learns by) of a run without the term of `signal`."""
    if config["reward.weight"]:
        return "reinforcement learning", f"its rewards, advantages {config['reward.advantage']}"
    if config["preference.weight"]:
        return "preference optimisation", f"the rankings of {config['preference.judge']}"
    return "training", "the terms beside the signal"


def _model(config: dict[str, Any], block: str) -> str:
    """A model as its config names it, without the folders above it."""
    source = config[f"{block}.path"] or config[f"{block}.recipe"]
    if source:
        rank = config["student.lora.rank"] if block == "student" else 0
        return (pathlib.PurePath(source).name or source) + (f" (LoRA of rank {rank})" if rank else "")
    return f"a new {config['student.init.model_type']}" if block == "student" else ""


def _changes(group: Group) -> str:
    spoken = _spoken(group) if len(group.common()) > 1 else SPOKEN_OF_TRAINING
    told = [text for name, words in spoken.items() if (text := _change(group, name, words))]
    if not told:
        return ""
    over = f" (means of {len(group.runs)} seeds, 95% t-intervals)" if len(group.runs) > 1 else ""
    text, end = f"{'; '.join(told)}{over}.", max(group.common(spoken))
    if end < group.config["steps"]:
        return f"So far, at update {_of(group, end)}: {text}"
    return text[0].upper() + text[1:]


def _change(group: Group, name: str, words: str) -> str:
    """`words rose from a [..] to b [..]`; nothing without two steps at which all runs have a value."""
    records = list(group.common([name]).values())
    if len(records) < 2:
        return ""
    first, last = (group.estimate(name, records[i]) for i in (0, -1))
    if number(first[0]) == number(last[0]):
        return f"{words} stayed at {estimate(last)}"
    verb = "rose" if last[0] > first[0] else "fell"
    doubt = ", within the intervals" if _overlap(first, last) else ""
    return f"{words} {verb} from {estimate(first)} to {estimate(last)}{doubt}"


def _overlap(a, b) -> bool:
    return None not in (*a, *b) and a[1] <= b[2] and b[1] <= a[2]


def _cost(group: Group) -> str:
    seconds, tokens = (_mean_of(group, name) for name in ("time/total_seconds", "rollout/tokens_total"))
    if not seconds:
        return ""
    each = " each" if len(group.runs) > 1 else ""
    devices = {_device(run.sessions[-1]) for run in group.runs if run.sessions}
    place = f" on {' and '.join(sorted(devices))}" if devices else ""
    return f"It took {seconds:,.0f} s of training{each}{place}, {tokens:,.0f} completion tokens ({tokens / seconds:,.0f} per second)."


def _device(session: Record) -> str:
    """What the arithmetic ran on: a CPU by its name and cores, an accelerator by its kind and number."""
    if session.get("platform") == "cpu":
        count = session.get("cpu_count")
        return f"{count} core{'' if count == 1 else 's'} of {session.get('cpu')}"
    return f"{session.get('devices')} × {session.get('device_kind')}"


def _comparison(groups: Sequence[Group]) -> list[str]:
    """How the groups that are finished compare, or, unless two are, those that have begun; and which evaluated ones are left out."""
    last = [(group, max(evaluated), evaluated[max(evaluated)]) for group in groups if (evaluated := group.common())]
    done = [step >= group.config["steps"] for group, step, _ in last]
    finished = sum(done) > 1
    among = done if finished else [step > 0 for _, step, _ in last]
    if sum(among) < 2:
        return []
    left_out = [
        f"{group.name} (evaluated at update {_of(group, step)})" for (group, step, _), here in zip(last, among, strict=True) if not here
    ]
    told = _best([one for one, here in zip(last, among, strict=True) if here], finished)
    return [*told, *([f"Not finished, and not compared: {', '.join(left_out)}."] if left_out and told else [])]


def _best(last: Sequence[tuple[Group, int, list[Record]]], finished: bool) -> list[str]:
    """Which group is best in the first metric that all have, and whether the next one's interval is apart from its own."""
    for name in SPOKEN:
        kinds = {_spoken(group)[name] for group, _, _ in last}
        values = [(group.estimate(name, records), group, step) for group, step, records in last]
        if len(kinds) > 1 or any(value is None for value, _, _ in values):
            continue
        better = "highest" if "accuracy" in name else "lowest"
        (best, first, step), (next_best, second, next_step), *_ = sorted(values, key=lambda v: v[0][0], reverse=better == "highest")
        metric = kinds.pop().removeprefix("the ")
        at, next_at = ("", "") if finished else (f" (update {_of(first, step)})", f" (update {_of(second, next_step)})")
        if best[0] == next_best[0]:
            verb = "end with" if finished else "have so far"
            return [f"{first.name}{at} and {second.name}{next_at} {verb} the same {metric}, {estimate(best)}."]
        apart = "their intervals overlap" if _overlap(best, next_best) else "their intervals do not overlap"
        apart = f"; {apart}" if None not in (*best, *next_best) else ""
        start = f"{first.name} ends with" if finished else f"So far {first.name} has"
        return [f"{start} the {better} {metric}, {estimate(best)}{at}, then {second.name}, {estimate(next_best)}{next_at}{apart}."]
    return []
