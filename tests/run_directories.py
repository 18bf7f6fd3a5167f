"""Run directories as the trainer writes them, with values that the tests choose."""

import json

from opd_jax import config as config_lib
from opd_jax.config import Config

SESSION = {
    "from_step": 0,
    "opd_jax": "0.1.0",
    "python": "3.11.9",
    "libraries": {"jax": "0.10.2", "numpy": "2.3.0"},
    "system": "Linux x86_64",
    "cpu": "A Processor",
    "cpu_count": 2,
    "platform": "cpu",
    "device_kind": "cpu",
    "devices": 1,
    "processes": 1,
    "to_step": 3,
    "peak_host_bytes": 3 * 2**29,
}


def evaluation(accuracy, kl):
    values = {"eval/accuracy": accuracy, "eval/sampled_accuracy": accuracy / 2, "eval/reverse_kl": kl, "eval/forward_kl": kl / 3}
    ends = {f"{name}_{end}": value + shift for name, value in values.items() for end, shift in (("low", -0.01), ("high", 0.01))}
    return values | ends | {"eval/entropy": 0.5, "eval/prompts": 256, "time/eval_seconds": 1.5}


def annotated(tokens, ratios, *, step=1, prompt="12=", special=(), top=()):
    """A line of samples.jsonl: the student gives every token probability 1/4, the teacher exp(ratio) times that."""
    logp = -1.3862944
    line = {"step": step, "prompt": prompt, "completion": "".join(t for i, t in enumerate(tokens) if i not in special)}
    line |= {"token_ids": list(range(len(tokens))), "tokens": list(tokens), "special": list(special)}
    line |= {"student_logp": [logp] * len(tokens), "student_entropy": [1.25] * len(tokens)}
    if ratios is not None:
        tops = [[[text, p] for text, p in top] or [[token, 0.5], ["x", 0.25], ["y", 0.1], ["z", 0.05], ["<eos>", 0.01]] for token in tokens]
        line |= {"teacher_logp": [logp + r for r in ratios], "teacher_entropy": [0.75] * len(tokens), "teacher_top": tops}
    return line


def make(path, *, accuracy=0.9, seed=0, completion="123", steps=3, before=0.3, loss=1.0, samples=None, session=SESSION, **fields):
    """A finished run of three updates; `fields` are config fields, dots written as two underscores."""
    path.mkdir(parents=True)
    config = config_lib.dataclasses.asdict(Config(seed=seed, steps=steps))
    config["task"]["train_size"] = 48
    for name, value in fields.items():
        *blocks, last = name.split("__")
        block = config
        for one in blocks:
            block = block[one]
        block[last] = value
    (path / "config.json").write_text(json.dumps(config))
    records = [{"step": 0, **evaluation(before, 1.2)}]
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "train/loss": loss / step,
            "train/reverse_kl": loss / step,
            "rollout/tokens_total": 500 * step,
            "time/total_seconds": 2.0 * step,
        }
        records.append(record | (evaluation(accuracy, 0.1) | {"eval/teacher_sampled_accuracy": 0.98} if step == steps else {}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if samples is None:
        samples = [{"step": s, "prompt": "p<b>", "completion": completion, "token_ids": [1]} for s in (1, 3)]
    (path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    if session:
        (path / "environment.json").write_text(json.dumps({"sessions": [session]}))
    return path
