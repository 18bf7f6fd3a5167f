"""Hugging Face folders in and out: config.json and safetensors, tensor by tensor, bit for bit."""

import functools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jax.sharding import Mesh

from opd_jax import files as files_lib
from opd_jax import parallel
from opd_jax.models import config as config_lib
from opd_jax.models import spec, transformer, weights
from opd_jax.models.config import ModelConfig
from opd_jax.types import UserError

Part = tuple[tuple[int, int], ...]  # (first, end) of each axis
MAX_FILE_BYTES = 5 * 10**9  # of one weights file; a model above it is written in several, with an index
# The largest config.json fields that are looked at.
_LARGEST = {"num_hidden_layers": 10_000} | dict.fromkeys(
    (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
    ),
    2**31 - 1,
)

# Our name inside a layer -> (its name in a checkpoint, how many leading axes of ours are inputs; None = stored as it is).
# Linear weights lie there as [outputs, inputs], with the heads merged, and a layer's experts one by one.
_LAYER = {
    "attention/norm": ("input_layernorm.weight", None),
    "attention/q": ("self_attn.q_proj.weight", 1),
    "attention/k": ("self_attn.k_proj.weight", 1),
    "attention/v": ("self_attn.v_proj.weight", 1),
    "attention/o": ("self_attn.o_proj.weight", 2),
    "attention/q_bias": ("self_attn.q_proj.bias", None),
    "attention/k_bias": ("self_attn.k_proj.bias", None),
    "attention/v_bias": ("self_attn.v_proj.bias", None),
    "attention/o_bias": ("self_attn.o_proj.bias", None),
    "attention/q_norm": ("self_attn.q_norm.weight", None),
    "attention/k_norm": ("self_attn.k_norm.weight", None),
    "mlp/norm": ("post_attention_layernorm.weight", None),
    "mlp/router": ("mlp.gate.weight", 1),
    "mlp/expert_gate": ("mlp.experts.{expert}.gate_proj.weight", 1),
    "mlp/expert_up": ("mlp.experts.{expert}.up_proj.weight", 1),
    "mlp/expert_down": ("mlp.experts.{expert}.down_proj.weight", 1),
    "mlp/gate": ("mlp.gate_proj.weight", 1),
    "mlp/up": ("mlp.up_proj.weight", 1),
    "mlp/down": ("mlp.down_proj.weight", 1),
    "mlp/gate_bias": ("mlp.gate_proj.bias", None),
    "mlp/up_bias": ("mlp.up_proj.bias", None),
    "mlp/down_bias": ("mlp.down_proj.bias", None),
}
# The same name means another norm where there are norms behind the blocks too.
_POST_NORMS = {
    "attention/post_norm": ("post_attention_layernorm.weight", None),
    "mlp/norm": ("pre_feedforward_layernorm.weight", None),
    "mlp/post_norm": ("post_feedforward_layernorm.weight", None),
}
_EXPERT = "/expert_"  # in the paths of parameters that begin with an axis of experts
_OUTSIDE = {"embed": ("model.embed_tokens.weight", None), "final_norm": ("model.norm.weight", None), "unembed": ("lm_head.weight", 1)}
# A table of the rotary frequencies, which old checkpoints hold and config.json determines.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def local_folder(path_or_repo: str | pathlib.Path) -> pathlib.Path:
    """The folder of a model: the path itself, or a snapshot of a Hugging Face repository (config, tokenizer and safetensors files only).

    Raises UserError when there is no such folder and no such repository can be fetched.
    """
    if os.path.isdir(path_or_repo):
        return pathlib.Path(path_or_repo)
    if not re.fullmatch(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", str(path_or_repo)) or os.path.lexists(path_or_repo):
        raise UserError(f"model {str(path_or_repo)!r}: is not a folder; give a Hugging Face folder or a repository id such as owner/name")
    import huggingface_hub

    try:
        patterns = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
        return pathlib.Path(huggingface_hub.snapshot_download(str(path_or_repo), allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many types: offline, not found, gated, broken connection
        reason = files_lib.reason(error)
        raise UserError(
            f"model {str(path_or_repo)!r}: is neither a folder nor a repository that can be fetched ({reason}); correct the path"
        ) from None


def load(path_or_repo: str | pathlib.Path, *, mesh: Mesh | None = None, dtype=None) -> tuple[dict, ModelConfig]:
    """(params, config) of a folder or hub id. Each tensor goes straight to its sharding; `dtype` None keeps what the files hold.

    Of several processes each reads what its devices hold.

    Raises UserError that names the file and the field or tensor: an unknown architecture, a field that is not implemented, a tensor that is
    missing, unused, of another shape or of a type other than float32, bfloat16 and float16.
    """
    folder = local_folder(path_or_repo)
    model_config = read_config(folder)
    files = weights.tensor_files(folder)
    if model_config.num_layers > len(files):  # each layer would be described before the first is missed
        raise UserError(
            f"folder {folder}: config.json has num_hidden_layers = {model_config.num_layers}, the weights have {len(files)} tensors; "
            "correct one of them"
        )
    specs = traverse_util.flatten_dict(transformer.param_specs(model_config), sep="/")
    _check_names(folder, model_config, specs, files)
    params = {}
    for path, param in specs.items():
        read = functools.partial(_from_files, files, path, param.shape, model_config, dtype)
        params[path] = _place(path, read, param, mesh)
    return traverse_util.unflatten_dict(params, sep="/"), model_config


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The ModelConfig of `folder`/config.json. Raises UserError."""
    path = folder / "config.json"
    if os.path.isfile(folder / "model" / "config.json"):
        raise UserError(
            f"{folder}: is a run directory, not a Hugging Face folder; write one with experiments/export_hf.py --workdir={folder} --out=DIR"
        )
    return config_lib.from_hf(read_fields(path), where=str(path))


def save(path: str | pathlib.Path, params: dict, model_config: ModelConfig, tokenizer: Any = None) -> None:
    """Writes config.json and the weights, bit for bit, in the types they have; the tokenizer's files too when one is given.

    A tied head stays tied: no lm_head is written. Weights files that were in the folder are replaced. Raises UserError when the folder
    cannot be written.
    """
    folder = pathlib.Path(path)
    arrays = traverse_util.flatten_dict(params, sep="/")
    specs = traverse_util.flatten_dict(transformer.param_specs(model_config), sep="/")
    assert {name: array.shape for name, array in arrays.items()} == {name: param.shape for name, param in specs.items()}, (
        "params are not of config"
    )
    fields = config_lib.to_hf(model_config) | {"torch_dtype": str(arrays["embed"].dtype)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, json.dumps(fields, indent=2) + "\n", arrays, model_config)
    except (OSError, safetensors.SafetensorError) as error:  # the latter where the disk is full
        raise UserError(f"folder {folder}: cannot be written ({files_lib.reason(error)}); give another one") from None
    if tokenizer is not None:
        tokenizer.save(folder)


# ---- names


def _names_in_file(path: str, config: ModelConfig) -> tuple[list[str], int | None]:
    """`layers/3/mlp/up` -> (["model.layers.3.mlp.up_proj.weight"], number of input axes); one name per expert for experts."""
    if path in _OUTSIDE:
        name, inputs = _OUTSIDE[path]
        return [name], inputs
    _, layer, rest = path.split("/", 2)
    name, inputs = (_LAYER | _POST_NORMS)[rest] if config.traits.post_norms else _LAYER[rest]
    experts = range(config.num_experts) if _EXPERT in path else [None]
    return [f"model.layers.{layer}.{name.format(expert=expert)}" for expert in experts], inputs


def _shape_in_file(shape: tuple[int, ...], inputs: int | None) -> tuple[int, ...]:
    return shape if inputs is None else (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def _check_names(folder: pathlib.Path, config: ModelConfig, specs: dict, files: dict[str, weights.File]) -> None:
    expected = {name for path in specs for name in _names_in_file(path, config)[0]}
    missing = sorted(expected - files.keys())
    if missing:
        raise UserError(f"folder {folder}: tensor {_first(missing)} is missing from the weights; restore them, or correct config.json")
    unused = {name for name in files.keys() - expected if not _DERIVED.fullmatch(name)}
    if config.tie_word_embeddings and "lm_head.weight" in unused and _same_as_embedding(files):
        unused.remove("lm_head.weight")
    if unused:
        raise UserError(
            f"folder {folder}: tensor {_first(sorted(unused))} in the weights is not used by the model of config.json; correct one of them"
        )


def _first(names: list[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _same_as_embedding(files: dict[str, weights.File]) -> bool:
    """Whether the head that a tied checkpoint also holds is the embedding."""
    head, embedding = ("lm_head.weight", "model.embed_tokens.weight")
    return weights.equal(files[head], head, files[embedding], embedding)


# ---- reading


def read_fields(path: pathlib.Path) -> dict[str, Any]:
    """The fields of a config.json, none of them so large that it could not be looked at. Raises UserError."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: is missing; give the folder of a Hugging Face model")
    fields = files_lib.read_json(path, remedy="restore it")
    check_fields(fields, where=str(path))
    return fields


def check_fields(fields: dict[str, Any], *, where: str) -> None:
    """Refuses sizes that would fill the memory before any weight is read, and names that are not text."""
    for name, limit in _LARGEST.items():
        value = fields.get(name)
        if isinstance(value, int) and value > limit:
            raise UserError(f"{where}: {name} = {files_lib.shown(value)}: must be at most {limit}; correct it")
    rotary = [fields[name] for name in ("rope_scaling", "rope_parameters") if isinstance(fields.get(name), dict)]
    for name, value in [("model_type", fields.get("model_type")), *((n, r.get(n)) for r in rotary for n in ("rope_type", "type"))]:
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {name} = {files_lib.shown(value)}: must be text; correct it")


def _from_files(
    files: dict[str, weights.File], path: str, shape: tuple[int, ...], config: ModelConfig, dtype, part: Part | None = None
) -> np.ndarray:
    """One of our parameters, or a part of it, in our layout."""
    names, inputs = _names_in_file(path, config)
    experts, one = part is not None and _EXPERT in path, shape[1:] if _EXPERT in path else shape
    names = names[slice(*part[0])] if experts else names
    cut = None if part is None else part[1:] if experts else part
    there = None if cut is None else _part_in_file(cut, one, inputs)
    arrays = [weights.read(files[name], name, _shape_in_file(one, inputs), there) for name in names]
    if inputs is not None:
        one = one if cut is None else tuple(stop - start for start, stop in cut)
        arrays = [np.ascontiguousarray(array.T).reshape(one) for array in arrays]
    array = np.stack(arrays) if _EXPERT in path else arrays[0]
    return array if dtype is None else array.astype(dtype)


def _part_in_file(part: Part, shape: tuple[int, ...], inputs: int | None) -> tuple[slice, ...]:
    """Where a part of ours lies in a tensor of a file: of merged axes the first is the one that is divided."""
    if inputs is None:
        return tuple(slice(*bounds) for bounds in part)

    def merged(axes: slice) -> slice:
        inner = math.prod(shape[axes][1:])
        assert part[axes][1:] == tuple((0, size) for size in shape[axes][1:]), f"{part} of {shape} is not one block of rows and columns"
        return slice(part[axes][0][0] * inner, part[axes][0][1] * inner)

    return merged(slice(inputs, None)), merged(slice(0, inputs))


def _place(path: str, read: Callable[..., np.ndarray], param: spec.ParamSpec, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(read())
    sharding = parallel.parameter_sharding(mesh, path, param.logical_axes, param.shape)
    if sharding.is_fully_addressable:
        array = read()
        return jax.make_array_from_callback(param.shape, sharding, lambda index: np.ascontiguousarray(array[index]))
    bounds = lambda index: tuple(one.indices(size)[:2] for one, size in zip(index, param.shape, strict=True))
    once = functools.cache(lambda part: read(part=part))  # several devices may hold the same
    return jax.make_array_from_callback(param.shape, sharding, lambda index: once(bounds(index)))


# ---- writing


def _write(folder: pathlib.Path, config_text: str, arrays: dict[str, jax.Array], config: ModelConfig) -> None:
    """All files under other names first: a full disk costs none of those that were there."""
    unfinished = folder / ".unfinished"
    try:
        unfinished.mkdir(exist_ok=True)
        (unfinished / "config.json").write_text(config_text)
        _write_weights(unfinished, arrays, config)
        for old in [*folder.glob("model-*-of-*.safetensors"), folder / weights.INDEX, folder / weights.SINGLE]:
            old.unlink(missing_ok=True)
        for new in unfinished.iterdir():
            new.replace(folder / new.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_weights(folder: pathlib.Path, arrays: dict[str, jax.Array], config: ModelConfig) -> None:
    groups = list(_groups(arrays))
    weight_map = {}
    for number, paths in enumerate(groups, start=1):
        file = weights.SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = dict(pair for path in paths for pair in _to_file(path, arrays[path], config))
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod((folder / "config.json").stat().st_mode)  # safetensors writes files that nobody else may read
        weight_map |= dict.fromkeys(tensors, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
        (folder / weights.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _groups(arrays: dict[str, jax.Array]) -> Iterator[list[str]]:
    """Parameters in order, in groups of at most MAX_FILE_BYTES (or of one parameter above it)."""
    group, size = [], 0
    for path, array in arrays.items():
        if group and size + array.nbytes > MAX_FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(path)
        size += array.nbytes
    yield group


def _to_file(path: str, array: jax.Array, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) in the layout of files."""
    names, inputs = _names_in_file(path, config)
    for name, one in zip(names, np.asarray(array) if _EXPERT in path else [np.asarray(array)], strict=True):
        if inputs is not None:
            one = one.reshape(_shape_in_file(one.shape, inputs)[::-1]).T
        yield name, np.ascontiguousarray(one)
