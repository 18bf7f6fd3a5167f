"""Student, teachers and reference of a run: opened, made to fit each other, and how each of them reads prompts."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import apart as apart_lib
from opd_jax import config as config_lib
from opd_jax import model_io, parallel, teachers
from opd_jax.apart import Apart
from opd_jax.config import Config, ConfigError
from opd_jax.data import contexts
from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.data.pipeline import Encoder
from opd_jax.model_io import LoadedModel
from opd_jax.models import attention_kernels, hf, lora, spec, transformer
from opd_jax.models import config as model_config_lib
from opd_jax.models.config import ModelConfig
from opd_jax.models.lora import LoraConfig
from opd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Pair:
    student: LoadedModel
    members: dict[str, LoadedModel]  # the teachers, by name
    reference: LoadedModel | None
    student_prompts: Encoder
    teacher_prompts: Encoder | None  # None: the teachers read what the student reads
    apart: Apart | None = None  # the teacher, where it has devices of its own

    @property
    def scorers(self) -> dict[str, LoadedModel]:
        """The teachers as the student's devices know them."""
        return self.members if self.apart is None else {name: self.apart.heard for name in self.members}

    @property
    def teacher(self) -> LoadedModel | None:
        """The first."""
        return next(iter(self.members.values()), None)


def open_pair(config: Config, resumed_from: pathlib.Path | None, mesh: Mesh) -> Pair:
    """Loads the models and masks the padding rows of their vocabularies.

    A resumed student comes without parameters, unless they are the base of an adapter; a teacher with that path shares its arrays.

    Raises UserError for a model, tokenizer or template that cannot be used, and for a teacher whose ids are not the student's.
    """
    apart_lib.check(config)
    with parallel.strict(config.mesh.strict):
        student = _open_student(config, resumed_from, mesh)
        others = _open_others(config, student, mesh, resumed_from)
    if config.rollout.stop == "union":
        student, *stopping = _share_stops(student, *others.values())
        others = dict(zip(others, stopping, strict=True))
    members = {name: others[f"teacher {name}"] for name in teachers.asked(config)}
    encoders = _make_encoders(config, student, members, list(others.values()))
    compute = {"compute_dtype": config.model.compute_dtype, "attention": config.model.attention}
    prepared = _prepare(student, student.tokenizer, "student.path", remat=config.model.remat, **compute)
    single = {"teacher teacher": "teacher.path"}
    others = {field: _prepare(model, student.tokenizer, single.get(field, field), **compute) for field, model in others.items()}
    members = {name: others[f"teacher {name}"] for name in members}
    pair = Pair(prepared, members, others.get("reference.path"), *encoders)
    return dataclasses.replace(pair, apart=apart_lib.make(config, pair.teacher, mesh))


def _open_student(config: Config, resumed_from: pathlib.Path | None, mesh: Mesh) -> LoadedModel:
    adapter = adapter_config(config.student.lora)
    if resumed_from is not None and adapter is None:
        student = model_io.read_description(resumed_from)
        spec.shardings(transformer.param_specs(student.config), mesh)  # refuses them here, before a checkpoint is looked at
        return student
    if not config.student.path:
        return _random_student(config, mesh)
    dtype = jnp.dtype(config.model.compute_dtype) if adapter else jnp.float32  # what is not trained needs no more than it computes with
    student = model_io.open_model(config.student.path, mesh=mesh, dtype=dtype)
    return dataclasses.replace(student, lora=adapter and fitted(adapter, student.config, config.student.lora.targets))


def _open_others(config: Config, student: LoadedModel, mesh: Mesh, resumed_from: pathlib.Path | None) -> dict[str, LoadedModel]:
    """Teachers and reference by what messages call them; those of one path share its arrays."""
    paths = {f"teacher {name}": member.path for name, member in teachers.asked(config).items()}
    if config_lib.needs_reference(config):
        paths["reference.path"] = config.reference.path
    own = parallel.teacher_mesh(config.mesh)
    asked = {name: (path, own if own and name != "reference.path" else mesh) for name, path in paths.items()}
    opened = {(path, where): _open_other(config, path, student, where, resumed_from) for path, where in dict.fromkeys(asked.values())}
    return {name: opened[asked[name]] for name in paths}


def _open_other(config: Config, path: str, student: LoadedModel, mesh: Mesh, resumed_from: pathlib.Path | None) -> LoadedModel:
    """A teacher or the reference. One that is the base of the student's adapter shares its arrays."""
    shares = student.lora is not None and mesh != parallel.teacher_mesh(config.mesh)  # arrays lie on the student's devices
    if shares and path in (config.student.path, teachers.STUDENT_INIT):
        return dataclasses.replace(student, lora=None)
    dtype = jnp.dtype(config.model.compute_dtype)
    if path != teachers.STUDENT_INIT:
        return model_io.open_model(path, mesh=mesh, dtype=dtype)
    if resumed_from is not None:  # what the checkpoint holds has been trained
        path = config.student.path
        again = model_io.open_model(path, mesh=mesh, dtype=jnp.float32) if path else _random_student(config, mesh)
        return dataclasses.replace(student, params=jax.tree.map(lambda x: x.astype(dtype), again.params))
    return dataclasses.replace(student, params=jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), student.params))


def adapter_config(settings: config_lib.Lora) -> LoraConfig | None:
    """The adapter that a config asks for; None: all weights are trained. Raises ConfigError."""
    if not settings.rank:
        return None
    names = lora.MODULES if settings.targets == "all" else tuple(settings.targets.split(","))
    for name in names:
        config_lib.check_choice("student.lora.targets", name, ("all", *lora.MODULES))
    return LoraConfig(settings.rank, settings.alpha, tuple(m for m in lora.MODULES if m in names))


def fitted(adapter: LoraConfig, student: ModelConfig, targets: str) -> LoraConfig:
    """The adapter with the modules that the student has. Raises ConfigError for one that is named and not there."""
    modules = lora.present(transformer.param_specs(student), adapter)
    missing = [name for name in adapter.modules if name not in modules]
    if missing and (targets != "all" or not modules):
        raise ConfigError(
            f"config field student.lora.targets = {targets!r}: the student has no {missing[0]} to adapt (experts are not adapted); "
            f"valid: all, {', '.join(modules)}"
        )
    return dataclasses.replace(adapter, modules=modules)


def _share_stops(*models: LoadedModel) -> tuple[LoadedModel, ...]:
    """Models whose completions end at the stop token of any of them. Ids beyond the student's are left out: they are never drawn."""
    known = models[0].tokenizer.vocab_size
    ids = dict.fromkeys(i for model in models for i in model.tokenizer.eos_ids if i < known)
    return tuple(dataclasses.replace(model, tokenizer=model.tokenizer.stopping_at(ids)) for model in models)


def _prepare(model: LoadedModel, tokenizer: tokenizer_lib.Tokenizer, field: str, **settings) -> LoadedModel:
    model = teachers.mask_padding(model, tokenizer, field=field)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, **settings))
    for rule in {transformer.attention_rule(model.config, layer) for layer in model.config.layers}:
        attention_kernels.check(model.config.attention, model.config.compute_dtype, model.config.head_dim, rule)
    return model


def random_outline(shape: config_lib.Architecture, tokenizer: tokenizer_lib.Tokenizer) -> ModelConfig:
    """The shape of a model with random weights. Raises UserError."""
    given = {name: value for name, value in dataclasses.asdict(shape).items() if value or isinstance(value, bool)}
    fields = given | {
        "head_dim": shape.head_dim or shape.hidden_size // shape.num_attention_heads,
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    hf.check_fields(fields, where="student.init")
    return model_config_lib.from_hf(fields, where="student.init")


def _random_student(config: Config, mesh: Mesh) -> LoadedModel:
    tokenizer = tokenizer_lib.load(config.student.tokenizer)
    model_config = random_outline(config.student.init, tokenizer)
    key = jax.random.fold_in(jax.random.key(config.seed), 0x1A17)
    try:
        params = transformer.init(key, model_config, mesh=mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = spec.count(transformer.param_specs(model_config))
        raise UserError(f"student.init: {size} parameters do not fit into the memory; lower hidden_size or num_hidden_layers") from None
    return LoadedModel(params, model_config, tokenizer)


def check_context(config: Config, models: list[ModelConfig]) -> None:
    """Refuses completions that leave no room for a prompt. Raises ConfigError."""
    new, context = config.rollout.max_new_tokens, min(model.max_position_embeddings for model in models)
    if new >= context:
        raise ConfigError(f"config field rollout.max_new_tokens = {new} must be below the context of the models, {context} tokens")


def _make_encoders(
    config: Config, student: LoadedModel, members: dict[str, LoadedModel], others: list[LoadedModel]
) -> tuple[Encoder, Encoder | None]:
    """How student and teachers read prompts; None for teachers that read what the student reads. Raises UserError."""
    first = next(iter(members.values()), None)
    own, theirs = contexts.make_readers(config.context, student.tokenizer, first and first.tokenizer)
    for name, member in members.items():
        if theirs and contexts.make_readers(config.context, student.tokenizer, member.tokenizer)[1].template != theirs.template:
            raise ConfigError(
                f"config field context.teacher.template = {config.context.teacher.template!r}: the teacher {name} has another chat "
                f"template than {next(iter(members))}, and all read one prompt; give a file with the template that all shall read"
            )
    for model in others:
        contexts.make_readers(config.context, student.tokenizer, model.tokenizer)  # refuses one whose ids are not the student's
    if members and config.context.privileged.reads:
        theirs = theirs or own
    new, overlong = config.rollout.max_new_tokens, config.rollout.overlong
    check_context(config, [model.config for model in (student, *others)])
    room = student.config.max_position_embeddings - new
    teacher_room = min((model.config.max_position_embeddings for model in others), default=math.inf) - new
    if theirs is None:
        room = min(room, teacher_room)
    student_encoder = Encoder(own, min(config.rollout.max_prompt_length, room), overlong)
    return student_encoder, Encoder(theirs, teacher_room, overlong) if theirs else None
