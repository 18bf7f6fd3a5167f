"""Evaluation on held-out prompts: accuracy, avg@k, pass@k, maj@k, KL to the teacher, how completions are written, recovery from errors.

Each model samples once; what an evaluation measures beside that, it reads off these samples.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import scipy.stats
from jax.sharding import Mesh

from opd_jax import environments, injected, parallel, processes, sampler, scores, teachers, wording
from opd_jax.apart import Apart
from opd_jax.data import pipeline, tasks
from opd_jax.data.tasks import Example, Task
from opd_jax.model_io import LoadedModel
from opd_jax.models import forward
from opd_jax.models.config import ModelConfig
from opd_jax.numerics.token_stats import Signal, token_stats
from opd_jax.rollout import sample
from opd_jax.teachers import Bank, Parameters
from opd_jax.turns import Turns
from opd_jax.types import Prompts, Rollout, UserError, view

# Draws of an evaluation depend on the seed alone, never on the step: evaluations of one run are paired.
GREEDY, SAMPLED, TEACHER = range(3)


@dataclasses.dataclass(frozen=True)
class Several:
    """More than one teacher, as they were in the beginning, without a reference."""

    bank: Bank
    params: dict  # by name
    route_P: np.ndarray | None = None  # number of the teacher of each prompt; None: all of them, as a mixture
    has_P: np.ndarray | None = None  # False on prompts that no teacher is for, of whose teacher nothing is said; None: on none


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates any student of one configuration on a fixed set of held-out prompts. `student.params` is not used."""

    student: LoadedModel
    teacher: LoadedModel | None
    task: Task
    examples: Sequence[Example]
    samples: int
    batch_size: int
    max_new_tokens: int
    student_prompts: pipeline.Encoder
    teacher_prompts: pipeline.Encoder | None  # None: the teacher reads what the student reads
    seed: int
    mesh: Mesh
    several: Several | None = None  # in place of the teacher alone, which is the first of them
    inject_error: bool = False  # measure recovery after an error: one more greedy pass
    turns: Turns | None = None  # how completions are written where the task has an environment
    apart: Apart | None = None  # the teacher, where it has devices of its own

    def __call__(self, params: dict) -> dict[str, float]:
        """All `eval/` metrics of a student with these parameters."""
        metrics = {"eval/prompts": len(self.examples)}
        if self.task.verifiable:
            rewards_P = self._rewards(self._sample(params, self.student.config, GREEDY))[:, 0]
            metrics |= proportion("eval/accuracy", rewards_P) | self._by_domain("eval/accuracy", rewards_P >= 1)
        rollouts = self._sample(params, self.student.config, SAMPLED)
        metrics |= self._read_samples(rollouts)
        metrics |= _length_metrics(rollouts)
        # The student's own completions give its entropy and the reverse KL, the teacher's give the forward KL, and the reverse KL again:
        # what the student makes of prefixes that it would not have written.
        stats = self._score(params, rollouts, "reverse_kl")
        metrics["eval/entropy"] = float(stats["entropy"].sum() / stats["tokens"].sum())
        at = self._compared
        if self.teacher is not None and at.any():
            metrics |= ratio_with_interval("eval/reverse_kl", stats["local"][at], stats["tokens"][at])
            rollouts = self._teacher_rollouts
            if self.task.verifiable:
                metrics["eval/teacher_sampled_accuracy"] = float(self._rewards(rollouts)[at].mean())
            for name, kind in (("eval/forward_kl", "forward_kl"), ("eval/reverse_kl_on_teacher", "reverse_kl")):
                stats = self._score(params, rollouts, kind)
                metrics |= ratio_with_interval(name, stats["local"][at], stats["tokens"][at])
        return metrics | (self._recovery(params) if self.inject_error else {})

    def _read_samples(self, rollouts) -> dict[str, float]:
        """What the student's samples say without a model: rewards, votes, and how they are written."""
        ids = _token_ids(rollouts)
        texts = [self.student.tokenizer.decode(row) for row in ids]
        metrics = wording.metrics(ids, texts, samples=self.samples, stop_ids=self.student.tokenizer.eos_ids)
        if self.turns is not None:
            metrics["eval/turns"], metrics["eval/call_errors"] = environments.counts(self.turns.environment, texts)
        if not self.task.verifiable:
            return metrics
        rewards_PK = self._judge(texts)
        metrics |= sampled_accuracy(rewards_PK) | self._by_domain("eval/sampled_accuracy", rewards_PK.mean(1))
        answers = tasks.votes(self.task, texts)
        if answers is not None:
            answers_PK = [answers[start : start + self.samples] for start in range(0, len(answers), self.samples)]
            votes_PK = scores.ballots(answers_PK, rewards_PK)
            metrics["eval/maj_at_k"] = float(scores.maj_rates(votes_PK, self.samples).mean())
        return metrics

    @property
    def _compared(self) -> np.ndarray:
        """bool [P]: the prompts that have a teacher."""
        has_P = None if self.several is None else self.several.has_P
        return np.ones(len(self.examples), bool) if has_P is None else has_P

    def _by_domain(self, name: str, values_P: np.ndarray) -> dict[str, float]:
        """The mean over the prompts of each tag, where examples have tags."""
        tags = [example.tag for example in self.examples]
        rows = {tag: [row for row, other in enumerate(tags) if other == tag] for tag in sorted(set(tags)) if tag}
        return {f"{name}/{tag}": float(np.mean(values_P[at])) for tag, at in rows.items()}

    def _recovery(self, params: dict) -> dict[str, float]:
        """How much of the solution the student writes after an error in it; what it stops before counts as missed."""
        rows, matches = len(self._injected.gold_NT), []
        for start in range(0, rows, self.batch_size):
            part = self._injected.take(np.minimum(np.arange(start, start + self.batch_size), rows - 1))
            # sample() would refuse a long beginning with max_new_tokens after it; what a row needs of them fits, because prompt and
            # solution do. The rest is written past the context and not looked at.
            rollout = sampler.sample_tokens(
                params,
                self.student.config,
                parallel.shard_batch(part.prompts, self.mesh),
                key=jax.random.key(self.seed),  # a greedy law draws nothing
                max_new_tokens=self.max_new_tokens,
                law=sampler.Law(temperature=0.0),
                stop_ids=tuple(self.student.tokenizer.eos_ids),
                pad_id=self.student.config.pad_token_id or 0,
            )
            matches.append(part.matches(*processes.to_host((rollout.tokens_BT, rollout.mask_BT)))[: rows - start])
        return ratio_with_interval("eval/recovery", np.concatenate(matches), self._injected.mask_NT.sum(1))

    @functools.cached_property
    def _injected(self) -> injected.Injected | None:
        settings = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        return injected.inject(self._prompts[0], self.examples, self.student.tokenizer, **settings)

    @functools.cached_property
    def _teacher_rollouts(self) -> list[tuple[tuple[Prompts, Prompts], Rollout, int]]:
        """The same for every student: the teacher is frozen, and so are the prompts and the draws. Of a mixture the first member writes."""
        if self.several is None or self.several.route_P is None:
            return self._sample(self.teacher.params, self.teacher.config, TEACHER)
        written = [self._sample(self.several.params[name], model, TEACHER) for name, model in self.several.bank.members]
        return [self._chosen(batches, example_B) for *batches, example_B in zip(*written, self._rows(self.samples), strict=True)]

    def _chosen(self, batches, example_B: np.ndarray) -> tuple[tuple[Prompts, Prompts], Rollout, int]:
        """Of one batch, as each teacher wrote it, the rows that are its own."""
        at = self.several.route_P[example_B], np.arange(len(example_B))
        chosen = jax.tree.map(lambda *x: np.stack(x)[at], *(processes.to_host(rollout) for _, rollout, _ in batches))
        prompts, _, real = batches[0]
        return prompts, parallel.shard_batch(chosen, self.mesh), real

    @functools.cached_property
    def _prompts(self) -> tuple[Prompts, Prompts]:
        """The held-out prompts, one row each, as student and teacher read them. Raises UserError for one that does not fit."""
        texts, ids = [example.prompt for example in self.examples], [example.id for example in self.examples]
        prompts, _ = self.student_prompts.encode(texts, ids)
        return prompts, self.teacher_prompts.encode(texts, ids)[0] if self.teacher_prompts else prompts

    def check(self) -> None:
        """Refuses held-out prompts that cannot be used. Raises UserError."""
        self._prompts  # noqa: B018
        if self.inject_error and self._injected is None:
            raise UserError(
                f"config field eval.inject_error = True needs solutions of two tokens or more, but the {len(self.examples)} held-out "
                "examples have none; set it to false, or give `solution`s"
            )

    def _batches(self, samples: int) -> Iterator[tuple[int, tuple[Prompts, Prompts]]]:
        """(rows that count, (student's, teacher's) Prompts of batch_size rows).

        The last batch is filled up with repeated rows, so that nothing recompiles.
        """
        total = len(self.examples) * samples
        for start in range(0, total, self.batch_size):
            row_B = np.minimum(np.arange(start, start + self.batch_size), total - 1)
            example_B = row_B // samples
            rollout_id_B = (self._prompts[0].id_B[example_B] * samples + row_B % samples).astype(np.uint32)
            rows = [Prompts(prompts.tokens_BS[example_B], prompts.mask_BS[example_B], rollout_id_B) for prompts in self._prompts]
            yield min(self.batch_size, total - start), parallel.shard_batch(tuple(rows), self.mesh)

    def _rows(self, samples: int) -> list[np.ndarray]:
        """Which example each row of each batch is of."""
        total = len(self.examples) * samples
        starts = range(0, total, self.batch_size)
        return [np.minimum(np.arange(start, start + self.batch_size), total - 1) // samples for start in starts]

    def _sample(self, params: dict, config: ModelConfig, purpose: int) -> list[tuple[tuple[Prompts, Prompts], Rollout, int]]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), 0xE7A1), purpose)
        greedy = purpose == GREEDY
        results = []
        for real, prompts in self._batches(1 if greedy else self.samples):
            read = prompts[purpose == TEACHER]
            law = {"key": key, "max_new_tokens": self.max_new_tokens, "temperature": 0.0 if greedy else 1.0}
            law["stop_ids"] = self.student.tokenizer.eos_ids
            here = functools.partial(sample, params, config)
            write = functools.partial(self.apart.sample if self.apart and purpose == TEACHER else here, read, **law)
            rollout = write() if self.turns is None else self.turns.write(write, read.id_B, self.max_new_tokens)
            results.append((prompts, rollout, real))
        return results

    def _rewards(self, rollouts) -> np.ndarray:
        """[P, k] rewards of the verifier."""
        return self._judge([self.student.tokenizer.decode(ids) for ids in _token_ids(rollouts)])

    def _judge(self, texts: list[str]) -> np.ndarray:
        per_prompt = len(texts) // len(self.examples)
        examples = [self.examples[i // per_prompt] for i in range(len(texts))]
        rewards_of = lambda examples, texts: [float(one.reward) for one in tasks.verify_many(self.task, examples, texts)]
        return np.array(processes.divide(rewards_of, examples, texts)).reshape(-1, per_prompt)

    def _score(self, params: dict, rollouts, kind: str) -> dict[str, np.ndarray]:
        """Sums of per-token statistics over each prompt's completions, [P]."""
        bank, frozen, route_P = None, None, None
        if self.several is not None:
            bank, frozen, route_P = self.several.bank, self.several.params, self.several.route_P
        elif self.teacher is not None:
            teacher = self.teacher if self.apart is None else self.apart.heard
            bank, frozen = teachers.single(teacher.config), {"teacher": teacher.params}
        pieces = []
        for (prompts, rollout, real), example_B in zip(rollouts, self._rows(self.samples), strict=True):
            route_B = None if route_P is None else parallel.shard_batch(route_P[example_B], self.mesh)
            if self.apart is not None:
                prompts = prompts[0], self.apart.hear(prompts[1], rollout)
            sums = _rollout_sums(params, frozen, prompts, rollout, route_B, self.student.config, bank, kind)
            pieces.append({name: value[:real] for name, value in processes.to_host(sums).items()})
        return {name: np.concatenate([p[name] for p in pieces]).reshape(len(self.examples), -1).sum(1) for name in pieces[0]}


@functools.partial(jax.jit, static_argnames=("student_config", "bank", "kind"))
def _rollout_sums(params, frozen, prompts, rollout, route_B, student_config, bank: Bank | None, kind):
    student_prompts, teacher_prompts = prompts
    own, theirs = view(student_prompts, rollout), view(teacher_prompts, rollout)
    student = forward.hidden(params, student_config, own)
    target, needs = None, {"entropy"}
    if bank is not None:
        target, needs = bank.target(Parameters(frozen, {}, params), theirs, own, route_B)[0], {"entropy", "local"}
    signal = Signal(kind=kind if target is not None else "nll")
    stats = token_stats(student, target, rollout.tokens_BT, signal=signal, needs=frozenset(needs))
    sums = {"tokens": rollout.mask_BT, "entropy": stats.entropy_BT} | ({"local": stats.local_BT} if target is not None else {})
    return {name: jax.numpy.where(rollout.mask_BT, value, 0).sum(1) for name, value in sums.items()}


def _token_ids(rollouts) -> list[list[int]]:
    """The tokens of each completion that counts, stop token included."""
    rows = []
    for _, rollout, real in rollouts:
        tokens_BT, standing_BT = processes.to_host((rollout.tokens_BT, rollout.standing_BT))
        rows += [tokens_BT[row][standing_BT[row]].tolist() for row in range(real)]
    return rows


def _length_metrics(rollouts) -> dict[str, float]:
    lengths = np.concatenate([processes.to_host(r.standing_BT).sum(1)[:real] for _, r, real in rollouts])
    stopped = np.concatenate([processes.to_host(r.stopped_B)[:real] for _, r, real in rollouts])
    return {"eval/length": float(lengths.mean()), "eval/truncated_fraction": float(1 - stopped.mean())}


def sampled_accuracy(rewards_PK: np.ndarray) -> dict[str, float]:
    """avg@k with an interval over prompts, and pass@k; a reward of 1 is a success."""
    passed = scores.pass_rates(rewards_PK, rewards_PK.shape[1]).mean()
    return with_interval("eval/sampled_accuracy", rewards_PK.mean(1)) | {"eval/pass_at_k": float(passed)}


def proportion(name: str, rewards_P: np.ndarray) -> dict[str, float]:
    """Share of prompts with reward 1, with Wilson's 95% interval."""
    successes = int((rewards_P >= 1.0).sum())
    interval = scipy.stats.binomtest(successes, len(rewards_P)).proportion_ci(method="wilson")
    return {name: successes / len(rewards_P), f"{name}_low": float(interval.low), f"{name}_high": float(interval.high)}


def with_interval(name: str, values_P: np.ndarray) -> dict[str, float]:
    """Mean over prompts with a 95% bootstrap interval."""
    return _bootstrap(name, lambda values, axis: values.mean(axis), (values_P,))


def ratio_with_interval(name: str, sums_P: np.ndarray, tokens_P: np.ndarray) -> dict[str, float]:
    """Mean per token, sum / tokens, with a 95% bootstrap interval over prompts."""
    return _bootstrap(name, lambda sums, tokens, axis: sums.sum(axis) / tokens.sum(axis), (sums_P, tokens_P))


def _bootstrap(name: str, statistic: Callable, data: tuple[np.ndarray, ...]) -> dict[str, float]:
    """Percentile bootstrap over prompts. With equal values, or a single prompt, the interval is the value itself or is left out."""
    data = tuple(np.asarray(values, np.float64) for values in data)
    value = float(statistic(*data, axis=0))
    if len(data[0]) < 2:
        return {name: value}
    interval = scipy.stats.bootstrap(
        data, statistic, paired=len(data) > 1, n_resamples=2000, method="percentile", rng=np.random.default_rng(0), vectorized=True
    ).confidence_interval
    return {name: value, f"{name}_low": float(interval.low), f"{name}_high": float(interval.high)}
