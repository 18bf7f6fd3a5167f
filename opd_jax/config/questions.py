"""What a config asks for, read off several of its fields."""

from opd_jax.config.fields import Config


def has_teacher(config: Config) -> bool:
    """Whether a config names one."""
    return bool(config.teacher.path or config.teacher.recipe or config.teacher.members)


def own_draws(config: Config) -> bool:
    """Whether the student, as it is, writes all completions that an update learns from."""
    settings = config.rollout
    if settings.aggregate:
        return False
    return settings.source == "student" or (settings.source == "mix" and settings.student_fraction == 1)


def keeps_scores(config: Config) -> bool:
    """Whether updates learn from stored scores of the teacher, which does not read their completions."""
    return config.rollout.source == "cache" or config.rollout.aggregate


def needs_solutions(config: Config) -> bool:
    """Whether the data set writes the completions of some steps."""
    return config.rollout.source == "dataset" or (config.rollout.source == "mix" and config.rollout.student_fraction < 1)


def extrapolates(config: Config) -> bool:
    """Whether the target is another than the teacher, by way of the reference."""
    return config.extrapolation.scale != 1 or config.extrapolation.adaptive


def needs_reference(config: Config) -> bool:
    """Whether a term of the loss refers to the reference."""
    return extrapolates(config) or config.regulariser.kl > 0 or config.preference.weight > 0


def needs_verdicts(config: Config) -> bool:
    """Whether an update looks at what the verifier says of its completions."""
    judged = {"feedback", "sibling"} & set(names_in(config.context.privileged.reads))
    ranked = config.preference.weight > 0 and config.preference.judge == "reward"
    masked = "drop" in (config.masking.malformed, config.masking.solved, config.masking.failed)
    return bool(judged) or ranked or config.reward.weight > 0 or masked


def measures_difficulty(config: Config) -> bool:
    """Whether training prompts are chosen by the initial student's success rates."""
    return config.task.difficulty_low > 0 or config.task.difficulty_high < 1


def names_in(listed: str) -> tuple[str, ...]:
    """The names of a field that takes several, with commas between them."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())
