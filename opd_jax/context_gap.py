"""What a teacher makes of its context, before the first update: how it does on gold answers with and without each kind of section.

Self-distillation moves the student towards what the same model says after reading more. Where reading changes nothing there is nothing to
learn, and an update is noise. Each kind of context.privileged.reads is measured alone, on held-out examples: solution, demonstration and
sibling are the example's solution, feedback is the verifier's (or judge's) on that solution with one character replaced.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax import config as config_lib
from opd_jax import evaluate, parallel, processes, rewards, rollout, score
from opd_jax.data import pipeline, privileged, tasks
from opd_jax.data.tasks import Example, Task
from opd_jax.data.tasks.informed import KINDS, section
from opd_jax.model_io import LoadedModel
from opd_jax.rewards import OwnJudge
from opd_jax.turns import Turns
from opd_jax.types import Prompts

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Speaker:
    """Whose feedback updates read, in a task's place: no error of a verifier ends a run."""

    judge: Task | OwnJudge

    def verify(self, example: Example, text: str) -> privileged.Attempt:
        return rewards.judge(self.judge, [example], [text]).attempts[0]


@dataclasses.dataclass(frozen=True)
class ContextGap:
    """Measures one teacher; call it under `jax.set_mesh(mesh)`."""

    teacher: LoadedModel
    task: Task
    examples: Sequence[Example]  # with solutions
    settings: config_lib.Privileged
    encoder: pipeline.Encoder  # how the teacher reads
    batch_size: int
    max_new_tokens: int
    mesh: Mesh
    seed: int
    turns: Turns | None = None  # how completions are written where the task has an environment
    judge: OwnJudge | None = None  # in place of the task's verifier: whose feedback is read

    def __call__(self) -> dict[str, float]:
        """The context/ metrics of record 0: gold_logp in nats per token, gains with 95% bootstrap intervals over examples.

        A kind that fits no example's teacher prompt is left out.
        """
        everyone = range(len(self.examples))
        plain_P = self._gold([example.prompt for example in self.examples], everyone)
        metrics = {"context/gold_logp": float(plain_P.mean())}
        if self.task.verifiable:
            metrics["context/accuracy"] = self._accuracy([example.prompt for example in self.examples], everyone)
        for kind in [kind for kind in privileged.kinds_of(self.settings.reads) if kind in KINDS]:
            texts = [self._informed(example, kind) for example in self.examples]
            rows = [row for row, text in enumerate(texts) if text is not None]
            if not rows:
                continue
            read = [texts[row] for row in rows]
            gold_P = self._gold(read, rows)
            metrics[f"context/gold_logp/{kind}"] = float(gold_P.mean())
            gain = evaluate.with_interval("gain", gold_P - plain_P[rows])
            metrics |= {f"context/gold_{name}/{kind}": value for name, value in gain.items()}
            if self.task.verifiable:
                metrics[f"context/accuracy/{kind}"] = self._accuracy(read, rows)
        return metrics

    def _informed(self, example: Example, kind: str) -> str | None:
        rng = np.random.default_rng([self.seed, example.id, 0x6A9])
        length_of = lambda text: len(self.encoder.reader.encode_prompt(text))
        speaker = _Speaker(self.judge or self.task)
        layout, sections = privileged.layout_text(self.settings.layout), section(speaker, example, kind, rng)
        return privileged.fit(layout, example.prompt, sections, length_of=length_of, room=self.encoder.max_prompt_length).text

    def _batches(self, texts: Sequence[str], rows: Sequence[int]):
        """(places in `texts` that count, their prompts on the mesh); the last batch is filled up with repeated rows."""
        prompts, _ = self.encoder.encode(texts, [self.examples[row].id for row in rows])
        for start in range(0, len(texts), self.batch_size):
            at_B = np.minimum(np.arange(start, start + self.batch_size), len(texts) - 1)
            taken = Prompts(prompts.tokens_BS[at_B], prompts.mask_BS[at_B], prompts.id_B[at_B])
            yield at_B, min(self.batch_size, len(texts) - start), parallel.shard_batch(taken, self.mesh)

    def _gold(self, texts: Sequence[str], rows: Sequence[int]) -> np.ndarray:
        """[P] mean log-prob of the tokens of each solution after these prompts."""
        gold = [self.examples[row].solution for row in rows]
        size = {"max_new_tokens": self.max_new_tokens}
        tokens_PT, mask_PT, stopped_P, _ = pipeline.encode_solutions(gold, tasks.environment_of(self.task), self.teacher.tokenizer, **size)
        found = []
        for at_B, real, prompts in self._batches(texts, rows):
            arrays = parallel.shard_batch((tokens_PT[at_B], mask_PT[at_B], stopped_P[at_B], processes.to_host(prompts.id_B)), self.mesh)
            logp_BT = score.logprobs(self.teacher.params, self.teacher.config, prompts, rollout.from_completions(*arrays))
            found.append((processes.to_host(logp_BT).sum(1, dtype=np.float64) / mask_PT[at_B].sum(1))[:real])
        return np.concatenate(found)

    def _accuracy(self, texts: Sequence[str], rows: Sequence[int]) -> float:
        """Greedy, after these prompts."""
        answers = []
        for _, real, prompts in self._batches(texts, rows):
            write = functools.partial(
                rollout.sample,
                self.teacher.params,
                self.teacher.config,
                prompts,
                key=jax.random.key(self.seed),  # a greedy law draws nothing
                max_new_tokens=self.max_new_tokens,
                temperature=0.0,
                stop_ids=self.teacher.tokenizer.eos_ids,
            )
            written = write() if self.turns is None else self.turns.write(write, prompts.id_B, self.max_new_tokens)
            tokens_BT, standing_BT = processes.to_host((written.tokens_BT, written.standing_BT))
            answers += [self.teacher.tokenizer.decode(tokens_BT[row][standing_BT[row]].tolist()) for row in range(real)]
        return float(np.mean(rewards.judge(self.task, [self.examples[row] for row in rows], answers).reward_B >= 1))


def make(
    config: config_lib.Config, teacher: LoadedModel | None, encoder, task: Task, mesh: Mesh, *, judge: Callable | None = None
) -> ContextGap | None:
    """None where the teacher reads nothing beside the question, or no held-out example has a solution to measure it by.

    `judge`: a user's own, in place of the task's verifier.
    """
    settings = config.context.privileged
    if teacher is None or not set(privileged.kinds_of(settings.reads)) & set(KINDS):
        return None
    held_out = task.examples("eval")
    examples = [held_out[i] for i in range(min(config.eval.prompts, len(held_out)))]
    examples = [example for example in examples if example.solution]
    if not examples:
        return None
    sizes = {"batch_size": config.eval.batch_size, "max_new_tokens": config.rollout.max_new_tokens}
    turns = rollout.make_turns(config.rollout, tasks.environment_of(task), teacher.tokenizer, mesh)
    speaks = {"judge": OwnJudge(judge) if judge else None}
    return ContextGap(teacher, task, examples, settings, encoder, mesh=mesh, seed=config.seed, **sizes, turns=turns, **speaks)


def in_words(metrics: dict[str, float]) -> list[str]:
    """A line for each kind, from what ContextGap gives."""
    lines = []
    for kind in [kind for kind in KINDS if f"context/gold_gain/{kind}" in metrics]:
        values = [metrics.get(f"context/gold_gain{end}/{kind}", float("nan")) for end in ("", "_low", "_high")]
        line = "gold answers gain {:.3f} [{:.3f}, {:.3f}] nats per token".format(*values)
        if "context/accuracy" in metrics:
            line += f", accuracy {metrics['context/accuracy']:.2f} -> {metrics[f'context/accuracy/{kind}']:.2f}"
        lines.append(f"the teacher reads {kind}: {line}")
    return lines


def warn(metrics: dict[str, float]) -> None:
    """Logs the kinds whose interval includes 0: nothing tells that the teacher uses them."""
    for kind in [kind for kind in KINDS if f"context/gold_gain/{kind}" in metrics]:
        low = metrics.get(f"context/gold_gain_low/{kind}")
        if low is None or low <= 0:
            log.warning(
                "the teacher makes no use of context.privileged.reads = %s that can be told from noise (gold answers gain %.3f nats per "
                "token, 95%% from %s): there may be nothing to distil; begin with a model that was trained to read it (configs/base.py)",
                kind,
                metrics[f"context/gold_gain/{kind}"],
                "an interval that one example does not give" if low is None else f"{low:.3f}",
            )
