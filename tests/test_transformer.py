"""The transformer against itself: cached and whole, sharded and not, rematerialised and not, and what each entry may see."""

import dataclasses

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import parallel
from opd_jax.models import cache as cache_lib
from opd_jax.models import config as model_config
from opd_jax.models import spec, transformer
from opd_jax.types import View

hidden = jax.jit(transformer.hidden, static_argnums=1)
prefill = jax.jit(transformer.prefill, static_argnums=1, static_argnames="cache_length")
decode_step = jax.jit(transformer.decode_step, static_argnums=1)


def make(name="qwen3", **changes):
    """(params, config) with weights, norms and biases too, large enough to be seen in the logits."""
    config = dataclasses.replace(model_config.from_hf(hf_oracle.fields_of(name), where="test"), **changes)
    rng = np.random.default_rng(0)
    abstract = spec.abstract(transformer.param_specs(config), jnp.float32)
    return jax.tree.map(lambda p: jnp.asarray((p.ndim == 1) + 0.2 * rng.normal(size=p.shape), p.dtype), abstract), config


def left_padded(rows, length, config, seed=0):
    tokens_BL, mask_BL = hf_oracle.left_padded(rows, length, config.vocab_size, seed)
    return jnp.asarray(tokens_BL, jnp.int32), jnp.asarray(mask_BL)


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)).max()), a, b)))


def head_logits(head):
    logits_BTV = jnp.einsum("btd,dv->btv", head.hidden_BTD, head.unembed_DV)
    return logits_BTV if head.softcap is None else head.softcap * jnp.tanh(logits_BTV / head.softcap)


# ---- parameters


def test_fresh_parameters_follow_their_specs():
    config = model_config.from_hf(hf_oracle.fields_of("qwen3-biases") | {"initializer_range": 0.05}, where="test")
    specs, params = transformer.param_specs(config), transformer.init(jax.random.key(0), config)
    assert jax.tree.map(lambda p: p.shape, params) == jax.tree.map(lambda s: s.shape, specs)
    assert spec.count(specs) == sum(leaf.size for leaf in jax.tree.leaves(params))
    layer = params["layers"]["1"]
    assert abs(float(layer["mlp"]["up"].std()) - 0.05) < 0.005
    assert not layer["attention"]["q_bias"].any() and (layer["attention"]["q_norm"] == 1).all()
    values = [leaf.ravel()[:8] for leaf in jax.tree.leaves(params) if leaf.ndim >= 2]
    assert len({tuple(v.tolist()) for v in values}) == len(values)  # no two parameters share their draw
    assert not any(leaf.ndim >= 2 for path, leaf in jax.tree.leaves_with_path(params) if "bias" in str(path) or "norm" in str(path))


def test_fresh_gemma_norms_multiply_by_one():
    config = model_config.from_hf(hf_oracle.fields_of("gemma3") | {"num_hidden_layers": 1}, where="test")
    params = transformer.init(jax.random.key(0), config)
    layer = params["layers"]["0"]
    norms = [params["final_norm"], *(layer["attention"][n] for n in ("norm", "post_norm", "q_norm", "k_norm")), layer["mlp"]["post_norm"]]
    assert not any(norm.any() for norm in norms)


@pytest.mark.slow
def test_fresh_parameters_are_the_same_on_any_mesh():
    config = make()[1]
    one = transformer.init(jax.random.key(3), config)
    mesh = parallel.make_mesh(2, 2, 2)
    eight = transformer.init(jax.random.key(3), config, mesh=mesh)
    assert largest_difference(one, jax.device_get(eight)) == 0.0
    shardings = spec.shardings(transformer.param_specs(config), mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda p, s: p.sharding == s, eight, shardings)))
    abstract = spec.abstract(transformer.param_specs(config), jnp.bfloat16, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding == s and a.dtype == jnp.bfloat16, abstract, shardings)))
    assert largest_difference(one, transformer.init(jax.random.key(4), config)) > 0


# ---- whole sequences


def test_left_padding_changes_nothing():
    params, config = make()
    tokens_BL, _ = left_padded(3, 9, config)
    plain = transformer.apply(params, config, tokens_BL)
    padded_BL = jnp.pad(tokens_BL, ((0, 0), (5, 0)), constant_values=7)
    padded = transformer.apply(params, config, padded_BL, mask_BL=jnp.arange(14)[None, :] >= jnp.full((3, 1), 5))
    assert largest_difference(plain, padded[:, 5:]) < 1e-5


@pytest.mark.parametrize("length", [10, 66])
def test_no_logit_sees_a_later_token_or_padding(length):
    """The gradient of the logits at one place with respect to the embeddings elsewhere is exactly zero after it, and not before it."""
    params, config = make()
    config = dataclasses.replace(config, vocab_size=length)  # one embedding per place
    params = params | {"embed": jax.random.normal(jax.random.key(5), (length, config.hidden_size))}
    place, padding = length - 6, 3
    tokens_BL = jnp.arange(length, dtype=jnp.int32)[None, :]
    mask_BL = tokens_BL >= padding

    def square(embed):
        return jnp.square(transformer.apply(params | {"embed": embed}, config, tokens_BL, mask_BL=mask_BL)[0, place]).sum()

    seen_L = np.abs(np.asarray(jax.grad(square)(params["embed"]))).max(1) > 0
    np.testing.assert_array_equal(seen_L, (np.arange(length) <= place) & (np.arange(length) >= padding))


@pytest.mark.parametrize("length", [10, 66])
def test_a_window_is_as_wide_as_it_says(length):
    """One layer with a window of 5: a logit depends on its own token and the 4 before it, no more and no less."""
    params, config = make("mistral-window")
    config = dataclasses.replace(config, vocab_size=length, num_layers=1, layers=config.layers[:1], tie_word_embeddings=False)
    params = params | {"embed": jax.random.normal(jax.random.key(5), (length, config.hidden_size)), "unembed": params["embed"].T}
    place, tokens_BL = length - 3, jnp.arange(length, dtype=jnp.int32)[None, :]
    grad = jax.grad(lambda embed: jnp.square(transformer.apply(params | {"embed": embed}, config, tokens_BL)[0, place]).sum())
    seen_L = np.abs(np.asarray(grad(params["embed"]))).max(1) > 0
    np.testing.assert_array_equal(np.flatnonzero(seen_L), np.arange(place - 4, place + 1))


# ---- experts


def experts_one_by_one(weights, config, x_BLD):
    """What a mixture of experts is: every expert on every token, those not chosen times zero."""
    y_BLD = x_BLD * jax.lax.rsqrt(jnp.square(x_BLD).mean(-1, keepdims=True) + config.rms_norm_eps) * weights["norm"][None, None]
    share_BLE = jax.nn.softmax(y_BLD @ weights["router"], axis=-1)
    least_BL1 = jnp.sort(share_BLE, axis=-1)[..., -config.experts_per_token, None]
    share_BLE = jnp.where(share_BLE >= least_BL1, share_BLE, 0)
    share_BLE = share_BLE / share_BLE.sum(-1, keepdims=True) if config.normalise_experts else share_BLE
    total = 0
    for e in range(config.num_experts):
        gated = jax.nn.silu(y_BLD @ weights["expert_gate"][e]) * (y_BLD @ weights["expert_up"][e])
        total += share_BLE[..., e, None] * (gated @ weights["expert_down"][e])
    return total


@pytest.mark.slow
@pytest.mark.parametrize("normalise", [False, True])
def test_experts_and_their_gradients_equal_the_plain_sum(normalise):
    params, config = make("qwen3_moe", normalise_experts=normalise)
    weights = params["layers"]["0"]["mlp"]
    weights["router"] = weights["router"].at[:, 3].set(0).at[0, 3].set(-100.0)  # an expert that few tokens choose
    x_BLD = jax.random.normal(jax.random.key(0), (3, 7, config.hidden_size))

    def loss(block):
        return jax.jit(jax.value_and_grad(lambda w, x: jnp.square(block(w, config, x)).mean(), argnums=(0, 1)))(weights, x_BLD)

    (found, found_grads), (expected, expected_grads) = loss(transformer._expert_block), loss(experts_one_by_one)
    assert abs(found - expected) < 1e-5 * abs(expected)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected_grads))
    assert largest_difference(found_grads, expected_grads) < 1e-5 * scale
    assert float(jnp.abs(expected_grads[0]["router"]).max()) > 0


def test_experts_that_no_token_chooses_get_no_gradient():
    params, config = make("qwen3_moe")
    weights = params["layers"]["0"]["mlp"]
    weights["router"] = jnp.zeros_like(weights["router"])  # a tie: the first experts win
    x_BLD = jax.random.normal(jax.random.key(0), (2, 5, config.hidden_size))
    grads = jax.grad(lambda w: jnp.square(transformer._expert_block(w, config, x_BLD)).sum())(weights)
    for name in ("expert_gate", "expert_up", "expert_down"):
        used_E = np.abs(np.asarray(grads[name])).max((1, 2)) > 0
        np.testing.assert_array_equal(used_E, np.arange(config.num_experts) < config.experts_per_token)


# ---- what changes no number


@pytest.mark.slow
def test_jit_equals_no_jit():
    params, config = make()
    tokens_BL, mask_BL = left_padded(3, 7, config)
    jitted = transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)
    with jax.disable_jit():
        plain = transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)
    assert largest_difference(jitted, plain) < 1e-5


def mean_square(params, config, tokens_BL, mask_BL):
    return jnp.mean(jnp.square(transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)) * mask_BL[:, :, None])


def test_bfloat16_products_of_experts_round_operands_alone():
    """Also in the gradients; an expert without tokens has none."""
    rng = np.random.default_rng(0)
    size_E = np.array([3, 0, 4])
    x, w, cotangent = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((7, 5), (3, 5, 6), (7, 6)))
    config = make(compute_dtype="bfloat16")[1]
    out, pull_back = jax.vjp(lambda x, w: transformer._grouped_matmul(x, w, jnp.asarray(size_E), config), x, w)
    rounded = [np.asarray(array.astype(jnp.bfloat16), np.float64) for array in (x, w, cotangent)]
    of_row = np.repeat(np.arange(3), size_E)
    over_w = np.stack([rounded[0][of_row == e].T @ rounded[2][of_row == e] for e in range(3)])
    expected = (
        np.einsum("rd,rdf->rf", rounded[0], rounded[1][of_row]),
        np.einsum("rf,rdf->rd", rounded[2], rounded[1][of_row]),
        over_w,
    )
    for found, exact in zip((out, *pull_back(cotangent)), expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3_moe-some-layers"])
def test_eight_devices_equal_one(name):
    params, config = make(name)
    tokens_BL, mask_BL = left_padded(8, 12, config)
    one = transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)
    gradient = jax.jit(jax.grad(mean_square), static_argnums=1)
    one_grads = gradient(params, config, tokens_BL, mask_BL)
    few = transformer.apply(params, config, tokens_BL[:3], mask_BL=mask_BL[:3])
    few_grads = gradient(params, config, tokens_BL[:3], mask_BL[:3])
    mesh = parallel.make_mesh(2, 2, 2)
    params = jax.device_put(params, spec.shardings(transformer.param_specs(config), mesh))
    with jax.set_mesh(mesh):
        tokens_BL, mask_BL = parallel.shard_batch((tokens_BL, mask_BL), mesh)
        eight = transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)
        _, cache = prefill(params, config, tokens_BL, mask_BL, cache_length=16)
        eight_grads = gradient(params, config, tokens_BL, mask_BL)
        three = np.asarray(tokens_BL[:3]), np.asarray(mask_BL[:3])  # rows that the batch axes cannot share
        undivided = transformer.apply(params, config, three[0], mask_BL=three[1])
        undivided_grads = gradient(params, config, *three)
    assert largest_difference(one, eight) < 1e-4
    assert largest_difference(few, undivided) < 1e-4
    for on_one, on_eight in ((one_grads, eight_grads), (few_grads, undivided_grads)):
        assert largest_difference(on_one, on_eight) < 1e-4 * max(float(jnp.abs(g).max()) for g in jax.tree.leaves(on_one))
    assert len(eight.sharding.device_set) == 8
    assert cache.keys_BKLH[0].addressable_shards[0].data.shape[0] == 2  # rows lie over data and fsdp


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3_moe-some-layers"])
def test_rematerialisation_changes_memory_alone(name):
    params, config = make(name)
    tokens_BL, mask_BL = left_padded(3, 7, config)

    def loss(params, config):
        return jnp.square(transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)).mean()

    again = dataclasses.replace(config, remat=True)
    plain, repeated = (jax.value_and_grad(loss)(params, c) for c in (config, again))
    assert largest_difference(plain, repeated) < 1e-5
    repeats = [str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, c)).count("remat") for c in (config, again)]
    assert repeats[0] == 0 and repeats[1] >= config.num_layers


@pytest.mark.parametrize("equation, inputs, weights", [("bld,dnh->blnh", (2, 3, 8), (8, 2, 4)), ("blnh,nhd->bld", (2, 3, 2, 4), (2, 4, 8))])
def test_bfloat16_products_and_their_gradients_round_operands_alone(equation, inputs, weights):
    """Also the cotangent, an operand of both gradients; sums and results are float32, those of float32 parameters too."""
    config = make(compute_dtype="bfloat16")[1]
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (inputs, weights))
    out, pull_back = jax.vjp(lambda x, w: transformer._matmul(equation, x, w, config), x, w)
    cotangent = jnp.asarray(rng.normal(size=out.shape), jnp.float32)
    rounded = [np.asarray(array.astype(jnp.bfloat16), np.float64) for array in (x, w, cotangent)]
    (of_x, of_w), of_out = equation.split("->")[0].split(","), equation.split("->")[1]
    expected = [
        np.einsum(equation, rounded[0], rounded[1]),
        np.einsum(f"{of_out},{of_w}->{of_x}", rounded[2], rounded[1]),
        np.einsum(f"{of_x},{of_out}->{of_w}", rounded[0], rounded[2]),
    ]
    for found, exact in zip((out, *pull_back(cotangent)), expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral-window"])
def test_bfloat16_compute_with_float32_parameters(name):
    params, config = make(name)
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    tokens_BL, mask_BL = left_padded(3, 7, config)
    exact, rough = (transformer.apply(params, c, tokens_BL, mask_BL=mask_BL) for c in (config, half))
    assert rough.dtype == jnp.float32
    assert 1e-4 < largest_difference(exact, rough) / float(jnp.abs(exact).max()) < 0.05
    grads = jax.grad(lambda p: transformer.apply(p, half, tokens_BL, mask_BL=mask_BL).sum())(params)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    jaxpr = str(jax.make_jaxpr(lambda p: transformer.apply(p, half, tokens_BL))(params))
    products = [line for line in jaxpr.splitlines() if "dot_general[" in line]
    assert len(products) == 9 * config.num_layers + 1 and all("f32[" in line.split("=")[0] for line in products)


# ---- generation

CACHED = [
    "llama-biases",
    "llama-llama3",
    "qwen2-tied",
    "qwen3",
    "mistral-window",
    "qwen3-window",
    "qwen3_moe-some-layers",
    "gemma2",
    "gemma3",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("total", [12, 70])
def test_cached_decoding_equals_the_whole_forward_pass(name, total):
    params, config = make(name)
    prompt = total - 6
    tokens_BL, mask_BL = left_padded(4, total, config)
    mask_BL = mask_BL.at[:, prompt - 1 :].set(True)
    whole_BLV = transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)
    logits_BV, cache = prefill(params, config, tokens_BL[:, :prompt], mask_BL[:, :prompt], cache_length=total + 3)
    step = jax.jit(lambda params, tokens_B, cache: transformer.decode_step(params, config, tokens_B, cache))
    assert logits_BV.dtype == jnp.float32
    assert largest_difference(logits_BV, whole_BLV[:, prompt - 1]) < 1e-4
    for place in range(prompt, total):
        logits_BV, cache = step(params, tokens_BL[:, place], cache)
        assert largest_difference(logits_BV, whole_BLV[:, place]) < 1e-4
    np.testing.assert_array_equal(cache.position_B, mask_BL.sum(1))
    assert int(cache.index) == total and step._cache_size() == 1
    assert cache.keys_BKLH[0].shape == (4, config.num_kv_heads, total + 3, config.head_dim)


def test_padding_rows_of_the_vocabulary():
    """They are never sampled and have no mass in the loss; apply() shows them as they are."""
    params, config = make("llama")
    padded = dataclasses.replace(config, valid_vocab_size=40)
    tokens_BL, mask_BL = left_padded(2, 5, config)
    assert largest_difference(*(transformer.apply(params, c, tokens_BL) for c in (config, padded))) == 0.0
    logits_BV, cache = prefill(params, padded, tokens_BL, mask_BL, cache_length=7)
    next_BV, _ = decode_step(params, padded, tokens_BL[:, 0], cache)
    for logits in (logits_BV, next_BV):
        assert np.isneginf(logits[:, 40:]).all() and np.isfinite(logits[:, :40]).all()
    view = View(tokens_BL[:, :2], mask_BL[:, :2], tokens_BL[:, 2:])
    np.testing.assert_array_equal(hidden(params, padded, view).valid_V, np.arange(43) < 40)
    assert hidden(params, config, view).valid_V is None


def test_bfloat16_cache():
    params, config = make(compute_dtype="bfloat16")
    tokens_BL, mask_BL = left_padded(2, 6, config)
    _, cache = prefill(params, config, tokens_BL, mask_BL, cache_length=8)
    _, after = decode_step(params, config, tokens_BL[:, 0], cache)
    assert cache.keys_BKLH[0].dtype == after.keys_BKLH[0].dtype == after.values_BKLH[1].dtype == jnp.bfloat16


def test_a_bfloat16_slot_is_written_bit_for_bit():
    """On a CPU the bits are written, because it would convert every slot for one."""
    old_BKLH, new_BKH = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 5, 4), (2, 3, 4)]))
    found = jax.jit(cache_lib.write)(old_BKLH.astype(jnp.bfloat16), new_BKH, jnp.int32(3))
    np.testing.assert_array_equal(found, old_BKLH.astype(jnp.bfloat16).at[:, :, 3].set(new_BKH.astype(jnp.bfloat16)))


# ---- the shift


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_hidden_is_aligned_with_the_completion(name):
    """Entry t predicts token t of the completion, for every row's own prompt length and padding."""
    params, config = make(name)
    prompt_BS, prompt_mask_BS = left_padded(4, 6, config)
    completion_BT, _ = left_padded(4, 5, config, seed=9)
    head = hidden(params, config, View(prompt_BS, prompt_mask_BS, completion_BT))
    assert head.hidden_BTD.shape == (4, 5, config.hidden_size) and head.softcap == config.final_softcap
    logits_BTV = head_logits(head)
    for row in range(4):
        prompt_S = np.asarray(prompt_BS[row])[np.asarray(prompt_mask_BS[row])]
        alone_BL = np.concatenate([prompt_S, np.asarray(completion_BT[row])])[None, :]  # a row of its own, without padding
        alone_LV = transformer.apply(params, config, alone_BL)[0]
        for t in range(5):
            assert largest_difference(logits_BTV[row, t], alone_LV[len(prompt_S) + t - 1]) < 1e-4


def test_models_with_different_prompts_stay_aligned():
    params, config = make()
    completion_BT, _ = left_padded(3, 5, config, seed=9)
    prompt_BS, mask_BS = left_padded(3, 4, config)
    short = hidden(params, config, View(prompt_BS, mask_BS, completion_BT))
    wide_BS, wide_mask_BS = jnp.pad(prompt_BS, ((0, 0), (7, 0)), constant_values=2), jnp.pad(mask_BS, ((0, 0), (7, 0)))
    wide = hidden(params, config, View(wide_BS, wide_mask_BS, completion_BT))
    assert largest_difference(short.hidden_BTD, wide.hidden_BTD) < 1e-5
    longer = hidden(params, config, View(wide_BS, jnp.ones_like(wide_mask_BS), completion_BT))
    assert longer.hidden_BTD.shape == short.hidden_BTD.shape and largest_difference(short.hidden_BTD, longer.hidden_BTD) > 1e-2
