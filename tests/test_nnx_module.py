"""An nnx.Module as a model: the GPT-2 of docs/nnx.md against transformers, sampling against re-reading, and the page's own loop."""

import pathlib
import re

import hf_oracle
import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from opd_jax import rollout, score
from opd_jax.models import forward, nnx_module
from opd_jax.types import Prompts, UserError, view

pytestmark = pytest.mark.slow

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "nnx.md"
SIZES = {"vocab_size": 43, "n_positions": 32, "n_embd": 24, "n_head": 3, "n_layer": 2}


def code_blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def page():
    """The names that the page's first block defines."""
    names = {"__name__": "page"}
    exec(compile(code_blocks()[0], str(PAGE), "exec"), names)
    return names


@pytest.fixture(scope="module")
def gpt2(page):
    """(transformers' GPT-2 with random weights, our parameters and model with the same weights)."""
    config = transformers.GPT2Config(**SIZES, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    oracle = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(oracle.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "ln_" in name and name.endswith("weight") else 0.3 * noise)
    module = page["GPT2"](43, 32, 24, 3, 2, rngs=nnx.Rngs(0))
    nnx.update(module, weights_of(oracle, heads=3))
    return oracle, *nnx_module.split(module, vocab_size=43, max_position_embeddings=32)


def weights_of(oracle, heads):
    t = {name: value.numpy() for name, value in oracle.state_dict().items()}
    norm = lambda name: {"scale": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}
    linear = lambda name: {"kernel": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}
    blocks = {}
    for i in range(SIZES["n_layer"]):
        at = f"transformer.h.{i}"
        width = t[f"{at}.attn.c_proj.weight"].shape[0]
        kernels = np.split(t[f"{at}.attn.c_attn.weight"], 3, axis=1)
        biases = np.split(t[f"{at}.attn.c_attn.bias"], 3)
        split = lambda k, b, width=width: {"kernel": k.reshape(width, heads, -1), "bias": b.reshape(heads, -1)}
        attention = {name: split(k, b) for name, k, b in zip(("query", "key", "value"), kernels, biases, strict=True)}
        attention["out"] = {"kernel": t[f"{at}.attn.c_proj.weight"].reshape(heads, -1, width), "bias": t[f"{at}.attn.c_proj.bias"]}
        blocks[i] = {
            "norm1": norm(f"{at}.ln_1"),
            "norm2": norm(f"{at}.ln_2"),
            "attention": attention,
            "up": linear(f"{at}.mlp.c_fc"),
            "down": linear(f"{at}.mlp.c_proj"),
        }
    embed = {"tokens": {"embedding": t["transformer.wte.weight"]}, "positions": {"embedding": t["transformer.wpe.weight"]}}
    return jax.tree.map(jnp.asarray, embed | {"blocks": blocks, "norm": norm("transformer.ln_f")})


def test_the_module_equals_transformers_with_padding(gpt2):
    oracle, params, model = gpt2
    tokens_BL, mask_BL = hf_oracle.left_padded(4, 9, 43)
    tokens_BT = np.random.default_rng(1).integers(0, 43, (4, 5))
    prompts = Prompts(jnp.asarray(tokens_BL), jnp.asarray(mask_BL), jnp.arange(4, dtype=jnp.uint32))
    one = models.ragged_rollout(np.random.default_rng(0), rows=4, length=5, vocab_size=43).replace(tokens_BT=jnp.asarray(tokens_BT))
    logits_BTV = np.asarray(forward.hidden(params, model, view(prompts, one)).logits_BTV)
    whole_BL, whole_mask_BL = np.concatenate([tokens_BL, tokens_BT], 1), np.concatenate([mask_BL, np.ones((4, 5), bool)], 1)
    expected_BTV = hf_oracle.logits(oracle, whole_BL, whole_mask_BL)[:, 8:-1]
    assert logits_BTV.shape == expected_BTV.shape
    assert np.abs(logits_BTV - expected_BTV).max() < 2e-4 * np.abs(expected_BTV).max()


def test_greedy_sampling_equals_transformers(gpt2):
    oracle, params, model = gpt2
    tokens_BS, mask_BS = hf_oracle.left_padded(3, 6, 43, seed=1)
    expected = hf_oracle.greedy(oracle, tokens_BS, mask_BS, 12)
    prompts = Prompts(jnp.asarray(tokens_BS), jnp.asarray(mask_BS), jnp.arange(3, dtype=jnp.uint32))
    ours = rollout.sample(params, model, prompts, key=jax.random.key(0), max_new_tokens=12, temperature=0)
    np.testing.assert_array_equal(ours.tokens_BT, expected)


def test_log_probs_of_a_sample_are_those_of_scoring(gpt2):
    _, params, model = gpt2
    prompts = models.ragged_prompts(np.random.default_rng(0), rows=5, vocab_size=43)
    sampled = rollout.sample(params, model, prompts, key=jax.random.key(3), max_new_tokens=10, stop_ids=(7,))
    np.testing.assert_allclose(sampled.logp_BT, score.logprobs(params, model, prompts, sampled), rtol=1e-4, atol=1e-4)


def test_annotations_of_a_module_are_its_log_probs(gpt2):
    _, params, model = gpt2
    prompts, one = (
        models.ragged_prompts(np.random.default_rng(0), vocab_size=43),
        models.ragged_rollout(np.random.default_rng(1), vocab_size=43),
    )
    annotation = score.annotate(params, model, prompts, one, k=5)
    np.testing.assert_allclose(annotation.logp_BT, score.logprobs(params, model, prompts, one), rtol=1e-5, atol=1e-5)
    assert annotation.top_ids_BTK.shape == (8, 7, 5)


def test_a_prompt_beyond_the_modules_context_is_refused(gpt2):
    _, params, model = gpt2
    prompts = models.ragged_prompts(np.random.default_rng(0), vocab_size=43)
    with pytest.raises(UserError, match="exceed the model's context of 32 tokens"):
        rollout.sample(params, model, prompts, key=jax.random.key(0), max_new_tokens=31)


@pytest.mark.parametrize("layer", [lambda: nnx.Dropout(0.1, rngs=nnx.Rngs(0)), lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0))])
def test_modules_with_other_state_are_refused_by_name(layer):
    class WithState(nnx.Module):
        def __init__(self):
            self.inner = layer()

    with pytest.raises(UserError, match=r"module WithState: inner\..* is a \w+, not a parameter; build the module without dropout"):
        nnx_module.split(WithState(), vocab_size=4, max_position_embeddings=8)


@pytest.mark.slow
def test_the_page_distils_its_module(page):
    """The page's own loop, as it stands there; the module holds the trained parameters at the end."""
    exec(compile(code_blocks()[1], str(PAGE), "exec"), page)
    assert np.mean(page["history"][-5:]) < 0.75 * page["history"][0]
    trained = nnx_module.split(page["module"], vocab_size=259, max_position_embeddings=64)[0]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), trained, page["state"].params)))
