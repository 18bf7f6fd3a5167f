"""Metrics of an update: the loss, the completions, rewards, contexts, time, cost."""

from opd_jax.glossary.description import Description


def described() -> dict[str, Description]:
    return {
        "step": Description("updates done", "n", "updates"),
        "train/loss": Description(
            "objective on this step's batch before the update (of sampled tokens, and credits beyond the token, only its gradient counts)",
            "(1/Z) sum_bt w_bt (D_bt - sg(A_bt) log pi(y_bt|c_bt)); D of signal.divergence, A of estimator.credit (either may be absent), "
            "both at the temperatures of loss; w of loss.normaliser and of gate, Z of loss.normaliser (token_mean: w = m, Z = M); with "
            "several parts the sum of train/loss_NAME",
            "nats, scaled by the normaliser",
        ),
        "train/grad_norm": Description(
            "norm of the gradient over all parameters, before clipping", "sqrt(sum_i (d loss / d theta_i)^2)", "loss per parameter unit"
        ),
        "train/learning_rate": Description("learning rate of this update", "schedule(n - 1)", "-"),
        **_parts(),
        "train/reverse_kl": Description(
            "reverse KL to the teacher on the student's own completions (rollout.source = student without rollout.aggregate; mix: in "
            "on-policy steps), of examples that have a teacher",
            "(1/M) sum_bt m_bt K_bt",
            "nats/token",
        ),
        "train/log_ratio_mean": Description(
            "log-ratio of teacher to student on the student's own completions (rollout.source = student without rollout.aggregate; mix: in "
            "on-policy steps); drawn from pi itself, its expectation is minus train/reverse_kl",
            "(1/M) sum_bt m_bt l_bt",
            "nats/token",
        ),
        "train/tokens": Description("completion tokens of this step, whichever parts of the loss learn from them", "M", "tokens"),
        "train/token_share/TAG": Description(
            "share of the examples of one tag in the completion tokens of this step, before loss.balance, where examples have tags",
            "(1/M) sum_bt m_bt 1[the example of b has the tag]",
            "fraction",
        ),
        **_teachers(),
        **_rollouts(),
        **_rewards(),
        **_contexts(),
        "time/step_seconds": Description(
            "wall time of this step, without evaluations and checkpoints", "t(step finished on the device) - t(the one before)", "s"
        ),
        "time/total_seconds": Description("time spent in steps since the run began", "sum of time/step_seconds over steps 1 ... n", "s"),
        **_costs(),
    }


def _teachers() -> dict[str, Description]:
    """Of several teachers, and of targets beyond one."""
    return {
        "teacher/disagreement": Description(
            "disagreement of several teachers on this step's completions, whatever their weights or routes: generalised Jensen-Shannon "
            "divergence, from 0 to log J",
            "(1/M) sum_bt m_bt (1/J) sum_j KL(q_j || (1/J) sum_i q_i)(c_bt); q_j the J members of teacher.members, without the reference",
            "nats/token",
        ),
        "extrapolation/scale": Description(
            "mean lambda of the tokens: how far the target goes beyond the teacher (extrapolation.adaptive)",
            "(1/M) sum_bt m_bt (1 + gamma q_bt), q_bt = exp(-(e^l - l - 1) / tau), l = l_bt",
            "-",
            "our reading of REOPD, arXiv 2608.11698",
        ),
        "extrapolation/gain": Description(
            "gamma of this update, 0 in the first ten (extrapolation.adaptive)",
            "clip(B_0 rho / s, 0, extrapolation.max_gain), averages of the updates before; see opd_jax/numerics/extrapolation.py",
            "-",
            "our reading of REOPD, arXiv 2608.11698",
        ),
    }


def _rollouts() -> dict[str, Description]:
    """Of the completions of a step."""
    return {
        "rollout/on_policy": Description(
            "whether the student wrote this step's completions, otherwise the data set did (rollout.source = mix)",
            "1[u_n < rollout.student_fraction], u_n uniform, a function of seed and step",
            "1 or 0",
            "Agarwal et al. 2024, GKD",
        ),
        "replay/age": Description(
            "updates since the completions that this step learns from were written, on average (rollout.aggregate; rollout/ and the "
            "verdicts speak of the completions that this step wrote, train/ and rollout/entropy of those it learns from)",
            "(1/P) sum_p (n - n_p), n_p the update that wrote the completions of prompt p",
            "updates",
            "Ross, Gordon and Bagnell 2011, DAgger",
        ),
        "rollout/length": Description(
            "mean length of this step's completions, with stop tokens and what others than their writer put in (beginnings, observations)",
            "(1/B) sum_b |y_b|",
            "tokens",
        ),
        "rollout/truncated_fraction": Description(
            "share of completions without a stop token, cut off by max_new_tokens or max_turns",
            "(1/B) sum_b 1[no stop token in y_b]",
            "fraction",
        ),
        "rollout/entropy": Description(
            "entropy of the student along this step's completions, whoever wrote them", "(1/M) sum_bt m_bt H_bt", "nats/token"
        ),
        "rollout/reward": Description(
            "mean reward of this step's completions (tasks with a verifier, sampled completions)", "(1/B) sum_b r_b", "reward"
        ),
        "rollout/turns": Description(
            "pieces of a completion that the student wrote, between the environment's answers (rollout.max_turns above 1)",
            "(1/B) sum_b turns of y_b",
            "turns",
        ),
        "rollout/call_errors": Description(
            "calls of a completion that the environment could not read (rollout.max_turns above 1)",
            "(1/B) sum_b such calls in y_b",
            "calls",
        ),
        "rollout/prompts_truncated": Description(
            "prompts of this step that lost their first tokens", "number of prompts longer than rollout.max_prompt_length", "prompts"
        ),
        "rollout/tokens_total": Description(
            "completion tokens since the run began, whichever parts of the loss learnt from them", "sum of M over steps 1 ... n", "tokens"
        ),
        "rollout/tokens_per_second": Description("completion tokens of this step per second", "M / time/step_seconds", "tokens/s"),
    }


def _parts() -> dict[str, Description]:
    """Of a loss with several parts, of which each has its mask and its denominator."""
    what = {
        "distillation": "divergence from the teacher, or advantages from its log-ratios (signal, estimator)",
        "extra": "a second divergence from the teacher (extra_signal)",
        "reward": "advantages of the verifier's rewards (reward.weight); only its gradient counts",
        "preference": "mean of -log sigmoid(Delta) over pairs, Delta as in preference.beta, scaled by its weight",
        "labels": "cross-entropy of the completions themselves (loss.labels)",
        "reference": "divergence from the reference (regulariser.kl)",
        "entropy": "minus the student's entropy (regulariser.entropy)",
    }
    formula = "c/Z sum_bt w_bt (D_bt - sg(A_bt) log pi(y_bt|c_bt)) of the part, c its weight"
    return {
        f"train/loss_{name}": Description(
            f"this part of train/loss, where there are several: {words}", formula, "nats, scaled by the normaliser"
        )
        for name, words in what.items()
    } | {
        f"train/gate_{name}": Description(
            f"mean weight that {field} gives to the tokens of this part; at 0 it learns nothing", "sum_bt m_bt g_bt / sum_bt m_bt", "-"
        )
        for name, field in (("distillation", "gate.kind"), ("extra", "extra_signal.gate.kind"))
    }


def _contexts() -> dict[str, Description]:
    """Of context.privileged."""
    return {
        "context/present": Description(
            "share of completions for which the teacher has something to read beside the question; the others are not distilled",
            "(1/B) sum_b 1[a section for y_b]",
            "fraction",
        ),
        "context/shortened": Description(
            "share of completions whose feedback, critique or analysis lost its end, to fit the teacher's context",
            "(1/B) sum_b 1[cut]",
            "fraction",
        ),
        "context/written_length": Description(
            "mean length of the critiques and analyses that the first teacher wrote before this update, stop tokens included",
            "their tokens / their number",
            "tokens",
        ),
        "context/too_long": Description(
            "share of completions left out because what the teacher should read does not fit", "(1/B) sum_b 1[too long]", "fraction"
        ),
        **_gaps(),
    }


def _gaps() -> dict[str, Description]:
    """Of context_gap.py, in record 0."""
    without = "before the first update: {} of the first teacher on held-out examples, after the question alone"
    gain = "(1/P) sum_p (log q(gold_p | question, section) - log q(gold_p | question)) / tokens of gold_p"
    read = "the same where it reads a section of this kind"
    return {
        "context/accuracy": Description(without.format("greedy accuracy"), "(1/P) sum_p 1[r(greedy completion of p) >= 1]", "fraction"),
        "context/accuracy/TAG": Description(
            "the same where it reads a section of this kind (TAG: solution, demonstration, sibling, feedback) beside the question",
            "context/accuracy, the prompt with the section",
            "fraction",
        ),
        "context/gold_logp": Description(
            without.format("log-prob of the solution"), "(1/P) sum_p log q(gold_p | question) / tokens of gold_p", "nats/token"
        ),
        "context/gold_logp/TAG": Description(read, "(1/P) sum_p log q(gold_p | question, section) / tokens of gold_p", "nats/token"),
        "context/gold_gain/TAG": Description("what the section adds to it, example by example", gain, "nats/token"),
        "context/gold_gain_low/TAG": Description("lower end of its 95% bootstrap interval over examples", "2.5% quantile", "nats/token"),
        "context/gold_gain_high/TAG": Description("upper end of its 95% bootstrap interval over examples", "97.5% quantile", "nats/token"),
    }


def _costs() -> dict[str, Description]:
    """By the accounting of cost.py, whose docstring says what N counts."""
    resumed = "; of a run begun by a version that did not count, without the prompts until then"
    return {
        "cost/flops_total": Description(
            f"floating-point operations of all updates (sampling, teacher, training), without diagnostics and evaluations{resumed}",
            "sum over steps 1 ... n and completions of 2 N_g (x + T) + 2 N_q (x' + T) + 2 N_r (x + T) + 6 N (x + T); T tokens of the "
            "completion, x and x' of its prompt as student and teacher read it; N, N_g, N_q and N_r parameters of the student, of the "
            "model that samples (0: a data set; a teacher reads x'; dagger, corrected: a term for each of the two), of all teachers that "
            "score (a route leaves none out, a trust region reads twice) and of the reference where the loss refers to it; with an adapter "
            "4 N + 2 N_adapter for 6 N; and 2 N of the first teacher for each token of texts that it writes, and of their prompts",
            "FLOPs",
            "Kaplan et al. 2020, Scaling Laws for Neural Language Models, 2.1; here the output projection counts",
        ),
        "cost/generated_tokens_total": Description(
            "tokens that were sampled since the run began: completions (none where a data set has them), and what a teacher wrote",
            "sum over steps 1 ... n",
            "tokens",
        ),
        "cost/scored_tokens_total": Description(
            "completion tokens that teachers and reference have scored since the run began",
            "sum of M over steps 1 ... n, once a model",
            "tokens",
        ),
    }


def _rewards() -> dict[str, Description]:
    """Of tasks with a verifier, and of preferences; the groups are the rollouts of one prompt."""
    groups = "N groups of rollout.group_size"
    return {
        "preference/pairs": Description(
            "share of prompts whose best and worst completion differ in what preference.judge says, and so are a pair",
            f"(1/N) sum_g 1[max_b s_b > min_b s_b, b of g, in two different completions], {groups}, s of preference.judge",
            "fraction",
        ),
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
