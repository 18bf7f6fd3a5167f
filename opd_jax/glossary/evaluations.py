"""Metrics of an evaluation."""

from opd_jax.glossary.description import Description


def described() -> dict[str, Description]:
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
        **_of_divergence(),
        **_of_writing(),
        "eval/entropy": Description("entropy of the student along its own samples", "(1/M) sum_bt m_bt H_bt", "nats/token"),
        "eval/length": Description("mean length of the student's samples, with all that stands in them", "(1/B) sum_b |y_b|", "tokens"),
        "eval/truncated_fraction": Description(
            "share of the student's samples that max_new_tokens cut off", "(1/B) sum_b 1[no stop token in y_b]", "fraction"
        ),
        "time/eval_seconds": Description("wall time of this evaluation", "t(end) - t(start)", "s"),
    }


def _of_divergence() -> dict[str, Description]:
    """From the teacher, both ways."""
    return {
        "eval/reverse_kl": Description(
            "reverse KL to the teacher on fresh samples of the student, exact over the vocabulary (of several teachers that of the "
            "prompt's tag, or their mixture, without prompts that none of them is for; a self-teacher as it was before training; all read "
            "the question alone, without extrapolation)",
            "sum_bt m_bt K_bt / M over the B = P k samples of the student",
            "nats/token",
        ),
        **_interval("eval/reverse_kl", "nats/token", _BOOTSTRAP, "Efron 1979"),
        "eval/forward_kl": Description(
            "forward KL, from the teacher as in eval/reverse_kl, on its fresh samples (of a mixture: on those of its first member), exact "
            "over the vocabulary",
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
    }


def _of_writing() -> dict[str, Description]:
    """How the student's samples are written; the stop token is left out. Of eval.inject_error: how it goes on after an error."""
    return {
        "eval/turns": Description(
            "pieces of a sample between the environment's answers (rollout.max_turns above 1)", "(1/(P k)) sum of turns", "turns"
        ),
        "eval/call_errors": Description(
            "calls of a sample that the environment could not read (rollout.max_turns above 1)", "(1/(P k)) sum of such calls", "calls"
        ),
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
