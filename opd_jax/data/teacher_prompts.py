"""The prompts that teachers read once the completions are there: with what context.privileged puts beside the question."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd_jax import config as config_lib
from opd_jax.data import privileged
from opd_jax.data.pipeline import Encoder
from opd_jax.data.privileged import Attempt, Fitted
from opd_jax.data.tasks import Example
from opd_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class Informed:
    """What the teachers read of some rollouts."""

    prompts: Prompts  # NumPy; a rollout without a context has its plain prompt
    context_B: np.ndarray  # bool: there is something to read beside the question
    counts: dict[str, float]  # shares of the rollouts, by metric name


class TeacherPrompts:
    """Made for one run, of its settings and of how its teachers read."""

    def __init__(self, settings: config_lib.Privileged, encoder: Encoder):
        self._settings, self._encoder = settings, encoder
        self._kinds = privileged.kinds_of(settings.reads)
        self._layout = privileged.layout_text(settings.layout)

    def __call__(self, examples: Sequence[Example], attempts_B: Sequence[Attempt] | None, group_size: int, id_B: np.ndarray) -> Informed:
        """For P examples with `group_size` rollouts each; `attempts_B` may be None where no kind speaks of an attempt."""
        fitted = []
        for p, example in enumerate(examples):
            group = attempts_B[p * group_size : (p + 1) * group_size] if attempts_B is not None else []
            fitted += [self._fit(example, group, own) for own in range(group_size)]
        texts = [one.text or examples[row // group_size].prompt for row, one in enumerate(fitted)]
        prompts, _ = self._encoder.encode(texts, id_B.tolist(), coarse=True)
        context_B = np.array([one.text is not None for one in fitted])
        counts = {
            "context/present": float(context_B.mean()),
            "context/shortened": float(np.mean([one.shortened for one in fitted])),
            "context/too_long": float(np.mean([one.dropped == privileged.TOO_LONG for one in fitted])),
        }
        return Informed(prompts, context_B, counts)

    def _fit(self, example: Example, group: Sequence[Attempt], own: int) -> Fitted:
        sections = privileged.gather(
            self._kinds,
            example,
            group,
            own,
            success=self._settings.success,
            feedback_with_solution=self._settings.feedback_with_solution,
            strip_thinking=self._settings.strip_thinking,
        )
        length_of = lambda text: len(self._encoder.reader.encode_prompt(text))
        return privileged.fit(self._layout, example.prompt, sections, length_of=length_of, room=self._encoder.max_prompt_length)
