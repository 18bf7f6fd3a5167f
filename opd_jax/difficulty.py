"""Prompts by measured difficulty: how often the initial student solves each of some training prompts; training is on those within a range.

What was measured is in the run directory, and a resumed run reads it: the student that it was measured by is no more. Completions are the
student's own whatever rollout.source is, from the sampling law of `rollout`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from opd_jax import config as config_lib
from opd_jax import files, parallel, processes, rewards, rollout
from opd_jax.config import Config, ConfigError
from opd_jax.data import tasks
from opd_jax.data.pipeline import Encoder
from opd_jax.data.tasks import Example, Task
from opd_jax.model_io import LoadedModel
from opd_jax.types import Prompts, UserError

FILE = "difficulty.json"  # in the run directory
_KEY = 0xD1FF  # folded into the run's seed, so that its updates draw other completions


@dataclasses.dataclass(frozen=True)
class Measured:
    """Training prompts with the share of completions that succeeded, a reward of at least 1."""

    examples: list[Example]
    rate_P: np.ndarray  # float64
    samples: int  # completions of each

    def kept(self, low: float, high: float) -> list[Example]:
        """The examples with a rate from low to high, both included."""
        return [example for example, rate in zip(self.examples, self.rate_P, strict=True) if low <= rate <= high]

    def to_json(self) -> str:
        """The file's text: `samples`, and `prompts`, a list of {id, rate}."""
        prompts = [{"id": example.id, "rate": float(rate)} for example, rate in zip(self.examples, self.rate_P, strict=True)]
        return json.dumps({"samples": self.samples, "prompts": prompts}) + "\n"

    @property
    def digest(self) -> str:
        """Of what a run's prompts depend on."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()


def candidates(config: Config, examples: Sequence[Example]) -> list[Example]:
    """The training prompts that are measured: task.difficulty_prompts of them, drawn by the seed, in the task's order."""
    count = min(config.task.difficulty_prompts, len(examples))
    rng = np.random.default_rng([config.seed, _KEY])
    return [examples[int(index)] for index in np.sort(rng.choice(len(examples), count, replace=False))]


def measure(
    config: Config, task: Task, judge: Callable | None, student: LoadedModel, encoder: Encoder, mesh: Mesh, examples: list[Example]
) -> Measured:
    """Success rates of a student on examples, by the task's verifier or a judge in its place. Call it under `jax.set_mesh(mesh)`.

    The draws are functions of the seed, the example's id and the number of the sample. Raises UserError for a prompt that does not fit.
    """
    asked, samples = config.rollout, config.task.difficulty_samples
    total = len(examples) * samples
    prompts, _ = encoder.encode([example.prompt for example in examples], [example.id for example in examples])
    law = {name: getattr(asked, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")}
    law |= {"key": jax.random.fold_in(jax.random.key(config.seed), _KEY), "stop_ids": student.tokenizer.eos_ids}
    turns = rollout.make_turns(asked, tasks.environment_of(task), student.tokenizer, mesh)
    verdicts, reward = rewards.Judge(rewards.OwnJudge(judge) if judge else task), []
    for start in range(0, total, asked.batch_size):
        row_B = np.minimum(np.arange(start, start + asked.batch_size), total - 1)  # the last batch repeats its last row
        example_B = row_B // samples
        id_B = (prompts.id_B[example_B].astype(np.uint64) * samples + row_B % samples).astype(np.uint32)
        rows = Prompts(prompts.tokens_BS[example_B], prompts.mask_BS[example_B], id_B)
        sample = functools.partial(rollout.sample, student.params, student.config, parallel.shard_batch(rows, mesh), **law)
        drawn = sample() if turns is None else turns.write(sample, id_B, asked.max_new_tokens)
        real = min(asked.batch_size, total - start)
        tokens_BT, standing_BT = (x[:real] for x in processes.to_host((drawn.tokens_BT, drawn.standing_BT)))
        texts = [student.tokenizer.decode(tokens[here].tolist()) for tokens, here in zip(tokens_BT, standing_BT, strict=True)]
        reward.append(verdicts([examples[i] for i in example_B[:real]], texts).reward_B)
    return Measured(examples, (np.concatenate(reward).reshape(-1, samples) >= 1).mean(1), samples)


def read(workdir: pathlib.Path, config: Config, examples: Sequence[Example]) -> Measured:
    """What a run measured before its first update. Raises UserError for a file that is gone, or that is not of these examples."""
    path, remedy = workdir / FILE, "restore it, or give another --workdir"
    found, asked = files.read_json(path, remedy=remedy), candidates(config, examples)
    prompts, samples = found.get("prompts"), found.get("samples")
    fits = isinstance(prompts, list) and all(isinstance(one, dict) and isinstance(one.get("rate"), float) for one in prompts)
    if not fits or samples != config.task.difficulty_samples or [one.get("id") for one in prompts] != [example.id for example in asked]:
        raise UserError(f"{path}: is not what this run measured of {len(asked)} prompts; {remedy}")
    return Measured(asked, np.array([one["rate"] for one in prompts]), samples)


def write(workdir: pathlib.Path, measured: Measured) -> None:
    """Raises UserError for a folder that cannot be written."""
    path, temporary = workdir / FILE, workdir / "difficulty.tmp"
    try:
        temporary.write_text(measured.to_json())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({files.reason(error)}); free space, or give another folder") from None


def chosen(config: Config, measured: Measured) -> list[Example]:
    """The prompts to train on. Raises ConfigError, with the measured distribution, where there is none."""
    low, high = config.task.difficulty_low, config.task.difficulty_high
    kept = measured.kept(low, high)
    if not kept:
        counts = ", ".join(f"{rate:g}: {count}" for rate, count in sorted(Counter(measured.rate_P.tolist()).items()))
        raise ConfigError(
            f"config field task.difficulty_low = {low:g} and task.difficulty_high = {high:g}: none of the {len(measured.examples)} prompts "
            f"that were measured is within; prompts by success rate of {measured.samples} samples: {counts}; widen the range, or measure "
            "more (task.difficulty_prompts)"
        )
    return kept


def check(config: Config, task: Task) -> None:
    """Refuses a measurement that nobody can judge. Raises ConfigError."""
    if config_lib.measures_difficulty(config) and not (task.verifiable or config.reward.judge):
        raise ConfigError(
            f"config field task.difficulty_low = {config.task.difficulty_low:g} and task.difficulty_high = {config.task.difficulty_high:g} "
            f"need a verifier, which task.name = {task.name!r} has not; choose another task, give train.run a judge, or use 0 and 1"
        )
