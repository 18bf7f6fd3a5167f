"""LoRA as an overlay: against peft on torch, against the merged weights, frozen bases, and runs that train an adapter alone."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import hf_oracle
import jax
import jax.numpy as jnp
import models
import numpy as np
import peft as peft_library
import pytest
import transformers
from test_learner import make_case, make_objective

from opd_jax import checkpoint, cost, learner, metrics, model_io, parallel, score, teachers, train
from opd_jax import config as config_lib
from opd_jax.data import tokenizer
from opd_jax.models import hf, lora, peft, spec, transformer
from opd_jax.models.lora import LoraConfig
from opd_jax.pair import open_pair
from opd_jax.types import UserError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]
ALL = LoraConfig(rank=3, alpha=6.0, modules=lora.MODULES)
CASES = ("llama-head-dim", "llama-biases", "qwen2-tied", "qwen3")


def random_adapter(config, lora_config=ALL, seed=1):
    """An adapter whose B is not zero."""
    specs = lora.param_specs(transformer.param_specs(config), lora_config)
    adapter = spec.init(jax.random.key(seed), specs)
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    oracle = hf_oracle.save_model(hf_oracle.fields_of(request.param), folder)
    params, config = hf.load(folder)
    return oracle, folder, params, config


def logits(params, config, seed=0):
    tokens_BL, mask_BL = hf_oracle.left_padded(3, 9, config.vocab_size, seed)
    return np.asarray(transformer.apply(params, config, jnp.asarray(tokens_BL), mask_BL=jnp.asarray(mask_BL)))[mask_BL]


# ---- the overlay


def test_a_fresh_adapter_changes_nothing_and_a_random_one_equals_its_merge(case):
    _, _, params, config = case
    fresh = spec.init(jax.random.key(0), lora.param_specs(transformer.param_specs(config), ALL))
    np.testing.assert_array_equal(logits(lora.attach(params, fresh, ALL), config), logits(params, config))
    adapter = random_adapter(config)
    attached, merged = lora.attach(params, adapter, ALL), lora.merge(params, adapter, ALL)
    scale = np.abs(logits(merged, config)).max()
    assert np.abs(logits(attached, config) - logits(merged, config)).max() < 1e-4 * scale
    assert np.abs(logits(attached, config) - logits(params, config)).max() > 1e-2 * scale


def test_the_overlay_decodes_as_it_reads(case):
    _, _, params, config = case
    attached = lora.attach(params, random_adapter(config), ALL)
    tokens_BL = jnp.asarray(hf_oracle.left_padded(2, 8, config.vocab_size)[0][:1])
    full_V = np.asarray(transformer.apply(attached, config, tokens_BL))[0, -1]
    _, cache = transformer.prefill(attached, config, tokens_BL[:, :-1], jnp.ones((1, 7), bool), cache_length=8)
    step_V = np.asarray(transformer.decode_step(attached, config, tokens_BL[:, -1], cache)[0])[0]
    np.testing.assert_allclose(step_V, full_V, rtol=1e-4, atol=1e-4 * np.abs(full_V).max())


@pytest.mark.parametrize(
    "equation, expected",
    [
        ("bld,dnh->blnh", ("bld,dr->blr", "blr,rnh->blnh")),
        ("blnh,nhd->bld", ("blnh,nhr->blr", "blr,rd->bld")),
        ("bld,df->blf", ("bld,dr->blr", "blr,rf->blf")),
    ],
)
def test_equations(equation, expected):
    assert lora.equations(equation) == expected


def test_only_the_named_modules_are_adapted(case):
    config = case[3]
    specs = lora.param_specs(transformer.param_specs(config), LoraConfig(2, 4.0, ("q_proj", "down_proj")))
    assert set(specs["layers"]["0"]) == {"attention", "mlp"}
    assert set(specs["layers"]["0"]["attention"]) == {"q"} and set(specs["layers"]["0"]["mlp"]) == {"down"}
    assert "embed" not in specs and len(specs["layers"]) == config.num_layers


def test_the_gradient_of_the_overlay_is_the_projection_of_the_full_one():
    """d/dA = (alpha / r) G B^T and d/dB = (alpha / r) A^T G for the gradient G by the merged weight, in float64."""
    with jax.enable_x64(True):
        params, config = models.tiny_model(0)
        config = dataclasses.replace(config, compute_dtype="float64")
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        adapter = jax.tree.map(lambda x: x.astype(jnp.float64), random_adapter(config))
        tokens_BL = jnp.arange(10).reshape(2, 5)
        loss = lambda p: jnp.sum(jax.nn.log_softmax(transformer.apply(p, config, tokens_BL))[..., 3])
        full = jax.grad(loss)(merge64(params, adapter))
        own = jax.grad(lambda a: loss(lora.attach(params, a, ALL)))(adapter)
        for part, name in (("attention", "q"), ("attention", "o"), ("mlp", "up")):
            g, pair, grads = (tree["layers"]["1"][part][name] for tree in (full, adapter, own))
            a, b = pair["a"].reshape(-1, 3), pair["b"].reshape(3, -1)
            g = g.reshape(a.shape[0], b.shape[1])
            np.testing.assert_allclose(grads["a"].reshape(a.shape), 2.0 * g @ b.T, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(grads["b"].reshape(b.shape), 2.0 * a.T @ g, rtol=1e-8, atol=1e-10)


def merge64(params, adapter):
    result = jax.tree.map(lambda x: x, params)
    for i, layer in adapter["layers"].items():
        for part, weights in layer.items():
            for name, pair in weights.items():
                result["layers"][i][part][name] = params["layers"][i][part][name] + 2.0 * jnp.tensordot(pair["a"], pair["b"], axes=1)
    return result


def test_the_overlay_does_not_depend_on_the_mesh():
    params, config = models.tiny_model(0)
    adapter = random_adapter(config)
    mesh = parallel.make_mesh(2, 2, 2)
    place = lambda tree, specs: jax.tree.map(jax.device_put, tree, spec.shardings(specs, mesh))
    specs = transformer.param_specs(config)
    sharded = lora.attach(place(params, specs), place(adapter, lora.param_specs(specs, ALL)), ALL)
    with jax.set_mesh(mesh):
        there = logits(sharded, config)
    np.testing.assert_allclose(there, logits(lora.attach(params, adapter, ALL), config), rtol=1e-5, atol=1e-5)


# ---- peft's files


def test_the_peft_library_reads_our_adapter(case, tmp_path):
    oracle, folder, params, config = case
    adapter = random_adapter(config)
    peft.save(tmp_path, adapter, ALL, base=str(folder))
    theirs = peft_library.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path).eval()
    tokens_BL, mask_BL = hf_oracle.left_padded(3, 9, config.vocab_size)
    expected = hf_oracle.logits(theirs, tokens_BL, mask_BL)[mask_BL]
    ours = logits(lora.attach(params, adapter, ALL), config)
    assert np.abs(ours - expected).max() < 2e-4 * np.abs(expected).max()
    assert np.abs(expected - hf_oracle.logits(oracle, tokens_BL, mask_BL)[mask_BL]).max() > 1e-2 * np.abs(expected).max()


def test_we_read_an_adapter_of_the_peft_library(case, tmp_path):
    _, folder, params, config = case
    settings = peft_library.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    theirs = peft_library.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), settings).eval()
    theirs.save_pretrained(tmp_path)
    adapter, lora_config = peft.load(tmp_path, config)
    assert lora_config == LoraConfig(4, 6.0, ("q_proj", "o_proj", "up_proj"))
    tokens_BL, mask_BL = hf_oracle.left_padded(3, 9, config.vocab_size)
    expected = hf_oracle.logits(theirs, tokens_BL, mask_BL)[mask_BL]
    assert np.abs(logits(lora.attach(params, adapter, lora_config), config) - expected).max() < 2e-4 * np.abs(expected).max()
    peft.save(tmp_path / "again", adapter, lora_config, base=str(folder))
    again, config_again = peft.load(tmp_path / "again", config)
    assert config_again == lora_config
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), adapter, again)))


def test_a_folder_of_an_adapter_opens_as_the_merged_model(case, tmp_path):
    _, _, params, config = case
    tokens = tokenizer.byte()
    params, config = models.tiny_model(0, vocab_size=259)
    hf.save(tmp_path / "base", params, config, tokens)
    adapter = random_adapter(config)
    peft.save(tmp_path / "adapter", adapter, ALL, base=str(tmp_path / "base"))
    opened = model_io.open_model(str(tmp_path / "adapter"))
    np.testing.assert_array_equal(logits(opened.params, config), logits(lora.merge(params, adapter, ALL), config))


BAD = {
    "use_dora": ({"use_dora": True}, "use_dora = True: is not supported; merge the adapter into its base with peft"),
    "rslora": ({"use_rslora": True}, "use_rslora = True: is not supported"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]: is not supported"),
    "bias": ({"bias": "all"}, "bias = 'all': is not supported"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': is not supported"),
    "type": ({"peft_type": "LOHA"}, "peft_type = 'LOHA': is not supported"),
    "rank": ({"r": 0}, "r = 0: must be a positive number"),
    "targets": ({"target_modules": ["embed_tokens"]}, r"target_modules = \['embed_tokens'\]: is not supported; valid: a list of q_proj"),
    "base": ({"base_model_name_or_path": None}, "base_model_name_or_path = None: must name the base model"),
    "other model": ({"target_modules": list(lora.MODULES[:4])}, "does not belong to the base model; give an adapter that was made for"),
    "other rank": ({"r": 2}, r"has shape \(3, 16\), but .* asks for \(2, 16\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_adapters_that_cannot_be_honoured_are_refused(name, tmp_path):
    changes, message = BAD[name]
    _, config = models.tiny_model(0)
    peft.save(tmp_path, random_adapter(config), ALL, base="owner/name")
    path = tmp_path / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        peft.load(tmp_path, config)


# ---- runs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        params, config = models.tiny_model(seed, vocab_size=259, num_hidden_layers=1)
        hf.save(base / name, params, config, tokenizer.byte())
    return base


def lora_config(folders, **changes):
    c = config_lib.default()
    c.student.path, c.teacher.path = str(folders / "student"), str(folders / "teacher")
    c.student.lora.rank, c.student.lora.alpha, c.learner.learning_rate = 4, 8.0, 1e-2
    c.task.level, c.rollout.batch_size, c.rollout.max_new_tokens, c.steps, c.learner.decay_steps = 3, 8, 6, 4, 4
    c.eval.prompts, c.log.samples_every, c.checkpoint.every = 0, 0, 2
    c.update_from_flattened_dict(changes)
    return c


@pytest.mark.slow
def test_a_run_trains_the_adapter_alone_and_resumes_bit_for_bit(folders, tmp_path):
    last = list(train.run(lora_config(folders), tmp_path / "whole"))[-1]
    list(train.run(lora_config(folders, steps=2), tmp_path / "parts"))
    assert list(train.run(lora_config(folders), tmp_path / "parts"))[-1]["cost/flops_total"] == last["cost/flops_total"]
    whole, parts = (model_io.open_base_and_adapter(tmp_path / name) for name in ("whole", "parts"))
    assert spec.content_hash(whole[1]) == spec.content_hash(parts[1])
    assert spec.content_hash(whole[0].params) == spec.content_hash(hf.load(folders / "student")[0])
    assert all(float(abs(pair["b"]).max()) > 0 for pair in whole[1]["layers"]["0"]["attention"].values())
    saved = (tmp_path / "whole" / "checkpoints" / "4" / "state" / "_METADATA").read_text()
    assert "attention" in saved and "embed" not in saved  # neither the base nor moments of it
    N, adapter = cost.active_parameters(whole[0].config), cost.size(whole[1])
    tokens = last["rollout/tokens_total"] + 4 * 8 * len("123=")
    assert last["cost/flops_total"] == tokens * (2 * (N + adapter) + 2 * N + 4 * (N + adapter) + 2 * adapter)


@pytest.mark.slow
def test_the_run_opens_merged_and_exports_both_ways(folders, tmp_path):
    list(train.run(lora_config(folders), tmp_path / "run"))
    base, adapter, config = model_io.open_base_and_adapter(tmp_path / "run")
    merged = model_io.open_model(str(tmp_path / "run"))
    np.testing.assert_array_equal(logits(merged.params, base.config), logits(lora.merge(base.params, adapter, config), base.config))
    for flag, out in (("--noadapter", "merged"), ("--adapter", "alone")):
        command = [sys.executable, "experiments/export_hf.py", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / out}", flag]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    np.testing.assert_array_equal(logits(hf.load(tmp_path / "merged")[0], base.config), logits(merged.params, base.config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders / "student")
    theirs = peft_library.PeftModel.from_pretrained(theirs, tmp_path / "alone").eval()
    tokens_BL, mask_BL = hf_oracle.left_padded(3, 9, 259)
    expected = hf_oracle.logits(theirs, tokens_BL, mask_BL)[mask_BL]
    assert np.abs(logits(merged.params, base.config) - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_adapter_and_all_weights_agree_where_they_must(folders, tmp_path):
    """The first step's loss and log-ratio are those of the base; the first gradient by B is A^T G, so another norm than G's."""
    lines = {}
    for rank in (0, 4):
        list(train.run(lora_config(folders, steps=1, **{"student.lora.rank": rank}), tmp_path / str(rank)))
        (lines[rank],) = metrics.read(tmp_path / str(rank) / "metrics.jsonl")
    for name in ("train/loss", "train/log_ratio_mean", "rollout/length"):
        assert lines[0][name] == lines[4][name]
    assert lines[0]["train/grad_norm"] != lines[4]["train/grad_norm"]


@pytest.mark.slow
def test_a_teacher_that_is_the_base_is_no_second_copy(folders, tmp_path):
    c = lora_config(folders, **{"teacher.path": str(folders / "student")})
    pair = open_pair(config_lib.parse(c), None, parallel.make_mesh())
    assert all(a is b for a, b in zip(jax.tree.leaves(pair.student.params), jax.tree.leaves(pair.teacher.params), strict=True))
    assert pair.teacher.lora is None
    (record, *_) = train.run(c, tmp_path / "run")
    assert abs(record["train/loss"]) < 1e-6 and abs(record["train/log_ratio_mean"]) < 1e-6


@pytest.mark.slow
def test_a_teacher_that_is_the_base_may_have_devices_of_its_own(folders, tmp_path):
    c = lora_config(folders, **{"teacher.path": str(folders / "student"), "mesh.teacher": 4, "mesh.data": 4})
    pair = open_pair(config_lib.parse(c), None, parallel.from_settings(config_lib.parse(c).mesh))
    devices = [{device for leaf in jax.tree.leaves(model.params) for device in leaf.devices()} for model in (pair.student, pair.teacher)]
    assert devices == [set(jax.devices()[:4]), set(jax.devices()[4:])]
    c.steps = 1
    assert abs(next(train.run(c, tmp_path / "run"))["train/loss"]) < 1e-6


@pytest.mark.slow
def test_a_frozen_base_lies_in_the_compute_type(folders):
    c = lora_config(folders, **{"model.compute_dtype": "bfloat16"})
    pair = open_pair(config_lib.parse(c), None, parallel.make_mesh())
    assert {leaf.dtype for leaf in jax.tree.leaves(pair.student.params)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_another_base_is_refused_on_resume(folders, tmp_path):
    base = tmp_path / "base"
    params, config = models.tiny_model(0, vocab_size=259, num_hidden_layers=1)
    hf.save(base, params, config, tokenizer.byte())
    list(train.run(lora_config(folders, **{"student.path": str(base), "steps": 2}), tmp_path / "run"))
    hf.save(base, models.tiny_model(5, vocab_size=259, num_hidden_layers=1)[0], config, tokenizer.byte())
    with pytest.raises(UserError, match="student.path = .*: its weights are not those this run began with"):
        list(train.run(lora_config(folders, **{"student.path": str(base)}), tmp_path / "run"))
    assert checkpoint.newest_step(tmp_path / "run" / "checkpoints") == 2


@pytest.mark.slow
def test_an_adapter_is_not_merged_into_another_base(folders, tmp_path):
    base = tmp_path / "base"
    params, config = models.tiny_model(0, vocab_size=259, num_hidden_layers=1)
    hf.save(base, params, config, tokenizer.byte())
    list(train.run(lora_config(folders, **{"student.path": str(base), "steps": 1}), tmp_path / "run"))
    model_io.open_model(str(tmp_path / "run"))
    hf.save(base, models.tiny_model(5, vocab_size=259, num_hidden_layers=1)[0], config, tokenizer.byte())
    with pytest.raises(
        UserError, match="base_model_name_or_path = .*: its weights are not those that the run began with; restore the base"
    ):
        model_io.open_model(str(tmp_path / "run"))
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="base_model_name_or_path = .*: cannot be opened .*; restore the base, or correct the path"):
        model_io.open_model(str(tmp_path / "run"))


@pytest.mark.slow
def test_a_base_of_16_bits_is_merged_in_32(folders, tmp_path):
    """In 16 bits most of a small update would be rounded away."""
    base = tmp_path / "base"
    params, config = models.tiny_model(0, vocab_size=259, num_hidden_layers=1)
    hf.save(base, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), config, tokenizer.byte())
    list(train.run(lora_config(folders, **{"student.path": str(base), "steps": 1, "model.compute_dtype": "bfloat16"}), tmp_path / "run"))
    opened, adapter, lora_settings = model_io.open_base_and_adapter(tmp_path / "run")
    assert {leaf.dtype for leaf in jax.tree.leaves(opened.params)} == {jnp.dtype("bfloat16")}
    expected = lora.merge(jax.tree.map(lambda x: x.astype(jnp.float32), opened.params), adapter, lora_settings)
    for a, b in zip(*map(jax.tree.leaves, (model_io.open_model(str(tmp_path / "run")).params, expected)), strict=True):
        assert a.dtype == jnp.float32 and (a == b).all()


@pytest.mark.slow
def test_experts_are_not_adapted_and_asking_for_them_is_refused(folders, tmp_path):
    moe = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    params, config = models.tiny_model(0, vocab_size=259, **moe)
    hf.save(tmp_path / "moe", params, config, tokenizer.byte())
    c = lora_config(folders, **{"student.path": str(tmp_path / "moe")})
    opened = open_pair(config_lib.parse(c), None, parallel.make_mesh()).student
    assert opened.lora.modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    c.student.lora.targets = "q_proj,up_proj"
    with pytest.raises(UserError, match="student.lora.targets = 'q_proj,up_proj': the student has no up_proj to adapt"):
        open_pair(config_lib.parse(c), None, parallel.make_mesh())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"student.lora.rank": -1}, "student.lora.rank = -1 must be 0 or more"),
        ({"student.lora.alpha": 0.0}, "student.lora.alpha = 0.0 must be above 0"),
        ({"student.path": ""}, "student.lora.rank = 4 needs weights to adapt"),
        ({"student.lora.targets": "q_proj,k"}, "student.lora.targets = 'k' is not known; valid: all, q_proj"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, folders):
    with pytest.raises(UserError, match=message):
        open_pair(config_lib.parse(lora_config(folders, **changes)), None, parallel.make_mesh())


@pytest.mark.slow
def test_microbatches_do_not_change_the_adapters_gradient():
    """The base is one argument of the update, not a constant of it, whatever the number of microbatches."""
    goal = make_objective()
    params, config, teacher, _, batch = make_case(goal)
    adapter = random_adapter(config)
    attach = lambda base, trained: lora.attach(base, trained, ALL)
    given = (goal, config, teachers.single(config), adapter, {"teacher": teacher}, batch)
    grads = [learner.gradient(*given, microbatches=m, attach=attach, base=params)[2] for m in (1, 4)]
    for one, four in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-6)


def test_scores_of_the_overlay_are_those_of_the_merge():
    params, config = models.tiny_model(0)
    adapter = random_adapter(config)
    rng = np.random.default_rng(0)
    prompts, rollout = models.ragged_prompts(rng), models.ragged_rollout(rng)
    one = score.logprobs(lora.attach(params, adapter, ALL), config, prompts, rollout)
    np.testing.assert_allclose(one, score.logprobs(lora.merge(params, adapter, ALL), config, prompts, rollout), rtol=1e-4, atol=1e-4)
