"""On-policy distillation, SeqKD and SFT on a fixed set of 48 prompts and on unlimited fresh ones, over 5 seeds.

python experiments/sweep.py --config=configs/sweeps/quickstart_regimes.py --workdir=runs/quickstart_regimes
"""

from opd_jax import config, sweeps


def get_config(arg=None):
    return config.load_config(f"configs/quickstart.py:{arg or ''}")


def get_sweep(arg=None):
    tiny = "tiny" in (arg or "").split(",")
    points = sweeps.product(sweeps.over(":prompts", 48, 0), sweeps.over(":role", "opd", "seqkd", "sft"))
    metrics = ("eval/accuracy", "eval/sampled_accuracy", "eval/reverse_kl", "eval/forward_kl")
    return sweeps.Sweep(points[:2] if tiny else points, seeds=2 if tiny else 5, metrics=metrics)
