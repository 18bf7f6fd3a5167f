"""A path -> a model with its tokenizer: a Hugging Face folder, a hub id, a peft adapter, or a run directory of this project."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import checkpoint, files
from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.models import config as model_config_lib
from opd_jax.models import hf, lora, peft, spec, transformer
from opd_jax.models.config import ModelConfig
from opd_jax.models.lora import LoraConfig
from opd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    params: dict
    config: ModelConfig
    tokenizer: tokenizer_lib.Tokenizer
    lora: LoraConfig | None = None  # with it, `params` is the base of an adapter that is trained


def is_run_directory(path: str | pathlib.Path) -> bool:
    """Whether a folder was written by the trainer."""
    return os.path.isfile(os.path.join(path, "model", "config.json"))


def describe(workdir: pathlib.Path, model: LoadedModel, base: str) -> None:
    """Writes `model/` of a run directory: config.json and the tokenizer, all of a Hugging Face folder but the weights.

    With an adapter also its configuration, which names its `base`: a hub id, or a folder (by its full path).
    """
    folder = workdir / "model"
    folder.mkdir(exist_ok=True)
    model.tokenizer.save(folder)
    if model.lora is not None:
        path = pathlib.Path(base)
        peft.write_config(folder, model.lora, base=str(path.resolve()) if path.exists() else base)
    (folder / "config.json").write_text(json.dumps(model_config_lib.to_hf(model.config), indent=2) + "\n")


def saved_steps(path: str | pathlib.Path) -> list[int]:
    """Steps of the checkpoints of a run directory, ascending."""
    return checkpoint.Checkpoints(pathlib.Path(path) / "checkpoints").steps()


def open_model(path: str, *, mesh: Mesh | None = None, dtype=None, step: int | None = None) -> LoadedModel:
    """Loads parameters (born on the mesh), configuration and tokenizer. `dtype` None keeps what the files hold.

    `step` is that of a run directory's checkpoint; None is the newest.

    Raises UserError when the path holds no model, or one that cannot be read.
    """
    if is_run_directory(path):
        return _open_run(pathlib.Path(path), mesh, dtype, step)
    if os.path.isdir(os.path.join(path, "checkpoints")):
        raise UserError(f"run directory {path}: model/config.json is missing; start the run again, or give another path")
    folder = hf.local_folder(path)
    if (folder / peft.CONFIG).is_file() and not (folder / "config.json").is_file():
        return _open_adapter(folder, mesh, dtype)
    params, config = hf.load(folder, mesh=mesh, dtype=dtype)
    return LoadedModel(params, config, tokenizer_lib.load(str(folder)))


def read_description(workdir: pathlib.Path) -> LoadedModel:
    """The student of a run directory without its parameters."""
    path = workdir / "model" / "config.json"
    return LoadedModel({}, model_config_lib.from_hf(hf.read_fields(path), where=str(path)), tokenizer_lib.load(str(workdir / "model")))


def _open_run(workdir: pathlib.Path, mesh: Mesh | None, dtype, step: int | None) -> LoadedModel:
    model = read_description(workdir)
    if (workdir / "model" / peft.CONFIG).is_file():
        base, adapter, lora_config = open_base_and_adapter(workdir, mesh=mesh, step=step)
        wide = jax.tree.map(lambda x: x.astype(dtype or jnp.float32), base.params)  # 16 bits would round much of the update away
        return dataclasses.replace(model, params=lora.merge(wide, adapter, lora_config))
    abstract = spec.abstract(transformer.param_specs(model.config), dtype or jnp.float32, mesh)
    return dataclasses.replace(model, params=checkpoint.restore_params(workdir / "checkpoints", abstract, step))


def open_base_and_adapter(
    workdir: pathlib.Path, *, mesh: Mesh | None = None, step: int | None = None
) -> tuple[LoadedModel, dict, LoraConfig]:
    """(base in the type it was trained with, newest adapter, its configuration) of a run that trained an adapter.

    Raises UserError, also for a base that is not the one that the run began with.
    """
    lora_config, path = peft.read_config(workdir / "model")
    where = f"{workdir / 'model' / peft.CONFIG}: base_model_name_or_path = {path!r}"
    remedy = "restore the base, or correct the path"
    settings = files.read_json(workdir / "config.json", remedy="restore the file")
    try:
        base = open_model(path, mesh=mesh, dtype=jnp.dtype(settings["model"]["compute_dtype"]))
    except UserError as error:
        raise UserError(f"{where}: cannot be opened ({error}); {remedy}") from None
    abstract = spec.abstract(lora.param_specs(transformer.param_specs(base.config), lora_config), jnp.float32, mesh)
    adapter, info = checkpoint.restore_params_and_info(workdir / "checkpoints", abstract, step)
    if info.get("base_hash") != spec.content_hash(base.params):
        raise UserError(f"{where}: its weights are not those that the run began with; {remedy}")
    return base, adapter, lora_config


def _open_adapter(folder: pathlib.Path, mesh: Mesh | None, dtype) -> LoadedModel:
    """A folder of the peft library: its base with the adapter merged into it."""
    _, path = peft.read_config(folder)
    base = open_model(path, mesh=mesh, dtype=dtype)
    adapter, lora_config = peft.load(folder, base.config)
    return dataclasses.replace(base, params=lora.merge(base.params, adapter, lora_config))
