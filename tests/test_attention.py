"""The ways to read whole sequences agree, values and gradients, and what cannot be used is refused.

No GPU or TPU is here: the flash kernel runs in Pallas's interpreter, and cuDNN's call with XLA in cuDNN's place.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_transformer import largest_difference, left_padded, make

from opd_jax import config as config_lib
from opd_jax import job, parallel
from opd_jax.models import attention, attention_kernels, transformer
from opd_jax.models.attention_kernels import Rule
from opd_jax.types import UserError

B, L, N, K, H = 2, 130, 4, 2, 8
RULES = {"plain": Rule(0.3), "window": Rule(0.3, window=7)}


def inputs(dtype=jnp.float32, length=L):
    """(queries, keys, values, a mask of left-padded rows, one of them with a gap)"""
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.normal(size=(B, length, heads, H)), dtype) for heads in (N, K, K)]
    return *heads, (jnp.arange(length)[None] >= jnp.array([[0], [17]])).at[1, 90:95].set(False)


def value_and_gradients(read, q, k, v, mask_BL, rule):
    """(outputs of real tokens, gradients of a sum over them)"""

    def loss(q, k, v):
        o_BLNH = jnp.where(mask_BL[..., None, None], read(q, k, v, mask_BL, rule).astype(jnp.float32), 0)
        return jnp.sum(jnp.sin(o_BLNH)) / 10, o_BLNH

    gradients, o_BLNH = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return o_BLNH, gradients


own = functools.partial(attention.read, "xla")


@pytest.mark.parametrize("rule", RULES)
def test_the_call_of_cudnn_with_xla_in_its_place(rule):
    arguments = (*inputs(), RULES[rule])
    found = value_and_gradients(functools.partial(attention_kernels.cudnn, by="xla"), *arguments)
    assert largest_difference(found, value_and_gradients(own, *arguments)) < 1e-5


@pytest.mark.parametrize("length", [64, 130])
def test_the_flash_kernel_in_the_interpreter(length):
    arguments = (*inputs(length=length)[:3], inputs(length=length)[3], RULES["plain"])
    with pltpu.force_tpu_interpret_mode():
        found = value_and_gradients(attention_kernels.flash, *arguments)
    assert largest_difference(found, value_and_gradients(own, *arguments)) < 1e-5


@pytest.mark.slow
def test_the_flash_kernel_reads_the_rows_and_heads_of_each_device():
    mesh = parallel.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    q, k, v, mask_BL = inputs()
    lay = lambda x: jax.device_put(x, parallel.sharding(mesh, ("batch", None, "heads", None), x.shape))
    with pltpu.force_tpu_interpret_mode(), jax.set_mesh(mesh):
        spread = *map(lay, (q, k, v)), parallel.shard_batch(mask_BL, mesh)
        found = jax.device_get(value_and_gradients(attention_kernels.flash, *spread, RULES["plain"]))
    assert largest_difference(found, value_and_gradients(own, q, k, v, mask_BL, RULES["plain"])) < 1e-5


@pytest.mark.slow
def test_a_model_reads_with_the_kernel_that_its_config_names():
    params, config = make()
    tokens_BL, mask_BL = left_padded(3, 12, config)
    expected = transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)
    with pltpu.force_tpu_interpret_mode():
        found = transformer.apply(params, dataclasses.replace(config, attention="flash"), tokens_BL, mask_BL=mask_BL)
    real = mask_BL[..., None]
    assert largest_difference(jnp.where(real, found, 0), jnp.where(real, expected, 0)) < 1e-4
    assert not np.array_equal(found, expected)  # another form was used


def test_auto_takes_a_kernel_where_it_can_be_used(monkeypatch):
    found = lambda dtype="bfloat16", head_dim=64, **rule: attention_kernels.resolve("auto", dtype, head_dim, Rule(1.0, **rule))
    assert found() == "xla"  # a CPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (found(), found(window=4), found("float32"), found(head_dim=256), found(softcap=5.0)) == ("cudnn", "cudnn", "xla", "xla", "xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert (found(), found("float32"), found(window=4), found(softcap=5.0)) == ("flash", "flash", "xla", "xla")


def test_kernels_that_cannot_be_used_are_refused_before_any_work(tmp_path, monkeypatch):
    def refused(choice, **changes):
        c = config_lib.default()
        c.model.attention, c.teacher.path = choice, "anywhere"
        c.model.compute_dtype = changes.get("dtype", "bfloat16")
        with pytest.raises(UserError) as error:
            job.setup(config_lib.parse(c), tmp_path / "run", make_model=None, make_store=None, progress=None)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert refused("cudnn") == "config field model.attention = 'cudnn': it needs a GPU, and this is a CPU; use 'auto' or 'xla'"
    assert refused("flash") == "config field model.attention = 'flash': it needs a TPU, and this is a CPU; use 'auto' or 'xla'"
    assert "model.attention = 'flsh' is not known; valid: auto, xla, cudnn, flash; did you mean flash?" in refused("flsh")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "needs model.compute_dtype = 'bfloat16', not 'float32'" in refused("cudnn", dtype="float32")


@pytest.mark.parametrize("name, choice, backend, words", [("gemma2", "cudnn", "gpu", "no cap"), ("gemma3", "flash", "tpu", "no sliding")])
def test_kernels_that_cannot_read_a_model_are_refused(name, choice, backend, words, monkeypatch):
    config = make(name)[1]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rules = {transformer.attention_rule(config, layer) for layer in config.layers}
    refusals = [attention_kernels.missing(choice, "bfloat16", 64, rule) for rule in rules]
    assert any(words in refusal for refusal in refusals if refusal)
