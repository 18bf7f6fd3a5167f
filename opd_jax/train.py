"""run(): the sentence prompt -> rollout -> score -> signal -> estimate -> update -> metrics, as a generator of step records."""

import functools
import hashlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import jax

from opd_jax import checkpoint, processes, score_cache, store
from opd_jax import config as config_lib
from opd_jax.cli import Interrupted, StopRequest
from opd_jax.config.loading import load_config
from opd_jax.data.tasks import Example, Task, Verdict
from opd_jax.job import setup
from opd_jax.metrics import Progress
from opd_jax.recorder import Recorder

WAIT_SECONDS = 0.2  # between two looks at what another process makes


def run(
    config,
    workdir,
    *,
    task: Task | None = None,
    judge: Callable[[Example, str], float | Verdict] | None = None,
    stop: StopRequest | None = None,
    progress: Progress | None = None,
) -> Iterator[dict]:
    """Starts or resumes the run of a ConfigDict (what `get_config` returns); yields one record per step, `step` 0 first.

    `task`: a task of your own in place of the config's (opd_jax/data/tasks/README.md). `judge(example, text)`: a reward or a Verdict, in
    place of the task's verifier wherever an update asks for rewards; evaluation is the verifier's. To resume, give them again.

    What is yielded is already in metrics.jsonl. Leaving the loop early saves the state. Raises UserError, before any work, for
    a config or workdir that cannot be used; Interrupted once `stop` is set; FloatingPointError when a loss or gradient is not finite. The
    state is saved in each case. Of several processes each calls it with the same arguments; a `stop` in one of them stops all.
    """
    progress = progress or Progress(quiet=True)
    parsed = config_lib.parse(config)
    recipes, stores = (functools.partial(make, stop=stop, progress=progress) for make in (make_model, make_store))
    job = setup(parsed, workdir, make_model=recipes, make_store=stores, progress=progress, own_task=task, own_judge=judge)
    recorder, asked = Recorder(job, progress), processes.Agreement()
    try:
        progress.begin(job.config.steps, done=job.step)
        yield from recorder.start()
        for step in range(job.step, job.config.steps):
            if signum := asked(stop.signum if stop else 0):
                raise Interrupted(signum)
            with jax.set_mesh(job.mesh):
                prompts = job.pipeline.batch(step)
                scorer = job.scorer(recorder.state)
                completions = job.rollouts(job.policy(recorder.state.params), scorer, prompts, step)
                recalled = job.recall(prompts, completions, scorer, step)
                made = job.make_batch(prompts, completions, scorer, recalled, step=step)
                annotated = recorder.annotate(step + 1, prompts, completions, made)
                recorder.state, measured = job.update(recorder.state, job.frozen, made.batch, job.student.params)
            yield from recorder.record(step + 1, prompts, completions, made, measured, annotated)
    finally:
        recorder.close(sys.exception())


def make_model(recipe: str, cache_dir: str, *, stop: StopRequest | None = None, progress: Progress | None = None) -> str:
    """Runs the config of a recipe, configs/FILE.py[:arg], to its end unless that is done; returns its run directory under `cache_dir`."""
    config, workdir = locate_recipe(recipe, cache_dir)

    def make() -> None:
        if progress is not None:
            progress.phase(f"making {recipe} in {workdir} (once)")
        for _ in run(config, workdir, stop=stop, progress=progress):
            pass

    _once(make, lambda: is_made(config, workdir), stop)
    return str(workdir)


def make_store(recipe: str, cache_dir: str, *, stop: StopRequest | None = None, progress: Progress | None = None) -> str:
    """Writes the store of a config, configs/FILE.py[:arg], unless that is done; returns its folder under `cache_dir`."""
    config, folder = locate_recipe(recipe, cache_dir)
    progress = progress or Progress(quiet=True)

    def make() -> None:
        progress.phase(f"writing the store of {recipe} in {folder} (once)")
        recipes = functools.partial(make_model, stop=stop, progress=progress)
        score_cache.write(config_lib.parse(config), folder, make_model=recipes, stop=stop, progress=progress)

    _once(make, lambda: store.is_whole(folder), stop)
    return str(folder)


def _once(make: Callable[[], None], is_there: Callable[[], bool], stop: StopRequest | None) -> None:
    """Makes what is not there. Of several processes the first makes it alone, on its own devices: what comes of it is the same as ever."""
    if processes.first():
        with processes.alone():
            if not is_there():
                make()
    while processes.count() > 1 and not is_there():
        if stop:
            raise Interrupted(stop.signum)
        time.sleep(WAIT_SECONDS)


def locate_recipe(recipe: str, cache_dir: str) -> tuple:
    """(ConfigDict, folder of its run or store) of a recipe; nothing is made. Recipes that it names itself have the same `cache_dir`."""
    config = load_config(recipe)
    digest = hashlib.blake2b(repr(config_lib.parse(config)).encode(), digest_size=4).hexdigest()
    config.cache_dir = cache_dir
    name = recipe.removesuffix(".py").replace(".py:", "_").replace("/", "_").replace(",", "_")
    return config, pathlib.Path(cache_dir) / f"{name}_{digest}"


def is_made(config, workdir: pathlib.Path) -> bool:
    """Whether the run of a recipe is finished."""
    return checkpoint.newest_step(workdir / "checkpoints") >= config.steps
