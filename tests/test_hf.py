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

from opd_jax import parallel
from opd_jax.models import config as model_config
from opd_jax.models import hf, spec, transformer
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


@pytest.fixture(scope="module", params=hf_oracle.CASES)
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


def test_greedy_continuation_equals_transformers(case):
    oracle, folder = case
    params, config = hf.load(folder)
    tokens_BS, mask_BS = hf_oracle.left_padded(3, 6, config.vocab_size, seed=1)
    expected = hf_oracle.greedy(oracle, tokens_BS, mask_BS, 12)
    np.testing.assert_array_equal(greedy(params, config, tokens_BS, mask_BS, 12), expected)


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


# ---- real models

PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen3-0.6b": 596_049_920,
}


@pytest.mark.shared
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameter_count(shared_data, name):
    config = model_config.from_hf(json.loads((shared_data / "configs" / f"{name}.json").read_text()), where=name)
    abstract = jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == spec.count(transformer.param_specs(config)) == PUBLISHED[name]


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
