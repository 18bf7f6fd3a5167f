"""Extrapolated on-policy distillation (Yang et al. 2026, ExOPD): G-OPD with lambda above 1, beyond the teacher.

    python experiments/train.py --config=configs/methods/ex_opd.py --workdir=runs/ex_opd

Axes: extrapolation.scale=1.25 (argument scale; the authors fix 1.25 and find 1.5 unstable), the reference is the student as it was. The
paper's reward correction takes the teacher before its own RL as the reference: --config.reference.path=DIR. Argument full: the exact
divergence to the normalised target in place of the sampled log-ratio.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, scale=1.25, full=False)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.signal.divergence, c.signal.support = "reverse_kl", "full" if arg.full else "sampled"
    c.extrapolation.scale, c.extrapolation.normalise = arg.scale, arg.full
    return c
