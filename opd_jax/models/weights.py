"""Safetensors files of strangers: what the format forbids is refused before a tensor is read; nothing is ever unpickled.

The safetensors library checks that the header fits the file, that offsets rise without gaps and end where it does, and that each size is
that of shape and type. What it lets through is checked here: a header that takes a gigabyte to parse, a name that stands in it twice, an
index that leads out of the folder, weights that are not numbers.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors

from opd_jax import files
from opd_jax.types import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The bits of the exponent, all of which are set in NaN and infinities alone.
_EXPONENT = {"F32": np.uint32(0x7F800000), "BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00)}
# The format allows 100 MB, which take 10 s and most of a gigabyte to parse. A tensor takes about 130 bytes, a large model's file 0.1 MB.
MAX_HEADER_BYTES = 16 * 2**20
MAX_FILE_BYTES = 2**50
_CHECKED_AT_ONCE = 2**18  # numbers


@dataclasses.dataclass(frozen=True)
class File:
    """An open weights file; tensors are read from it one at a time."""

    path: pathlib.Path
    handle: Any


def open_file(path: pathlib.Path) -> File:
    """Raises UserError unless the file is whole and what the format says."""
    files.check_regular(path, where=str(path), remedy="restore it", limit=MAX_FILE_BYTES)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= MAX_HEADER_BYTES else b""
        if MAX_HEADER_BYTES < length <= path.stat().st_size:
            raise UserError(f"{path}: has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read; split the file")
        opened = File(path, safetensors.safe_open(path, framework="numpy"))
    except (OSError, safetensors.SafetensorError) as error:
        text = files.reason(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{path}: cannot be read as safetensors ({text}); restore it") from None
    _refuse_repeated_names(path, header)
    return opened


def _refuse_repeated_names(path: pathlib.Path, header: bytes) -> None:
    """Readers differ in which of two entries of one name they take."""

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
        names = set()
        for name, _ in pairs:
            if name in names:
                raise UserError(f"{path}: names {name[:100]!r} twice in its header; restore it")
            names.add(name)

    json.loads(header, object_pairs_hook=refuse_repeated)


def tensor_files(folder: pathlib.Path) -> dict[str, File]:
    """Tensor name -> the open file that holds it. Raises UserError."""
    if os.path.lexists(folder / SINGLE):
        opened = open_file(folder / SINGLE)
        return dict.fromkeys(opened.handle.keys(), opened)
    if os.path.lexists(folder / INDEX):
        return _indexed_files(folder)
    pickled = next((name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).exists()), None)
    found = f"holds {pickled}, whose pickles are never read, but" if pickled else "holds"
    raise UserError(f"folder {folder}: {found} neither {SINGLE} nor {INDEX}; convert its weights to safetensors")


def _indexed_files(folder: pathlib.Path) -> dict[str, File]:
    index = folder / INDEX
    weight_map = files.read_json(index, remedy="restore it").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map must be an object that gives each tensor its file; restore it")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or pathlib.PurePath(file).name != file:
            where = f"{index}: weight_map gives tensor {name[:100]!r} the file {files.shown(file)}"
            raise UserError(f"{where}; valid: the name of a .safetensors file in this folder; restore it")
    held: dict[str, File] = {}
    for file in sorted(set(weight_map.values())):
        opened = open_file(folder / file)
        for name in list(opened.handle.keys()):
            if name in held:
                raise UserError(f"{opened.path}: tensor {name[:100]!r} is in {held[name].path.name} too; remove one of them")
            held[name] = opened
    for name, file in weight_map.items():
        if name not in held or held[name].path.name != file:
            raise UserError(f"{index}: weight_map gives tensor {name[:100]!r} the file {file!r}, which does not hold it; restore it")
    return held


def read(file: File, name: str, shape: tuple[int, ...], part: tuple[slice, ...] | None = None) -> np.ndarray:
    """One tensor, or the part of it that is asked for: no more is read.

    Raises UserError that names it where shape or type are others, or where a number is NaN or infinite.
    """
    described = file.handle.get_slice(name)
    if tuple(described.get_shape()) != shape:
        raise UserError(
            f"{file.path}: tensor {name!r} has shape {tuple(described.get_shape())}, but config.json asks for {shape}; correct one of them"
        )
    kind = described.get_dtype()
    if kind not in _EXPONENT:
        raise UserError(f"{file.path}: tensor {name!r} is of type {kind}; valid: {', '.join(_EXPONENT)}; convert it")
    array = file.handle.get_tensor(name) if part is None else described[part]
    if not _all_finite(array, _EXPONENT[kind]):
        raise UserError(f"{file.path}: tensor {name!r} holds NaN or an infinity; every weight must be finite: restore the file")
    return array


def _all_finite(array: np.ndarray, exponent: np.unsignedinteger) -> bool:
    """By the bits, which is five times as fast as np.isfinite for the 16-bit types; in pieces, which are no second copy of the tensor."""
    bits = array.reshape(-1).view(exponent.dtype)
    pieces = (bits[start : start + _CHECKED_AT_ONCE] for start in range(0, bits.size, _CHECKED_AT_ONCE))
    return all((piece & exponent).max() < exponent for piece in pieces)


def equal(file: File, name: str, other_file: File, other: str) -> bool:
    """Whether two tensors have one shape and the same bits."""
    a, b = file.handle.get_slice(name), other_file.handle.get_slice(other)
    if (a.get_shape(), a.get_dtype()) != (b.get_shape(), b.get_dtype()):
        return False
    return np.array_equal(file.handle.get_tensor(name), other_file.handle.get_tensor(other))
