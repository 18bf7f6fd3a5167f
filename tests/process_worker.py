"""One of the processes of test_processes.py: a tiny run, and what can only be seen from inside.

python process_worker.py --workdir=DIR --cache=DIR --notes=FILE --model=DIR [--fsdp=N] [--interrupted] [--features]
"""

import errno
import json
import os
import pathlib
import signal
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from orbax.checkpoint._src.futures import synchronization

from opd_jax import checkpoint, cli, config, learner, parallel, processes, sampler, store, train
from opd_jax.data.tasks import Verdict
from opd_jax.models import config as model_config
from opd_jax.models import hf, spec, transformer
from opd_jax.types import Rollout, UserError

FLAGS = flags.FLAGS
WRITES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0, "shutil.rmtree": 0}  # event -> place of the path


def make_config(cache: str, fsdp: int = 1, **mesh):
    """A tiny run that asks the host for texts at every step: verdicts, group advantages, samples, diagnostics, evaluations."""
    c = config.load_config("configs/quickstart.py:tiny")
    c.steps, c.cache_dir = 6, cache
    c.rollout.group_size, c.reward.weight, c.reward.advantage = 4, 0.5, "rloo"
    c.eval.every, c.checkpoint.every = 2, 100
    c.log.samples, c.log.samples_every, c.log.diagnostics = 16, 1, True
    c.learner.microbatches = 2
    c.mesh.fsdp = fsdp
    c.mesh.update(mesh)
    return c


RUNS = ("agent", "dagger", "stored")


def verdict(example, text: str) -> Verdict:
    """In place of a verifier, by which a student of a few updates would never succeed."""
    solved = sum(map(ord, text)) % 2 == 0
    return Verdict(float(solved), "" if solved else f"{len(text)} characters are no answer", well_formed=len(text) % 5 > 0)


def features(cache: str) -> dict:
    """Three runs that have between them what make_config() has not."""
    agent = config.load_config("configs/methods/tools.py:drop,reward=0.5,tiny")  # turns, an adapter, a teacher that follows the student
    agent.student.lora.rank, agent.rollout.group_size = 2, 4
    agent.teacher.recipe, agent.teacher.path, agent.teacher.update, agent.teacher.rate = "", "student_init", "ema", 0.3
    agent.context.privileged.reads, agent.context.privileged.success = "sibling,feedback", 1.0
    agent.task.train_size, agent.task.difficulty_prompts, agent.task.difficulty_samples, agent.task.difficulty_high = 24, 12, 2, 0.5
    agent.preference.weight, agent.preference.judge, agent.regulariser.kl = 0.5, "teacher_mean", 0.1
    dagger = config.load_config("configs/methods/dagger.py:soft,k=4,p=0.5,round=1,tiny")  # a store that grows; devices along the length
    stored = config.load_config("configs/methods/thinking_machines.py:tiny")  # a store that is made once
    stored.rollout.source, stored.rollout.cache_recipe = "cache", "configs/methods/thinking_machines.py:tiny"
    stored.estimator.importance, stored.preference.weight, stored.preference.judge = "token", 0.5, "reward"
    runs = dict(zip(RUNS, (agent, dagger, stored), strict=True))
    for c in runs.values():
        c.steps, c.cache_dir, c.eval.prompts, c.checkpoint.every = 3, cache, 0, 100
        c.log.samples, c.log.samples_every = 16, 1
        c.mesh.fsdp = 2
    dagger.mesh.fsdp, dagger.mesh.sequence = 1, 2
    return runs


def run_features(folder: str, cache: str) -> list[str]:
    """Runs them, each left once the first record is there and taken up again; gives what a config says that cannot be used."""
    for name, c in features(cache).items():
        for last in (1, 3):
            for record in train.run(c, f"{folder}/{name}", judge=verdict):
                if record["step"] == last:
                    break
    return [*(refusal(cache, folder, name) for name in ("agent", "stored")), unwritten(folder)]


def unwritten(folder: str) -> str:
    """What a process is told of a store to which the first cannot write."""
    try:
        store.Store(f"{folder}/nowhere", None, []).append([], Rollout(*[np.zeros((1, 1), np.int32)] * 6), {})
    except UserError as error:
        return str(error)
    return ""


def refusal(cache: str, folder: str, name: str) -> str:
    """What a run is told of prompts that none is within, or of a store that is none."""
    c = features(cache)[name]
    c.task.difficulty_low, c.task.difficulty_high = (0.3, 0.4) if name == "agent" else (0.0, 1.0)
    if name == "stored":
        c.rollout.cache_recipe, c.rollout.cache = "", folder
    try:
        next(train.run(c, f"{folder}/refused_{name}", judge=verdict))
    except UserError as error:
        return str(error)
    return ""


def watch(folders: list[pathlib.Path]) -> list[str]:
    """A list that grows by every path within the folders that Python code of this process writes, makes, renames or removes."""
    seen = []

    def look(event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in WRITES:
            path = str(arguments[WRITES.get(event, 0)])
            if any(folder in pathlib.Path(path).parents for folder in folders):
                seen.append(path)

    sys.addaudithook(look)
    return seen


def uniforms(mesh) -> np.ndarray:
    """[T, B] the uniforms of some draws, computed where the rows lie."""
    ids_B = parallel.shard_batch(np.arange(64, dtype=np.uint32) * 977, mesh)
    draw = jax.jit(lambda ids_B, t: sampler.uniforms(jax.random.key(5), ids_B, t))
    return np.stack([processes.to_host(draw(ids_B, t)) for t in range(3)])


OPTIMIZER = learner.make_optimizer(config.Learner(), 10)
MODEL = model_config.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    where="a test",
)


def abstract_state(mesh):
    return learner.abstract_state(spec.abstract(transformer.param_specs(MODEL), np.float32, mesh), OPTIMIZER)


def save_state(folder: str, mesh) -> str:
    """Saves a state that lies on the mesh; gives the hash of all that it holds."""
    state = learner.init_state(transformer.init(jax.random.key(3), MODEL, mesh=mesh), OPTIMIZER)
    checkpoint.Checkpoints(folder).save(3, state, {"seconds": 1.5})
    return spec.content_hash(state)


def refused() -> str:
    """What a process is told when the first cannot write."""

    def write():
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        processes.by_first(write)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def main(argv: list[str]) -> None:
    stop = cli.StopRequest().install()
    seen = watch([pathlib.Path(FLAGS.workdir), pathlib.Path(FLAGS.cache)])
    notes = {"index": processes.index(), "count": processes.count(), "devices": len(jax.devices()), "written": seen}
    notes["divided"] = processes.divide(lambda part: [[x, processes.index()] for x in part], list(range(5)))
    try:
        if FLAGS.features:
            notes["refusals"] = run_features(FLAGS.workdir, FLAGS.cache)
            notes["saves"] = synchronization.OperationIdGenerator.get_current_operation_id()
        else:
            run_one(notes, stop)
    finally:
        pathlib.Path(FLAGS.notes).write_text(json.dumps(notes))


def run_one(notes: dict, stop: cli.StopRequest) -> None:
    """The run of make_config(), and what each process sees of a mesh, a model and a state."""
    mesh = parallel.make_mesh(fsdp=FLAGS.fsdp)
    notes["refused"] = refused()
    notes["uniforms"] = uniforms(mesh).tolist()
    notes["loaded"] = spec.content_hash(hf.load(FLAGS.model, mesh=mesh)[0])
    notes["state"] = save_state(f"{FLAGS.workdir}0_state", mesh)
    for record in train.run(make_config(FLAGS.cache, FLAGS.fsdp), FLAGS.workdir, stop=stop):
        if FLAGS.interrupted and record["step"] == 2 and processes.index() == processes.count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":  # tests import this module too, where other scripts have flags of these names
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("cache", None, "Folder of what recipes make.")
    flags.DEFINE_string("model", None, "A Hugging Face folder.")
    flags.DEFINE_string("notes", None, "File for what this process saw.")
    flags.DEFINE_integer("fsdp", 2, "mesh.fsdp")
    flags.DEFINE_bool("interrupted", False, "The last process gets SIGTERM once the record of step 2 is there.")
    flags.DEFINE_bool("features", False, "The runs of features() in place of that of make_config().")
    cli.run(main, several=True)
