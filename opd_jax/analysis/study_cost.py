"""What a study costs: said before it begins, corrected by its first microbatches, shown by a progress bar."""

import time
from collections.abc import Sequence
from typing import Any

import jax

from opd_jax.analysis.study_conditions import Condition, Plan, Shadow
from opd_jax.metrics import Progress
from opd_jax.numerics.estimators import Estimator


class Cost:
    """Counts of a whole study, and its clock."""

    def __init__(
        self,
        params: dict,
        shadows: Sequence[Shadow],
        settings: Sequence[Condition],
        references: dict[str, Estimator],
        rollouts: int,
        plan: Plan,
    ):
        self._plan, self._rollouts, self._references = plan, rollouts, len(references)
        self._parameters = sum(x.size for x in jax.tree.leaves(params))
        self._numbers = self._parameters if plan.projection(params).exact else plan.sketch
        swept = [shadows if number == 0 else [one for one in shadows if one.default] for number in range(len(settings))]
        self._own = {s: len({one.estimator for one in here} | set(references.values())) for s, here in zip(settings, swept, strict=True)}
        self._done, self._estimated = 0, None
        self._begun, self._progress = time.monotonic(), Progress(quiet=True)

    def _parts(self, setting: Condition) -> int:
        return min(self._plan.position_parts, setting.T)

    def _further(self, setting: Condition) -> int:
        """Rollouts for the references."""
        return self._rollouts // setting.group_size * self._plan.reference

    def _back(self, setting: Condition) -> int:
        return self._rollouts * self._own[setting] * self._parts(setting) + self._further(setting) * self._references

    def _forward(self, setting: Condition) -> int:
        return 2 * (self._rollouts + self._further(setting))

    def _work(self, setting: Condition) -> int:
        """Passes times tokens; a pass back costs about two forward."""
        return setting.T * (2 * self._back(setting) + self._forward(setting))

    def _memory(self, setting: Condition) -> int:
        rows, streams = self._plan.microbatch, self._own[setting] + self._references
        further = rows // setting.group_size * self._plan.reference
        at_once = rows * (self._own[setting] + self._parts(setting)) + further * self._references + 3 * streams
        kept = self._rollouts // setting.group_size * streams * 8 * (self._plan.sketch + streams)
        return 4 * (self._numbers * at_once + self._parameters * max(rows, further)) + kept

    @property
    def counts(self) -> dict[str, int]:
        """Of all conditions; `memory_bytes` of gradients and what is kept of them, at most at once, beside models and activations."""
        each = {s: self._rollouts + self._further(s) for s in self._own}
        return {
            "conditions": len(each),
            "parameters": self._parameters,
            "rollouts": sum(each.values()),
            "tokens": sum(rollouts * s.T for s, rollouts in each.items()),
            "forward_passes": sum(map(self._forward, each)),
            "backward_passes": sum(map(self._back, each)),
            "memory_bytes": max(map(self._memory, each)),
        }

    def announce(self, progress: Progress) -> None:
        self._progress, c = progress, self.counts
        progress.phase(
            f"{c['conditions']} conditions, {c['parameters']:,} parameters: {c['rollouts']:,} rollouts of {c['tokens']:,} tokens at most, "
            f"{c['forward_passes']:,} forward and {c['backward_passes']:,} backward passes of single rollouts, "
            f"about {c['memory_bytes'] / 2**20:,.0f} MiB beside models and activations"
        )
        progress.begin(len(self._own) * self._rollouts // self._plan.microbatch, done=0)

    def microbatch(self, setting: Condition, seconds: float) -> None:
        """One is done; the second of all, which compiles nothing, tells the time of the rest."""
        self._done += 1
        if self._done == 2:
            share = self._work(setting) * self._plan.microbatch / self._rollouts
            self._estimated = seconds / share * sum(map(self._work, self._own))
            self._progress.phase(f"about {self._estimated:,.0f} s, sampling and compiling aside")
        self._progress.advance(self._done, f"T = {setting.T}")

    def close(self) -> None:
        self._progress.close()

    def spent(self) -> dict[str, Any]:
        """The counts, what was estimated and what it took."""
        return self.counts | {"estimated_seconds": self._estimated, "seconds": time.monotonic() - self._begun}
