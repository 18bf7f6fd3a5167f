"""Checkpoints: whole or not there, restored bit for bit, on another mesh too; damage falls back to the entry before."""

import dataclasses
import json
import os
import pathlib
import shutil

import flax.struct
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from opd_jax import checkpoint, config, learner, parallel
from opd_jax.checkpoint import Checkpoints
from opd_jax.models import spec, transformer
from opd_jax.types import UserError

pytestmark = pytest.mark.slow

OPTIMIZER = learner.make_optimizer(config.Learner(), 10)


def make_state(seed=0, mesh=None):
    params, model_config = models.tiny_model(seed)
    if mesh is not None:
        params = jax.device_put(params, spec.shardings(transformer.param_specs(model_config), mesh))
    state = learner.init_state(params, OPTIMIZER)
    return dataclasses.replace(state, step=jnp.int32(seed + 5))


def abstract_state(mesh=None):
    return learner.abstract_state(spec.abstract(transformer.param_specs(models.tiny_config()), jnp.float32, mesh), OPTIMIZER)


def equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.dtype == y.dtype


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    state = make_state()
    Checkpoints(tmp_path / "c").save(7, state, {"tokens_total": 12})
    step, restored, info = Checkpoints(tmp_path / "c").restore(abstract_state())
    assert (step, info) == (7, {"tokens_total": 12})
    equal(restored, state)
    assert checkpoint.newest_step(tmp_path / "c") == 7


def test_a_state_that_lacks_later_fields_opens(tmp_path):
    """As versions saved it before there were teacher banks and adaptive extrapolation."""

    @flax.struct.dataclass
    class Earlier:
        step: jax.Array
        params: dict
        opt_state: tuple
        finite: jax.Array

    state = make_state()
    Checkpoints(tmp_path / "c").save(7, Earlier(state.step, state.params, state.opt_state, state.finite), {})
    restored = Checkpoints(tmp_path / "c").restore(abstract_state())[1]
    equal(restored, state)
    assert (restored.kept, restored.adaptive) == ({}, {})


@pytest.mark.parametrize("saved, wanted", [((1, 1, 1), (2, 2, 2)), ((2, 2, 2), (1, 8, 1)), ((8, 1, 1), (1, 1, 1))])
def test_restored_on_another_mesh(saved, wanted, tmp_path):
    state = make_state(mesh=parallel.make_mesh(*saved))
    Checkpoints(tmp_path).save(1, state, {})
    mesh = parallel.make_mesh(*wanted)
    _, restored, _ = Checkpoints(tmp_path).restore(abstract_state(mesh))
    equal(restored, state)
    expected = spec.shardings(transformer.param_specs(models.tiny_config()), mesh)
    for leaf, sharding in zip(jax.tree.leaves(restored.params), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_the_newest_are_kept_and_no_temporary_is_left(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (0, 3, 10, 9):
        checkpoints.save(step, make_state(), {})
    assert checkpoints.steps() == [9, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "9"]


def test_an_entry_of_the_same_step_is_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(0), {"try": 1})
    checkpoints.save(1, make_state(1), {"try": 2})
    _, restored, info = checkpoints.restore(abstract_state())
    equal(restored, make_state(1))
    assert info == {"try": 2}


def test_unfinished_entries_are_not_entries(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), {})
    shutil.copytree(tmp_path / "1", tmp_path / "2.tmp")
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(abstract_state())[0] == 1


def largest_file(entry: pathlib.Path) -> pathlib.Path:
    return max((p for p in (entry / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda entry: flip(largest_file(entry)),
    "a truncated file": lambda entry: os.truncate(largest_file(entry), 100),
    "a missing file": lambda entry: largest_file(entry).unlink(),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "a broken manifest": lambda entry: (entry / "manifest.json").write_text("{"),
    "other information": lambda entry: (entry / "info.json").write_text("{}"),
    "no state": lambda entry: shutil.rmtree(entry / "state"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_falls_back_to_the_one_before_with_a_warning(damage, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {"step": 1})
    checkpoints.save(2, make_state(2), {"step": 2})
    DAMAGE[damage](tmp_path / "2")
    assert checkpoint.newest_step(tmp_path) == -1
    equal(checkpoint.restore_params(tmp_path, abstract_state().params), make_state(1).params)
    step, restored, info = checkpoints.restore(abstract_state())
    assert (step, info) == (1, {"step": 1})
    equal(restored, make_state(1))
    assert f"{tmp_path / '2'} cannot be read" in caplog.text
    # Set aside: it neither counts among those that are kept, nor comes back over what the run does now.
    assert checkpoints.steps() == [1] and (tmp_path / "2.tmp_old").is_dir()
    checkpoints.save(2, make_state(3), {"step": 2})
    assert checkpoints.steps() == [1, 2] and not (tmp_path / "2.tmp_old").exists()


def test_with_no_readable_entry_there_is_no_silent_fresh_start(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_state(), {})
        flip(largest_file(tmp_path / str(step)))
    with pytest.raises(UserError, match=r"no checkpoint can be read \(2: .* is damaged; 1: .* is damaged\)"):
        checkpoints.restore(abstract_state())
    assert checkpoints.steps() == [1, 2]


def test_without_entries(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(abstract_state()) is None
    assert checkpoint.newest_step(tmp_path / "none") == -1
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.restore_params(tmp_path / "none", abstract_state().params)


def test_parameters_alone_equal_those_of_the_whole(tmp_path):
    Checkpoints(tmp_path).save(1, make_state(), {})
    found = checkpoint.restore_params(tmp_path, abstract_state().params)
    equal(found, make_state().params)
    halved = checkpoint.restore_params(tmp_path, spec.abstract(transformer.param_specs(models.tiny_config()), jnp.bfloat16))
    equal(halved, jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_state().params))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Checkpoints(tmp_path).save(1, make_state(), {})
    other = spec.abstract(transformer.param_specs(models.tiny_config(hidden_size=32)), jnp.float32)
    with pytest.raises(UserError, match="no checkpoint can be read"):
        Checkpoints(tmp_path).restore(learner.abstract_state(other, OPTIMIZER))
    with pytest.raises(UserError, match="no checkpoint can be read"):
        checkpoint.restore_params(tmp_path, other)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "c").write_text("x")
    with pytest.raises(UserError, match="a checkpoint cannot be written"):
        Checkpoints(tmp_path / "c").save(1, make_state(), {})


def test_the_manifest_lists_every_file(tmp_path):
    Checkpoints(tmp_path).save(1, make_state(), {})
    listed = json.loads((tmp_path / "1" / "manifest.json").read_text())
    present = {str(p.relative_to(tmp_path / "1")) for p in (tmp_path / "1").rglob("*") if p.is_file()}
    assert set(listed) == present - {"manifest.json"} and "info.json" in listed
