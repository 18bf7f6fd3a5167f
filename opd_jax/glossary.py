"""Every metric of a record: what it means, its formula, its unit. docs/metrics.md is made of this by experiments/glossary.py.

A new metric is one more entry of `_described`; the tests compare the names with those that runs emit.
"""

import dataclasses

# A metric with one of these in its name depends on the clock; all others are reproducible bit for bit on one machine.
CLOCK = ("time/", "per_second", "memory")
# Metrics that come once more for each domain, NAME/TAG: as many as the examples have tags.
FAMILIES = ("eval/accuracy", "eval/sampled_accuracy")

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


@dataclasses.dataclass(frozen=True)
class Description:
    meaning: str
    formula: str
    unit: str
    source: str = ""


def entry(name: str) -> str:
    """The name under which GLOSSARY has a metric: itself, or that of its family, such as eval/accuracy/TAG for eval/accuracy/algebra."""
    families = [family for family in FAMILIES if name.startswith(f"{family}/") and len(name) > len(family) + 1]
    return f"{families[0]}/TAG" if families else name


def depends_on_clock(name: str) -> bool:
    """Whether a metric of this name may differ between two runs of the same config on one machine."""
    return any(word in entry(name) for word in CLOCK)


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
            "(1/M) sum_bt m_bt l_bt",
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
        **_rewards(),
        "time/step_seconds": Description(
            "wall time of this step, without evaluations and checkpoints", "t(step finished on the device) - t(the one before)", "s"
        ),
        "time/total_seconds": Description("time spent in steps since the run began", "sum of time/step_seconds over steps 1 ... n", "s"),
        **_costs(),
        **_diagnostics(),
        **_evaluations(),
    }


def _costs() -> dict[str, Description]:
    """By the accounting of cost.py, whose docstring says what N counts."""
    resumed = "; of a run begun by a version that did not count, without the prompts until then"
    return {
        "cost/flops_total": Description(
            f"floating-point operations of all updates (sampling, teacher, training), without diagnostics and evaluations{resumed}",
            "sum over steps 1 ... n and completions of 2 N_g (x + T) + 2 N_q (x' + T) + 6 N (x + T); T tokens of the completion, x and x' "
            "of its prompt as student and teacher read it; N, N_g and N_q parameters of the student, of the model that samples (0: a data "
            "set; a teacher reads x'), and of the teacher where it scores; with an adapter 4 N + 2 N_adapter for 6 N",
            "FLOPs",
            "Kaplan et al. 2020, Scaling Laws for Neural Language Models, 2.1; here the output projection counts",
        ),
        "cost/generated_tokens_total": Description(
            "completion tokens that were sampled since the run began, 0 where a data set has them", "sum of M over steps 1 ... n", "tokens"
        ),
        "cost/scored_tokens_total": Description(
            "completion tokens that frozen models have scored since the run began", "sum of M over steps 1 ... n, once a model", "tokens"
        ),
    }


def _rewards() -> dict[str, Description]:
    """Of tasks with a verifier; the groups are the rollouts of one prompt."""
    groups = "N groups of rollout.group_size"
    return {
        "reward/equal_groups": Description(
            "share of prompts whose completions all have the same reward, so that none has an advantage",
            f"(1/N) sum_g 1[r_b = r_c for all b, c of g], {groups}",
            "fraction",
        ),
        "reward/solved_groups": Description(
            "share of prompts that all completions solve", f"(1/N) sum_g 1[r_b >= 1 for all b of g], {groups}", "fraction"
        ),
        "reward/failed_groups": Description(
            "share of prompts that no completion solves", f"(1/N) sum_g 1[r_b < 1 for all b of g], {groups}", "fraction"
        ),
        "reward/verifier_errors": Description(
            "completions of this step for which the verifier failed, or gave no finite number; they have reward 0",
            "number of completions without a verdict",
            "completions",
        ),
        "reward/well_formed": Description(
            "share of completions with an answer in the form that the task asks for (where it says so; verifier errors have none)",
            "(1/B) sum_b 1[the verdict on y_b is well-formed]",
            "fraction",
        ),
    }


def _diagnostics() -> dict[str, Description]:
    """Of log.diagnostics; a quantity that a step does not have, such as a ratio with divisor 0, is left out of its record."""
    return {
        "diag/negative_log_ratios": Description(
            "share of tokens that the teacher finds less likely than the student does", "(1/M) sum_bt m_bt 1[l_bt < 0]", "fraction"
        ),
        "diag/outlier_tokens": Description("tokens with a log-ratio of more than 10 nats in size", "sum_bt m_bt 1[|l_bt| > 10]", "tokens"),
        **_log_ratio_quantiles(),
        "diag/special_log_ratio_min": Description(
            "lowest log-ratio of a special or stop token of the completions", "min of l_bt over m_bt = 1, y_bt special", "nats"
        ),
        "diag/special_token_min": Description("which token that is", "argmin of diag/special_log_ratio_min", "token id"),
        "diag/teacher_entropy": Description(
            "entropy of the teacher along this step's completions (the student's: rollout/entropy)",
            "-(1/M) sum_bt m_bt sum_v q(v|c_bt) log q(v|c_bt)",
            "nats/token",
        ),
        **_top_k(),
        "diag/ess_token": Description(
            "effective sample size of the tokens as draws of the policy, as a share of their number (rollout.source = student); below 1 "
            "where the sampling law, or the arithmetic of the sampler, is another",
            "(sum_bt m_bt w_bt)^2 / (M sum_bt m_bt w_bt^2), w_bt = pi(y_bt|c_bt) / mu(y_bt|c_bt), mu the law that sampled",
            "fraction",
            "Kong 1992",
        ),
        "diag/ess_sequence": Description(
            "the same of whole completions (rollout.source = student)",
            "(sum_b W_b)^2 / (N sum_b W_b^2), W_b = prod_t w_bt over m_bt = 1, of the N completions that have a token",
            "fraction",
            "Kong 1992",
        ),
        "diag/repeated_ngrams": Description(
            "share of 4-grams that a completion has had before, mean over the completions of at least 4 tokens (stop token left out)",
            "1 - distinct 4-grams of y_b / 4-grams of y_b",
            "fraction",
            "Welleck et al. 2020, seq-rep-4",
        ),
        "diag/terminal_loops": Description(
            "share of completions that end (before the stop token) in a block of at most 64 tokens again and again, 3 times and 12 tokens "
            "at least",
            "(1/B) sum_b 1[there is p <= 64: y_bi = y_b(i-p) for i > |y_b| - max(3p, 12) + p]",
            "fraction",
        ),
        **_gradient_noise(),
    }


def _log_ratio_quantiles() -> dict[str, Description]:
    parts = {"": "", **{f"_quarter_{n}": f" among positions {n - 1}/4 to {n}/4 of rollout.max_new_tokens" for n in (1, 2, 3, 4)}}
    return {
        f"diag/log_ratio_p{level:02d}{part}": Description(
            f"{level}% quantile of the tokens' log-ratios{where}", f"{level}% quantile of l_bt over m_bt = 1, linear between values", "nats"
        )
        for part, where in parts.items()
        for level in (5, 50, 95)
    }


def _top_k() -> dict[str, Description]:
    """S is of signal.k tokens, or of 16 where the signal has no k."""
    top = "S_bt the k tokens most probable to the teacher (k = signal.k, 16 where there is none)"
    renormalised = "K^S_bt = KL(pi || q) of both renormalised on S_bt, h_bt its gradient by the student's logits, g_bt that of K_bt"
    return {
        "diag/topk_overlap": Description(
            "how much of the teacher's top-k is in the student's", "(1/M) sum_bt m_bt |S_bt and the same of pi| / k", "fraction"
        ),
        "diag/topk_student_mass": Description(
            "student's mass on the teacher's top-k", f"(1/M) sum_bt m_bt pi(S_bt|c_bt), {top}", "fraction"
        ),
        "diag/topk_teacher_mass": Description("teacher's mass on it", "(1/M) sum_bt m_bt q(S_bt|c_bt)", "fraction"),
        "diag/topk_kl_gap": Description(
            "what reverse KL renormalised on the teacher's top-k lacks of the full one, with the sign of an error",
            f"(1/M) sum_bt m_bt (K^S_bt - K_bt), {renormalised}",
            "nats/token",
        ),
        "diag/topk_gradient_cosine": Description(
            "cosine between the gradients of the two by the student's logits, those of all tokens as one vector",
            "sum_bt m_bt <h_bt, g_bt> / sqrt(sum_bt m_bt |h_bt|^2 sum_bt m_bt |g_bt|^2)",
            "-",
        ),
        "diag/topk_gradient_error": Description(
            "norm of their difference, relative to the full gradient", "sqrt(sum_bt m_bt |h_bt - g_bt|^2 / sum_bt m_bt |g_bt|^2)", "-"
        ),
    }


def _gradient_noise() -> dict[str, Description]:
    source = "McCandlish et al. 2018, An Empirical Model of Large-Batch Training, appendix A.1"
    where = "(learner.microbatches >= 2; before clipping)"
    return {
        "diag/gradient_signal": Description(
            f"estimate of the squared norm of the expected gradient {where}; unbiased, so that it can be negative. Microbatches count as "
            "independent draws: with rollout.group_size above 1 they share prompts, and what the choice of prompts adds to the noise is "
            "seen in part, or not at all (where learner.microbatches divides the group). The divisor of token_mean counts as fixed",
            "|G|^2 - S / B, G = sum_j g_j the gradient and its shares of the J microbatches",
            "(loss per parameter unit)^2",
            source,
        ),
        "diag/gradient_noise": Description(
            f"estimate of the trace of the covariance of the gradient of one completion {where}, unbiased under the same terms",
            "S = (B/J) (J sum_j |g_j|^2 - |G|^2) J / (J - 1)",
            "(loss per parameter unit)^2",
            source,
        ),
        "diag/gradient_snr": Description(
            f"signal-to-noise of one completion's gradient {where}, B times that for the step's; noisy: average the signal and the noise "
            "over steps before dividing",
            "diag/gradient_signal / diag/gradient_noise",
            "-",
        ),
        "diag/noise_scale": Description(
            f"simple noise scale: the batch at which signal equals noise {where}; left out where the signal is estimated at 0 or less",
            "diag/gradient_noise / diag/gradient_signal",
            "completions",
            source,
        ),
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
        "eval/accuracy/TAG": Description(
            "eval/accuracy on the prompts of a domain, for each tag of held-out examples", "eval/accuracy over p with tag TAG", "fraction"
        ),
        "eval/sampled_accuracy/TAG": Description("eval/sampled_accuracy on them", "eval/sampled_accuracy over p with tag TAG", "fraction"),
        "eval/maj_at_k": Description(
            "chance that the most frequent answer of k samples is accepted, k = eval.samples (tasks that say what an answer is); accepted "
            "answers count as one, ties are broken uniformly, samples without an answer do not vote",
            "(1/P) sum_p 1[a_p most frequent] / number of most frequent; a_p the accepted answer among the k samples of p",
            "fraction",
            "Wang et al. 2022, Self-Consistency",
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
        "eval/reverse_kl_on_teacher": Description(
            "reverse KL to the teacher on fresh samples of the teacher, exact over the vocabulary: what eval/reverse_kl is above it is "
            "exposure bias, the student's loss from standing on prefixes of its own",
            "sum_bt m_bt K_bt / M over the B = P k samples of the teacher",
            "nats/token",
        ),
        **_interval("eval/reverse_kl_on_teacher", "nats/token", _BOOTSTRAP, "Efron 1979"),
        **_of_writing(),
        "eval/entropy": Description("entropy of the student along its own samples", "(1/M) sum_bt m_bt H_bt", "nats/token"),
        "eval/length": Description("mean length of the student's samples, stop token included", "M / B", "tokens"),
        "eval/truncated_fraction": Description(
            "share of the student's samples that max_new_tokens cut off", "(1/B) sum_b 1[no stop token in y_b]", "fraction"
        ),
        "time/eval_seconds": Description("wall time of this evaluation", "t(end) - t(start)", "s"),
    }


def _of_writing() -> dict[str, Description]:
    """How the student's samples are written; the stop token is left out. Of eval.inject_error: how it goes on after an error."""
    return {
        "eval/distinct_2": Description(
            "share of different token pairs among those of one prompt's samples together, mean over the prompts that have a pair",
            "mean over p of distinct 2-grams / 2-grams of y_p1 ... y_pk",
            "fraction",
            "Li et al. 2016, distinct-n",
        ),
        "eval/repetition": Description(
            "share of 4-grams that a sample has had before, mean over the samples of at least 4 tokens",
            "mean over b of 1 - distinct 4-grams of y_b / 4-grams of y_b",
            "fraction",
            "Welleck et al. 2020, seq-rep-4",
        ),
        "eval/reflection": Description(
            "share of samples with words of reflection, such as wait, hmm or let me check (wording.REFLECTION has them all)",
            "(1/B) sum_b 1[y_b has one of the words, in any case]",
            "fraction",
        ),
        "eval/recovery": Description(
            "after one wrong token in a gold solution, at a place and to a token by chance, the student continues greedily "
            "(eval.inject_error): share of the tokens after it that are the solution's, place by place, stop token included; examples "
            "without a solution of two tokens are left out",
            "sum_pt 1[y_pt = g_pt] / sum_p |g_p|; g_p the solution after the error, y_p what the student writes",
            "fraction",
        ),
        **_interval("eval/recovery", "fraction", _BOOTSTRAP, "Efron 1979"),
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
