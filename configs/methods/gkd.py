"""Generalised knowledge distillation (Agarwal et al. 2024, arXiv 2306.13649): a divergence on the student's own completions or the data's.

    python experiments/train.py --config=configs/methods/gkd.py --workdir=runs/gkd

Axes: rollout.source=mix, a step is on-policy with probability rollout.student_fraction (the paper's lambda, argument on_policy=0.5); any
divergence (argument divergence=jsd, beta=0.5; the paper tries forward and reverse KL and JSD at 0.1, 0.5, 0.9), exact over the vocabulary,
mean over each completion first (loss.normaliser=sequence_mean, eq. 2). No gradient flows through sampling. The combination with rewards
(eq. 5) is reward.weight with on_policy=1.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, on_policy=0.5, divergence=("jsd", "forward_kl", "reverse_kl"), beta=0.5)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.rollout.source, c.rollout.student_fraction = "mix", arg.on_policy
    c.signal.divergence, c.signal.beta = arg.divergence, arg.beta
    c.loss.normaliser = "sequence_mean"
    return c
