"""A teacher on devices of its own (mesh.teacher): it reads there, and what it says of completions comes to the devices of the student.

Its unembedding lies with the student, once; of every batch the hidden states travel, [B, T, D] in the compute type. From there on it is a
teacher as any other: token_stats makes its logits, tile by tile.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from opd_jax import parallel, processes
from opd_jax.config import Config, ConfigError
from opd_jax.model_io import LoadedModel
from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig
from opd_jax.numerics.heads import Head
from opd_jax.rollout import sample
from opd_jax.teachers import STUDENT_INIT
from opd_jax.types import Prompts, Rollout, View, view


@dataclasses.dataclass(frozen=True)
class Heard:
    """A model (forward.Model) whose hidden states were made elsewhere and come with its prompts; it scores, and does not write."""

    config: ModelConfig

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def valid_vocab_size(self) -> int | None:
        return self.config.valid_vocab_size

    def hidden(self, params: dict, view: View) -> Head:
        return Head(view.hidden_BTD, params["unembed_DV"], self.config.final_softcap, params["valid_V"])


@dataclasses.dataclass(frozen=True)
class Apart:
    """A teacher on its own mesh, for a student at home on another."""

    model: LoadedModel
    mesh: Mesh
    home: Mesh

    @functools.cached_property
    def heard(self) -> LoadedModel:
        """The teacher as the student's devices know it: what turns hidden states into logits."""
        with jax.set_mesh(self.mesh):
            unembed_DV, valid_V = _unembedding(self.model.params, self.model.config)
        there = parallel.sharding(self.home, ("act_embed", "vocab"), unembed_DV.shape)
        params = {"unembed_DV": jax.device_put(unembed_DV, there), "valid_V": parallel.replicate(valid_V, self.home)}
        return LoadedModel(params, Heard(self.model.config), self.model.tokenizer)

    def hear(self, prompts: Prompts, completions: Rollout) -> Prompts:
        """The prompts with what the teacher says after them of these completions, on the student's devices."""
        read = parallel.shard_batch(view(prompts, completions), self.mesh)
        with jax.set_mesh(self.mesh):
            hidden_BTD = _hidden(self.model.params, self.model.config, read)
        return prompts.replace(hidden_BTD=parallel.shard_batch(hidden_BTD, self.home))

    def sample(self, prompts: Prompts, *, key: jax.Array, **law) -> Rollout:
        """Completions that the teacher writes where it is, brought to the student's devices. See rollout.sample."""
        bits = np.asarray(jax.random.key_data(key))  # a key is of the mesh under which it was made
        with jax.set_mesh(self.mesh):
            own = parallel.shard_batch(prompts, self.mesh)
            written = sample(self.model.params, self.model.config, own, key=jax.random.wrap_key_data(bits), **law)
        return parallel.shard_batch(written, self.home)


@functools.partial(jax.jit, static_argnames="config")
def _unembedding(params: dict, config: ModelConfig) -> tuple[jax.Array, jax.Array | None]:
    head = transformer.head(params, config, jnp.zeros((1, 1, config.hidden_size)))
    return head.unembed_DV, head.valid_V


@functools.partial(jax.jit, static_argnames="config")
def _hidden(params: dict, config: ModelConfig, read: View) -> jax.Array:
    return transformer.hidden(params, config, read).hidden_BTD


def make(config: Config, teacher: LoadedModel | None, home: Mesh) -> Apart | None:
    """None where the teacher shares the student's devices."""
    mesh = parallel.teacher_mesh(config.mesh)
    return None if mesh is None or teacher is None else Apart(teacher, mesh, home)


def check(config: Config) -> None:
    """Refuses what a teacher on its own devices cannot do: follow the student, or write for it. Raises ConfigError."""
    asked, rollout = config.teacher, config.rollout
    wanted = {
        "a teacher of its own (teacher.path)": bool(asked.path or asked.recipe) and not asked.members and asked.path != STUDENT_INIT,
        "rollout.source = 'student', 'dataset' or 'mix'": rollout.source in ("student", "dataset", "mix"),
        "rollout.aggregate = False": not rollout.aggregate,
        "rollout.max_turns = 1": rollout.max_turns == 1,
        "context.privileged.reads = ''": not config.context.privileged.reads,
        "preference.judge = 'reward'": not config.preference.weight or config.preference.judge == "reward",
        "one process": processes.count() == 1,
    }
    missing = [words for words, fits in wanted.items() if not fits]
    if config.mesh.teacher and missing:
        raise ConfigError(f"config field mesh.teacher = {config.mesh.teacher} needs {missing[0]}; use that, or mesh.teacher = 0")
