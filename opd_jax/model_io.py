"""A path -> a model with its tokenizer: a Hugging Face folder, a hub id, or a run directory of this project."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
from jax.sharding import Mesh

from opd_jax import checkpoint
from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.models import config as model_config_lib
from opd_jax.models import hf, spec, transformer
from opd_jax.models.config import ModelConfig
from opd_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    params: dict
    config: ModelConfig
    tokenizer: tokenizer_lib.Tokenizer


def is_run_directory(path: str | pathlib.Path) -> bool:
    """Whether a folder was written by the trainer."""
    return (pathlib.Path(path) / "model" / "config.json").is_file()


def describe(workdir: pathlib.Path, config: ModelConfig, tokenizer: tokenizer_lib.Tokenizer) -> None:
    """Writes `model/` of a run directory: config.json and the tokenizer, all of a Hugging Face folder but the weights."""
    folder = workdir / "model"
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(model_config_lib.to_hf(config), indent=2) + "\n")


def open_model(path: str, *, mesh: Mesh | None = None, dtype=None) -> LoadedModel:
    """Loads parameters (born on the mesh), configuration and tokenizer. `dtype` None keeps what the files hold.

    Raises UserError when the path holds no model, or one that cannot be read.
    """
    if is_run_directory(path):
        return _open_run(pathlib.Path(path), mesh, dtype)
    if pathlib.Path(path).is_dir() and (pathlib.Path(path) / "checkpoints").is_dir():
        raise UserError(f"run directory {path}: model/config.json is missing; start the run again, or give another path")
    folder = hf.local_folder(path)
    params, config = hf.load(folder, mesh=mesh, dtype=dtype)
    return LoadedModel(params, config, tokenizer_lib.load(str(folder)))


def read_description(workdir: pathlib.Path) -> LoadedModel:
    """The student of a run directory without its parameters."""
    path = workdir / "model" / "config.json"
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or give another folder") from None
    return LoadedModel({}, model_config_lib.from_hf(fields, where=str(path)), tokenizer_lib.load(str(workdir / "model")))


def _open_run(workdir: pathlib.Path, mesh: Mesh | None, dtype) -> LoadedModel:
    model = read_description(workdir)
    abstract = spec.abstract(transformer.param_specs(model.config), dtype or jnp.float32, mesh)
    return dataclasses.replace(model, params=checkpoint.restore_params(workdir / "checkpoints", abstract))
