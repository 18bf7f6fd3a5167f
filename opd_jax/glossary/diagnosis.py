"""Metrics of log.diagnostics."""

from opd_jax.glossary.description import Description


def described() -> dict[str, Description]:
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
            "effective sample size of the tokens as draws of the policy, as a share of their number (rollout.source = student; mix: in "
            "on-policy steps); below 1 where the sampling law, or the arithmetic of the sampler, is another",
            "(sum_bt m_bt w_bt)^2 / (M sum_bt m_bt w_bt^2), w_bt = pi(y_bt|c_bt) / mu(y_bt|c_bt), mu the law that sampled",
            "fraction",
            "Kong 1992",
        ),
        "diag/ess_sequence": Description(
            "the same of whole completions (rollout.source = student; mix: in on-policy steps)",
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
