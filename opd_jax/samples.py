"""samples.jsonl while a run is running: a few completions of a step, and what student and teacher thought of each of their tokens."""

import functools
import math
from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import parallel, score
from opd_jax.config import Config
from opd_jax.data.pipeline import Batch
from opd_jax.data.tokenizer import Tokenizer
from opd_jax.models.config import ModelConfig
from opd_jax.score import Annotation
from opd_jax.types import Prompts, Rollout

TOP = 5  # of the teacher's most probable tokens are logged
CONTEXT = 4  # prompt tokens decoded with a completion, so that its first token has the space before it


@flax.struct.dataclass
class Annotated:
    """The first completions of a step and what the models thought of them; arrays of the device until `lines` reads them."""

    completions: Rollout
    student: Annotation
    teacher: Annotation | None


class SampleLog:
    """Which steps log samples, and the lines that they log. Values are those of the student before the update: it wrote the tokens."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        student: ModelConfig,
        teacher: ModelConfig | None,
        mesh: Mesh,
        *,
        others: tuple[ModelConfig, ...] = (),
    ):
        """`others`: teachers beside the first, where each row has one of its own."""
        self._config, self._tokenizer = config, tokenizer
        self._count = min(config.log.samples, config.rollout.batch_size)
        # Rows that the mesh divides as it divides a batch: fewer would lie, and be computed, on every device.
        ways = math.prod(mesh.shape[axis] for axis in parallel.RULES.batch)
        rows = min(-(-self._count // ways) * ways, config.rollout.batch_size)
        teachers = (teacher, *others) if teacher is not None else ()
        self._annotate = functools.partial(_annotate, student_config=student, teacher_configs=teachers, rows=rows)

    def due(self, step: int) -> bool:
        """Whether update number `step` (from 1) logs samples: the first, the last, and those at the interval."""
        every = self._config.log.samples_every
        return bool(every) and (step == 1 or step % every == 0 or step == self._config.steps)

    def annotate(
        self,
        params: dict,
        teacher_params: dict | None,
        prompts: tuple[Prompts, Prompts],
        completions: Rollout,
        *,
        others: tuple[dict, ...] = (),
        route_B: jax.Array | None = None,
    ) -> Annotated:
        """Starts the scoring of the first completions. Call it before the update, which takes the parameters' buffers.

        `prompts`: as the student reads them, and as the teacher does; `route_B`: number of each row's teacher, where there are `others`.
        """
        return self._annotate(params, (teacher_params, *others), prompts, completions, route_B)

    def lines(self, step: int, prompts: Batch, annotated: Annotated) -> Iterator[dict]:
        """The lines of samples.jsonl, as report.py reads them."""
        values = jax.tree.map(np.asarray, annotated)
        group = self._config.rollout.group_size
        for row in range(self._count):
            mask = values.completions.standing_BT[row]
            ids = values.completions.tokens_BT[row][mask].tolist()
            before = prompts.prompts.tokens_BS[row][prompts.prompts.mask_BS[row]][-CONTEXT:].tolist()
            line = {
                "step": step,
                "prompt": prompts.examples[row // group].prompt,
                "completion": self._tokenizer.decode(ids),
                "token_ids": ids,
                "tokens": self._tokenizer.pieces(ids, before=before),
                "special": [position for position, token in enumerate(ids) if token in self._tokenizer.special_ids],
                "student_logp": _short(values.student.logp_BT[row][mask]),
                "student_entropy": _short(values.student.entropy_BT[row][mask]),
            }
            given = np.flatnonzero(~values.completions.mask_BT[row][mask]).tolist()
            if given:
                line["given"] = given  # positions that the loss does not see: beginnings, observations
            if values.teacher is not None:
                line |= {
                    "teacher_logp": _short(values.teacher.logp_BT[row][mask]),
                    "teacher_entropy": _short(values.teacher.entropy_BT[row][mask]),
                    "teacher_top": self._top(values.teacher.top_ids_BTK[row][mask], values.teacher.top_logp_BTK[row][mask]),
                }
            yield line

    def _top(self, ids_TK: np.ndarray, logp_TK: np.ndarray) -> list[list]:
        """[[text, probability] x K] for each token."""
        name = functools.cache(self._tokenizer.piece)
        return [
            [[name(token), p] for token, p in zip(ids, _short(np.exp(logp)), strict=True)]
            for ids, logp in zip(ids_TK.tolist(), logp_TK, strict=True)
        ]


@functools.partial(jax.jit, static_argnames=("student_config", "teacher_configs", "rows"))
def _annotate(params, teachers: tuple, prompts, completions: Rollout, route_B, *, student_config, teacher_configs, rows: int) -> Annotated:
    (own, theirs), completions, route_B = jax.tree.map(lambda x: x[:rows], (prompts, completions, route_B))
    student = score.annotate(params, student_config, own, completions)
    # Without a teacher there are no configs, whatever stands for its parameters.
    said = [score.annotate(one, config, theirs, completions, k=TOP) for one, config in zip(teachers, teacher_configs, strict=False)]
    if len(said) < 2:
        return Annotated(completions, student, said[0] if said else None)
    return Annotated(completions, student, jax.tree.map(lambda *x: jnp.stack(x)[route_B, jnp.arange(rows)], *said))


def _short(values: np.ndarray) -> list[float | None]:
    """Five significant digits; None for what is not finite, which JSON does not have."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
