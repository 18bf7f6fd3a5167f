"""The models of a config by their shapes alone, before any of them is loaded: for what is planned, or compiled ahead of time."""

import dataclasses
import os
import pathlib
import re

import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import config as config_lib
from opd_jax import model_io, teachers
from opd_jax.config import Config
from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.models import config as model_config_lib
from opd_jax.models import hf, lora, peft, published, spec, transformer
from opd_jax.models.config import ModelConfig
from opd_jax.models.lora import LoraConfig
from opd_jax.pair import adapter_config, check_context, fitted, random_outline
from opd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Outlines:
    """Shapes of student, teachers and reference, with the settings that they compute with."""

    student: ModelConfig
    adapter: LoraConfig | None  # with it the student's own parameters are frozen
    members: dict[str, ModelConfig]
    reference: ModelConfig | None
    owned: tuple[str, ...]  # members (and teachers.REFERENCE) that hold parameters; the others share those of the one with their path
    dtype: str  # of parameters that are not trained

    def model(self, name: str) -> ModelConfig:
        """Of a member or of the reference."""
        return self.reference if name == teachers.REFERENCE else self.members[name]

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of all that a bank reads: members, and the reference."""
        return (*self.members, *((teachers.REFERENCE,) if self.reference is not None else ()))

    def trained(self, mesh: Mesh | None = None) -> dict:
        """What is trained, as abstract float32 arrays."""
        specs = transformer.param_specs(self.student)
        return spec.abstract(lora.param_specs(specs, self.adapter) if self.adapter else specs, jnp.float32, mesh)

    def base(self, mesh: Mesh | None = None) -> dict:
        """The base of an adapter as abstract arrays; {} without one."""
        return self.parameters(self.student, mesh) if self.adapter else {}

    def parameters(self, model: ModelConfig, mesh: Mesh | None = None) -> dict:
        """Of a model that is not trained, as abstract arrays."""
        return spec.abstract(transformer.param_specs(model), jnp.dtype(self.dtype), mesh)


def of_config(config: Config) -> Outlines:
    """The outlines of a config's models.

    A path may be a folder with a config.json, a run directory, or the name of a published shape (models/published.py), also as a hub id
    such as Qwen/Qwen3-8B; a recipe is what its config trains. Raises UserError for a model whose shape is not known before it is loaded.
    """
    if config.mesh.teacher:
        raise UserError(f"config field mesh.teacher = {config.mesh.teacher}: plans are of models on one mesh; use 0 for an upper bound")
    compute = config.model.compute_dtype
    student = dataclasses.replace(_student(config), compute_dtype=compute, remat=config.model.remat)
    adapter = adapter_config(config.student.lora)
    if adapter:
        adapter = fitted(adapter, student, config.student.lora.targets)
    sources = {name: (member.path, member.recipe) for name, member in teachers.asked(config).items()}
    if config_lib.needs_reference(config):
        sources[teachers.REFERENCE] = (config.reference.path, config.reference.recipe)
    others, owned, seen = {}, [], set()
    for name, source in sources.items():
        same = source[0] == teachers.STUDENT_INIT or source[0] == config.student.path != ""
        own = student if same else _outline(*source)
        others[name] = dataclasses.replace(own, compute_dtype=compute, remat=False)
        if source not in seen and not (adapter and same):
            owned.append(name)
        seen.add(source)
    check_context(config, [student, *others.values()])
    reference = others.pop(teachers.REFERENCE, None)
    return Outlines(student, adapter, others, reference, tuple(owned), compute)


def _student(config: Config) -> ModelConfig:
    settings = config.student
    if settings.path or settings.recipe:
        return _outline(settings.path, settings.recipe)
    return random_outline(settings.init, tokenizer_lib.load(settings.tokenizer))


def _outline(path: str, recipe: str) -> ModelConfig:
    if not path:
        return _student(config_lib.parse(config_lib.load_config(recipe)))
    folder = pathlib.Path(path)
    if model_io.is_run_directory(folder):
        file = folder / "model" / "config.json"
        return model_config_lib.from_hf(hf.read_fields(file), where=str(file))
    if (folder / peft.CONFIG).is_file() and not (folder / "config.json").is_file():
        return _outline(peft.read_config(folder)[1], "")
    if os.path.isdir(folder):
        return hf.read_config(folder)
    if folder.is_absolute() or path.startswith((".", "~")):
        raise UserError(f"model {path!r}: is not a folder; correct the path")
    name = re.sub(r"-(instruct|base|chat|hf|it)$", "", path.rpartition("/")[2].lower())
    if name not in published.NAMES:
        raise UserError(
            f"model {path!r}: its shape is not known before it is loaded; give a folder with a config.json, or one of "
            f"{', '.join(published.NAMES)}"
        )
    return published.shape(name)
