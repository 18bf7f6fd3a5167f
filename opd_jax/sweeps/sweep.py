"""run(): points -> checked runs -> processes -> table, as experiments/sweep.py calls it."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from opd_jax import config as config_lib
from opd_jax import store, train
from opd_jax.cli import Interrupted, StopRequest
from opd_jax.config import Config, loading
from opd_jax.sweeps import board as board_lib
from opd_jax.sweeps import pool as pool_lib
from opd_jax.sweeps import slots as slots_lib
from opd_jax.sweeps import status, table
from opd_jax.sweeps.combinators import Sweep
from opd_jax.sweeps.plan import Base, Plan, Trial, describe, make
from opd_jax.sweeps.pool import GB, Job, Outcome, Pool
from opd_jax.sweeps.status import Folder
from opd_jax.types import UserError

TRAIN = loading.ROOT / "experiments" / "train.py"
PAUSE = 0.2  # seconds between two looks at the processes


@dataclasses.dataclass(frozen=True)
class Budget:
    workers: int = 1  # runs at a time; each is a process of its own
    memory_gb: float = 0.0  # main memory of all runs together, 10**9 bytes; 0: no limit


def run(
    base: Base,
    sweep: Sweep,
    workdir: str | os.PathLike,
    *,
    budget: Budget = Budget(),
    retry_failed: bool = False,
    stop: StopRequest | None = None,
    quiet: bool = False,
) -> tuple[Plan, list[table.Result]]:
    """Makes every run that is not done yet, and the table. Returns the plan and one result for each of its runs, failed ones included.

    Raises UserError, before anything runs, for points that cannot be used and a folder that holds something else; Interrupted once `stop`
    is set and all runs have saved.
    """
    if not os.fspath(workdir):
        raise UserError("--workdir='' is no folder; give the folder of the sweep")
    if budget.memory_gb < 0:
        raise UserError(f"--memory_gb={budget.memory_gb:g}: must be 0 (no limit) or more")
    plan, root = make(base, sweep), pathlib.Path(workdir)
    status.check_empty(root)
    with status.alone(root):
        folder = status.begin(root, plan)
        results = table.read(folder, plan)
        todo = [r.trial for r in results if r.outcome is None or (r.outcome.exit and retry_failed)]
        if todo:
            results = _Runner(plan, folder, results, todo, budget, quiet).run(stop)
        table.write_all(folder, plan, results)
    return plan, results


class _Runner:
    """The runs that are left, from the recipes that they need to their results."""

    def __init__(self, plan: Plan, folder: Folder, results: Sequence[table.Result], todo: Sequence[Trial], budget: Budget, quiet: bool):
        self._plan, self._folder = plan, folder
        self._results = {r.trial.name: r if r.trial not in todo else table.Result(r.trial, None, {}) for r in results}
        self._trials = {trial.name: trial for trial in todo}
        self._board = board_lib.Board(plan, folder, quiet=quiet)
        slots = slots_lib.make(min(budget.workers, len(todo)) if budget.workers > 0 else budget.workers, [trial.config for trial in todo])
        peak = max((r.outcome.peak_bytes for r in results if r.outcome is not None), default=0)
        self._pool = Pool(self._jobs(todo), slots, memory_bytes=int(budget.memory_gb * GB), peak_bytes=peak)

    def run(self, stop: StopRequest | None) -> list[table.Result]:
        vary = f"; seeds differ in {', '.join(self._plan.seed_fields)}" if self._plan.seed_fields else ""
        self._board.line(f"{len(self._results)} runs of {len(self._plan.settings)} settings, {len(self._trials)} to be made{vary}")
        self._board.start()
        try:
            pool_lib.run(self._pool, on_end=self._end, on_wait=self._show, stop=lambda: bool(stop), pause=PAUSE)
        finally:
            self._board.close()
            table.write_all(self._folder, self._plan, list(self._results.values()))
        if stop and self._pool.stopping:
            raise Interrupted(stop.signum)
        return list(self._results.values())

    def _show(self) -> None:
        self._board.show(list(self._results.values()), self._pool)

    def _end(self, job: Job, outcome: Outcome) -> None:
        trial = self._trials.get(job.name)
        if outcome.exit and self._pool.stopping:
            return  # it was asked to stop: neither done nor failed
        if trial is None:
            said = f"exit status {outcome.exit}: {' '.join(outcome.stderr[-1:])}" if outcome.exit else f"made ({outcome.seconds:.0f} s)"
            self._board.line(f"{'FAILED' if outcome.exit else 'done'}  {job.name}  {said}")
            return
        if not outcome.exit and (changed := status.config_changed(self._folder, trial)):
            outcome = dataclasses.replace(outcome, exit=1, stderr=(f"the config file was changed while the sweep ran: {changed}",))
        self._folder.note(trial, outcome)
        self._results[trial.name] = result = table.read_one(self._folder, trial, self._plan.metrics)
        self._board.line(board_lib.ended(trial, result) + f"  [{board_lib.summary(list(self._results.values()), self._pool)}]")
        table.write_all(self._folder, self._plan, list(self._results.values()))

    def _jobs(self, todo: Sequence[Trial]) -> list[Job]:
        """The recipes that are not made yet, each once and before the runs that need it, then the runs."""
        recipes: dict[str, Job] = {}
        jobs = []
        for trial in todo:
            needs = self._recipes(trial.config, recipes)
            command = (sys.executable, str(TRAIN), *trial.flags(), f"--workdir={self._folder.run(trial)}")
            point = self._folder.point(trial.name)
            jobs.append(Job(trial.name, command, point, point.with_name(f"{trial.name}.lock"), needs))
        return [*recipes.values(), *jobs]

    def _recipes(self, config: Config, found: dict[str, Job]) -> tuple[str, ...]:
        """Names of the jobs that make the models of a config; new ones are added to `found`, those that they need before them."""
        needs = []
        reference = (config.reference,) if config_lib.needs_reference(config) else ()
        for source in (config.student, config.teacher, *config.teacher.members.values(), *reference):
            if source.path not in ("", config_lib.Reference.path) or not source.recipe:
                continue
            made_of, workdir = train.locate_recipe(source.recipe, config.cache_dir)
            if not train.is_made(made_of, workdir):
                needs.append(self._made(source.recipe, made_of, workdir, (str(TRAIN), f"--workdir={workdir}"), found))
        if config.rollout.cache_recipe and not config.rollout.cache:
            made_of, folder = train.locate_recipe(config.rollout.cache_recipe, config.cache_dir)
            if not store.is_whole(folder):
                script = (str(TRAIN.with_name("score_cache.py")), f"--out={folder}")
                needs.append(self._made(config.rollout.cache_recipe, made_of, folder, script, found))
        return tuple(needs)

    def _made(self, recipe: str, made_of, folder: pathlib.Path, script: tuple[str, str], found: dict[str, Job]) -> str:
        """Name of the job that makes a recipe in its folder by (script, flag)."""
        name = f"recipe_{folder.name}"
        if name not in found:
            own = self._recipes(config_lib.parse(made_of), found)
            arg = recipe.partition(":")[2]
            file = f"{loading.find(recipe)}{':' if arg else ''}{arg}"
            command = (sys.executable, script[0], f"--config={file}", f"--config.cache_dir={made_of.cache_dir}", script[1])
            # Beside the models, so that two sweeps that share them do not make one model twice at the same time.
            found[name] = Job(name, command, self._folder.point(name), folder.with_name(f"{folder.name}.lock"), own)
        return name


def failures(folder: str | os.PathLike, results: Sequence[table.Result]) -> str:
    """What is to be said of the runs that failed; empty where none did."""
    lines = []
    for r in results:
        if r.outcome is not None and not r.done:
            lines += [f"failed: {describe(r.trial.setting | {'seed': r.trial.seed})}, exit status {r.outcome.exit}"]
            lines += [f"    {line}" for line in r.outcome.stderr]
            lines += [f"    {pathlib.Path(folder) / 'points' / r.trial.name}.stderr"]
    return "\n".join([*lines, "the same command with --retry_failed makes them again"]) if lines else ""
