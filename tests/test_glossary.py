"""The glossary has the names that runs emit, its page is up to date, and its formulas, by hand in NumPy, give the values of a run."""

import dataclasses
import itertools
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from opd_jax import config as config_lib
from opd_jax import glossary, job, train
from opd_jax.data import tasks, tokenizer
from opd_jax.glossary import GLOSSARY
from opd_jax.metrics import Progress
from opd_jax.models import hf, transformer

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_every_metric_that_the_code_writes_is_in_the_glossary():
    """Names are literals in the source; intervals add _low and _high. What runs emit is compared below."""
    found = set()
    for path in (ROOT / "opd_jax").rglob("*.py"):
        if "glossary" not in path.parts:
            found |= set(re.findall(r'"((?:train|rollout|eval|time|diag|cost|reward|context)/[a-z_]*[a-z])"', path.read_text()))
    assert len(found) > 20
    assert found <= set(GLOSSARY)


def test_the_accuracies_of_domains_have_the_entry_of_their_family():
    assert glossary.entry("eval/accuracy/algebra") == "eval/accuracy/TAG" and glossary.entry("eval/accuracy/a/b") == "eval/accuracy/TAG"
    assert glossary.entry("eval/sampled_accuracy/x") == "eval/sampled_accuracy/TAG"
    for name in ("eval/accuracy", "eval/accuracy_low", "eval/accuracy/", "eval/length/x", "train/loss"):
        assert glossary.entry(name) == name
    assert not glossary.depends_on_clock("eval/accuracy/memory") and glossary.depends_on_clock("time/step_seconds")


def test_each_entry_has_meaning_formula_and_unit_and_the_clock_is_in_the_name():
    for name, description in GLOSSARY.items():
        assert description.meaning and description.formula and description.unit, name
        assert not re.search(r"[{}]", description.formula), name  # a template that was not filled in
        assert (description.unit in ("s", "tokens/s")) == glossary.depends_on_clock(name), name


def test_the_page_in_docs_is_what_the_command_writes(tmp_path):
    command = [sys.executable, "experiments/glossary.py", f"--out={tmp_path / 'new' / 'metrics.md'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = (tmp_path / "new" / "metrics.md").read_text()
    assert text == (ROOT / "docs" / "metrics.md").read_text(), "run: python experiments/glossary.py"
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert {row.split("`")[1] for row in rows} >= set(GLOSSARY)
    assert len(rows) == len(GLOSSARY) + len(glossary.NOTATION)
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert columns == {3, 6}  # bars within cells are escaped


def tiny_config(**fields):
    c = config_lib.default()
    c.rollout.batch_size, c.rollout.max_new_tokens = 31, 3
    c.student.init.num_hidden_layers = 1
    c.student.init.hidden_size = c.student.init.intermediate_size = 32
    c.eval.prompts, c.eval.batch_size, c.eval.samples = 20, 32, 3
    c.learner.learning_rate, c.learner.schedule, c.steps = 1e-2, "constant", 1
    c.update_from_flattened_dict(fields)
    return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(student, teacher, task file, names emitted): a training's run directory, once cut back to an earlier checkpoint, once whole.

    The answer is x or, two times of five, yyy, which with its stop token exceeds max_new_tokens: some completions are
    accepted and some are not, some stop and some are cut off.
    """
    folder = tmp_path_factory.mktemp("models")
    lines = [{"prompt": f"{i}", "answer": answer} for i, answer in enumerate(random.Random(0).choices(["x", "yyy"], [3, 2], k=80))]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = {"task.name": "jsonl", "task.path": str(folder / "task.jsonl"), "task.eval_size": 20}
    c = tiny_config(steps=40, **task, **{"rollout.source": "dataset", "signal.divergence": "nll", "eval.prompts": 0})
    c.checkpoint.every, c.checkpoint.keep = 20, 9
    emitted = {name for record in train.run(c, folder / "teacher") for name in record}
    shutil.copytree(folder / "teacher", folder / "student")
    shutil.rmtree(folder / "student" / "checkpoints" / "40")
    return str(folder / "student"), str(folder / "teacher"), task, emitted


def opd_config(trained, **fields):
    return tiny_config(**{"student.path": trained[0], "teacher.path": trained[1]} | trained[2] | fields)


COMPARED = {"train/reverse_kl", "train/log_ratio_mean"}
WITH_TEACHER = {"eval/reverse_kl", "eval/forward_kl", "eval/reverse_kl_on_teacher"}
VERIFIED = {"rollout/reward", "eval/accuracy", "eval/pass_at_k", "eval/maj_at_k"}
RECOVERY = {"eval/recovery", "eval/recovery_low"}
DOMAINS = {"eval/accuracy/TAG", "eval/sampled_accuracy/TAG"}
ENDS = {"eval/reverse_kl_low", "eval/forward_kl_high"}
WATCHED = {"log.diagnostics": True}
LOOKED_AT = {"diag/log_ratio_p50", "diag/topk_overlap", "diag/teacher_entropy"}
OWN_DRAWS = {"diag/ess_token", "diag/ess_sequence"}
PARTS = {f"train/loss_{name}" for name in ("distillation", "extra", "reward", "labels", "reference", "entropy", "preference")}
EVERY_PART = {"reward.weight": 0.5, "rollout.group_size": 2, "loss.labels": 0.1, "regulariser.kl": 0.1, "regulariser.entropy": 0.01}
EVERY_PART |= {"gate.kind": "confidence", "extra_signal.gate.kind": "teacher_entropy_above"}
EVERY_PART |= {"extra_signal.weight": 0.1, "preference.weight": 0.1, "preference.judge": "reward"}
READ = {"context.privileged.reads": "feedback,solution,analysis", "context.privileged.layout": "compact"}
# case -> (fields, names that are there, names that are not)
CASES = {
    "student": (
        WATCHED | {"rollout.batch_size": 32, "rollout.max_new_tokens": 4, "learner.microbatches": 2},
        COMPARED | WITH_TEACHER | VERIFIED | ENDS | {"eval/teacher_sampled_accuracy"} | LOOKED_AT | OWN_DRAWS,
        RECOVERY | DOMAINS | PARTS | {"context/present"},
    ),
    "tagged": (
        {"rollout.source": "teacher", "eval.inject_error": True, "loss.balance": "tag"},
        RECOVERY | DOMAINS | VERIFIED | {"train/token_share/TAG"},
        set(),
    ),
    "teacher": (
        WATCHED | {"rollout.source": "teacher"},
        WITH_TEACHER | VERIFIED | LOOKED_AT,
        COMPARED | OWN_DRAWS | {"diag/gradient_noise"},
    ),
    "mix": (
        WATCHED | {"rollout.source": "mix"},
        COMPARED | VERIFIED | OWN_DRAWS | {"rollout/on_policy"},
        set(),
    ),
    "no_teacher": (
        WATCHED | {"teacher.path": "", "rollout.source": "dataset", "signal.divergence": "nll"},
        {"eval/accuracy", "diag/terminal_loops"},
        WITH_TEACHER | COMPARED | LOOKED_AT | OWN_DRAWS,
    ),
    "parts": (
        EVERY_PART | READ | {"rollout.batch_size": 16},
        PARTS | COMPARED | {"context/present", "context/written_length", "context/gold_gain/TAG", "reward/equal_groups"}
        | {"train/gate_distillation", "train/gate_extra"},
        set(),
    ),
    "members": (
        {"teacher.path": "", "teacher.combine": "geometric", "extrapolation.adaptive": True},
        COMPARED | {"teacher/disagreement", "extrapolation/scale", "extrapolation/gain"},
        PARTS,
    ),
    "turns": (
        {"task.name": "calculator", "task.path": "", "task.level": 2, "rollout.max_new_tokens": 16, "rollout.max_turns": 2},
        COMPARED | {"rollout/turns", "rollout/call_errors", "eval/turns", "eval/call_errors"},
        DOMAINS,
    ),
    "replay": (
        {"rollout.source": "dagger", "rollout.aggregate": True, "signal.divergence": "top1_cross_entropy", "signal.support": "full"},
        {"replay/age"},
        COMPARED,
    ),
    "unconditional": (
        {"task.name": "unconditional", "eval.prompts": 1},
        COMPARED | WITH_TEACHER,
        VERIFIED | ENDS | {"diag/terminal_loops"},
    ),
}


def tagged(c):
    """The task of a config, whose examples are of two domains."""
    task = tasks.from_config(config_lib.parse(c))
    split = lambda examples: tuple(dataclasses.replace(example, tag="xy"[example.id % 2]) for example in examples)
    return dataclasses.replace(task, train=split(task.train), held_out=split(task.held_out))


@pytest.mark.slow
def test_the_glossary_is_what_runs_emit(trained, tmp_path):
    """Both ways: nothing is emitted that has no entry, and no entry is never emitted."""
    params, config = models.tiny_model(vocab_size=259, num_hidden_layers=1, bos_token_id=256, eos_token_id=257)
    hf.save(tmp_path / "bos", params, config, tokenizer.Tokenizer(tokenizer.byte()._fast, eos_ids=[257], adds_bos=True))
    emitted = set(trained[3])
    assert not any("eval" in name for name in emitted)  # eval.prompts = 0
    for case, (fields, there, absent) in CASES.items():
        paths = (*[str(tmp_path / "bos")] * 2, {}) if case == "unconditional" else trained
        own = tagged(opd_config(paths)) if case == "tagged" else None
        c = opd_config(paths, **fields)
        if case == "members":
            c.teacher.members = {name: config_lib.member(path=trained[1]).to_dict() for name in "ab"}
        records = train.run(c, tmp_path / case, task=own)
        names = {glossary.entry(name) for record in records for name in record}
        assert names <= set(GLOSSARY), case
        assert there <= names and not absent & names, case
        emitted |= names
    assert not emitted ^ set(GLOSSARY)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def completion_logits(params, config, prompts, tokens_BT):
    """[B, T, V] logits before each completion token, from one pass over prompt and completion without a cache."""
    width = prompts.tokens_BS.shape[1]
    tokens_BL = jnp.concatenate([jnp.asarray(prompts.tokens_BS), tokens_BT], axis=1)
    mask_BL = jnp.concatenate([jnp.asarray(prompts.mask_BS), jnp.ones(tokens_BT.shape, bool)], axis=1)
    return transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)[:, width - 1 : -1]


def by_hand(params, config, teacher, prompts, tokens_BT, stop_ids):
    """The quantities of the glossary's notation: mask, M, B, K, H, log-ratio, and whether each completion stopped."""
    tokens = np.asarray(tokens_BT)
    stops = np.isin(tokens, stop_ids)
    m = np.cumsum(stops, axis=1) - stops == 0  # up to the first stop token, and it
    logp, logq = (log_softmax(completion_logits(p, c, prompts, tokens_BT)) for p, c in ((params, config), (teacher.params, teacher.config)))
    p, q, chosen = np.exp(logp), np.exp(logq), tokens[..., None]
    with np.errstate(invalid="ignore"):
        terms = {"K": p * (logp - logq), "F": q * (logq - logp), "H": -p * logp}
    values = {name: np.where(np.isnan(term), 0, term).sum(-1) for name, term in terms.items()}
    values["l"] = (np.take_along_axis(logq, chosen, -1) - np.take_along_axis(logp, chosen, -1))[..., 0]
    return values | {"m": m, "M": m.sum(), "B": len(tokens), "stopped": stops.any(1)}


@pytest.fixture(scope="module")
def update(trained, tmp_path_factory):
    """A run of one update, with an evaluation before it: (job before it, its parts of step 1, the records of the run)."""
    c = opd_config(trained, **{"learner.clip_norm": 0.01})
    folder = tmp_path_factory.mktemp("update")
    first = job.setup(config_lib.parse(c), folder / "parts", make_model=None, make_store=None, progress=Progress(quiet=True))
    with jax.set_mesh(first.mesh):
        prompts = first.pipeline.batch(0)
        completions = first.rollouts(first.state.params, first.scorer(first.state), prompts, 0)
    return first, prompts, completions, list(train.run(c, folder / "run"))


@pytest.mark.slow
def test_train_and_rollout_metrics_follow_their_formulas(update):
    first, prompts, completions, records = update
    student, record = first.student, records[1]
    x = by_hand(first.state.params, student.config, first.teacher, prompts.prompts, completions.tokens_BT, student.tokenizer.eos_ids)
    assert 0 < x["stopped"].mean() < 1 and x["M"] < x["m"].size  # ragged
    texts = [student.tokenizer.decode(t[m].tolist()) for t, m in zip(np.asarray(completions.tokens_BT), x["m"], strict=True)]
    rewards = [first.task.verify(example, text).reward for example, text in zip(prompts.examples, texts, strict=True)]
    assert 0 < np.mean(rewards) < 1
    expected = {
        "train/loss": (x["m"] * x["K"]).sum() / x["M"],  # D = K and w = m, Z = M: full reverse KL, token_mean
        "train/reverse_kl": (x["m"] * x["K"]).sum() / x["M"],
        "train/log_ratio_mean": (x["m"] * x["l"]).sum() / x["M"],
        "train/tokens": x["M"],
        "rollout/length": x["M"] / x["B"],
        "rollout/truncated_fraction": 1 - x["stopped"].mean(),
        "rollout/entropy": (x["m"] * x["H"]).sum() / x["M"],
        "rollout/reward": np.mean(rewards),
        "rollout/prompts_truncated": 0,
    }
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=2e-5), name


@pytest.mark.slow
def test_grad_norm_is_of_the_whole_gradient_before_clipping(update):
    first, prompts, completions, records = update

    def loss(params):
        logits = completion_logits(params, first.student.config, prompts.prompts, completions.tokens_BT)
        teacher = completion_logits(first.teacher.params, first.teacher.config, prompts.prompts, completions.tokens_BT)
        logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
        seen = jnp.isfinite(logq) & jnp.isfinite(logp)
        kl_BT = jnp.sum(jnp.where(seen, jnp.exp(logp) * jnp.where(seen, logp - logq, 0), 0), -1)
        return jnp.sum(jnp.where(completions.mask_BT, kl_BT, 0)) / completions.mask_BT.sum()

    leaves = jax.tree.leaves(jax.grad(loss)(first.state.params))
    expected = np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in leaves))
    assert expected > 10 * first.config.learner.clip_norm
    assert records[1]["train/grad_norm"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_eval_metrics_follow_their_formulas(update):
    """The completions are those of the evaluator, whose draws depend on the seed alone; the rest is by hand."""
    first, _, _, records = update
    evaluator, student, record = first.evaluate, first.student, records[0]
    values, rewards = {}, {}
    with jax.set_mesh(first.mesh):
        for purpose, params, config in (
            (0, first.state.params, student.config),
            (1, first.state.params, student.config),
            (2, *both(first)),
        ):
            batches = evaluator._sample(params, config, purpose)
            by_row = lambda batch: (batch[0][0], batch[1].tokens_BT)  # student and teacher read the same prompts
            parts = [
                by_hand(first.state.params, student.config, first.teacher, *by_row(batch), student.tokenizer.eos_ids) for batch in batches
            ]
            rows = [real for _, _, real in batches]
            values[purpose] = {
                key: np.concatenate([part[key][:real] for part, real in zip(parts, rows, strict=True)])
                for key in ("m", "K", "F", "H", "stopped")
            }
            rewards[purpose] = evaluator._rewards(batches)
    x, f, successes = values[1], values[2], (rewards[1] >= 1).sum(1)
    texts = [["".join(map(chr, row[row < 256])) for row in prompt] for prompt in sampled_tokens(evaluator, first)]
    most = [majority(answers, example.answer) for answers, example in zip(texts, evaluator.examples, strict=True)]
    P, s, z = 20, (rewards[0] >= 1).sum(), 1.959964
    spread = z * np.sqrt(s * (P - s) / P + z**2 / 4)
    expected = {
        "eval/prompts": P,
        "eval/accuracy": s / P,
        "eval/accuracy_low": (s + z**2 / 2 - spread) / (P + z**2),
        "eval/accuracy_high": (s + z**2 / 2 + spread) / (P + z**2),
        "eval/sampled_accuracy": rewards[1].mean(),
        "eval/pass_at_k": np.mean(successes >= 1),
        "eval/maj_at_k": np.mean(most),
        "eval/teacher_sampled_accuracy": rewards[2].mean(),
        "eval/reverse_kl_on_teacher": (f["m"] * f["K"]).sum() / f["m"].sum(),
        "eval/reverse_kl": (x["m"] * x["K"]).sum() / x["m"].sum(),
        "eval/forward_kl": (f["m"] * f["F"]).sum() / f["m"].sum(),
        "eval/entropy": (x["m"] * x["H"]).sum() / x["m"].sum(),
        "eval/length": x["m"].sum() / len(x["m"]),
        "eval/truncated_fraction": 1 - x["stopped"].mean(),
    }
    assert 0 < s < P and 0 < successes.sum() < 60 and x["stopped"].mean() not in (0, 0.5, 1)
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=2e-5), name


def sampled_tokens(evaluator, first):
    """[P, k, T] tokens of the student's samples."""
    with jax.set_mesh(first.mesh):
        batches = evaluator._sample(first.state.params, first.student.config, 1)
    rows = [np.where(np.asarray(r.mask_BT), np.asarray(r.tokens_BT), 258)[:real] for _, r, real in batches]
    return np.concatenate(rows).reshape(20, 3, -1)


def majority(answers, right):
    """Over the ways to put the votes in order: the first of the most frequent answers wins."""
    orders = [[a for a in order if a] for order in itertools.permutations(answers)]
    return np.mean([bool(order) and max(order, key=order.count) == right for order in orders])


def both(first):
    return first.teacher.params, first.teacher.config


@pytest.mark.slow
def test_running_sums_and_the_learning_rate_follow_their_formulas(trained, tmp_path):
    schedule = {"learner.schedule": "cosine", "learner.warmup_steps": 2, "learner.decay_steps": 10, "learner.final_fraction": 0.1}
    records = list(train.run(opd_config(trained, steps=5, **{"eval.prompts": 0}, **schedule), tmp_path / "run"))
    tokens = seconds = 0.0
    for n, record in enumerate(records, start=1):
        done = n - 1
        rate = done / 2 if done < 2 else 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (done - 2) / 8))
        tokens, seconds = tokens + record["train/tokens"], seconds + record["time/step_seconds"]
        assert record["step"] == n
        assert record["train/learning_rate"] == pytest.approx(1e-2 * rate, rel=1e-5)
        assert record["rollout/tokens_total"] == tokens == record["cost/generated_tokens_total"] == record["cost/scored_tokens_total"]
        assert record["time/total_seconds"] == pytest.approx(seconds)
        assert record["rollout/tokens_per_second"] == pytest.approx(record["train/tokens"] / record["time/step_seconds"])
