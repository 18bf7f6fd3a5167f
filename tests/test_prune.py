"""Dropping layers, in memory and from the command line."""

import json
import pathlib
import subprocess
import sys

import hf_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from opd_jax.models import config as model_config
from opd_jax.models import hf, prune, transformer
from opd_jax.types import UserError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]


def make(layers=4):
    config = model_config.from_hf(hf_oracle.fields_of("qwen3") | {"num_hidden_layers": layers}, where="test")
    return transformer.init(jax.random.key(0), config), config


def run(**flags):
    command = [sys.executable, str(ROOT / "experiments" / "prune.py"), *(f"--{name}={value}" for name, value in flags.items())]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_kept_layers_are_those_of_the_teacher():
    params, config = make()
    student, student_config = prune.keep_layers(params, config, (0, 2, 3))
    assert student_config.num_layers == 3 and list(student["layers"]) == ["0", "1", "2"]
    assert student["layers"]["1"] is params["layers"]["2"] and student["embed"] is params["embed"]
    assert jax.tree.map(jnp.shape, student) == jax.tree.map(lambda s: s.shape, transformer.param_specs(student_config))
    assert list(params["layers"]) == ["0", "1", "2", "3"]  # the teacher is as it was


def test_a_dropped_layer_is_one_that_adds_nothing():
    params, config = make()
    silent = dict(params["layers"]["1"])
    silent["attention"] = silent["attention"] | {"o": jnp.zeros_like(silent["attention"]["o"])}
    silent["mlp"] = silent["mlp"] | {"down": jnp.zeros_like(silent["mlp"]["down"])}
    params = params | {"layers": params["layers"] | {"1": silent}}
    student, student_config = prune.keep_layers(params, config, (0, 2, 3))
    tokens_BL = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    np.testing.assert_array_equal(transformer.apply(student, student_config, tokens_BL), transformer.apply(params, config, tokens_BL))


@pytest.mark.parametrize(
    "name, keep, windowed, experts",
    [
        ("gemma2", (1, 2), [False, True], [False, False]),
        ("gemma3", (0, 2, 3), [True, True, False], [False] * 3),
        ("gemma3", (3,), [False], [False]),
        ("qwen3-window", (0, 3), [True, False], [False, False]),
        ("qwen2-window", (0,), [False], [False]),
        ("mistral-window", (0, 3), [True, True], [False, False]),
        ("qwen3_moe-some-layers", (0, 3), [False, False], [False, True]),
        ("qwen3_moe-some-layers", (0, 2), [False, False], [False, False]),
    ],
)
def test_kept_layers_keep_their_kind(name, keep, windowed, experts, tmp_path):
    """Windows and experts go with their layers, and transformers reads the same model out of the folder."""
    fields = hf_oracle.fields_of(name) | {"num_hidden_layers": 4}
    if "layer_types" in fields:
        fields["layer_types"] = ["sliding_attention", "full_attention"] * 2
    hf_oracle.save_model(fields, tmp_path / "teacher")
    student, config = prune.keep_layers(*hf.load(tmp_path / "teacher"), keep)
    assert [layer.windowed for layer in config.layers] == windowed and [layer.experts for layer in config.layers] == experts
    assert model_config.from_hf(model_config.to_hf(config), where="test") == config
    hf.save(tmp_path / "student", student, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    tokens_BL, mask_BL = hf_oracle.left_padded(2, 20, config.vocab_size)
    expected = hf_oracle.logits(model, tokens_BL, mask_BL)[mask_BL]
    found = np.asarray(transformer.apply(student, config, jnp.asarray(tokens_BL), mask_BL=jnp.asarray(mask_BL)))[mask_BL]
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize("keep", [(), (0, 4), (-1, 2), (2, 1), (1, 1)], ids=str)
def test_layers_that_do_not_exist_are_refused(keep):
    with pytest.raises(UserError, match=r"must be rising layer numbers out of 0..3"):
        prune.keep_layers(*make(), keep)


@pytest.fixture
def teacher(tmp_path):
    """A Hugging Face folder with a tokenizer that transformers made."""
    import tokenizers

    folder = tmp_path / "teacher"
    hf_oracle.save_model(hf_oracle.fields_of("llama-tied") | {"num_hidden_layers": 3}, folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(43)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", bos_token="w1").save_pretrained(folder)
    return folder


def test_command_writes_a_folder_that_loads(teacher, tmp_path):
    out = tmp_path / "student"
    done = run(teacher=teacher, keep="0,2", out=out)
    assert done.returncode == 0, done.stderr
    params, config = hf.load(teacher)
    expected, expected_config = prune.keep_layers(params, config, (0, 2))
    found, found_config = hf.load(out)
    assert found_config == expected_config
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), expected, found)))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (teacher / name).read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(out)("w5 w7").input_ids == [5, 7]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens_BL, mask_BL = hf_oracle.left_padded(2, 6, 43)
    ours = np.asarray(transformer.apply(found, found_config, jnp.asarray(tokens_BL), mask_BL=jnp.asarray(mask_BL)))[mask_BL]
    theirs = hf_oracle.logits(model, tokens_BL, mask_BL)[mask_BL]
    assert model.config.num_hidden_layers == 2
    assert np.abs(ours - theirs).max() < 2e-4 * np.abs(theirs).max()


def test_command_refuses_in_one_line(teacher, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    out = tmp_path / "student"
    for flags, message in [
        ({"teacher": teacher, "keep": "0,3", "out": out}, "out of 0..2"),
        ({"teacher": teacher, "keep": "0,x", "out": out}, "--keep=0,x"),
        ({"teacher": teacher, "keep": "0", "out": full}, "not an empty folder"),
        ({"teacher": tmp_path / "nowhere", "keep": "0", "out": out}, "nowhere"),
        ({"teacher": teacher, "out": out}, "keep"),
    ]:
        done = run(**flags)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not out.exists()


@pytest.mark.shared
def test_the_real_model_loses_a_layer(shared_data, tmp_path):
    folder = shared_data / "models" / "stories260K"
    done = run(teacher=folder, keep="0,1,3,4", out=tmp_path / "student")
    assert done.returncode == 0, done.stderr
    params, config = hf.load(tmp_path / "student")
    teacher, _ = hf.load(folder)
    assert config.num_layers == 4 and json.loads((tmp_path / "student" / "config.json").read_text())["num_hidden_layers"] == 4
    same = jax.tree.map(lambda a, b: bool((a == b).all()), params["layers"]["2"], teacher["layers"]["3"])
    assert all(jax.tree.leaves(same))
    assert (tmp_path / "student" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
