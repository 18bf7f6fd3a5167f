"""What a run needs of each device's memory, told before anything is loaded.

Parameters, the optimizer's state, copies and the sampler's cache are counted exactly, from the shapes and shardings that the run will have.
What the compiler needs beside them (activations, tiles of logits, gathered weights) is estimated from what the mathematics keeps;
opd_jax/aot.py compiles the programs and asks XLA.
"""

import dataclasses
import logging
import math
import os

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from opd_jax import learner, outlines, parallel, refill, rollout, sampler, teachers
from opd_jax.config import Config
from opd_jax.data.pipeline import BUCKET
from opd_jax.models.config import ModelConfig
from opd_jax.numerics import heads
from opd_jax.outlines import Outlines
from opd_jax.types import UserError

log = logging.getLogger(__name__)

ALWAYS, WRITING, LEARNING = "always", "writing", "learning"
FLOAT32 = 4  # bytes
_TILES = 5  # of logits that the loss has at once: student, teacher, their log-probs, the gradient


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that is in memory: bytes on one device, whether they are counted or estimated, and while what is done."""

    name: str
    bytes: int
    exact: bool
    when: str  # always, writing (completions are sampled) or learning (an update)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The parts of a run on a mesh."""

    parts: tuple[Part, ...]
    devices: int

    def total(self, *, when: tuple[str, ...] = (ALWAYS, WRITING, LEARNING), exact: bool | None = None) -> int:
        """Bytes of some parts on one device."""
        return sum(part.bytes for part in self.parts if part.when in when and exact in (None, part.exact))

    @property
    def peak(self) -> int:
        """Bytes on one device while it needs the most: a step writes first, and then learns."""
        return self.total(when=(ALWAYS,)) + max(self.total(when=(WRITING,)), self.total(when=(LEARNING,)))

    @property
    def least(self) -> int:
        """Bytes on one device of what is counted exactly, at the peak."""
        counted = [self.total(when=(when,), exact=True) for when in (WRITING, LEARNING)]
        return self.total(when=(ALWAYS,), exact=True) + max(counted)


def abstract_mesh(data: int, fsdp: int, tensor: int, sequence: int = 1) -> AbstractMesh:
    """A mesh of devices that are not there: for plans, not for programs."""
    return AbstractMesh((data, fsdp, sequence, tensor), parallel.AXES, axis_types=(AxisType.Auto,) * len(parallel.AXES))


def plan(config: Config, mesh: Mesh | AbstractMesh, models: Outlines | None = None) -> Plan:
    """The plan of a config's runs on a mesh. Raises UserError for a model whose shape is not known before it is loaded."""
    models = models or outlines.of_config(config)
    with parallel.strict(config.mesh.strict):  # refuses what the run would refuse
        parts = [*_state(config, mesh, models), *_writing(config, mesh, models), *_learning(config, mesh, models)]
    return Plan(tuple(part for part in parts if part.bytes), mesh.size)


def _state(config: Config, mesh, models: Outlines) -> list[Part]:
    """What is there from the first step to the last."""
    described = {name: models.model(name) for name in models.members}
    bank = teachers.make_bank(config, described, models.reference)
    trained = models.trained(mesh)
    state = learner.abstract_state(trained, learner.make_optimizer(config.learner, config.steps), bank)
    counted = {
        "adapter" if models.adapter else "parameters": trained,
        "base of the adapter": models.base(mesh),
        "optimizer state": state.opt_state,
        "copy of the student": state.kept,
    }
    counted |= {_called(name): models.parameters(models.model(name), mesh) for name in models.owned}
    return [Part(name, _bytes(tree), True, ALWAYS) for name, tree in counted.items()]


def _called(name: str) -> str:
    return name if name in (teachers.REFERENCE, "teacher") else f"teacher {name}"


def _writing(config: Config, mesh, models: Outlines) -> list[Part]:
    """While completions are sampled, those of updates or of evaluations, by student or teacher: of whoever needs the most."""
    student, members = models.student, list(models.members.values())
    two = [student, *members[:1]]
    sources = {"teacher": members[:1], "dagger": two, "corrected": two, "dataset": [], "cache": []}
    phases = [_sampling(config, mesh, sources.get(config.rollout.source, [student]), config.rollout.batch_size)]
    slots = rollout.slots_of(config.rollout, mesh)
    if slots:
        phases = [_refilling(config, mesh, model, slots) for model in sources.get(config.rollout.source, [student])]
    if config.eval.prompts:
        asked = members if config.teacher.combine == "route" else members[:1]
        phases += [_sampling(config, mesh, [model], config.eval.batch_size) for model in (student, *asked)]
    return max(phases, key=lambda parts: sum(part.bytes for part in parts))


def _sampling(config: Config, mesh, writers: list[ModelConfig], rows: int) -> list[Part]:
    """The caches of who writes together, and the logits of a token."""
    stages = sampler.make_stages([_width_read(config, model) for model in writers], config.rollout.max_new_tokens) if writers else ()
    parts = []
    for number, model in enumerate(writers):
        *_, before, last = [0, *(_cache_bytes(model, mesh, rows, stage.lengths[number]) for stage in stages)]
        parts.append(Part("cache", last, True, WRITING))
        parts.append(Part("cache from which it grows", before, False, WRITING))
        parts += _reading(config, mesh, model, rows)
    return parts


def _refilling(config: Config, mesh, model: ModelConfig, slots: int) -> list[Part]:
    """The same of a model that writes in few rows, while the prompts that have been read wait for one."""
    width, new, rows = _width_read(config, model), config.rollout.max_new_tokens, config.rollout.batch_size
    groups = -(-rows // slots) * slots  # in which the prompts are read, to be put together
    return [
        Part("cache", _cache_bytes(model, mesh, slots, refill.cache_length(width, new)), True, WRITING),
        Part("prompts as they are read", _cache_bytes(model, mesh, groups, width), True, WRITING),
        Part("prompts that wait", _cache_bytes(model, mesh, rows, width), True, WRITING),
        *_reading(config, mesh, model, slots),
    ]


def _cache_bytes(model: ModelConfig, mesh, rows: int, length: int) -> int:
    """Of the keys and values of all layers."""
    shape = (rows, model.num_kv_heads, length, model.head_dim)
    slots = jax.ShapeDtypeStruct(shape, model.compute_dtype, sharding=parallel.sharding(mesh, ("batch", "kv_heads", None, None), shape))
    return 2 * model.num_layers * _bytes(slots)


def _reading(config: Config, mesh, model: ModelConfig, rows: int) -> list[Part]:
    """Of so many rows, what reads prompts and then tokens one by one."""
    logits = 3 * FLOAT32 * _tokens(mesh, rows, 1) * _split(mesh, model.vocab_size)  # as they are, their law, and its sum
    prompts = _layer_bytes(model, mesh, rows, _prompt(config, model))
    return [Part("logits of a token", logits, False, WRITING), Part("reading the prompts", prompts, False, WRITING)]


def _learning(config: Config, mesh, models: Outlines) -> list[Part]:
    """During an update, of a microbatch: gradients, activations, and what the loss and the teachers need beside them."""
    settings, student = config.learner, models.student
    rows, new = config.rollout.batch_size // settings.microbatches, config.rollout.max_new_tokens
    length = _prompt(config, student) + new
    kept = _kept_bytes(student, mesh, rows, length) * (1 if student.remat else student.num_layers)
    inputs = FLOAT32 * _tokens(mesh, rows, length) * student.hidden_size * (student.num_layers if student.remat else 0)
    gradients = _bytes(models.trained(mesh)) * (2 if settings.microbatches > 1 else 1)
    parts = [
        Part("gradients", gradients, True, LEARNING),
        Part("activations, recomputed by layer" if student.remat else "activations", kept + inputs, False, LEARNING),
        Part("loss", _loss_bytes(models, mesh, rows, new), False, LEARNING),
    ]
    readers = [models.model(name) for name in models.frozen]
    if readers:
        parts.append(Part("reading of teachers", max(_layer_bytes(model, mesh, rows, length) for model in readers), False, LEARNING))
    if mesh.shape["fsdp"] > 1:
        wide = max(readers + [student], key=lambda model: model.hidden_size * model.vocab_size)
        gathered = jnp.dtype(wide.compute_dtype).itemsize * wide.hidden_size * wide.vocab_size // mesh.shape["tensor"]
        parts.append(Part("gathered weights", gathered, False, LEARNING))
    return parts


# ---- sizes on one device


def _bytes(tree) -> int:
    """Of abstract arrays, on one device."""
    each = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(each(leaf) for leaf in jax.tree.leaves(tree))


def _prompt(config: Config, model: ModelConfig) -> int:
    """Tokens of the longest prompt."""
    return min(config.rollout.max_prompt_length, model.max_position_embeddings - config.rollout.max_new_tokens)


def _width_read(config: Config, model: ModelConfig) -> int:
    """Places that a batch with the longest prompt has for it."""
    return -(-_prompt(config, model) // BUCKET) * BUCKET


def _tokens(mesh, rows: int, length: int) -> int:
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return length * (rows // ways if rows % ways == 0 else rows)


def _split(mesh, size: int) -> int:
    """A width on one device."""
    return size // mesh.shape["tensor"] if size % mesh.shape["tensor"] == 0 else size


def _layer_bytes(model: ModelConfig, mesh, rows: int, length: int) -> int:
    """Of a layer that reads without a gradient: the residual stream, and the widest of what it makes from it."""
    narrow = jnp.dtype(model.compute_dtype).itemsize
    ffn, heads_here = _split(mesh, _width(model)), _split(mesh, model.num_heads)
    mlp = (2 * FLOAT32 + narrow) * ffn
    attention = (FLOAT32 + narrow) * heads_here * (length + model.head_dim)
    return _tokens(mesh, rows, length) * (2 * FLOAT32 * model.hidden_size + max(mlp, attention))


def _kept_bytes(model: ModelConfig, mesh, rows: int, length: int) -> int:
    """What a layer keeps for its backward pass. Blocks of queries skip the keys after them: 5/8 of the pairs are there."""
    narrow = jnp.dtype(model.compute_dtype).itemsize
    ffn, heads_here, kv_here = _split(mesh, _width(model)), _split(mesh, model.num_heads), _split(mesh, model.num_kv_heads)
    stream = (2 * FLOAT32 + 2 * narrow) * model.hidden_size
    projected = narrow * (heads_here + 2 * kv_here) * model.head_dim + (FLOAT32 + narrow) * heads_here * model.head_dim
    weights = (FLOAT32 + narrow) * heads_here * length * 5 // 8
    return _tokens(mesh, rows, length) * (stream + projected + weights + (2 * FLOAT32 + narrow) * ffn)


def _width(model: ModelConfig) -> int:
    """Of the feed-forward layer that a token goes through."""
    return model.experts_per_token * model.expert_size if model.num_experts else model.intermediate_size


def _loss_bytes(models: Outlines, mesh, rows: int, new: int) -> int:
    """Hidden states, tiles of logits, and the gradient of the unembedding, which is summed in float32."""
    student = models.student
    tiling = heads.tiling(rows, new, student.vocab_size, columns=len(models.members) < 2)  # a pool of laws takes whole vocabularies
    tile = _tokens(mesh, rows, tiling.positions) * _split(mesh, tiling.columns or student.vocab_size)
    vocab = _split(mesh, student.vocab_size)
    narrow = jnp.dtype(student.compute_dtype).itemsize
    hidden = sum(2 * narrow * _tokens(mesh, rows, new) * model.hidden_size for model in (student, *models.members.values()))
    return hidden + _TILES * FLOAT32 * tile + FLOAT32 * student.hidden_size * vocab


# ---- beside what there is


def device_bytes(mesh: Mesh) -> int | None:
    """Memory of the smallest device, where devices tell."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return None if None in limits else min(limits)


def host_bytes() -> int | None:
    """Main memory of this machine, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def line(made: Plan) -> str:
    """A plan in a line."""
    always = ", ".join(f"{part.name} {size(part.bytes)}" for part in made.parts if part.when == ALWAYS)
    rest = [f"{when} {size(made.total(when=(when,)))}" for when in (WRITING, LEARNING)]
    where = "per device" if made.devices > 1 else "on the device"
    return f"memory planned {where}: {size(made.peak)} ({always}; beside them {' or '.join(rest)}, estimated)"


def preflight(config: Config, mesh: Mesh) -> str:
    """The line of a run's plan, before anything is loaded. Raises UserError where the run cannot fit a device."""
    try:
        models = outlines.of_config(config)
    except UserError as error:
        return f"memory is not planned: {error}"
    made = plan(config, mesh, models)
    shape = f"mesh.{', '.join(mesh.axis_names)} = {', '.join(map(str, mesh.shape.values()))}"
    on_host = mesh.devices.flat[0].platform == "cpu"
    judge(made, shape, device=device_bytes(mesh), host=host_bytes() if on_host else None, sharing=len(mesh.local_devices))
    return line(made)


def judge(made: Plan, mesh: str, *, device: int | None, host: int | None, sharing: int = 1) -> None:
    """Refuses a plan of which what is counted exceeds a device; warns where its estimate does, or exceeds the host that `sharing` share.

    Bytes of a device and of the host, None where they are not known. Raises UserError.
    """
    remedy = "raise mesh.fsdp or learner.microbatches, lower eval.batch_size, set model.remat or model.compute_dtype=bfloat16, or give "
    remedy += "smaller models"
    if device is not None and made.least > device:
        raise UserError(f"config field {mesh}: a device has {size(device)}, and needs {size(made.least)} at the least; {remedy}")
    for have, needed in ((device, made.peak), (host, made.peak * sharing)):
        if have is not None and needed > have:
            log.warning("%s: about %s of memory are needed, and there are %s; %s", mesh, size(needed), size(have), remedy)


def size(count: int) -> str:
    """Bytes in words."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= 0.1 * unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1024:.1f} KiB"


def table(made: Plan) -> str:
    """A plan as lines: bytes on one device."""
    lines = [f"{f'bytes on each of {made.devices} devices' if made.devices > 1 else 'bytes on one device':36}{'while':>10}{'':>14}"]
    for part in made.parts:
        lines.append(f"{part.name:36}{part.when:>10}{size(part.bytes):>14}  {'counted' if part.exact else 'estimated'}")
    lines.append(f"{'at the peak':36}{'':>10}{size(made.peak):>14}  of which {size(made.least)} counted")
    return "\n".join(lines)
