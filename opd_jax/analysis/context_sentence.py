"""What a teacher makes of the context that it reads, in a sentence: where reading adds nothing, a student has nothing to learn from it."""

from opd_jax.analysis.formats import Record, estimate, mean, number
from opd_jax.analysis.runs import Group
from opd_jax.data.tasks.informed import KINDS


def of(group: Group) -> str:
    """For each kind of context what it adds to gold answers, and to accuracy, before the first update; nothing where none was measured."""
    records = [run.records[0] if run.records else {} for run in group.runs]
    told = [_kind(group, records, kind) for kind in KINDS if all(f"context/gold_gain/{kind}" in record for record in records)]
    if not told:
        return ""
    return f"Before the first update, on held-out gold answers and in nats per token, the teacher gains {', and '.join(told)}."


def _kind(group: Group, records: list[Record], kind: str) -> str:
    found = group.estimate(f"context/gold_gain/{kind}", records)
    if len(records) == 1:
        found = found[0], records[0].get(f"context/gold_gain_low/{kind}"), records[0].get(f"context/gold_gain_high/{kind}")
    names = ("context/accuracy", f"context/accuracy/{kind}")
    accuracies = [[record[name] for record in records if name in record] for name in names]
    changed = f" (accuracy {' -> '.join(number(mean(values)) for values in accuracies)})" if all(accuracies) else ""
    doubt = ", which may be nothing," if found[1] is not None and found[1] <= 0 else ""
    return f"{estimate(found)}{doubt} by reading the {kind}{changed}"
