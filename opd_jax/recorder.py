"""The run directory while a run is running: records one step late, samples, evaluations, checkpoints, and the last save."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import context_gap, cost, environments, labels, machine, processes, rewards, rollout, teachers
from opd_jax.apart import Heard
from opd_jax.batches import Made, token_shares
from opd_jax.cli import Interrupted
from opd_jax.data import tasks
from opd_jax.data.pipeline import Batch
from opd_jax.diagnostics import Diagnostics
from opd_jax.job import Job
from opd_jax.metrics import Progress
from opd_jax.samples import Annotated
from opd_jax.types import Rollout


@dataclasses.dataclass(frozen=True)
class Pending:
    """A step whose record is not written yet."""

    step: int
    prompts: Batch
    completions: Rollout
    made: Made  # without the batch itself, whose arrays need not outlive the update
    measured: dict
    annotated: Annotated | None
    finished: Future  # -> the time when the device had finished it


# What ends all processes at the same step: they agreed, they measured the same, or their user's loop was left.
ENDS_ALL = Interrupted | FloatingPointError | GeneratorExit


def _finish_time(measured: dict) -> float:
    jax.block_until_ready(measured)
    return time.perf_counter()


class Recorder:
    """Owns the current state of a run, and what is on disk about it.

    Device metrics are read one step late, so that the host never waits for the step it has just started. Where an evaluation or a
    checkpoint needs them complete they are read at once: every record up to a checkpoint's step is on disk before the checkpoint.
    """

    def __init__(self, job: Job, progress: Progress):
        self.job = job
        self.state = job.state
        self.step = job.step  # updates whose records are on disk
        self._saved_step = job.step if job.resumed else None
        self._accounts = _accounts(job)
        self._teacher_size = cost.parameters(job.teacher.config, job.teacher.params) if job.teacher else 0
        self._info = {**job.info, **cost.totals(job.info, self._accounts(self._writer(1)))._asdict()}
        self._progress = progress
        self._pending: Pending | None = None
        self._clock = time.perf_counter()  # when the last step was finished
        self._diagnostics = Diagnostics(job.student.tokenizer)
        self._waiter = ThreadPoolExecutor(1)  # waits for the device, so that the loop need not

    def start(self) -> Iterator[dict]:
        """Saves the initial state, and evaluates it unless that is on record."""
        if self._saved_step is None:
            self._save()
        if self.step == 0 and self.job.evaluate is not None and not self.job.writer.has_record(0):
            yield self._write({"step": 0, **self._evaluation(0), **self._context_gap()})
        self._clock = time.perf_counter()

    def annotate(self, step: int, prompts: Batch, completions: Rollout, made: Made) -> Annotated | None:
        """Scores the samples of update number `step`, where they are due, by the student that wrote them: call it before the update."""
        if not self.job.samples.due(step):
            return None
        scorer = self.job.scorer(self.state)
        bank, read = self.job.bank, (prompts.prompts, made.teacher_prompts)
        routed = bank.members[1:] if made.batch.route_B is not None else ()
        others = {"others": tuple(self.job.frozen[name] for name, _ in routed), "route_B": made.batch.route_B}
        return self.job.samples.annotate(self.job.policy(self.state.params), scorer, read, completions, **others)

    def record(
        self, step: int, prompts: Batch, completions: Rollout, made: Made, measured: dict, annotated: Annotated | None
    ) -> Iterator[dict]:
        """Takes what update number `step` gave, writes what is due, yields the records written."""
        config = self.job.config
        last = step == config.steps
        evaluate = last or (config.eval.every > 0 and step % config.eval.every == 0)
        save = last or step % config.checkpoint.every == 0
        finished = self._waiter.submit(_finish_time, measured)
        # Taken in before anything is yielded: whoever leaves the loop at a yield must not lose this step.
        made = dataclasses.replace(made, batch=None, teacher_prompts=processes.gather(made.teacher_prompts.replace(hidden_BTD=None)))
        completions, measured, annotated = processes.gather((completions, measured, annotated))
        previous, self._pending = self._pending, Pending(step, prompts, completions, made, measured, annotated, finished)
        if previous is not None:
            yield self._complete(previous)
        if evaluate or save:
            pending, self._pending = self._pending, None
            record = self._complete(pending, evaluate=evaluate)
            if save:
                self._save()
            self._clock = time.perf_counter()
            yield record

    def close(self, error: BaseException | None) -> None:
        """Writes and saves what is not on disk yet; `error` is what ends the run. After an interrupt within an update the last checkpoint
        stands, and also where one of several processes may be alone with its error: the others would not save with it.
        """
        together = processes.count() == 1 or isinstance(error, ENDS_ALL | None)
        try:
            if self._pending is not None and together:
                self._complete(self._pending)
        finally:
            intact = together and not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
            try:
                if intact and int(self.state.step) == self.step != self._saved_step:
                    self._save()
                if self.step > self.job.step or not self.job.resumed:
                    machine.end_session(self.job.workdir, self.step, self.job.mesh)
            finally:
                self._waiter.shutdown()
                self.job.trackers.close()
                self._progress.close()

    def _complete(self, pending: Pending, *, evaluate: bool = False) -> dict:
        record = {"step": pending.step, **self._train_metrics(pending.step, pending.measured), **self._rollout_metrics(pending)}
        if "diagnostics" in pending.measured:
            own = self._on_policy(pending.step)
            record |= self._diagnostics.record(pending.measured["diagnostics"], pending.completions, own_draws=own)
        finished = pending.finished.result()
        seconds, self._clock = finished - self._clock, finished
        self._info["seconds"] += seconds
        record |= {"time/step_seconds": seconds, "time/total_seconds": self._info["seconds"]}
        record["rollout/tokens_per_second"] = record["train/tokens"] / seconds
        written = self._write(record | (self._evaluation(pending.step) if evaluate else {}))
        self.step = pending.step  # not before: a step whose record could not be written must not be saved
        return written

    def _writer(self, step: int) -> str:
        """Who wrote the completions of update number `step`."""
        return rollout.writer(self.job.config.rollout, self.job.config.seed, step - 1)

    def _on_policy(self, step: int) -> bool:
        """Whether update number `step` learns from completions of the student as it is."""
        return self._writer(step) == "student" and not self.job.config.rollout.aggregate

    def _train_metrics(self, step: int, measured: dict) -> dict[str, float]:
        values = {name: float(value) for name, value in measured.items() if name != "diagnostics"}
        for name, value in values.items():
            if not np.isfinite(value):
                self._pending = None  # no update after this one changed the state
                raise FloatingPointError(f"step {step}: {name} is {value}; the state before this update is saved")
        if not self._on_policy(step):  # these two are statements about the student's own completions
            values = {name: value for name, value in values.items() if name not in ("train/reverse_kl", "train/log_ratio_mean")}
        return values | {"train/learning_rate": float(self.job.schedule(step - 1))}

    def _rollout_metrics(self, pending: Pending) -> dict[str, float]:
        prompts, completions = pending.prompts, pending.completions
        config, writer = self.job.config, self._writer(pending.step)
        drawn, standing_BT = int(np.asarray(completions.mask_BT).sum()), np.asarray(completions.standing_BT)
        self._info["tokens_total"] += drawn
        prompt, teacher_prompt = (int(np.asarray(read.mask_BS).sum()) for read in (prompts.prompts, pending.made.teacher_prompts))
        read = {"prompt": prompt, "teacher_prompt": teacher_prompt, "completion": int(standing_BT.sum())}
        learnt = pending.made.learnt
        # Of corrected completions the student's beginning was sampled too, though it is not learnt from.
        read |= {"drawn": None if writer == "corrected" else drawn, "learnt": learnt and learnt.tokens}
        work = self._accounts(writer).work(**read)
        work = work.plus(cost.writing(self._teacher_size, *pending.made.written))
        for name, amount in work._asdict().items():
            self._info[name] += amount
        record = {
            "rollout/length": float(standing_BT.sum(1).mean()),
            "rollout/truncated_fraction": float(1 - np.asarray(completions.stopped_B).mean()),
            "rollout/tokens_total": self._info["tokens_total"],
            "rollout/prompts_truncated": prompts.truncated,
            "cost/flops_total": float(self._info["flops"]),
            "cost/generated_tokens_total": self._info["generated_tokens"],
            "cost/scored_tokens_total": self._info["scored_tokens"],
            **pending.made.counts,
        }
        record |= learnt.shares if learnt else token_shares(prompts.examples, np.asarray(completions.mask_BT))
        if learnt is not None:
            record["replay/age"] = learnt.age
        if config.rollout.source == "mix":
            record["rollout/on_policy"] = int(writer == "student")
        if config.rollout.max_turns > 1 and writer != "dataset":
            texts, environment = self.job.make_batch.texts(completions), tasks.environment_of(self.job.task)
            record["rollout/turns"], record["rollout/call_errors"] = environments.counts(environment, texts)
        if pending.annotated is not None:
            self.job.writer.samples(self.job.samples.lines(pending.step, prompts, pending.annotated))
        judges = self.job.task.verifiable or config.reward.judge
        if judges and (writer not in ("dataset", "cache") or (writer == "cache" and pending.made.judged)):
            judged = pending.made.judged or self.job.make_batch.judge(prompts, completions)
            record["rollout/reward"] = float(judged.reward_B.mean())
            record |= rewards.metrics(judged, config.rollout.group_size)
        return record

    def _evaluation(self, step: int) -> dict[str, float]:
        if self.job.evaluate is None:
            return {}
        self._progress.phase(f"evaluating after {step} updates")
        start = time.perf_counter()
        with jax.set_mesh(self.job.mesh):
            values = self.job.evaluate(self.job.policy(self.state.params))
        return values | {"time/eval_seconds": time.perf_counter() - start}

    def _context_gap(self) -> dict[str, float]:
        """Whether there is anything to distil from a teacher that reads more; said before the first update."""
        if self.job.context_gap is None:
            return {}
        with jax.set_mesh(self.job.mesh):
            values = self.job.context_gap()
        for line in context_gap.in_words(values):
            self._progress.phase(line)
        context_gap.warn(values)
        return values

    def _write(self, record: dict) -> dict:
        self.job.writer.write(record)
        self.job.trackers.write(record)
        self._progress.update(record)
        return record

    def _save(self) -> None:
        self.job.trackers.flush()
        self.job.checkpoints.save(self.step, self.state.replace(finite=jnp.ones_like(self.state.finite)), self._info)
        self._saved_step = self.step


def _accounts(job: Job) -> Callable[[str], cost.Account]:
    """Of a step, by who wrote its completions."""
    student, adapter = job.student, cost.size(job.state.params) if job.student.lora else 0
    base = cost.parameters(student.config, student.params if student.lora else job.state.params)
    teacher = cost.parameters(job.teacher.config, job.teacher.params) if job.teacher else None
    scorers, references = _scorers(job, base + adapter)
    return lambda writer: cost.account(writer, base + adapter, adapter or base, teacher, scorers=scorers, references=references)


def _scorers(job: Job, student: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Parameters of all that read each completion: the teachers (a route leaves none out; a trust region reads twice), the reference."""
    bank = job.bank
    if bank is None:
        return (), ()
    scored = job.objective.has_teacher or (job.config.rollout.aggregate and labels.form_of(job.objective).scores != "none")
    own = lambda name, model: (model, job.frozen[name]) if not isinstance(model, Heard) else (job.teacher.config, job.teacher.params)
    read_by = [own(name, model) for name, model in bank.members]
    members = tuple(cost.parameters(*model) for model in read_by) if scored else ()
    live = (student,) if scored and bank.update == "trust_region" else ()
    refers = bank.reference is not None and (job.objective.has_reference or (scored and bank.extrapolates))
    return members + live, (cost.parameters(bank.reference, job.frozen[teachers.REFERENCE]),) if refers else ()
