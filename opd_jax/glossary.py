"""Every metric of a record: what it means, its formula, its unit. docs/metrics.md is made of this by experiments/glossary.py.

A new metric is one more entry of `_described`; the tests compare the names with those that runs emit.
"""

import dataclasses

# A metric with one of these in its name depends on the clock; all others are reproducible bit for bit on one machine.
CLOCK = ("time/", "per_second", "memory")

NOTATION = (
    ("pi, q", "student and teacher, at temperature 1"),
    ("y_bt, c_bt", "token t of completion b; what stands before it: the prompt and y_b1 ... y_b(t-1)"),
    ("m_bt", "1 on the tokens of a completion, its stop token included; 0 on what follows"),
    ("B, M", "completions of the step, or of the evaluation; their tokens, M = sum_bt m_bt"),
    ("K_bt", "KL(pi || q) = sum_v pi(v|c_bt) (log pi(v|c_bt) - log q(v|c_bt)), the sum over the whole vocabulary"),
    ("H_bt", "entropy -sum_v pi(v|c_bt) log pi(v|c_bt)"),
    ("r_b", "reward of the task's verifier for completion b; at least 1 is a success"),
    ("P, k", "evaluation prompts, eval.prompts at most; completions sampled for each, eval.samples"),
    ("n", "updates done, `step`"),
    ("sg", "stop-gradient: a constant for the derivative"),
)


@dataclasses.dataclass(frozen=True)
class Description:
    meaning: str
    formula: str
    unit: str
    source: str = ""


def depends_on_clock(name: str) -> bool:
    """Whether a metric of this name may differ between two runs of the same config on one machine."""
    return any(word in name for word in CLOCK)


def _described() -> dict[str, Description]:
    return {
        "step": Description("updates done", "n", "updates"),
        "train/loss": Description(
            "objective on this step's batch before the update (of sampled tokens, and credits beyond the token, only its gradient counts)",
            "(1/Z) sum_bt w_bt (D_bt - sg(A_bt) log pi(y_bt|c_bt)); D of signal.divergence, A of estimator.credit (either may be absent), "
            "both at the temperatures of loss; w and Z of loss.normaliser (token_mean: w = m, Z = M)",
            "nats, scaled by the normaliser",
        ),
        "train/grad_norm": Description(
            "norm of the gradient over all parameters, before clipping", "sqrt(sum_i (d loss / d theta_i)^2)", "loss per parameter unit"
        ),
        "train/learning_rate": Description("learning rate of this update", "schedule(n - 1)", "-"),
        "train/reverse_kl": Description(
            "reverse KL to the teacher on the student's own completions (rollout.source = student)", "(1/M) sum_bt m_bt K_bt", "nats/token"
        ),
        "train/log_ratio_mean": Description(
            "log-ratio of teacher to student on the student's own completions (rollout.source = student); drawn from pi itself, its "
            "expectation is minus train/reverse_kl",
            "(1/M) sum_bt m_bt (log q(y_bt|c_bt) - log pi(y_bt|c_bt))",
            "nats/token",
        ),
        "train/tokens": Description("completion tokens in this step's loss", "M", "tokens"),
        "rollout/length": Description("mean length of this step's completions, stop token included", "M / B", "tokens"),
        "rollout/truncated_fraction": Description(
            "share of completions without a stop token, cut off by max_new_tokens", "(1/B) sum_b 1[no stop token in y_b]", "fraction"
        ),
        "rollout/entropy": Description(
            "entropy of the student along this step's completions, whoever wrote them", "(1/M) sum_bt m_bt H_bt", "nats/token"
        ),
        "rollout/reward": Description(
            "mean reward of this step's completions (tasks with a verifier, sampled completions)", "(1/B) sum_b r_b", "reward"
        ),
        "rollout/prompts_truncated": Description(
            "prompts of this step that lost their first tokens", "number of prompts longer than rollout.max_prompt_length", "prompts"
        ),
        "rollout/tokens_total": Description("completion tokens in the loss since the run began", "sum of M over steps 1 ... n", "tokens"),
        "rollout/tokens_per_second": Description("completion tokens of this step per second", "M / time/step_seconds", "tokens/s"),
        "time/step_seconds": Description(
            "wall time of this step, without evaluations and checkpoints", "t(step finished on the device) - t(the one before)", "s"
        ),
        "time/total_seconds": Description("time spent in steps since the run began", "sum of time/step_seconds over steps 1 ... n", "s"),
        **_evaluations(),
    }


def _evaluations() -> dict[str, Description]:
    return {
        "eval/prompts": Description("held-out prompts of this evaluation", "P", "prompts"),
        "eval/accuracy": Description(
            "share of held-out prompts whose greedy completion the verifier accepts",
            "(1/P) sum_p 1[r(greedy completion of p) >= 1]",
            "fraction",
        ),
        **_interval("eval/accuracy", "fraction", _WILSON, "Wilson 1927"),
        "eval/sampled_accuracy": Description(
            "mean reward of the student's samples at temperature 1 (avg@k)", "(1/P) sum_p (1/k) sum_j r_pj", "fraction"
        ),
        **_interval("eval/sampled_accuracy", "fraction", _BOOTSTRAP, "Efron 1979"),
        "eval/pass_at_k": Description(
            "chance that at least one of k samples is accepted, k = eval.samples",
            "(1/P) sum_p (1 - C(k - s_p, k) / C(k, k)) = (1/P) sum_p 1[s_p >= 1]; s_p successes among the k samples of p",
            "fraction",
            "Chen et al. 2021, Evaluating Large Language Models Trained on Code",
        ),
        "eval/teacher_sampled_accuracy": Description(
            "mean reward of the teacher's samples at temperature 1", "(1/P) sum_p (1/k) sum_j r_pj, completions of the teacher", "fraction"
        ),
        "eval/reverse_kl": Description(
            "reverse KL to the teacher on fresh samples of the student, exact over the vocabulary",
            "sum_bt m_bt K_bt / M over the B = P k samples of the student",
            "nats/token",
        ),
        **_interval("eval/reverse_kl", "nats/token", _BOOTSTRAP, "Efron 1979"),
        "eval/forward_kl": Description(
            "forward KL, from the teacher, on fresh samples of the teacher, exact over the vocabulary",
            "sum_bt m_bt KL(q || pi)(c_bt) / M over the B = P k samples of the teacher",
            "nats/token",
        ),
        **_interval("eval/forward_kl", "nats/token", _BOOTSTRAP, "Efron 1979"),
        "eval/entropy": Description("entropy of the student along its own samples", "(1/M) sum_bt m_bt H_bt", "nats/token"),
        "eval/length": Description("mean length of the student's samples, stop token included", "M / B", "tokens"),
        "eval/truncated_fraction": Description(
            "share of the student's samples that max_new_tokens cut off", "(1/B) sum_b 1[no stop token in y_b]", "fraction"
        ),
        "time/eval_seconds": Description("wall time of this evaluation", "t(end) - t(start)", "s"),
    }


_WILSON = "(s + z^2/2 {sign} z sqrt(s (P - s) / P + z^2/4)) / (P + z^2); s accepted prompts, z = 1.960"
_BOOTSTRAP = "{percent}% quantile over 2000 resamples of the prompts with replacement (left out where P = 1)"


def _interval(name: str, unit: str, formula: str, source: str) -> dict[str, Description]:
    """The ends of a 95% interval over the evaluation prompts."""
    ends = {"low": {"sign": "-", "percent": "2.5"}, "high": {"sign": "+", "percent": "97.5"}}
    return {
        f"{name}_{end}": Description(f"{end} end of the 95% interval of {name} over the prompts", formula.format(**words), unit, source)
        for end, words in ends.items()
    }


GLOSSARY: dict[str, Description] = _described()

_PAGE = """# Metrics

Made by `python experiments/glossary.py` from `opd_jax/glossary.py`: change that file and run the command.

One record per step is a line of a run's `metrics.jsonl`; TensorBoard and Weights & Biases show the same numbers under the same names
(`log.tensorboard`, `log.wandb`). A record holds the metrics that apply: those of `eval/` where an evaluation was due, those that compare
with a teacher where there is one, rewards where the task has a verifier. Metrics marked *clock* depend on the machine and the moment; all
others are the same bit for bit when the same run is made again on the same machine.

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
