"""Every metric of a record: what it means, its formula, its unit. docs/metrics.md is made of this by experiments/glossary.py.

A new metric is one more entry of updates.py, evaluations.py or diagnosis.py; the tests compare the names with those that runs emit.
"""

from opd_jax.glossary import diagnosis, evaluations, updates
from opd_jax.glossary.description import Description as Description

# A metric with one of these in its name depends on the clock; all others are reproducible bit for bit on one machine.
CLOCK = ("time/", "per_second", "memory")
# Metrics that come once more for each domain or kind, NAME/TAG: as many as the examples have tags, or the teacher reads kinds.
FAMILIES = ("eval/accuracy", "eval/sampled_accuracy", "train/token_share", "context/accuracy", "context/gold_logp")
FAMILIES += ("context/gold_gain", "context/gold_gain_low", "context/gold_gain_high")

NOTATION = (
    ("pi, q", "student and teacher, at temperature 1"),
    ("y_bt, c_bt", "token t of completion b; what stands before it: the prompt and y_b1 ... y_b(t-1)"),
    ("m_bt", "1 on the tokens of a completion, its stop token included; 0 on what follows"),
    ("B, M", "completions of the step, or of the evaluation; their tokens, M = sum_bt m_bt"),
    ("K_bt", "KL(pi || q) = sum_v pi(v|c_bt) (log pi(v|c_bt) - log q(v|c_bt)), the sum over the whole vocabulary"),
    ("l_bt", "log-ratio log q(y_bt|c_bt) - log pi(y_bt|c_bt)"),
    ("H_bt", "entropy -sum_v pi(v|c_bt) log pi(v|c_bt)"),
    ("r_b", "reward of the task's verifier for completion b; at least 1 is a success"),
    ("P, k", "evaluation prompts, eval.prompts at most; completions sampled for each, eval.samples"),
    ("n", "updates done, `step`"),
    ("sg", "stop-gradient: a constant for the derivative"),
)


def entry(name: str) -> str:
    """The name under which GLOSSARY has a metric: itself, or that of its family, such as eval/accuracy/TAG for eval/accuracy/algebra."""
    families = [family for family in FAMILIES if name.startswith(f"{family}/") and len(name) > len(family) + 1]
    return f"{families[0]}/TAG" if families else name


def depends_on_clock(name: str) -> bool:
    """Whether a metric of this name may differ between two runs of the same config on one machine."""
    return any(word in entry(name) for word in CLOCK)


GLOSSARY: dict[str, Description] = {**updates.described(), **diagnosis.described(), **evaluations.described()}

_PAGE = """# Metrics

Made by `python experiments/glossary.py` from `opd_jax/glossary/`: change its files and run the command.

One record per step is a line of a run's `metrics.jsonl`; TensorBoard and Weights & Biases show the same numbers under the same names
(`log.tensorboard`, `log.wandb`). A record holds the metrics that apply: those of `eval/` where an evaluation was due, those that compare
with a teacher where there is one, rewards where the task has a verifier. Metrics marked *clock* depend on the machine and the moment; all
others are the same bit for bit when the same run is made again on the same machine.
Those of `diag/` are measured where log.diagnostics is on; no number of an update depends on it.

## Notation

{notation}
"""


def markdown() -> str:
    """The page: notation, then a table per group of names."""
    groups: dict[str, list[str]] = {}
    for name in GLOSSARY:
        group, _, rest = name.rpartition("/")
        groups.setdefault(group or "step", []).append(name)
    parts = [_PAGE.format(notation=_table([("symbol", "meaning"), *((f"`{symbol}`", meaning) for symbol, meaning in NOTATION)]))]
    for group, names in groups.items():
        header = ("metric", "meaning", "formula", "unit", "depends on")
        parts.append(f"## {group}\n\n{_table([header, *map(_row, names)])}\n")
    return "\n".join(parts)


def _row(name: str) -> tuple[str, ...]:
    one = GLOSSARY[name]
    meaning = f"{one.meaning} ({one.source})" if one.source else one.meaning
    return f"`{name}`", meaning, f"`{one.formula}`", one.unit, "clock" if depends_on_clock(name) else ""


def _table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; a bar within a cell is escaped, also within code, as GitHub asks."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
