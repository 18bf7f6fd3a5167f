"""The estimator of a training configuration, from the classes of the registry."""

import dataclasses

from opd_jax.numerics import credit as credit_lib
from opd_jax.numerics import entries
from opd_jax.numerics.estimators.base import TARGETS, Estimator
from opd_jax.numerics.estimators.local import Local
from opd_jax.numerics.estimators.score import LocalToGo, ScoreFunction
from opd_jax.numerics.token_stats import Signal


def build(
    signal: Signal,
    credit: str,
    gamma: float,
    *,
    exact_future: bool = False,
    length_normalised: bool = False,
    baseline: str = "none",
    importance: str = "none",
    clip: float = 2.0,
) -> Estimator:
    """The estimator of a signal and of the choices of the config block `estimator`, with its claim. Raises ValueError.

    reverse_kl on the sampled token is a score function of any credit; exact over the vocabulary with to_go or discounted credit it is the
    local term and the future KLs; every other signal is a loss of its position, token credit.
    """
    if credit not in credit_lib.CREDITS:
        raise ValueError(f"estimator.credit = {credit!r} is not known; valid: {', '.join(credit_lib.CREDITS)}")
    if not 0 <= gamma <= 1:
        raise ValueError(f"estimator.gamma = {gamma!r} must be between 0 and 1")
    off_policy = {"importance": importance, "clip": clip}
    credited = {"gamma": gamma if credit == "discounted" else 1.0, "baseline": baseline, **off_policy}
    credited["mean_future"] = length_normalised
    chosen = (signal.kind, signal.support, credit, "exact_future" if exact_future else "", "mean" if length_normalised else "")
    about = {"name": "/".join(part for part in (*chosen, baseline, importance) if part not in ("", "none")), "formula": "", "reference": ""}
    about |= {"claim": "", "target": "", "unbiased": False}
    _refuse_ratios(signal, importance)
    if length_normalised and credit not in ("to_go", "discounted"):
        raise ValueError(f"estimator.length_normalised = True needs estimator.credit = 'to_go' or 'discounted', not {credit!r}")
    if signal.kind == "reverse_kl" and signal.support == "sampled":
        _check_exact_future(exact_future, credit)
        built = ScoreFunction(**about, signal=signal, credit=credit, exact_future=exact_future, **credited)
    elif credit == "token":
        _refuse_without_advantages(signal, exact_future, baseline)
        built = Local(**about, signal=signal, **off_policy)
    elif signal.clip:
        raise ValueError(f"signal.clip = {signal.clip:g} is for estimator.credit = 'token', not for {credit!r}; use 0, or 'token'")
    elif signal.kind == "reverse_kl" and signal.support == "full" and credit in ("to_go", "discounted"):
        built = _local_to_go(about, signal, credited, baseline, exact_future)
    else:
        raise ValueError(
            f"estimator.credit = {credit!r} does not go with signal.divergence = {signal.kind!r}, signal.support = {signal.support!r}: "
            "use 'token', or signal.divergence = 'reverse_kl' with signal.support = 'full' ('to_go' or 'discounted') or 'sampled' (any)"
        )
    return dataclasses.replace(built, **_claim(built))


def _check_exact_future(exact_future: bool, credit: str) -> None:
    if exact_future and credit not in ("to_go", "discounted"):
        raise ValueError(f"estimator.exact_future = True needs estimator.credit = 'to_go' or 'discounted', not {credit!r}")


def _refuse_without_advantages(signal: Signal, exact_future: bool, baseline: str) -> None:
    asked = f"estimator.baseline = {baseline!r}" if baseline != "none" else "estimator.exact_future = True" if exact_future else ""
    if asked:
        raise ValueError(
            f"{asked} is for advantages, and signal.divergence = {signal.kind!r}, signal.support = {signal.support!r} has none; leave it "
            "out, or use signal.divergence = 'reverse_kl' with signal.support = 'sampled'"
        )


def _refuse_ratios(signal: Signal, importance: str) -> None:
    if importance != "none" and signal.kind not in entries.DIVERGENCES:
        raise ValueError(
            f"estimator.importance = {importance!r} is for divergences on the policy's own completions, not for signal.divergence = "
            f"{signal.kind!r}; use 'none'"
        )


def _local_to_go(about: dict, signal: Signal, credited: dict, baseline: str, exact_future: bool) -> LocalToGo:
    if baseline in ("kl", "optimal"):
        raise ValueError(
            f"estimator.baseline = {baseline!r} is for the sampled token's own log-ratio, which signal.support = 'full' does not use; "
            "use 'leave_one_out', or signal.support = 'sampled'"
        )
    if exact_future:
        raise ValueError("estimator.exact_future = True is for signal.support = 'sampled'; with 'full' all terms are exact already")
    return LocalToGo(**about, signal=signal, **credited)


_OF_A_TAIL = {
    "generalised": "leaves out what is outside",
    "renormalise": "does not see the mass outside",
    "bucket": "does not tell the tokens outside apart",
    "none": "has its minimum elsewhere",
    "sampled_tail": "draws nothing outside once the token is added",
    "sampled_tail_published": "is off by grad p(S)",
}


def _claim(built: Estimator) -> dict:
    """claim, target and unbiased of a built estimator, on-policy at the loss temperatures: what its parts say, and no more."""
    if isinstance(built, ScoreFunction | LocalToGo):
        return _claim_of_credit(built)
    words = built.signal.kind.replace("_", " ").replace("kl", "KL").replace("jsd", "JSD")
    if built.signal.kind not in entries.DIVERGENCES:
        return {"target": "", "unbiased": True, "claim": f"The gradient of the {words} of these completions, prefixes taken as data"}
    reasons = []
    if built.signal.is_topk and (built.signal.tail != "sampled_tail" or built.signal.adds_token):
        reasons.append(f"below the whole vocabulary, {built.signal.support} with tail {built.signal.tail} {_OF_A_TAIL[built.signal.tail]}")
    if built.signal.clip:
        reasons.append(
            f"an entry above signal.clip {built.signal.clip:g} has no gradient of its own, so that the minimiser may put no mass on "
            "a token of the teacher"
        )
    takes_beta = entries.DIVERGENCES[built.signal.kind]
    beta = f" ({built.signal.beta:g})" if takes_beta else ""
    same = {name: signal for name, signal in TARGETS.items() if signal and signal.kind == built.signal.kind}
    target = next((name for name, signal in same.items() if not takes_beta or signal.beta == built.signal.beta), "")
    return _stated(built, target, f"the token-level {words}{beta} with prefixes held fixed", reasons)


def _claim_of_credit(built: ScoreFunction | LocalToGo) -> dict:
    token = built.gamma == 0 or getattr(built, "credit", "to_go") == "token"
    what = "the token-level reverse KL with prefixes held fixed" if token else "the sequence-level reverse KL"
    reasons = [] if token or built.gamma == 1 else [f"gamma {built.gamma:g} discounts what comes later"]
    if built.mean_future:
        reasons.append("what comes later counts by its mean")
    if built.baseline in ("batch_mean", "position_mean"):
        reasons.append(f"baseline {built.baseline} includes the own sample, of order 1/n")
    return _stated(built, "token_reverse_kl" if token else "sequence_reverse_kl", what, reasons)


def _stated(built: Estimator, target: str, what: str, reasons: list[str]) -> dict:
    at = built.signal.student_temperature, built.signal.teacher_temperature
    if at != (1.0, 1.0):  # another law than those that the named targets speak of
        target, what = "", f"{what}, of the laws at temperatures {at[0]:g} and {at[1]:g}"
    claim = f"Biased for {what}: {' and '.join(reasons)}" if reasons else f"Unbiased for {what}"
    return {"target": target, "unbiased": not reasons, "claim": claim}
