"""Adaptive extrapolation (OUR READING of a short description of REOPD, arXiv 2608.11698): ExOPD whose lambda each token has for itself.

    python experiments/train.py --config=configs/methods/reopd.py --workdir=runs/reopd

Axes: extrapolation.adaptive=True, the reference is the student as it was. lambda_t = 1 + gamma q_t: q_t is near 1 where student and teacher
agree on the drawn token (tau=0.007), gamma follows a budget that the first 10 updates measure, up to gain=1.0. What the description leaves
open, and how it is read here, is in opd_jax/numerics/extrapolation.py. gain=0.0 is plain distillation. Argument full: the exact divergence
to the normalised target in place of the sampled log-ratio.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, tau=0.007, gain=1.0, full=False)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.signal.divergence, c.signal.support = "reverse_kl", "full" if arg.full else "sampled"
    c.extrapolation.adaptive, c.extrapolation.normalise = True, arg.full
    c.extrapolation.tau, c.extrapolation.max_gain = arg.tau, arg.gain
    return c
