"""Which terms of the loss an example has, by its tag: distillation from the teacher of that tag, rewards, or both."""

from collections.abc import Iterable, Sequence

import numpy as np

from opd_jax import teachers
from opd_jax.config import Config, ConfigError, names_in
from opd_jax.data.tasks import Example


def distilled(config: Config, example: Example) -> bool:
    """Whether the distillation terms learn from its rollouts (masking.tags)."""
    return not config.masking.tags or example.tag in names_in(config.masking.tags)


def rewarded(config: Config, example: Example) -> bool:
    """Whether its rollouts have the reward's term (reward.tags)."""
    return config.reward.weight > 0 and (not config.reward.tags or example.tag in names_in(config.reward.tags))


def has_member(config: Config, example: Example) -> bool:
    """Whether there is a teacher for its rollouts: they are distilled, or a member has their tag."""
    return distilled(config, example) or example.tag in teachers.tags(config)


def domains_P(examples: Sequence[Example]) -> np.ndarray:
    """Numbers from 0 on of the examples' tags."""
    return np.unique([example.tag for example in examples], return_inverse=True)[1]


def check(config: Config, examples: Iterable[Example]) -> None:
    """Refuses an example for which there is no teacher, or no term at all. Raises ConfigError."""
    examples = list(examples)
    for_all = config.preference.weight > 0 or config.loss.labels > 0
    for example in examples:
        if not (for_all or distilled(config, example) or rewarded(config, example)):
            raise ConfigError(
                f"config field masking.tags = {config.masking.tags!r} and reward.tags = {config.reward.tags!r} have neither the tag "
                f"{example.tag!r} of the example {example.prompt[:40]!r}; name it in one of them (reward.weight = {config.reward.weight:g})"
            )
    teachers.check_tags(config, [example for example in examples if distilled(config, example)])


def check_names(config: Config, examples: Iterable[Example]) -> None:
    """Refuses tags that none of the task's (first) examples has, and fields of tags that have no effect. Raises ConfigError."""
    distils = config.signal.weight > 0 or config.extra_signal.weight > 0
    found = {example.tag for example in examples}
    for field, value, has_term, weight in (
        ("masking.tags", config.masking.tags, distils, "signal.weight"),
        ("reward.tags", config.reward.tags, config.reward.weight > 0, "reward.weight"),
    ):
        if value and not has_term:
            raise ConfigError(f"config field {field} = {value!r} chooses who has the term that {weight} = 0 leaves out; use ''")
        for name in names_in(value):
            if name not in found:
                raise ConfigError(f"config field {field} = {value!r}: no example has the tag {name!r}; valid: {', '.join(sorted(found))}")
    if config.loss.balance == "tag" and len(found) < 2:
        raise ConfigError(
            f"config field loss.balance = 'tag' weighs examples of different tags, but task.name = {config.task.name!r} has no two; "
            "use 'none'"
        )
