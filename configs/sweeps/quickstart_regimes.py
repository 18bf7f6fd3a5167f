"""On-policy distillation, SeqKD and SFT on a fixed set of 48 prompts and on unlimited fresh ones, over 5 seeds.

python experiments/sweep.py --config=configs/sweeps/quickstart_regimes.py --workdir=runs/quickstart_regimes

A seed draws the training and the evaluation prompts, the student that all six runs of the seed start from, and all samples; the teacher is
one for all seeds. The runs of a seed are paired.

30 runs of 100 updates, after 5 students and a teacher: 20 to 100 s each, start-up included, on 2 CPU cores that had other work too. With
48 prompts on-policy, SeqKD and SFT end at a greedy accuracy of 0.78, 0.63 and 0.53, in this order in each seed; with unlimited prompts at
0.96, 1.00 and 1.00, within their noise. Intervals and reverse KLs are in the README. Arguments are those of configs/quickstart.py; tiny is
a sweep of 2 points and 2 seeds.
"""

from opd_jax import config, sweeps


def get_config(arg=None):
    return config.load_config(f"configs/quickstart.py:{arg or ''}")


def get_sweep(arg=None):
    tiny = "tiny" in (arg or "").split(",")
    points = sweeps.product(sweeps.over(":prompts", 48, 0), sweeps.over(":role", "opd", "seqkd", "sft"))
    metrics = ("eval/accuracy", "eval/sampled_accuracy", "eval/reverse_kl", "eval/forward_kl")
    return sweeps.Sweep(points[:2] if tiny else points, seeds=2 if tiny else 5, metrics=metrics)
