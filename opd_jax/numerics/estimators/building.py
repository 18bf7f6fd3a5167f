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
    about = {"name": "/".join((signal.kind, signal.support, credit)), "formula": "", "reference": ""}
    about |= dict(zip(("claim", "target", "unbiased"), ("", "", False), strict=True))
    if signal.kind == "reverse_kl" and signal.support == "sampled":
        _check_exact_future(exact_future, credit)
        built = ScoreFunction(**about, signal=signal, credit=credit, exact_future=exact_future, **credited)
    elif credit == "token":
        _refuse_without_advantages(signal, exact_future, baseline)
        built = Local(**about, signal=signal, **off_policy)
    elif signal.kind == "reverse_kl" and signal.support == "full" and credit in ("to_go", "discounted"):
        built = _local_to_go(about, signal, credited, baseline)
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


def _local_to_go(about: dict, signal: Signal, credited: dict, baseline: str) -> LocalToGo:
    if baseline == "optimal":
        raise ValueError(
            "estimator.baseline = 'optimal' is for the sampled token's own log-ratio, which signal.support = 'full' does not use; "
            "use 'leave_one_out', or signal.support = 'sampled'"
        )
    return LocalToGo(**about, signal=signal, **credited)


def _claim(built: Estimator) -> dict:
    """claim, target and unbiased of a built estimator, on-policy and at the loss temperatures: what its parts say, and no more."""
    words = built.signal.kind.replace("_", " ").replace("kl", "KL").replace("jsd", "JSD")
    if isinstance(built, ScoreFunction | LocalToGo):
        credit = built.credit if isinstance(built, ScoreFunction) else "to_go"
        whole = credit != "token" and not (credit == "discounted" and built.gamma == 0)
        target = "sequence_reverse_kl" if whole else "token_reverse_kl"
        what = "the sequence-level reverse KL" if whole else "the token-level reverse KL with prefixes held fixed"
        reasons = []
        if whole and built.gamma < 1:
            reasons.append(f"gamma {built.gamma:g} discounts")
        if built.baseline in ("batch_mean", "position_mean"):
            reasons.append(f"baseline {built.baseline} includes the own sample, of order 1/n")
        return {"target": target, "unbiased": not reasons, "claim": _sentence(what, reasons)}
    if built.signal.kind not in entries.DIVERGENCES:
        return {"target": "", "unbiased": True, "claim": f"The gradient of the {words} of these completions, prefixes taken as data"}
    reasons = []
    if built.signal.support.startswith("topk") and (built.signal.tail != "sampled_tail" or built.signal.support.endswith("+token")):
        reasons.append(f"support {built.signal.support} with tail {built.signal.tail} leaves out what is outside")
    takes_beta = entries.DIVERGENCES[built.signal.kind]
    beta = f" ({built.signal.beta:g})" if takes_beta else ""
    same = {name: signal for name, signal in TARGETS.items() if signal and signal.kind == built.signal.kind}
    target = next((name for name, signal in same.items() if not takes_beta or signal.beta == built.signal.beta), "")
    return {
        "target": target,
        "unbiased": not reasons,
        "claim": _sentence(f"the token-level {words}{beta} with prefixes held fixed", reasons),
    }


def _sentence(what: str, reasons: list[str]) -> str:
    return f"Biased for {what}: {' and '.join(reasons)}" if reasons else f"Unbiased for {what}"
