"""Which gradient a run follows, in one line: what its estimators claim, and what the rest of its config spoils of it."""

from opd_jax import teachers
from opd_jax.config import Config
from opd_jax.objective import GATES, Objective, Part

# Weights of the parts that stand beside the first, and what they are in words where that says all.
_WEIGHTS = {"extra": "extra_signal.weight", "reward": "reward.weight", "labels": "loss.labels", "reference": "regulariser.kl"}
_WEIGHTS |= {"entropy": "regulariser.entropy", "preference": "preference.weight"}
_PLAIN = {"labels": "the cross-entropy of the completions", "entropy": "minus the student's entropy"}


def of_run(objective: Objective, config: Config) -> str:
    """The claims of a run on the student's completions, or on others by ratios: of the first part, then of those beside it."""
    first, *others = objective.parts
    beside = [f"; beside it {_WEIGHTS[part.name]}={part.coefficient:g} of: {_said(part, config)}" for part in others]
    return _said(first, config) + "".join(beside)


def _said(part: Part, config: Config) -> str:
    if part.name in _PLAIN:
        return _PLAIN[part.name]
    if part.name == "preference":
        ranks = f"each prompt's best and worst completion (preference.judge={config.preference.judge})"
        return f"the DPO loss, against the reference, of {ranks}, completions taken as data"
    if part.name == "reference":
        return f"{config.regulariser.divergence.replace('_kl', ' KL')} to the reference, token by token"
    spoilt = _by_law(part, config) + _by_lengths(part, config)
    spoilt += _by_rewards(config) if part.name == "reward" else _by_target(config) + _by_masks(config) + _by_gate(part)
    return f"{part.estimator.claim}{', but for: ' if spoilt else ''}{'; '.join(spoilt)}"


def _by_law(part: Part, config: Config) -> list[str]:
    law, asked = config.rollout, config.estimator.importance if part.name != "reward" else "none"  # it has no such correction
    truncated = [f"{name}={value}" for name, value, whole in _truncations(law) if value != whole]
    if truncated:
        spoilt = [f"rollout.{truncated[0]} draws nothing outside its tokens, which no ratio brings back"]
    elif law.temperature != part.estimator.signal.student_temperature and asked not in ("cumulative", "sequence"):
        spoilt = [f"completions are drawn at temperature {law.temperature:g}, corrected by estimator.importance={asked}"]
    else:
        spoilt = []
    if law.source == "corrected":
        chosen = "before the student's worst token, which its draws decide" if law.cut == "worst" else "at a random place"
        spoilt.append(f"prefixes are the student's up to a cut {chosen}, then the teacher's (rollout.source=corrected, cut={law.cut})")
    if asked in ("cumulative", "sequence"):
        return spoilt
    others = {
        "completions and their prefixes are those of the store's law (rollout.source=cache)": law.source == "cache",
        "completions are drawn from all of the run so far (rollout.aggregate)": law.aggregate,
        "completions are drawn from the mixture with the teacher": law.source == "dagger" and not law.aggregate,
    }
    return spoilt + [f"{words}, corrected by estimator.importance={asked}" for words, there in others.items() if there]


def _truncations(law) -> list[tuple]:
    return [("top_p", law.top_p, 1.0), ("top_k", law.top_k, 0), ("min_p", law.min_p, 0.0)]


def _by_lengths(part: Part, config: Config) -> list[str]:
    by_length = part.normaliser in ("token_mean", "sequence_mean")
    spoilt = [f"lengths weigh completions (loss.normaliser={part.normaliser})"] if by_length else []
    return spoilt + (["rollouts weigh by what others of their tag are (loss.balance=tag)"] if config.loss.balance == "tag" else [])


def _by_target(config: Config) -> list[str]:
    """The law that stands for the teacher's, where it is another."""
    scale, members = config.extrapolation.scale, teachers.asked(config)
    others = [f"its teacher is q^{scale:g} r^{1 - scale:g}, r the reference (extrapolation.scale={scale:g})"] if scale != 1 else []
    if config.extrapolation.adaptive:
        others.append(
            "its teacher is q^lambda r^(1 - lambda), r the reference, with a lambda for each token that depends on what was drawn there: "
            "no fixed objective (extrapolation.adaptive=True)"
        )
    if len(members) > 1:
        each = (
            "the teacher of the example's tag"
            if config.teacher.combine == "route"
            else f"the {config.teacher.combine} mixture of the members"
        )
        others.append(f"its teacher is {each} (teacher.combine={config.teacher.combine})")
    if config.teacher.confidence:
        others.append(f"members weigh by their certainty at each token (teacher.confidence={config.teacher.confidence:g})")
    if config.teacher.update != "frozen":
        others.append(f"its teacher follows the student, as a constant (teacher.update={config.teacher.update})")
    if config.context.privileged.reads:
        others.append(f"its teacher reads more than the question (context.privileged.reads={config.context.privileged.reads})")
    return others


def _by_masks(config: Config) -> list[str]:
    masking = config.masking
    named = [f"{name}={getattr(masking, name)}" for name in ("skip_first", "first_only") if getattr(masking, name)]
    named += [f"{name}=drop" for name in ("special_tokens", "malformed", "solved", "failed") if getattr(masking, name) == "drop"]
    named += [f"tags={masking.tags}"] if masking.tags else []
    return [f"masking.{', masking.'.join(named)} leaves tokens out, which is another objective"] if named else []


def _by_gate(part: Part) -> list[str]:
    return [f"{part.gate.words}, which is another objective ({GATES[part.name]}.kind={part.gate.kind})"] if part.gate.words else []


def _by_rewards(config: Config) -> list[str]:
    settings, spoilt = config.reward, []
    if settings.clip_high:
        spoilt.append("tokens that have moved far from the law that wrote them have no gradient (reward.clip_low, clip_high)")
    if settings.advantage == "grpo":
        spoilt.append("prompts weigh by the inverse of their rewards' deviation, which includes the own rollout (reward.advantage=grpo)")
    elif settings.advantage == "centred":
        spoilt.append("a group's mean includes the own rollout: the gradient is 1 - 1/n of it (reward.advantage=centred)")
    for name in ("filter_groups", "mask_overlong"):
        if getattr(settings, name):
            spoilt.append(f"rollouts are left out by what they turned out to be (reward.{name})")
    if settings.tags:
        spoilt.append(f"rollouts of some prompts alone have the term (reward.tags={settings.tags})")
    if settings.only != "all":
        spoilt.append(f"solved rollouts alone have the term (reward.only={settings.only})")
    return spoilt
