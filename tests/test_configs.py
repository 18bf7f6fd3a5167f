"""Every config parses; the quickstart and prune_distill run from end to end through their scripts, as the README says."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from opd_jax import config as config_lib
from opd_jax import metrics, rollout, train
from opd_jax.data import tokenizer
from opd_jax.models import hf
from opd_jax.types import Prompts

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(name, *flags, cwd=ROOT):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "experiments" / name), *flags]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_says_its_command(path):
    module = load(path)
    for arg in (None, "tiny", "seed=3"):
        config = module.get_config(arg)
        config.teacher.path = config.teacher.path or "given on the command line"
        parsed = config_lib.parse(config)
        assert parsed.seed == (3 if arg == "seed=3" else 0)
    command = re.search(r"python experiments/\w+\.py --config=(\S+)", module.__doc__)
    assert command and (ROOT / command[1]).resolve() == path


def test_the_quickstart_gives_all_three_equal_updates_and_tokens():
    module = load(ROOT / "configs" / "quickstart.py")
    configs = [config_lib.flatten(config_lib.parse(module.get_config(role))) for role in ("opd", "seqkd", "sft")]
    differing = {name for name in configs[0] if len({str(c[name]) for c in configs}) > 1}
    assert differing == {"rollout.source", "signal.divergence"}
    assert configs[0]["task.train_size"] == 48


def test_gsm8k_names_models_of_one_family():
    module = load(ROOT / "configs" / "gsm8k_qwen.py")
    for family, thinking in (("qwen2.5", ""), ("qwen3", "off")):
        parsed = config_lib.parse(module.get_config(family))
        assert parsed.student.path.lower().startswith(f"qwen/{family}") and parsed.teacher.path.lower().startswith(f"qwen/{family}")
        assert (parsed.context.student.template, parsed.context.student.thinking) == ("chat", thinking)
        assert parsed.task.name == "gsm8k" and parsed.task.path == ""
    with pytest.raises(config_lib.ConfigError, match="is the recipe of tiny"):
        module.get_config("teacher")


def check_gsm8k_tiny(workdir, cache, model_type):
    records = metrics.read(workdir / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert records[0]["eval/prompts"] == 8 and records[0]["eval/reverse_kl"] > 0 and 0 <= records[-1]["eval/accuracy"] <= 1
    assert json.loads((workdir / "model" / "config.json").read_text())["model_type"] == model_type
    assert len(list((cache / "gsm8k").iterdir())) == 1
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert samples and all("####" in sample["prompt"] for sample in samples)


@pytest.mark.slow
def test_gsm8k_tiny_from_end_to_end(tmp_path):
    """Offline: the real architecture, a chat template, the prepared data and the verifier."""
    flags = ["--config=configs/gsm8k_qwen.py:tiny", f"--workdir={tmp_path / 'run'}", f"--config.cache_dir={tmp_path / 'cache'}"]
    script("train.py", *flags)
    check_gsm8k_tiny(tmp_path / "run", tmp_path / "cache", "qwen2")


@pytest.mark.slow
def test_gsm8k_tiny_of_the_other_family_in_this_process(tmp_path):
    config = load(ROOT / "configs" / "gsm8k_qwen.py").get_config("qwen3,tiny")
    config.cache_dir = str(tmp_path / "cache")
    assert len(list(train.run(config, tmp_path / "run"))) == 4
    check_gsm8k_tiny(tmp_path / "run", tmp_path / "cache", "qwen3")


@pytest.mark.slow
def test_quickstart_from_end_to_end(tmp_path):
    workdirs, cache = [], f"--config.cache_dir={tmp_path / 'cache'}"
    for role in ("opd", "seqkd", "sft"):
        workdirs.append(tmp_path / role)
        out = script("train.py", f"--config=configs/quickstart.py:{role},tiny", f"--workdir={workdirs[-1]}", cache)
        assert ("making configs/quickstart.py:teacher,tiny" in out) == (role == "opd")  # made on first use
        assert (workdirs[-1] / "report.html").exists()
    out = script("report.py", f"--workdir={','.join(map(str, workdirs))}", f"--out={tmp_path / 'all.html'}")
    assert [line.split()[0] for line in out.splitlines()[2:7]] == ["before", "opd", "seqkd", "sft", "teacher"]
    page = (tmp_path / "all.html").read_text()
    assert "eval/reverse_kl" in page and "train/reverse_kl" in page
    steps = [[record["step"] for record in metrics.read(workdir / "metrics.jsonl")] for workdir in workdirs]
    assert steps == [[0, 1, 2, 3, 4]] * 3
    again = script("train.py", "--config=configs/quickstart.py:opd,tiny", f"--workdir={workdirs[0]}", cache)
    assert "is finished; nothing to do" in again
    values = evaluate(tmp_path, workdirs[0])
    last = metrics.read(workdirs[0] / "metrics.jsonl")[-1]
    assert values["eval/reverse_kl"] == pytest.approx(last["eval/reverse_kl"], rel=1e-4)


def evaluate(tmp_path, workdir):
    script(
        "evaluate.py",
        "--config=configs/quickstart.py:opd,tiny",
        f"--workdir={workdir}",
        f"--config.cache_dir={tmp_path / 'cache'}",
        f"--out={tmp_path / 'values.json'}",
    )
    return json.loads((tmp_path / "values.json").read_text())


def greedy_here(folder, prompt_ids, count):
    """A greedy continuation by our sampler."""
    params, config = hf.load(folder)
    prompts = Prompts(jnp.array([prompt_ids]), jnp.ones((1, len(prompt_ids)), bool), jnp.zeros(1, jnp.uint32))
    found = rollout.sample(params, config, prompts, key=jax.random.key(0), max_new_tokens=count, temperature=0.0)
    return np.asarray(found.tokens_BT[0]).tolist()


def greedy_in_transformers(folder, prompt_ids, count):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt_ids])
    settings = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt_ids) :].tolist()


@pytest.mark.slow
def test_prune_distill_and_export_from_end_to_end(tmp_path):
    params, config = models.tiny_model(vocab_size=259, num_hidden_layers=3, bos_token_id=256, eos_token_id=257)
    source = tokenizer.Tokenizer(tokenizer.byte()._fast, eos_ids=[257], adds_bos=True)
    hf.save(tmp_path / "teacher", params, config, source)
    script("prune.py", f"--teacher={tmp_path / 'teacher'}", "--keep=0,2", f"--out={tmp_path / 'pruned'}")
    flags = [f"--config.student.path={tmp_path / 'pruned'}", f"--config.teacher.path={tmp_path / 'teacher'}"]
    script("train.py", f"--config={ROOT}/configs/prune_distill.py:tiny", f"--workdir={tmp_path / 'run'}", *flags, cwd=tmp_path)
    records = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["eval/reverse_kl"] > 0 and records[-1]["eval/forward_kl"] > 0
    script("export_hf.py", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'export'}")
    prompt_ids = [256, 72, 105]
    ours = greedy_here(tmp_path / "export", prompt_ids, 24)
    assert ours == greedy_in_transformers(tmp_path / "export", prompt_ids, 24)
    assert len(set(ours)) > 1


@pytest.mark.shared
@pytest.mark.slow
def test_pruning_the_real_model_and_healing_it(shared_data, tmp_path):
    """40 of the 475 updates of configs/prune_distill.py: the whole run is a command in the README."""
    teacher = shared_data / "models" / "stories260K"
    script("prune.py", f"--teacher={teacher}", "--keep=0,1,3,4", f"--out={tmp_path / 'pruned'}")
    flags = [f"--config.student.path={tmp_path / 'pruned'}", f"--config.teacher.path={teacher}", "--config.steps=40"]
    flags += ["--config.learner.decay_steps=475", "--config.eval.prompts=32"]
    script("train.py", "--config=configs/prune_distill.py", f"--workdir={tmp_path / 'run'}", *flags)
    records = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert 1.2 < records[0]["eval/reverse_kl"] < 1.5
    assert records[-1]["eval/reverse_kl"] < 0.45 and records[-1]["eval/forward_kl"] < 0.45
    script("export_hf.py", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'export'}")
    for folder in (teacher, tmp_path / "export"):
        prompt_ids = tokenizer.load(str(folder)).encode_prompt("Once upon a time")
        assert greedy_here(folder, prompt_ids, 100) == greedy_in_transformers(folder, prompt_ids, 100)
