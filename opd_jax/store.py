"""Stores: a folder of completions with what a teacher says of them, written once and read by any number of updates.

`store.json` describes the whole; batch n is `00000n.npz` (arrays: every field of types.Rollout, and the teacher's scores) and `00000n.json`
(its examples, and the SHA-256 of the arrays). Each file is written under another name and renamed, the .json last: a batch is there when
its .json is. A store is read whole, verified, and held in memory. Nothing in it is unpickled.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from opd_jax import files, processes
from opd_jax.data.tasks import Example
from opd_jax.types import Rollout, UserError

DESCRIPTION = "store.json"
SCORES = {"none": (), "tokens": ("logp_BT",), "topk": ("ids_BTK", "logp_BTK", "rest_BT")}  # form -> arrays, named as in numerics.targets
_SCORE = "score/"  # before the names of scores in a batch
_MAX_BYTES = 4 * 2**30  # of one batch
_REMEDY = "restore the store, or write it again in another folder"
# What a field of a rollout must hold; those that are not here may be of any of these kinds.
_KINDS = {"tokens_BT": "i", "mask_BT": "b", "logp_BT": "f", "behaviour_logp_BT": "f", "id_B": "u", "stopped_B": "b", "ids_BTK": "i"}
_KINDS |= {"logp_BTK": "f", "rest_BT": "f"}


@dataclasses.dataclass(frozen=True)
class Description:
    """What a store holds. Every score in it is of one teacher, by the hash of its weights."""

    teacher_hash: str  # spec.content_hash of who scored, or wrote in the teacher's place; empty: there is no teacher
    tokenizer: str  # Tokenizer.fingerprint of the ids
    student_reads: str  # Reader.digest of what turns a prompt into the student's ids
    teacher_reads: str  # the same of the teacher
    task: str  # task.name of the config that wrote it, whose verifier judges the completions
    writer: str  # rollout.source of that config: who wrote the completions
    writer_hash: str  # spec.content_hash of the student that wrote; empty: another did, or a student that changed
    law: dict[str, float | int]  # of the sampling: temperature, top_p, top_k, min_p, max_new_tokens, max_turns
    rows: int  # completions of a batch
    group_size: int  # completions of a prompt, which follow each other
    scores: str  # none, tokens (log-probs of the completions' tokens) or topk (most probable tokens and the mass outside)
    k: int  # tokens of a topk, otherwise 0
    batches: int  # that belong to the whole; 0: it grows as long as its run does


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One batch."""

    examples: list[Example]  # one for each prompt
    rollout: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    digest: str


class Store:
    """The batches of a folder. Make one with `begin` or `read`."""

    def __init__(self, folder: str | os.PathLike, description: Description, batches: list[_Stored]):
        self.folder, self.description, self._batches = pathlib.Path(folder), description, batches

    def __len__(self) -> int:
        """Prompts, each with its completions."""
        return self.batches * self.description.rows // self.description.group_size

    @property
    def batches(self) -> int:
        """Of those there are."""
        return len(self._batches)

    @property
    def digest(self) -> str:
        """Hex digest of all that it holds."""
        digest = hashlib.blake2b(_json(dataclasses.asdict(self.description)), digest_size=16)
        for batch in self._batches:
            digest.update(batch.digest.encode())
        return digest.hexdigest()

    @property
    def highest_token(self) -> int:
        """The highest id of completions and scores."""
        named = [(batch.rollout | batch.scores).get(name) for batch in self._batches for name in ("tokens_BT", "ids_BTK")]
        return max(int(ids.max()) for ids in named if ids is not None)

    def example(self, prompt: int) -> Example:
        """The example of a prompt by its number; its `id` is that of its task."""
        per_batch = self.description.rows // self.description.group_size
        return self._batches[prompt // per_batch].examples[prompt % per_batch]

    def completions(self, prompts: Sequence[int]) -> Rollout:
        """The completions of these prompts, as NumPy arrays, group after group."""
        return Rollout(**self._take("rollout", prompts))

    def scores(self, prompts: Sequence[int], *, teacher_hash: str) -> dict[str, np.ndarray]:
        """The scores of these prompts' completions, by the names of SCORES. Raises UserError for another teacher than that of the store."""
        self.check_teacher(teacher_hash)
        return self._take("scores", prompts)

    def check_teacher(self, teacher_hash: str) -> None:
        """Raises UserError unless the store's scores are of the teacher with this hash."""
        known = self.description.teacher_hash
        if teacher_hash != known:
            raise UserError(
                f"{self.folder}: its scores are those of the teacher {known or '(none)'}, not of {teacher_hash or '(none)'}; give that "
                "teacher (and the model.compute_dtype of the config that wrote the store), or write a store of the other one"
            )

    def append(self, examples: Sequence[Example], rollout: Rollout, scores: dict[str, Any]) -> None:
        """Adds a batch, on disk when this returns. Raises UserError where it cannot be written. Of several processes the first writes."""
        named, scores = processes.to_host(({name: value for name, value in vars(rollout).items() if value is not None}, dict(scores)))
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **named, **{_SCORE + name: value for name, value in scores.items()})
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        described = _json({"sha256": digest, "examples": [dataclasses.asdict(example) for example in examples]})
        processes.by_first(_write_batch, self._path(self.batches), buffer.getvalue(), described)
        self._batches.append(_Stored(list(examples), named, scores, digest))

    def _take(self, what: str, prompts: Sequence[int]) -> dict[str, np.ndarray]:
        group = self.description.group_size
        places = [divmod(prompt * group + sample, self.description.rows) for prompt in prompts for sample in range(group)]
        arrays = [getattr(batch, what) for batch in self._batches]
        return {name: np.stack([arrays[batch][name][row] for batch, row in places]) for name in arrays[0]}

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:06d}.json"


def begin(folder: str | os.PathLike, description: Description, *, keep: int | None = None) -> Store:
    """A store to append to: a new one, or what is there of one with this description.

    `keep`: its first batches, which must be there; those after them are removed, as are all of another store where none are kept. Raises
    UserError for a folder with another store, and for a store that cannot be read or written.
    """
    folder = pathlib.Path(folder)
    processes.by_first(_prepare, folder, description, keep)
    store = Store(folder, description, _read_batches(folder, description))
    if keep is not None and store.batches < keep:
        raise UserError(f"{folder}: holds {store.batches} of the {keep} batches that its run has written; {_REMEDY}")
    return store


def _prepare(folder: pathlib.Path, description: Description, keep: int | None) -> None:
    path = folder / DESCRIPTION
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and keep != 0:
            if read_description(folder) != description:
                raise UserError(f"{path}: describes a store of another config, teacher or tokenizer; give another folder")
        else:
            _remove_from(folder, 0)
            _write(path, _json({"format": 1} | dataclasses.asdict(description)))
        if keep is not None:
            _remove_from(folder, keep)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({files.reason(error)}); free space, or give another folder") from None


def read(folder: str | os.PathLike) -> Store:
    """A whole store, verified. Raises UserError for one that is not there, not whole, or damaged."""
    folder = pathlib.Path(folder)
    description = read_description(folder)
    store = Store(folder, description, _read_batches(folder, description))
    if store.batches < max(description.batches, 1):
        raise UserError(
            f"{folder}: holds {store.batches} of {description.batches} batches; run experiments/score_cache.py again, which goes on"
        )
    return store


def is_whole(folder: str | os.PathLike) -> bool:
    """Whether all batches of a store are written, unless they are damaged."""
    folder = pathlib.Path(folder)
    if not (folder / DESCRIPTION).is_file():
        return False
    return _written(folder) >= max(read_description(folder).batches, 1)


def read_description(folder: str | os.PathLike) -> Description:
    """Raises UserError for a description that is missing or damaged."""
    path = pathlib.Path(folder) / DESCRIPTION
    found = files.read_json(path, remedy="give a folder that experiments/score_cache.py has written")
    if found.get("format") != 1:
        raise UserError(f"{path}: format = {files.shown(found.get('format'))}, this version reads 1; {_REMEDY}")
    fields = {field.name: field.type for field in dataclasses.fields(Description)}
    for name, kind in fields.items():
        value, kind = found.get(name), kind if isinstance(kind, type) and kind in (str, int) else dict
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: {name} = {files.shown(value)} must be of the type {kind.__name__}; {_REMEDY}")
    made = Description(**{name: found[name] for name in fields})
    law = {"temperature": float, "top_p": float, "min_p": float, "top_k": int, "max_new_tokens": int, "max_turns": int}
    for name, kind in law.items():
        if not isinstance(made.law.get(name), int if kind is int else (int, float)) or made.law[name] < 0:
            raise UserError(f"{path}: law.{name} = {files.shown(made.law.get(name))} must be a number of at least 0; {_REMEDY}")
    sizes = min(made.rows, made.group_size, made.law["max_new_tokens"]) >= 1 and made.rows % made.group_size == 0
    if not sizes or made.scores not in SCORES or (made.k >= 1) != (made.scores == "topk"):
        sizes = {name: getattr(made, name) for name in ("rows", "group_size", "scores", "k")}
        raise UserError(f"{path}: {files.shown(sizes)} does not describe a store; {_REMEDY}")
    return made


# ---- batches on disk


def _written(folder: pathlib.Path) -> int:
    return next(number for number in itertools.count() if not (folder / f"{number:06d}.json").is_file())


def _read_batches(folder: pathlib.Path, description: Description) -> list[_Stored]:
    batches = [_read_batch(folder / f"{number:06d}.json", description) for number in range(_written(folder))]
    for number, batch in enumerate(batches):
        if set(batch.rollout) != set(batches[0].rollout):
            raise UserError(f"{folder / f'{number:06d}.npz'}: has other arrays than the first batch; {_REMEDY}")
    return batches


def _read_batch(path: pathlib.Path, description: Description) -> _Stored:
    """Raises UserError for a batch that is damaged."""
    found, arrays_path = files.read_json(path, remedy=_REMEDY), path.with_suffix(".npz")
    files.check_regular(arrays_path, where=str(arrays_path), remedy=_REMEDY, limit=_MAX_BYTES)
    try:
        content = arrays_path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != found.get("sha256"):
            raise ValueError("its SHA-256 is not the one that was written down")
        arrays = _arrays(content)
        rollout = {name: value for name, value in arrays.items() if not name.startswith(_SCORE)}
        scores = {name.removeprefix(_SCORE): value for name, value in arrays.items() if name.startswith(_SCORE)}
        _check_names(rollout, scores, description)
        for name, value in itertools.chain(rollout.items(), scores.items()):
            _check_array(name, value, description)
        examples = _examples(found.get("examples"), description.rows // description.group_size)
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{arrays_path}: cannot be read ({files.reason(error)}); {_REMEDY}") from None
    return _Stored(examples, rollout, scores, digest)


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name. Raises ValueError where a header promises more than there is, before memory is taken for it."""
    arrays = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > len(content):
                raise ValueError(f"{member.filename} is compressed")
            file = io.BytesIO(archive.read(member))
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"{member.filename} has the format {version}")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            values = file.read()
            if dtype.hasobject or dtype.kind not in "biuf" or fortran or math.prod(shape) * dtype.itemsize != len(values):
                raise ValueError(f"{member.filename} is no array of numbers of the size that it claims")
            arrays[member.filename.removesuffix(".npy")] = np.frombuffer(values, dtype).reshape(shape)
    return arrays


def _check_names(rollout: dict, scores: dict, description: Description) -> None:
    fields = {field.name: field.default is not None for field in dataclasses.fields(Rollout)}  # name -> whether it must be there
    missing = sorted({name for name, needed in fields.items() if needed} - set(rollout))
    if missing or set(rollout) - set(fields):
        raise ValueError(f"{(missing or sorted(set(rollout) - set(fields)))[0]} is {'missing' if missing else 'not known'}")
    if set(scores) != set(SCORES[description.scores]):
        raise ValueError(f"its scores are {sorted(scores)}, not those of {description.scores}")


def _check_array(name: str, value: np.ndarray, description: Description) -> None:
    """By the letters of its name (types.py), and its kind."""
    sizes = {"B": description.rows, "T": description.law["max_new_tokens"], "K": description.k}
    expected = tuple(sizes.get(letter) for letter in name.rsplit("_", 1)[1])
    if value.shape != expected:
        raise ValueError(f"{name} has the shape {value.shape}, the description asks for {expected}")
    if value.dtype.kind != _KINDS.get(name, value.dtype.kind) or value.dtype.itemsize > 4:
        raise ValueError(f"{name} has the type {value.dtype}")
    if value.dtype.kind == "f" and not (value < np.inf).all():
        raise ValueError(f"{name} holds what is no log-probability")
    if name in ("tokens_BT", "ids_BTK") and value.min(initial=0) < 0:
        raise ValueError(f"{name} holds {value.min()}, which is no token")


def _examples(found: Any, count: int) -> list[Example]:
    if not isinstance(found, list) or len(found) != count:
        raise ValueError(f"it has no list of {count} examples")
    kinds = {field.name: field.type for field in dataclasses.fields(Example)}
    for one in found:
        fits = isinstance(one, dict) and {"id", "prompt"} <= set(one) <= set(kinds) and not isinstance(one["id"], bool)
        if not fits or not all(isinstance(value, kinds[name]) for name, value in one.items()):
            raise ValueError(f"{files.shown(one)} is no example")
    return [Example(**one) for one in found]


def _remove_from(folder: pathlib.Path, number: int) -> None:
    """Removes batch `number` and those after it, the last one first: what is left has no gap."""
    for later in reversed(range(number, _written(folder))):
        for suffix in (".json", ".npz"):
            (folder / f"{later:06d}{suffix}").unlink(missing_ok=True)


def _write_batch(path: pathlib.Path, arrays: bytes, described: bytes) -> None:
    try:
        _write(path.with_suffix(".npz"), arrays)
        _write(path, described)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({files.reason(error)}); free space, or give another folder") from None


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all. The temporary name is this process's own: two that write the same store do not tear each other's files."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
