"""LoRA adapters in and out, in the file format of the peft library: adapter_config.json and adapter_model.safetensors."""

import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from opd_jax import files
from opd_jax.models import lora, transformer, weights
from opd_jax.models.config import ModelConfig
from opd_jax.models.lora import LoraConfig
from opd_jax.types import UserError

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_BLOCKS = {"attention": "self_attn", "mlp": "mlp"}
# Fields that change nothing here: names, notes, and settings of training.
_IGNORED = frozenset(
    ("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "loftq_config")
    + ("layers_pattern", "megatron_core", "qalora_group_size")
)
_READ = frozenset(("r", "lora_alpha", "target_modules", "base_model_name_or_path"))
# Fields that are accepted at these values; all others must be empty or false.
_NEUTRAL: dict[str, tuple] = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
_EMPTY = (None, False, "", [], {})


def save(path: str | pathlib.Path, adapter: dict, config: LoraConfig, *, base: str) -> None:
    """Writes an adapter, bit for bit; `base` is the model that it belongs to, a folder or hub id. Raises UserError."""
    folder = pathlib.Path(path)
    tensors = {}
    for name, array in traverse_util.flatten_dict(adapter, sep="/").items():
        weight, half = name.rsplit("/", 1)
        array = np.asarray(array)
        inputs = math.prod(array.shape[:-1] if half == "a" else array.shape[:1])
        tensors[f"{_module(weight)}.lora_{half.upper()}.weight"] = np.ascontiguousarray(array.reshape(inputs, -1).T)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        write_config(folder, config, base=base)
        (folder / _WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors writes files that nobody else may read
    except (OSError, safetensors.SafetensorError) as error:  # the latter where the disk is full
        raise UserError(f"folder {folder}: cannot be written ({files.reason(error)}); give another one") from None


def write_config(folder: pathlib.Path, config: LoraConfig, *, base: str) -> None:
    """Writes adapter_config.json."""
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def read_config(folder: pathlib.Path) -> tuple[LoraConfig, str]:
    """(the adapter's configuration, the path or hub id of its base). Raises UserError for a field that would change the numbers."""
    path = folder / CONFIG
    fields = files.read_json(path, remedy="restore it")

    def refuse(name: str, remedy: str) -> UserError:
        return UserError(f"{path}: {name} = {fields.get(name)!r}: {remedy}")

    for name, value in fields.items():
        if name not in _IGNORED | _READ and value not in _NEUTRAL.get(name, _EMPTY):
            raise refuse(name, "is not supported; merge the adapter into its base with peft")
    for name, kinds in (("r", int), ("lora_alpha", int | float)):
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            raise refuse(name, "must be a positive number; correct the file")
    modules = fields.get("target_modules")
    if not isinstance(modules, list) or not modules or not set(map(str, modules)) <= set(lora.MODULES):
        raise refuse("target_modules", f"is not supported; valid: a list of {', '.join(lora.MODULES)}")
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise refuse("base_model_name_or_path", "must name the base model; add it")
    return LoraConfig(fields["r"], float(fields["lora_alpha"]), tuple(m for m in lora.MODULES if m in modules)), base


def load(path: str | pathlib.Path, model_config: ModelConfig) -> tuple[dict, LoraConfig]:
    """(adapter, its configuration) of a folder, for a base with `model_config`. Raises UserError that names the file and the tensor."""
    folder = pathlib.Path(path)
    config, _ = read_config(folder)
    file = folder / _WEIGHTS
    specs = traverse_util.flatten_dict(lora.param_specs(transformer.param_specs(model_config), config), sep="/")
    names = {f"{_module(name[:-2])}.lora_{name[-1].upper()}.weight": name for name in specs}
    opened = weights.open_file(file)
    found = set(opened.handle.keys())
    for label, missing in (("is missing", names.keys() - found), ("does not belong to the base model", found - names.keys())):
        if missing:
            raise UserError(f"{file}: tensor {sorted(missing)[0]!r} {label}; give an adapter that was made for this base")
    adapter: dict[str, Any] = {}
    for name, target in names.items():
        shape, inputs = specs[target].shape, len(specs[target].shape) - 1 if target.endswith("/a") else 1
        array = weights.read(opened, name, (math.prod(shape[inputs:]), math.prod(shape[:inputs])))
        adapter[target] = jax.device_put(np.ascontiguousarray(array.T).reshape(shape).astype(np.float32))
    return traverse_util.unflatten_dict(adapter, sep="/"), config


def _module(weight: str) -> str:
    """`layers/0/attention/q` -> base_model.model.model.layers.0.self_attn.q_proj"""
    layers, number, block, _ = weight.split("/")
    module, _ = lora.TARGETS[weight.split("/", 2)[2]]
    return f"base_model.model.model.{layers}.{number}.{_BLOCKS[block]}.{module}"
