"""What a study costs: said before it begins, corrected by its first microbatches, shown by a progress bar."""

import time
from collections.abc import Sequence
from typing import Any

import jax

from opd_jax.analysis.study_conditions import Condition, Plan, Shadow
from opd_jax.metrics import Progress
from opd_jax.numerics.estimators import Estimator


class Cost:
    """Counts of the whole study, and a clock."""

    def __init__(
        self,
        model: Any,
        params: dict,
        shadows: Sequence[Shadow],
        settings: Sequence[Condition],
        references: dict[str, Estimator],
        rollouts,
        plan: Plan,
    ):
        self._plan, self._rollouts = plan, rollouts
        self._parameters = sum(x.size for x in jax.tree.leaves(params))
        self._numbers = self._parameters if plan.projection(params).exact else plan.sketch
        self._own = {s: self._streams(shadows if i == 0 else [o for o in shadows if o.default], references) for i, s in enumerate(settings)}
        self._references = len(references)
        self._settings = settings
        self._done, self._seen, self._estimated = 0, 0, None
        self._begun = time.monotonic()
        self._progress: Progress | None = None

    @staticmethod
    def _streams(shadows: Sequence[Shadow], references: dict[str, Estimator]) -> int:
        return len({one.estimator for one in shadows} | set(references.values()))

    def _further(self, setting: Condition) -> int:
        return self._rollouts // setting.group_size * self._plan.reference

    def _work(self, setting: Condition) -> float:
        """Passes times tokens: a pass back costs about two forward."""
        parts = min(self._plan.position_parts, setting.T)
        back = self._rollouts * self._own[setting] * parts + self._further(setting) * self._references
        return setting.T * (2 * back + 2 * (self._rollouts + self._further(setting)))

    @property
    def counts(self) -> dict[str, int]:
        parts = {s: min(self._plan.position_parts, s.T) for s in self._settings}
        return {
            "conditions": len(self._settings),
            "parameters": self._parameters,
            "rollouts": sum(self._rollouts + self._further(s) for s in self._settings),
            "tokens": sum((self._rollouts + self._further(s)) * s.T for s in self._settings),
            "forward_passes": sum(2 * (self._rollouts + self._further(s)) for s in self._settings),
            "backward_passes": sum(self._rollouts * self._own[s] * parts[s] + self._further(s) * self._references for s in self._settings),
            "memory_bytes": max(self._memory(s) for s in self._settings),
        }

    def _memory(self, setting: Condition) -> int:
        """Of gradients and of what is kept of them; models and activations come on top."""
        rows, parts = self._plan.microbatch, min(self._plan.position_parts, setting.T)
        further = rows // setting.group_size * self._plan.reference
        streams = self._own[setting] + self._references
        at_once = rows * (self._own[setting] + parts) + further * self._references + 3 * streams
        kept = self._rollouts // setting.group_size * streams * (8 * self._plan.sketch + 8 * streams)
        return 4 * (self._numbers * at_once + self._parameters * max(rows, further)) + kept

    def announce(self, progress: Progress) -> None:
        self._progress, c = progress, self.counts
        progress.phase(
            f"{c['conditions']} conditions, {c['parameters']:,} parameters: {c['rollouts']:,} rollouts of {c['tokens']:,} tokens at most, "
            f"{c['forward_passes']:,} forward and {c['backward_passes']:,} backward passes of single rollouts, "
            f"about {c['memory_bytes'] / 2**20:,.0f} MiB beside models and activations"
        )
        progress.begin(len(self._settings) * self._rollouts // self._plan.microbatch, done=0)

    def microbatch(self, setting: Condition, seconds: float) -> None:
        """One is done; the second of all, which compiles nothing, tells the time of the rest."""
        self._done, self._seen = self._done + 1, self._seen + 1
        if self._seen == 2:
            share = self._work(setting) * self._plan.microbatch / self._rollouts
            self._estimated = seconds / share * sum(map(self._work, self._settings))
            self._progress.phase(f"about {self._estimated:,.0f} s, sampling and compiling aside")
        self._progress.advance(self._done, f"T = {setting.T}")

    def close(self) -> None:
        self._progress.close()

    def spent(self) -> dict[str, Any]:
        return self.counts | {"time/estimated_seconds": self._estimated, "time/seconds": time.monotonic() - self._begun}
