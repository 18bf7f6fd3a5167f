"""Plans of memory against what XLA says of the compiled programs, on eight virtual devices; shapes of published models; refusals."""

import dataclasses
import functools
import json
import logging
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import aot, memory_plan, outlines, parallel, refill, rollout, sampler, train
from opd_jax import config as config_lib
from opd_jax.data.pipeline import BUCKET
from opd_jax.memory_plan import ALWAYS, LEARNING, WRITING, Part, Plan
from opd_jax.metrics import Progress
from opd_jax.models import cache as cache_lib
from opd_jax.models import published, spec, transformer
from opd_jax.types import Prompts, UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def base_config(**changes):
    c = config_lib.default()
    c.student.init.hidden_size, c.student.init.intermediate_size, c.student.init.num_hidden_layers = 128, 384, 2
    c.rollout.batch_size = c.eval.batch_size = 8
    c.rollout.max_prompt_length, c.rollout.max_new_tokens = 8, 8
    c.teacher.path = "student_init"
    for name, value in changes.items():
        *blocks, last = name.split("__")
        setattr(functools.reduce(getattr, blocks, c), last, value)
    return c


def write_shape(folder, **changes):
    """A folder of a model with nothing but its config.json."""
    fields = {"model_type": "qwen3", "vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields | changes))
    return str(folder)


def several(c, folder):
    c.teacher.path = ""
    c.teacher.members.one = config_lib.member(path=write_shape(folder / "one"))
    c.teacher.members.two = config_lib.member(path=write_shape(folder / "two", hidden_size=64))
    c.teacher.combine = "geometric"
    c.student.path = write_shape(folder / "student")
    c.extrapolation.scale = 1.25


def adapter(c, folder):
    c.student.path = write_shape(folder / "student")
    c.student.lora.rank = 4
    c.teacher.path = write_shape(folder / "teacher", hidden_size=192)


CASES = {
    "replicated, with a copy": (dict(mesh__data=8, teacher__update="ema"), None),
    "sharded two ways": (dict(mesh__fsdp=4, mesh__tensor=2, model__compute_dtype="bfloat16"), None),
    "several teachers and a reference": (dict(mesh__data=2, mesh__fsdp=4), several),
    "adapter": (dict(mesh__fsdp=2, mesh__tensor=4, model__compute_dtype="bfloat16"), adapter),
    "rewards alone, in microbatches": (
        dict(teacher__path="", signal__weight=0.0, reward__weight=1.0, learner__microbatches=2, rollout__group_size=2),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_counted_is_what_the_compiled_update_is_given(name, tmp_path):
    changes, more = CASES[name]
    c = base_config(**changes)
    if more:
        more(c, tmp_path)
    parsed = config_lib.parse(c)
    mesh = parallel.from_settings(parsed.mesh)
    models = outlines.of_config(parsed)
    plan = memory_plan.plan(parsed, mesh, models)
    found = aot.update(parsed, models, mesh).memory_analysis()
    # A self-teacher that follows the student is read from the state; as it began it is held for evaluations alone.
    beside = sum(part.bytes for part in plan.parts if part.name == "teacher") if parsed.teacher.update == "ema" else 0
    assert found.argument_size_in_bytes == pytest.approx(plan.total(when=(ALWAYS,), exact=True) - beside, rel=0.05)
    returned = sum(part.bytes for part in plan.parts if part.name in ("parameters", "adapter", "optimizer state", "copy of the student"))
    assert found.output_size_in_bytes == pytest.approx(returned, rel=0.05)
    assert found.temp_size_in_bytes > 0
    there = memory_plan.abstract_mesh(*dataclasses.astuple(parsed.mesh)[:4])
    assert memory_plan.plan(parsed, there, models).parts == plan.parts  # the devices need not be there


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_the_cache_is_as_large_as_the_sampler_makes_it(shape, monkeypatch):
    """Of a batch that is written to its end: the last cache, and the one before, which is there while its tokens move."""
    data, fsdp, tensor = shape
    c = config_lib.parse(base_config(mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor, rollout__max_new_tokens=56))
    mesh, models = parallel.make_mesh(*shape), outlines.of_config(c)
    made, decode = [], sampler._decode_in_place

    def watched(params, state, *rest, **static):
        leaves = jax.tree.leaves((state.caches[0].keys_BKLH, state.caches[0].values_BKLH))
        made.append(sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves))
        return decode(params, state, *rest, **static)

    monkeypatch.setattr(sampler, "_decode_in_place", watched)
    prompts = Prompts(np.zeros((8, BUCKET), np.int32), np.ones((8, BUCKET), bool), np.arange(8, dtype=np.uint32))
    with jax.set_mesh(mesh):
        params = transformer.init(jax.random.key(0), models.student, mesh=mesh)
        rollout.sample(params, models.student, parallel.shard_batch(prompts, mesh), key=jax.random.key(1), max_new_tokens=56)
    parts = {part.name: part.bytes for part in memory_plan.plan(c, mesh, models).parts}
    assert made == [parts["cache from which it grows"], parts["cache"]]


def test_with_slots_the_caches_are_those_of_the_programs_that_fill_them(monkeypatch):
    """As given to the program, and made in it, not compiled: all prompts in groups, put together, and the rows that are written at once."""
    c = config_lib.parse(base_config(rollout__slots=3, rollout__max_new_tokens=40, eval__prompts=0))
    mesh, models = parallel.make_mesh(1, 1, 1), outlines.of_config(c)
    names = ("cache", "prompts as they are read", "prompts that wait")
    planned = lambda c: sum(part.bytes for part in memory_plan.plan(c, mesh, models).parts if part.name in names)
    sizes, kept = [], cache_lib.grown
    monkeypatch.setattr(cache_lib, "grown", lambda *cache: sizes.append(kept(*cache)) or sizes[-1])
    prompts = Prompts(jnp.zeros((8, BUCKET), jnp.int32), jnp.ones((8, BUCKET), bool), jnp.arange(8))
    law = {"key": jax.random.key(0), "max_new_tokens": 40, "law": sampler.Law(), "stop_ids": (), "pad_id": 0}
    jax.eval_shape(lambda params: refill.sample_tokens(params, models.student, prompts, slots=3, **law), models.trained())
    keys_BKLH = sizes[-1].keys_BKLH[0]
    per_place = 2 * 2 * keys_BKLH.nbytes // keys_BKLH.shape[0] // keys_BKLH.shape[2]  # keys and values of two layers
    assert planned(c) == per_place * (9 * BUCKET + 8 * BUCKET + 3 * keys_BKLH.shape[2])
    everything = per_place * 8 * sampler.bucket(BUCKET + 39)
    evaluated = dataclasses.replace(c, eval=dataclasses.replace(c.eval, prompts=8))
    assert planned(evaluated) == everything  # an evaluation has no slots, and needs more beside its caches
    for changes in ({"source": "corrected"}, {"max_turns": 2}, {"slots": 8}, {"slots": 0}):
        changed = dataclasses.replace(c, rollout=dataclasses.replace(c.rollout, **changes))
        assert planned(changed) >= everything


def cache_planned(c):
    return sum(part.bytes for part in memory_plan.plan(config_lib.parse(c), parallel.make_mesh()).parts if part.name == "cache")


def test_evaluations_write_too(tmp_path):
    """Also where updates learn from completions of others; and the teacher writes in them, whose cache may be the largest."""
    assert cache_planned(base_config(rollout__source="dataset")) == cache_planned(base_config()) > 0
    assert cache_planned(base_config(rollout__source="dataset", eval__prompts=0)) == 0
    deep = base_config(teacher__path=write_shape(tmp_path / "teacher", num_hidden_layers=20, num_key_value_heads=4))
    assert cache_planned(deep) == 10 * cache_planned(base_config())
    deep.eval.prompts = 0
    assert cache_planned(deep) == cache_planned(base_config())


def test_what_no_model_could_do_is_not_planned(tmp_path):
    """A run is refused for it when its models are open."""
    refused = lambda c: memory_plan.preflight(config_lib.parse(c), parallel.make_mesh())
    said = refused(base_config(rollout__max_new_tokens=256))
    assert said == "memory is not planned: config field rollout.max_new_tokens = 256 must be below the context of the models, 256 tokens"
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    c = base_config(student__path=write_shape(tmp_path / "student", **experts), student__lora__rank=4, student__lora__targets="up_proj")
    assert refused(c).startswith("memory is not planned: config field student.lora.targets = 'up_proj': the student has no up_proj")


def test_the_sampling_program_compiles_on_a_mesh_and_is_given_the_student():
    c = config_lib.parse(base_config(mesh__fsdp=4, mesh__tensor=2))
    mesh, models = parallel.make_mesh(1, 4, 2), outlines.of_config(c)
    found = aot.sampling(c, models, mesh).memory_analysis()
    (planned,) = (part.bytes for part in memory_plan.plan(c, mesh, models).parts if part.name == "parameters")
    assert found.argument_size_in_bytes == pytest.approx(planned, rel=0.05)


def test_microbatches_gather_the_parameters_layer_by_layer():
    """Before the loop, where the compiler would move what does not depend on it, a whole model would lie on each device."""
    c = config_lib.parse(base_config(mesh__fsdp=4, mesh__tensor=2, learner__microbatches=2))
    program = aot.update(c, outlines.of_config(c), parallel.make_mesh(1, 4, 2)).as_text()
    outside, inside = 0, 0
    for computation in re.split(r"\n\n", program):
        gathered = sum(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w+\[([\d,]+)\]\S* all-gather\(", computation))
        outside, inside = (outside + gathered, inside) if "\nENTRY " in f"\n{computation}" else (outside, inside + gathered)
    trained = spec.count(transformer.param_specs(outlines.of_config(c).student))
    assert inside > trained / 2 and outside < trained / 10


# ---- shapes without weights


@pytest.mark.parametrize(
    "name, billions",
    # of the model cards; those of tied models count the embedding once
    [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.72), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19), ("qwen3-14b", 14.77), ("qwen3-32b", 32.76)]
    + [("qwen2.5-0.5b", 0.494), ("qwen2.5-1.5b", 1.54), ("qwen2.5-7b", 7.62), ("llama-3.2-1b", 1.24), ("llama-3.1-8b", 8.03)],
)
def test_published_shapes_have_the_published_numbers_of_parameters(name, billions):
    assert spec.count(transformer.param_specs(published.shape(name))) / 1e9 == pytest.approx(billions, abs=0.006)


def test_every_published_shape_is_counted_above():
    assert len(published.NAMES) == 11
    with pytest.raises(UserError, match="'qwen9' is not a published shape known here; valid: qwen3-0.6b, "):
        published.shape("qwen9")


def test_shapes_come_from_folders_names_hub_ids_recipes_and_the_config(tmp_path):
    shape_of = lambda **changes: outlines.of_config(config_lib.parse(base_config(**changes))).student
    assert shape_of(student__path=write_shape(tmp_path / "a", hidden_size=48)).hidden_size == 48
    assert shape_of(student__path="qwen3-0.6b").num_layers == 28
    assert shape_of(student__path="Qwen/Qwen2.5-0.5B-Instruct").hidden_size == 896
    assert (
        shape_of(student__recipe="configs/quickstart.py:teacher,tiny").num_layers
        == shape_of(student__recipe="configs/quickstart.py:student,tiny").num_layers
    )
    assert shape_of().hidden_size == 128
    with pytest.raises(UserError, match="model 'nobody/nothing': its shape is not known before it is loaded; give a folder"):
        shape_of(student__path="nobody/nothing")
    with pytest.raises(UserError, match="model '/nothing/here': is not a folder; correct the path"):
        shape_of(student__path="/nothing/here")


def test_teachers_of_one_path_are_held_once(tmp_path):
    folder = write_shape(tmp_path / "teacher")
    c = base_config(teacher__path="")
    c.teacher.members.one, c.teacher.members.two = (config_lib.member(path=folder) for _ in range(2))
    assert outlines.of_config(config_lib.parse(c)).owned == ("one",)


# ---- what a run says


def made(**sizes):
    parts = [Part("parameters", sizes.get("always", 0), True, ALWAYS), Part("cache", sizes.get("cache", 0), True, WRITING)]
    parts += [Part("gradients", sizes.get("gradients", 0), True, LEARNING), Part("activations", sizes.get("guess", 0), False, LEARNING)]
    return Plan(tuple(parts), 2)


def test_a_step_writes_first_and_then_learns():
    plan = made(always=100, cache=30, gradients=20, guess=40)
    assert (plan.peak, plan.least) == (160, 130)
    assert made(always=100, cache=90, gradients=20, guess=40).peak == 190


def test_what_cannot_fit_is_refused_and_what_may_not_fit_is_warned_of(caplog):
    plan = made(always=100, cache=30, gradients=20, guess=40)
    with pytest.raises(UserError, match=r"config field mesh = 1: a device has 0.1 KiB, and needs 0.1 KiB at the least; raise mesh.fsdp"):
        memory_plan.judge(plan, "mesh = 1", device=120, host=None)
    for device, host, warns in ((160, None, 0), (150, None, 1), (None, 319, 1), (None, 320, 0), (None, None, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            memory_plan.judge(plan, "mesh = 1", device=device, host=host, sharing=2)
        assert len(caplog.records) == warns


def test_a_run_prints_its_plan_before_it_loads_anything(tmp_path, capsys):
    c = config_lib.load_config("configs/quickstart.py:opd,tiny")
    c.student.recipe, c.teacher.path, c.steps, c.eval.prompts = "", "", 1, 0
    c.signal.divergence, c.rollout.source, c.learner.warmup_steps = "nll", "dataset", 0
    for _ in train.run(c, tmp_path / "run", progress=Progress()):
        pass
    said = capsys.readouterr().out
    plan = re.search(r"memory planned on the device: ([\d.]+) (GiB|MiB|KiB) \(parameters .*; beside them .*, estimated\)", said)
    assert plan and plan.start() < said.index("loading the models")
    assert "device" in memory_plan.line(made(always=1)) and memory_plan.host_bytes() > 2**30


@pytest.mark.slow
def test_the_command_plans_a_pair_that_this_machine_could_not_hold():
    pair = ["--config.student.path=qwen3-1.7b", "--config.teacher.path=qwen3-32b", "--config.model.compute_dtype=bfloat16"]
    command = [sys.executable, "experiments/memory_plan.py", "--config=configs/quickstart.py", *pair, "--config.mesh.fsdp=16"]
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    done = run([*command, "--devices=16"])
    assert done.returncode == 0, done.stderr
    teacher = re.search(r"^teacher +always +([\d.]+) GiB  counted$", done.stdout, re.MULTILINE)
    assert float(teacher[1]) == pytest.approx(2 * 32.762e9 / 16 / 2**30, abs=0.06)
    small = ["--config.student.recipe=", "--config.teacher.recipe=", "--config.teacher.path=student_init", "--config.mesh.data=2"]
    compiled = run([*command[:3], *small, "--compile"])
    assert compiled.returncode == 0, compiled.stderr
    assert re.search(r"^writing +arguments .* MiB, temporaries .* MiB, results .* \(compiled in \d+ s\)$", compiled.stdout, re.MULTILINE)
    assert re.search(r"^learning +arguments ", compiled.stdout, re.MULTILINE)
    refused = run([*command, "--devices=8"])
    assert refused.returncode == 2 and refused.stderr.startswith(
        "error: --devices=8: mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor = 1 * 16 * 1 * 1 = 16"
    )
    apart = run([*command, "--config.mesh.teacher=4", "--devices=8"])
    assert apart.returncode == 2 and "mesh.tensor + mesh.teacher = 1 * 16 * 1 * 1 + 4 = 20; make it 8" in apart.stderr


def test_a_plan_refuses_what_a_strict_mesh_would_refuse():
    """The four key/value heads of the shape do not lie on eight devices: copied, or refused before anything is loaded."""
    c = base_config(teacher__path="", mesh__tensor=8, mesh__strict=True, signal__divergence="nll", rollout__source="dataset")
    with pytest.raises(UserError, match=r"mesh.tensor = 8 does not divide dimension \d \(\w+\) of parameter "):
        memory_plan.plan(config_lib.parse(c), memory_plan.abstract_mesh(1, 1, 8))
    c.mesh.strict = False
    assert memory_plan.plan(config_lib.parse(c), memory_plan.abstract_mesh(1, 1, 8)).devices == 8


def test_a_teacher_on_its_own_devices_is_not_planned():
    parsed = config_lib.parse(base_config(teacher__path="qwen3-0.6b", mesh__teacher=4))
    assert memory_plan.preflight(parsed, parallel.make_mesh()).startswith("memory is not planned: config field mesh.teacher = 4")
