"""The mesh and the rules that lay logical axes on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from opd_jax import config, parallel
from opd_jax.models import spec
from opd_jax.models.spec import ParamSpec
from opd_jax.pair import open_pair
from opd_jax.parallel import Rules
from opd_jax.types import UserError


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4)])
def test_a_mesh_has_one_device_or_all(shape):
    mesh, settings = parallel.make_mesh(*shape), config.Mesh(*shape)
    assert mesh.shape == {axis: getattr(settings, axis) for axis in ("data", "fsdp", "sequence", "tensor")}
    assert parallel.from_settings(settings) == mesh and settings.devices == mesh.size


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(UserError, match=r"= 2 \* 1 \* 2 \* 1 = 4, but there are 8 devices: make the product 8, or 1"):
        parallel.make_mesh(2, 1, 2)


def test_logical_axes_become_mesh_axes():
    mesh = parallel.make_mesh(2, 2, 2)
    assert parallel.partition_spec(mesh, ("embed", "ffn"), (16, 8)) == PartitionSpec("fsdp", "tensor")
    assert parallel.partition_spec(mesh, ("batch", None, "vocab"), (4, 7, 6)) == PartitionSpec(("data", "fsdp"), None, "tensor")


def test_what_an_axis_cannot_divide_is_replicated_and_reported_once(caplog):
    mesh = parallel.make_mesh(2, 2, 2)
    for _ in range(2):
        assert parallel.partition_spec(mesh, ("kv_heads", "ffn"), (13, 4)) == PartitionSpec(None, "tensor")
    assert [r.getMessage() for r in caplog.records] == ["axis 'kv_heads' of size 13 is replicated: mesh.tensor = 2 does not divide it"]


def test_a_mesh_axis_used_twice_is_refused():
    with pytest.raises(UserError, match="logical axes 'vocab' and 'ffn' of one array both lie along mesh axis 'tensor': change the rule"):
        parallel.partition_spec(parallel.make_mesh(2, 2, 2), ("vocab", "embed", "ffn"), (4, 4, 4), Rules())


def test_strict_refuses_what_would_be_replicated(caplog):
    mesh = parallel.make_mesh(2, 2, 2)
    divided, odd = ParamSpec((4, 6), ("embed", "ffn")), ParamSpec((4, 7), ("embed", "ffn"))
    with parallel.strict():
        assert spec.shardings({"up": divided}, mesh)["up"].spec == PartitionSpec("fsdp", "tensor")
        for place in (spec.shardings, lambda specs, mesh: spec.abstract(specs, jnp.float32, mesh)):
            with pytest.raises(
                UserError, match=r"mesh.tensor = 2 does not divide dimension 1 \(ffn\) of parameter mlp/up, which is 7; give"
            ):
                place({"mlp": {"up": odd}}, mesh)
    assert not caplog.records
    assert spec.shardings({"mlp": {"up": odd}}, mesh)["mlp"]["up"].spec == PartitionSpec("fsdp", None)
    assert "axis 'ffn' of size 7 is replicated" in caplog.text


def test_a_config_that_is_strict_refuses_a_model(tmp_path):
    c = config.load_config("configs/quickstart.py:teacher,tiny")
    c.mesh.tensor, c.mesh.data, c.mesh.strict = 4, 2, True
    with pytest.raises(UserError, match=r"mesh.tensor = 4 does not divide dimension 0 \(vocab\) of parameter embed, which is 259;"):
        open_pair(config.parse(c), None, parallel.make_mesh(2, 1, 4))
    c.mesh.strict = False
    open_pair(config.parse(c), None, parallel.make_mesh(2, 1, 4))


def test_a_mesh_of_the_users_may_lack_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert parallel.partition_spec(mesh, ("batch", "length", "ffn"), (8, 4, 4)) == PartitionSpec("data", None, None)


def test_batches_lie_over_the_batch_axes_and_the_rest_everywhere():
    mesh = parallel.make_mesh(2, 2, 2)
    x = np.arange(24.0).reshape(8, 3)
    rows = parallel.shard_batch({"x": x}, mesh)["x"]
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
    whole = parallel.replicate(jnp.asarray(x), mesh)
    assert {shard.data.shape for shard in whole.addressable_shards} == {(8, 3)}
    np.testing.assert_array_equal(rows, whole)


def test_over_rows_gives_each_device_its_own_rows():
    x, weights = jnp.arange(16.0).reshape(8, 2), jnp.float32(2.0)
    sort = lambda x, w: jnp.sort(x * w, axis=0)[::-1]  # mixes the rows that it sees
    np.testing.assert_array_equal(parallel.over_rows(sort, x, weights), (2 * x)[::-1])
    with jax.set_mesh(parallel.make_mesh(2, 2, 2)):
        found = jax.jit(lambda x: parallel.over_rows(sort, x, weights))(x)
    np.testing.assert_array_equal(found, (2 * x).reshape(4, 2, 2)[:, ::-1].reshape(8, 2))
    for axis, here in (("data", 2 * x), ("tensor", (2 * x)[::-1])):  # a mesh of the user's, which lacks axes
        with jax.set_mesh(jax.make_mesh((8,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))):
            np.testing.assert_array_equal(jax.jit(lambda x: parallel.over_rows(sort, x, weights))(x), here)


def test_constrain_is_the_identity_without_a_mesh_and_keeps_values_on_one():
    x = jnp.arange(16.0).reshape(8, 2)
    assert parallel.constrain(x, "batch", None) is x
    with jax.set_mesh(parallel.make_mesh(8)):
        y = jax.jit(lambda x: parallel.constrain(x * 2, "batch", None))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(1, 2)}
    np.testing.assert_array_equal(y, x * 2)
