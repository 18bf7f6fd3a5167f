"""Hugging Face folders in and out, against transformers on torch; what cannot be honoured is refused by name."""

import dataclasses
import json
import shutil
import tracemalloc

import hf_oracle
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import traverse_util

from opd_jax import config as config_lib
from opd_jax import pair, parallel
from opd_jax.models import config as model_config
from opd_jax.models import families, hf, spec, transformer, weights
from opd_jax.types import UserError


def leaves_equal(a: dict, b: dict) -> bool:
    """Same tree, shapes, types and bits."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(same))


def greedy(params, config, tokens_BS, mask_BS, count):
    step = jax.jit(transformer.decode_step, static_argnums=1)
    logits_BV, cache = transformer.prefill(
        params, config, jnp.asarray(tokens_BS), jnp.asarray(mask_BS), cache_length=tokens_BS.shape[1] + count
    )
    tokens = []
    for _ in range(count):
        tokens.append(logits_BV.argmax(-1).astype(jnp.int32))
        logits_BV, cache = step(params, config, tokens[-1], cache)
    return np.stack(tokens, axis=1)


def one_of_each_family_fast():
    """All cases; those after the first of their family are slow."""
    seen, params = set(), []
    for name, fields in hf_oracle.CASES.items():
        params.append(pytest.param(name, marks=[pytest.mark.slow] if fields["model_type"] in seen else []))
        seen.add(fields["model_type"])
    return params


@pytest.fixture(scope="module", params=one_of_each_family_fast())
def case(request, tmp_path_factory):
    """(oracle model, its folder) of every family and choice."""
    folder = tmp_path_factory.mktemp(request.param)
    return hf_oracle.save_model(hf_oracle.fields_of(request.param), folder), folder


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    hf_oracle.save_model(hf_oracle.fields_of("llama"), folder)
    return folder


# ---- parity


@pytest.mark.parametrize("length", [9, 67])
def test_logits_equal_transformers(case, length):
    oracle, folder = case
    params, config = hf.load(folder)
    tokens_BL, mask_BL = hf_oracle.left_padded(4, length, config.vocab_size)
    expected_BLV = hf_oracle.logits(oracle, tokens_BL, mask_BL)[mask_BL]
    logits_BLV = np.asarray(transformer.apply(params, config, jnp.asarray(tokens_BL), mask_BL=jnp.asarray(mask_BL)))[mask_BL]
    assert logits_BLV.dtype == np.float32
    assert np.abs(logits_BLV - expected_BLV).max() < 2e-4 * np.abs(expected_BLV).max()


@pytest.mark.slow
def test_greedy_continuation_equals_transformers(case):
    oracle, folder = case
    params, config = hf.load(folder)
    tokens_BS, mask_BS = hf_oracle.left_padded(3, 6, config.vocab_size, seed=1)
    expected = hf_oracle.greedy(oracle, tokens_BS, mask_BS, 12)
    np.testing.assert_array_equal(greedy(params, config, tokens_BS, mask_BS, 12), expected)


@pytest.mark.parametrize("name", ["mistral-window", "gemma3"])
def test_windows_count_columns_as_transformers_does(name, tmp_path):
    """A masked column inside a row takes a place in the window, though it has no position."""
    oracle = hf_oracle.save_model(hf_oracle.fields_of(name), tmp_path)
    params, config = hf.load(tmp_path)
    tokens_BL, mask_BL = hf_oracle.left_padded(3, 24, config.vocab_size)
    mask_BL[:, [8, 9, 15]] = False
    expected = hf_oracle.logits(oracle, tokens_BL, mask_BL)[mask_BL]
    found = np.asarray(transformer.apply(params, config, jnp.asarray(tokens_BL), mask_BL=jnp.asarray(mask_BL)))[mask_BL]
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embeddings_are_scaled_in_the_type_of_the_weights(dtype, tmp_path):
    oracle = hf_oracle.save_model(hf_oracle.fields_of("gemma3"), tmp_path, dtype=dtype)
    params, config = hf.load(tmp_path)
    tokens_BL = np.arange(config.vocab_size)[None, :]
    expected = oracle.model.embed_tokens(torch.tensor(tokens_BL)).float().detach().numpy()
    found = transformer._embed(params, config, jnp.asarray(tokens_BL)).astype(params["embed"].dtype).astype(jnp.float32)
    np.testing.assert_array_equal(found, expected)


def test_export_is_bit_identical_and_loads_in_transformers(case, tmp_path):
    oracle, folder = case
    params, config = hf.load(folder)
    hf.save(tmp_path / "out", params, config)
    again, config_again = hf.load(tmp_path / "out")
    assert config_again == config
    assert leaves_equal(params, again)
    original = safetensors.numpy.load_file(folder / "model.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens_BL, mask_BL = hf_oracle.left_padded(2, 5, config.vocab_size)
    np.testing.assert_array_equal(hf_oracle.logits(loaded, tokens_BL, mask_BL), hf_oracle.logits(oracle, tokens_BL, mask_BL))


def test_a_run_directory_says_how_to_become_a_folder(tmp_path):
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "config.json", tmp_path / "model" / "config.json"):
        path.write_text("{}")
    with pytest.raises(UserError, match="is a run directory, not a Hugging Face folder; write one with experiments/export_hf.py"):
        hf.load(tmp_path)


def test_weights_may_be_read_by_whoever_may_read_the_config(tmp_path):
    params, config = models.tiny_model()
    hf.save(tmp_path, params, config)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_a_tied_head_stays_tied(tmp_path):
    config = model_config.from_hf(hf_oracle.fields_of("llama-tied"), where="test")
    params = transformer.init(jax.random.key(0), config)
    hf.save(tmp_path, params, config)
    assert "unembed" not in params
    assert "lm_head.weight" not in safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (config.vocab_size, config.hidden_size)


# ---- files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_files(tmp_path, dtype):
    hf_oracle.save_model(hf_oracle.fields_of("llama"), tmp_path / "in", dtype=dtype)
    params, config = hf.load(tmp_path / "in")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {str(dtype).removeprefix("torch.")}
    hf.save(tmp_path / "out", params, config)
    assert leaves_equal(params, hf.load(tmp_path / "out")[0])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    wide, _ = hf.load(tmp_path / "in", dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
    tokens_BL, mask_BL = hf_oracle.left_padded(2, 5, config.vocab_size)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
    expected = hf_oracle.logits(oracle, tokens_BL, mask_BL)[mask_BL]
    found = np.asarray(transformer.apply(wide, config, jnp.asarray(tokens_BL), mask_BL=jnp.asarray(mask_BL)))[mask_BL]
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


def test_sharded_files_of_transformers(tmp_path, llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    assert leaves_equal(hf.load(tmp_path / "parts")[0], hf.load(llama)[0])


def test_large_models_are_written_in_several_files(tmp_path, llama, monkeypatch):
    params, config = hf.load(llama)
    out = tmp_path / "parts"
    hf.save(out, params, config)  # its single file must not survive the next save
    monkeypatch.setattr(hf, "MAX_FILE_BYTES", 20_000)
    hf.save(out, params, config)
    parts = sorted(out.glob("*.safetensors"))
    assert len(parts) > 2 and all(part.stat().st_size < 24_000 for part in parts)
    assert leaves_equal(hf.load(out)[0], params)
    expected = transformers.AutoModelForCausalLM.from_pretrained(llama).state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_each_tensor_goes_straight_to_its_sharding(llama):
    mesh = parallel.make_mesh(2, 2, 2)
    params, config = hf.load(llama, mesh=mesh)
    assert leaves_equal(params, hf.load(llama)[0])
    expected = spec.shardings(transformer.param_specs(config), mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda p, s: p.sharding == s, params, expected)))
    assert params["layers"]["0"]["mlp"]["up"].addressable_shards[0].data.shape == (16, 24)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe-some-layers"])
def test_a_part_of_a_parameter_is_read_as_the_whole_has_it(name, tmp_path):
    """What the devices of one process among several hold."""
    config = model_config.from_hf(hf_oracle.fields_of(name), where="test")
    hf.save(tmp_path, transformer.init(jax.random.key(0), config), config)
    files, mesh = weights.tensor_files(tmp_path), parallel.make_mesh(2, 2, 2)
    for path, param in traverse_util.flatten_dict(transformer.param_specs(config), sep="/").items():
        whole = hf._from_files(files, path, param.shape, config, None)
        for index in parallel.sharding(mesh, param.logical_axes, param.shape).devices_indices_map(param.shape).values():
            part = tuple(one.indices(size)[:2] for one, size in zip(index, param.shape, strict=True))
            np.testing.assert_array_equal(hf._from_files(files, path, param.shape, config, None, part), whole[index])


@pytest.mark.slow
def test_tensors_are_read_one_at_a_time(tmp_path):
    fields = hf_oracle.fields_of("llama-tied") | {"num_hidden_layers": 20, "hidden_size": 128, "intermediate_size": 256}
    config = model_config.from_hf(fields, where="test")
    hf.save(tmp_path, transformer.init(jax.random.key(0), config), config)
    hf.load(tmp_path)  # imports and caches
    largest = max(leaf.size * 4 for leaf in jax.tree.leaves(spec.abstract(transformer.param_specs(config), jnp.float32)))
    tracemalloc.start()
    params, _ = hf.load(tmp_path)
    kept, peak = tracemalloc.get_traced_memory()  # of the host's arrays; JAX adopts those that are aligned and copies the others
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) > 80 * largest
    assert peak - kept < 8 * largest


def rewrite(folder, change):
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_derived_and_duplicate_tensors_are_accepted(llama, tmp_path):
    rewrite(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    hf.load(llama)
    tied = tmp_path / "tied"
    hf_oracle.save_model(hf_oracle.fields_of("llama-tied"), tied)
    rewrite(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    hf.load(tied)
    rewrite(tied, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match=r"'lm_head.weight' in the weights is not used"):
        hf.load(tied)


BAD_WEIGHTS = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"'model.layers.1.mlp.up_proj.weight' is missing"),
    "unused": (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros(3)}), r"'model.layers.2.mlp.up_proj.weight' .* not used"),
    "a bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32)}),
        r"'model.layers.0.self_attn.q_proj.bias' .* not used",
    ),
    "shape": (
        lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
        r"'model.norm.weight' has shape \(31,\).* asks for \(32,\)",
    ),
    "type": (lambda t: t.update({"model.norm.weight": np.zeros(32, np.int8)}), r"'model.norm.weight' is of type I8; valid: F32, BF16, F16"),
}


@pytest.mark.parametrize("change, message", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(llama, change, message):
    rewrite(llama, change)
    with pytest.raises(UserError, match=message):
        hf.load(llama)


def test_folders_that_hold_no_model_are_refused(llama, tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(UserError, match="nowhere.*not a folder"):
            hf.load(path)
    with pytest.raises(UserError, match="no-such-owner/no-such-model.*neither a folder nor a repository"):
        hf.load("no-such-owner/no-such-model")
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        hf.load(llama)
    weights.unlink()
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        hf.load(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: cannot be read"):
        hf.load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(UserError, match="config.json: is missing"):
        hf.load(llama)


def test_a_folder_that_cannot_be_written_is_refused(llama, tmp_path):
    params, config = hf.load(llama)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.*cannot be written"):
        hf.save(tmp_path / "file" / "out", params, config)


# ---- config.json

GEMMA, GEMMA3, MOE = (hf_oracle.fields_of(name) for name in ("gemma2", "gemma3", "qwen3_moe"))
GEMMA3["num_hidden_layers"] = 2


@pytest.mark.parametrize("name", hf_oracle.CASES)
def test_config_survives_a_round_trip(name):
    extra = {"transformers_version": "4.40.0", "use_cache": True, "attention_dropout": 0.0, "eos_token_id": [3, 5], "id2label": {"0": "A"}}
    config = model_config.from_hf(hf_oracle.fields_of(name) | extra, where="test")
    written = model_config.to_hf(config)
    assert model_config.from_hf(json.loads(json.dumps(written)), where="test") == config
    assert written["id2label"] == {"0": "A"} and written["eos_token_id"] == [3, 5]
    assert hash(config) == hash(dataclasses.replace(config))


def test_both_spellings_of_the_rotary_fields_agree():
    plain = {key: value for key, value in hf_oracle.fields_of("llama").items() if key != "rope_theta"}
    old = plain | {"rope_theta": 700.0, "rope_scaling": hf_oracle.LLAMA3}
    new = plain | {"rope_parameters": hf_oracle.LLAMA3 | {"rope_theta": 700.0}}
    expected = model_config.from_hf(old, where="test")
    assert expected.rope_theta == 700.0 and expected.rope_scaling.factor == 8.0
    assert model_config.from_hf(new, where="test") == expected
    assert model_config.from_hf(old | new, where="test") == expected
    with pytest.raises(UserError, match="rope_theta = 500.0: disagrees with rope_parameters.rope_theta = 700.0"):
        model_config.from_hf(new | {"rope_theta": 500.0}, where="test")
    with pytest.raises(UserError, match="rope_scaling = .*disagrees with rope_parameters"):
        model_config.from_hf(new | {"rope_scaling": {"type": "linear", "factor": 2.0}}, where="test")


def test_what_a_config_does_not_say_is_as_transformers_has_it():
    """Every field that may be missing, against the attributes of the config that transformers makes of the same file."""
    for name in ("mistral", "gemma2", "gemma3_text"):
        fields = {key: hf_oracle.BASE[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
        fields |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        ours = model_config.from_hf({"model_type": name} | fields, where="test")
        theirs = transformers.AutoConfig.for_model(name, **fields)
        for mine, its in {
            "head_dim": "head_dim",
            "rms_norm_eps": "rms_norm_eps",
            "max_position_embeddings": "max_position_embeddings",
            "sliding_window": "sliding_window",
            "tie_word_embeddings": "tie_word_embeddings",
            "initializer_range": "initializer_range",
            "bos_token_id": "bos_token_id",
            "pad_token_id": "pad_token_id",
        }.items():
            assert getattr(ours, mine) == getattr(theirs, its), (name, mine)
        assert ours.eos_token_ids == (theirs.eos_token_id,)
        assert ours.query_scalar == getattr(theirs, "query_pre_attn_scalar", ours.head_dim)
        assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
        assert ours.final_softcap == getattr(theirs, "final_logit_softcapping", None)
        assert ours.qkv_bias == getattr(theirs, "attention_bias", False)
        kinds = ["sliding_attention" if layer.windowed else "full_attention" for layer in ours.layers]
        assert kinds == getattr(theirs, "layer_types", ["sliding_attention"] * 2)
        rope = theirs.rope_parameters
        if name == "gemma3_text":
            assert (ours.rope_theta, ours.local_rope_theta) == tuple(rope[k]["rope_theta"] for k in ("full_attention", "sliding_attention"))
        else:
            assert ours.rope_theta == rope["rope_theta"]


def test_gemma3_rotary_fields_agree_in_both_spellings():
    plain = hf_oracle.fields_of("gemma3") | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    old = model_config.from_hf(plain, where="test")
    bare = {key: value for key, value in plain.items() if not key.startswith("rope")}
    both = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0}, "sliding_attention": {"rope_theta": 50.0}}
    assert model_config.from_hf(bare | {"rope_parameters": both}, where="test") == old
    assert model_config.from_hf(plain | {"rope_parameters": both}, where="test") == old
    assert (old.rope_theta, old.rope_scaling.factor, old.local_rope_theta) == (700.0, 8.0, 50.0)
    defaults = model_config.from_hf(bare, where="test")
    assert (defaults.rope_theta, defaults.rope_scaling, defaults.local_rope_theta) == (1e6, None, 1e4)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_can_be_made_afresh(name):
    """From the fields of `student.init`, whose families are these."""
    c = config_lib.default()
    c.student.init.model_type = name
    if families.FAMILIES[name].experts:
        c.student.init.num_experts, c.student.init.num_experts_per_tok, c.student.init.moe_intermediate_size = 4, 2, 8
    model = pair._random_student(config_lib.parse(c), parallel.make_mesh())
    assert model.config.family == name and model.config.tie_word_embeddings and model.config.head_dim == 16
    assert np.isfinite(transformer.apply(model.params, model.config, jnp.arange(6, dtype=jnp.int32)[None, :])).all()
    assert tuple(families.FAMILIES) == config_lib.FAMILIES


def test_a_null_that_means_none_is_not_the_default():
    mistral = model_config.from_hf(hf_oracle.fields_of("mistral"), where="test")
    gemma = model_config.from_hf(hf_oracle.fields_of("gemma2-no-caps") | {"eos_token_id": None, "pad_token_id": None}, where="test")
    assert (mistral.sliding_window, gemma.attention_softcap, gemma.final_softcap) == (None, None, None)
    assert (gemma.eos_token_ids, gemma.pad_token_id, gemma.bos_token_id) == ((), None, 2)
    assert not any(layer.windowed for layer in mistral.layers)
    for config in (mistral, gemma):
        assert model_config.from_hf(model_config.to_hf(config), where="test") == config


def test_windows_that_are_switched_off_do_nothing():
    """Qwen2.5 has a window in its config.json and does not use it."""
    fields = hf_oracle.fields_of("qwen2") | {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 1}
    config = model_config.from_hf(fields, where="test")
    assert config.sliding_window is None and not any(layer.windowed for layer in config.layers)
    written = model_config.to_hf(config)
    assert (written["use_sliding_window"], written["sliding_window"], written["max_window_layers"]) == (False, 3, 1)
    assert model_config.from_hf(written, where="test") == config


BAD_FIELDS = {
    "unknown family": ({"model_type": "gpt2"}, "model_type = 'gpt2'.*llama, mistral, qwen2, qwen3, qwen3_moe, gemma2, gemma3_text"),
    "no family": ({"model_type": None}, "model_type = None"),
    "another head": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures.*LlamaForCausalLM"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*silu"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    "window": ({"use_sliding_window": True}, "use_sliding_window = True"),
    "window of llama": ({"sliding_window": 16}, "sliding_window = 16"),
    "windowed layers": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "multiplier": ({"residual_multiplier": 0.5}, "residual_multiplier = 0.5.*not a field"),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "remote code": ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map"),
    "per-layer": ({"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "rope type": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling: rope_type = 'yarn'.*default, linear, llama3"),
    "rope field": ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.5}}, "rope_scaling: mscale = 1.5"),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor = None: must be a positive number"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads = 4"),
    "width": ({"hidden_size": 30}, "hidden_size = 30: is not a multiple of num_attention_heads"),
    "odd head": ({"head_dim": 7}, "head_dim = 7.*even"),
    "not an integer": ({"num_hidden_layers": "2"}, "num_hidden_layers = '2': must be an integer"),
    "a boolean": ({"num_hidden_layers": True}, "num_hidden_layers = True: must be an integer"),
    "negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06: must be a positive number"),
    "not a boolean": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes': must be true or false"),
    "stop token": ({"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
    "missing": ({"vocab_size": None}, "vocab_size is missing"),
    "biases of qwen2": ({"model_type": "qwen2", "attention_bias": False}, "attention_bias = False: qwen2 always"),
    "biases of mistral": ({"model_type": "mistral", "attention_bias": True}, "attention_bias = True: mistral has no biases"),
    "kv heads of mistral": ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads is missing"),
    "layers of mistral": (
        {"model_type": "mistral", "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "layer_types = .*must be 2 times 'sliding_attention' for this mistral",
    ),
    "windows without a switch": (
        {"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"]},
        "layer_types = .*must be 2 times 'full_attention' for this qwen3",
    ),
    "kinds of layers": (GEMMA | {"layer_types": ["chunked_attention"] * 2}, "layer_types.*'full_attention' or 'sliding_attention'"),
    "count of layers": (GEMMA | {"layer_types": ["full_attention"] * 3}, "layer_types = .*must be 2 times"),
    "no window": (GEMMA | {"sliding_window": None}, "sliding_window = None: must be an integer, because layers of gemma2 have windows"),
    "window of zero": (GEMMA | {"sliding_window": 0}, "sliding_window = 0: must be an integer of at least 1"),
    "two windows": (GEMMA | {"sliding_window_size": 8}, "sliding_window_size = 8: disagrees with sliding_window = 5"),
    "activation of gemma": (
        GEMMA | {"hidden_activation": "gelu"},
        "hidden_activation = 'gelu': .*; valid: 'gelu_pytorch_tanh'",
    ),
    "old activation of gemma": (GEMMA | {"hidden_act": "silu"}, "hidden_act = 'silu': is not supported; valid: 'gelu_pytorch_tanh'"),
    "softcap of zero": (GEMMA | {"final_logit_softcapping": 0}, "final_logit_softcapping = 0: must be a positive number"),
    "bidirectional": (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "query scalar": (GEMMA | {"query_pre_attn_scalar": 0.5}, "query_pre_attn_scalar = 0.5: must be an integer"),
    "attention softcap of gemma3": (
        GEMMA3 | {"attn_logit_softcapping": 5.0},
        "attn_logit_softcapping = 5.0: is not a field of gemma3",
    ),
    "flat rope_parameters": (GEMMA3 | {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.*full_attention and sliding_attention"),
    "local scaling": (
        GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_parameters.*stretches the positions of sliding_attention",
    ),
    "two local bases": (
        GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_theta": 60.0}}},
        "rope_local_base_freq = 50.0: disagrees with rope_parameters.rope_theta = 60.0",
    ),
    "vision": ({"model_type": "gemma3"}, "model_type = 'gemma3': is not supported"),
    "no experts": (MOE | {"num_experts": None}, "num_experts is missing"),
    "no choice of experts": (MOE | {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
    "no size of experts": (MOE | {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
    "too many experts": (MOE | {"num_experts_per_tok": 7}, "num_experts_per_tok = 7: must be at most num_experts = 6"),
    "two counts of experts": (MOE | {"num_local_experts": 8}, "num_local_experts = 8: disagrees with num_experts = 6"),
    "dense layers": (MOE | {"mlp_only_layers": [True]}, "mlp_only_layers = .*list of layer numbers"),
    "sparse step": (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step = 0: must be an integer of at least 1"),
    "shared experts": (MOE | {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8: is not a field of qwen3_moe"),
    "mlp biases of qwen3": ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias = True: is not a field of qwen3"),
}


@pytest.mark.parametrize("change, message", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_fields_that_cannot_be_honoured_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=f"^config.json: .*{message}|^config.json: {message}") as error:
        model_config.from_hf(hf_oracle.fields_of("llama") | change, where="config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"residual_multiplier": None}, {"use_moe": False}, {"auto_map": {}}, {"sliding_window": None}, {"hidden_act": None}], ids=str
)
def test_fields_that_say_nothing_are_accepted_and_change_nothing(change):
    plain = hf_oracle.fields_of("llama")
    changed, same = (model_config.from_hf(fields, where="config.json") for fields in (plain | change, plain))
    assert dataclasses.replace(changed, source=same.source) == same


def test_what_the_makers_of_smollm2_left_in_its_config_is_accepted_and_written_back():
    notes = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}
    plain = hf_oracle.fields_of("llama")
    loaded, same = (model_config.from_hf(fields, where="config.json") for fields in (plain | notes, plain))
    assert dataclasses.replace(loaded, source=same.source) == same
    assert notes.items() <= model_config.to_hf(loaded).items()
    with pytest.raises(UserError, match="rope_interleaved = True: is not a field of llama"):
        model_config.from_hf(plain | {"rope_interleaved": True}, where="config.json")


# ---- real models

PUBLISHED = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
}


@pytest.mark.shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameter_count(shared_data, name):
    fields = json.loads((shared_data / "configs" / f"{name}.json").read_text())
    specs = transformer.param_specs(model_config.from_hf(fields, where=name))
    with torch.device("meta"):
        oracle = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(fields.pop("model_type"), **fields))
    assert spec.count(specs) == PUBLISHED[name] == sum(p.numel() for p in oracle.parameters())


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", ["gemma-2-2b", "gemma-3-270m", "qwen3-0.6b"])
def test_a_published_model_made_small_equals_transformers(shared_data, name, tmp_path):
    """The published choices with other sizes."""
    fields = json.loads((shared_data / "configs" / f"{name}.json").read_text())
    fields |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "head_dim": 16, "vocab_size": 101}
    fields |= {"sliding_window": 8} if "sliding_window" in fields else {}
    oracle = hf_oracle.save_model(fields, tmp_path)
    params, config = hf.load(tmp_path)
    assert dataclasses.replace(config, source="{}") == model_config.from_hf(fields, where=name)
    tokens_BL, mask_BL = hf_oracle.left_padded(3, 40, config.vocab_size)
    expected = hf_oracle.logits(oracle, tokens_BL, mask_BL)[mask_BL]
    found = np.asarray(transformer.apply(params, config, jnp.asarray(tokens_BL), mask_BL=jnp.asarray(mask_BL)))[mask_BL]
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_model_tells_the_story_of_transformers(shared_data, tmp_path):
    folder = shared_data / "models" / "stories260K"
    params, config = hf.load(folder)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = np.array([[config.bos_token_id, *tokenizer("Once upon a time", add_special_tokens=False).input_ids]])
    mask = np.ones_like(ids, bool)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = hf_oracle.logits(oracle, ids, mask)
    found = np.asarray(transformer.apply(params, config, jnp.asarray(ids)))
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()
    story = greedy(params, config, ids, mask, 200)
    np.testing.assert_array_equal(story, hf_oracle.greedy(oracle, ids, mask, 200))
    assert tokenizer.decode(story[0]).startswith(", there was a little girl named Lily. She loved to play outside in the park.")
    hf.save(tmp_path, params, config)
    shutil.copyfile(folder / "generation_config.json", tmp_path / "generation_config.json")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(hf_oracle.greedy(exported, ids, mask, 50), story[:, :50])
