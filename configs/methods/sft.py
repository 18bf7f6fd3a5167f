"""Supervised fine-tuning: cross-entropy of the data set's solutions, no teacher.

    python experiments/train.py --config=configs/methods/sft.py --workdir=runs/sft

Axes: rollout.source=dataset, signal.divergence=nll. Baseline of every method here.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    c = config.load_config(f"configs/quickstart.py:{arg or ''}")
    c.rollout.source = "dataset"
    c.signal.divergence = "nll"
    c.teacher.recipe = ""
    return c
