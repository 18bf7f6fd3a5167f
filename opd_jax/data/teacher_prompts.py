"""The prompts that teachers read once the completions are there: with what context.privileged puts beside the question."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from opd_jax import config as config_lib
from opd_jax.data import privileged
from opd_jax.data.pipeline import Encoder
from opd_jax.data.privileged import Attempt, Fitted
from opd_jax.data.tasks import Example
from opd_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class Written:
    """What a model wrote after some texts."""

    texts: list[str]
    prompt_tokens: int  # that it read, all rows together
    tokens: int  # that it drew


# (texts, number of the kind) -> what the first teacher writes after each
Write = Callable[[Sequence[str], int], Written]


@dataclasses.dataclass(frozen=True)
class Informed:
    """What the teachers read of some rollouts."""

    prompts: Prompts  # NumPy; a rollout without a context has its plain prompt
    context_B: np.ndarray  # bool: there is something to read beside the question
    counts: dict[str, float]  # context/ metrics
    written: tuple[int, int] = (0, 0)  # tokens that the first teacher read, and drew, to write critiques and analyses


class TeacherPrompts:
    """Made for one run, of its settings and of how its teachers read."""

    def __init__(self, settings: config_lib.Privileged, encoder: Encoder, writing_room: int = 0):
        """`writing_room`: tokens that the prompt of a text which the first teacher writes may have."""
        self._settings, self._encoder, self._writing_room = settings, encoder, writing_room
        self._kinds = privileged.kinds_of(settings.reads)
        self._layout = privileged.layout_text(settings.layout)

    def __call__(
        self,
        examples: Sequence[Example],
        attempts_B: Sequence[Attempt] | None,
        group_size: int,
        id_B: np.ndarray,
        write: Write | None = None,
    ) -> Informed:
        """For P examples with `group_size` rollouts each; `attempts_B` may be None where no kind speaks of an attempt.

        `write`: asked for each kind of text that the first teacher writes.
        """
        written, read, drawn = self._write(examples, attempts_B, group_size, write)
        fitted = []
        for p, example in enumerate(examples):
            group = attempts_B[p * group_size : (p + 1) * group_size] if attempts_B is not None else []
            for own in range(group_size):
                found = {kind: texts_B[p * group_size + own] for kind, texts_B in written.items()}
                fitted.append(self._fit(example, group, own, found))
        texts = [one.text or examples[row // group_size].prompt for row, one in enumerate(fitted)]
        prompts, _ = self._encoder.encode(texts, id_B.tolist(), coarse=True)
        context_B = np.array([one.text is not None for one in fitted])
        counts = {
            "context/present": float(context_B.mean()),
            "context/shortened": float(np.mean([one.shortened for one in fitted])),
            "context/too_long": float(np.mean([one.dropped == privileged.TOO_LONG for one in fitted])),
        }
        if written:
            counts["context/written_length"] = drawn / (len(written) * len(fitted))
        return Informed(prompts, context_B, counts, (read, drawn))

    def _write(self, examples: Sequence[Example], attempts_B: Sequence[Attempt] | None, group_size: int, write: Write | None):
        """(texts [B] by kind, None where there is nothing to write of; tokens read; tokens drawn)."""
        found, read, drawn = {}, 0, 0
        for number, kind in enumerate(privileged.WRITTEN):
            if kind not in self._kinds:
                continue
            asked = [self._asked(kind, examples[row // group_size], attempts_B, row) for row in range(len(examples) * group_size)]
            # Every row is written, so that the shape is the same in all steps; what nobody asked for is thrown away.
            written = write([text or examples[row // group_size].prompt for row, text in enumerate(asked)], number)
            found[kind] = [text if ask else None for text, ask in zip(written.texts, asked, strict=True)]
            read, drawn = read + written.prompt_tokens, drawn + written.tokens
        return found, read, drawn

    def _asked(self, kind: str, example: Example, attempts_B: Sequence[Attempt] | None, row: int) -> str | None:
        """What the first teacher reads before it writes for a row; None where there is nothing to write of, or it does not fit."""
        reads_solution = kind == "analysis" or "solution" in self._kinds or "demonstration" in self._kinds
        of = {"attempt": attempts_B[row].text if attempts_B is not None else None, "solution": example.solution if reads_solution else None}
        text = privileged.writing_prompt(kind, self._settings.layout, example.prompt, **of)
        return text if text is not None and len(self._encoder.reader.encode_prompt(text)) <= self._writing_room else None

    def _fit(self, example: Example, group: Sequence[Attempt], own: int, written: dict[str, str | None]) -> Fitted:
        sections = privileged.gather(
            self._kinds,
            example,
            group,
            own,
            success=self._settings.success,
            feedback_with_solution=self._settings.feedback_with_solution,
            strip_thinking=self._settings.strip_thinking,
            **written,
        )
        length_of = lambda text: len(self._encoder.reader.encode_prompt(text))
        return privileged.fit(self._layout, example.prompt, sections, length_of=length_of, room=self._encoder.max_prompt_length)
