"""The estimators by name, each with its claim; the table of the README is made from this file."""

from opd_jax.numerics.estimators.base import Estimator
from opd_jax.numerics.estimators.local import Local, LogRatioLoss, LogRatioReward
from opd_jax.numerics.estimators.score import LocalToGo, ScoreFunction
from opd_jax.numerics.token_stats import Signal

THEORY = "Liu et al., Theory of On-Policy Distillation (2026)"
REVISITING = "Fu et al., Revisiting On-Policy Distillation, arXiv 2603.25562"
GKD = "Agarwal et al., GKD, ICLR 2024"
PITFALLS = "Tang and Munos, arXiv 2506.09477"
VOPD = "vOPD, arXiv 2605.07865"

SEQUENCE = "Unbiased for the gradient of the sequence-level reverse KL"
TOKEN = "Unbiased for the token-level reverse KL with prefixes held fixed"
DISCOUNTED = "Biased for the sequence-level reverse KL (gamma 0.9): later terms count less; often, not always, between token and to-go"
TRUNCATED = "Biased for the token-level reverse KL"
TOP_K = 16


def _of_the_sequence(name: str, formula: str, reference: str, *, more: str = "", claim: str = SEQUENCE, unbiased: bool = True, **choices):
    about = {"name": name, "claim": claim + more, "formula": formula, "reference": reference}
    signal = Signal("reverse_kl", "sampled")
    return ScoreFunction(**about, target="sequence_reverse_kl", unbiased=unbiased, signal=signal, **choices)


def _of_the_token(name: str, formula: str, reference: str, *, more: str = "", **choices):
    about = {"name": name, "claim": TOKEN + more, "formula": formula, "reference": reference}
    return ScoreFunction(**about, target="token_reverse_kl", unbiased=True, signal=Signal("reverse_kl", "sampled"), **choices)


def _to_go(name: str, formula: str, reference: str, *, claim: str, unbiased: bool, gamma: float):
    about = {"name": name, "claim": claim, "formula": formula, "reference": reference}
    return LocalToGo(**about, target="sequence_reverse_kl", unbiased=unbiased, signal=Signal("reverse_kl"), gamma=gamma)


def _full(name: str, target: str, words: str, formula: str, reference: str, signal: Signal):
    claim = f"Unbiased for the token-level {words} with prefixes held fixed, exact over the vocabulary"
    return Local(name=name, claim=claim, formula=formula, reference=reference, target=target, unbiased=True, signal=signal)


def _top_k(name: str, claim: str, formula: str, reference: str, support: str, tail: str, *, unbiased: bool = False):
    signal = Signal("reverse_kl", support, tail=tail, k=TOP_K)
    about = {"name": name, "claim": claim, "formula": formula, "reference": reference}
    return Local(**about, target="token_reverse_kl", unbiased=unbiased, signal=signal)


def _of_the_ratio(kind, name: str, value: str, claim: str, formula: str, *, target: str = "token_reverse_kl", unbiased: bool):
    about = {"name": name, "claim": claim, "formula": formula, "reference": PITFALLS}
    return kind(**about, target=target, unbiased=unbiased, signal=Signal("reverse_kl", "sampled"), value=value)


SEQUENCE_LEVEL = (
    _of_the_sequence(
        "sequence", "A_t = sum_u l_u", f"{THEORY}, Theorem 1 (i)", more="; the past log-ratios add noise and no mean", credit="sequence"
    ),
    _of_the_sequence("to_go", "A_t = sum_{u >= t} l_u", f"{THEORY}, Theorem 1 (ii)", credit="to_go"),
    _of_the_sequence(
        "to_go_kl_baseline",
        "A_t = sum_{u >= t} l_u + K_t",
        f"{THEORY}, Theorem 1 (iii)",
        more="; baseline -K_t, the value of token credit: myopic here",
        credit="to_go",
        baseline="kl",
    ),
    _of_the_sequence(
        "to_go_leave_one_out",
        "A_t = sum_{u >= t} l_u - mean of the others' at t",
        "Kool et al., Buy 4 REINFORCE Samples (2019)",
        more="; baseline: the other rollouts of the prompt, none where there are none",
        credit="to_go",
        baseline="leave_one_out",
    ),
    _of_the_sequence(
        "sequence_leave_one_out",
        "A_t = sum_u l_u - mean of the others'",
        "Kool et al., Buy 4 REINFORCE Samples (2019)",
        more="; baseline: the other rollouts of the prompt, none where there are none",
        credit="sequence",
        baseline="leave_one_out",
    ),
    _of_the_sequence(
        "rao_blackwell_to_go",
        "A_t = l_t - sum_{u > t} K_u",
        f"{THEORY}, Theorem 1 (iv)",
        more="; future log-ratios are replaced by exact KLs",
        credit="to_go",
        exact_future=True,
    ),
    _of_the_sequence(
        "rao_blackwell_to_go_kl_baseline",
        "A_t = l_t + K_t - sum_{u > t} K_u",
        f"{THEORY}, Theorem 1 (v)",
        more="; exact future KLs and baseline -K_t",
        credit="to_go",
        exact_future=True,
        baseline="kl",
    ),
    _to_go(
        "local_to_go",
        "sum_t grad K_t + (sum_{u > t} K_u) s_t",
        f"{THEORY}, Theorem 2",
        claim=f"{SEQUENCE}: exact local term, exact future KLs",
        unbiased=True,
        gamma=1.0,
    ),
    _of_the_sequence(
        "discounted",
        "A_t = sum_{u >= t} gamma^(u - t) l_u",
        f"{REVISITING}, eq. 3",
        claim=DISCOUNTED,
        unbiased=False,
        credit="discounted",
        gamma=0.9,
    ),
    _of_the_sequence(
        "rao_blackwell_discounted",
        "A_t = l_t - sum_{u > t} gamma^(u - t) K_u",
        f"{REVISITING}, eq. 3; {THEORY}, Theorem 1 (iv)",
        claim=f"{DISCOUNTED}; exact future KLs",
        unbiased=False,
        credit="discounted",
        gamma=0.9,
        exact_future=True,
    ),
    _to_go(
        "local_discounted",
        "sum_t grad K_t + (sum_{u > t} gamma^(u - t) K_u) s_t",
        f"{REVISITING}, eq. 3; {THEORY}, Theorem 2",
        claim=f"{DISCOUNTED}; exact local term, exact future KLs",
        unbiased=False,
        gamma=0.9,
    ),
)

TOKEN_LEVEL = (
    _of_the_token("token", "A_t = l_t", f"{REVISITING}, eq. 2", more="; for the sequence level it misses g2"),
    _of_the_token(
        "token_kl_baseline", "A_t = l_t + K_t", VOPD, more="; the baseline -K_t does not always lower the variance", baseline="kl"
    ),
    _of_the_token(
        "token_optimal_baseline",
        "A_t = l_t - b_t, b_t = E[w l] / E[w], w = |e_y - p|^2",
        "arXiv 2602.07078",
        more="; the baseline is optimal where the score's norm is that of the logits",
        baseline="optimal",
    ),
    _full("token_full", "token_reverse_kl", "reverse KL", "sum_t grad K_t", f"{REVISITING}, eq. 4", Signal("reverse_kl")),
    _full("forward_kl", "token_forward_kl", "forward KL", "sum_t grad KL(q || pi)", GKD, Signal("forward_kl")),
    _full("jsd", "token_jsd", "JSD(0.5)", "sum_t grad JSD_0.5(q, pi)", f"{GKD}, eq. 1", Signal("jsd", beta=0.5)),
    _full(
        "skew_forward_kl",
        "token_skew_forward_kl",
        "skewed forward KL (0.1)",
        "sum_t grad KL(q || 0.1 q + 0.9 pi)",
        "Ko et al., DistiLLM, ICML 2024",
        Signal("skew_forward_kl", beta=0.1),
    ),
    _full(
        "skew_reverse_kl",
        "token_skew_reverse_kl",
        "skewed reverse KL (0.1)",
        "sum_t grad KL(pi || 0.1 pi + 0.9 q)",
        "Ko et al., DistiLLM, ICML 2024",
        Signal("skew_reverse_kl", beta=0.1),
    ),
)

LOG_RATIOS = (
    _of_the_ratio(
        LogRatioLoss,
        "k1_loss",
        "k1",
        "Biased: its expected gradient is 0, whatever the teacher; nothing is learnt",
        "sum_t s_t",
        unbiased=False,
    ),
    _of_the_ratio(LogRatioLoss, "k2_loss", "k2", TOKEN, "-sum_t l_t s_t, the value is l_t^2 / 2", unbiased=True),
    _of_the_ratio(
        LogRatioLoss,
        "k3_loss",
        "k3",
        "Unbiased for the token-level FORWARD KL with prefixes held fixed, though its value is a reverse KL's",
        "sum_t (1 - exp(l_t)) s_t",
        target="token_forward_kl",
        unbiased=True,
    ),
    _of_the_ratio(
        LogRatioLoss, "k3_plus_loss", "k3_plus", f"{TOKEN}: value of k3, gradient of k2", "-sum_t l_t s_t, the value is k3", unbiased=True
    ),
    _of_the_ratio(LogRatioReward, "k1_reward", "k1", f"{TOKEN}: the same as token", "A_t = l_t", unbiased=True),
    _of_the_ratio(
        LogRatioReward,
        "k2_reward",
        "k2",
        "Biased for every divergence named here: l_t^2 / 2 loses the sign",
        "A_t = -l_t^2 / 2",
        unbiased=False,
    ),
    _of_the_ratio(
        LogRatioReward,
        "k3_reward",
        "k3",
        "Biased for every divergence named here: a reward of the right mean with another gradient",
        "A_t = -(exp(l_t) - 1 - l_t)",
        unbiased=False,
    ),
)

TOP_K_LEVEL = (
    _top_k(
        "topk_sampled_tail",
        f"{TOKEN}: the teacher's top {TOP_K} exactly, the rest by the sampled token",
        "grad sum_{v in S} f(p, q) - 1[y not in S] l_t s_t",
        "corrects the tail of EMA-PG, arXiv 2602.04417",
        "topk_teacher",
        "sampled_tail",
        unbiased=True,
    ),
    _top_k(
        "topk_generalised",
        f"{TRUNCATED}: the teacher's top {TOP_K} without the rest; 0 only where they agree on it",
        "grad sum_{v in S} p log(p/q) - p + q",
        "MOPD, arXiv 2601.02780",
        "topk_teacher",
        "generalised",
    ),
    _top_k(
        "topk_renormalised",
        f"{TRUNCATED}: both laws renormalised on the teacher's top {TOP_K}; mass outside is not seen",
        "grad KL(p(.|S) || q(.|S))",
        f"{REVISITING}, eq. 6 to 8",
        "topk_teacher",
        "renormalise",
    ),
    _top_k(
        "topk_bucket",
        f"{TRUNCATED}, a lower bound: the student's top {TOP_K} and one bucket for the rest",
        "grad KL of the laws of (v in S, rest)",
        "SDPO, arXiv 2601.20802",
        "topk_student",
        "bucket",
    ),
    _top_k(
        "topk_biased_head",
        f"{TRUNCATED}, for study: the un-renormalised head; its minimum puts p = q/e on S and drives the mass out",
        "grad sum_{v in S} p log(p/q)",
        f"{REVISITING}, ablation without normalisation",
        "topk_teacher",
        "none",
    ),
    _top_k(
        "topk_biased_published_tail",
        f"{TRUNCATED} by grad p(S), for study: the un-renormalised head with the published sampled tail",
        "grad sum_{v in S} p log(p/q) - 1[y not in S] l_t s_t",
        "EMA-PG, arXiv 2602.04417",
        "topk_teacher",
        "sampled_tail_published",
    ),
)

REGISTRY: dict[str, Estimator] = {estimator.name: estimator for estimator in (*SEQUENCE_LEVEL, *TOKEN_LEVEL, *LOG_RATIOS, *TOP_K_LEVEL)}
