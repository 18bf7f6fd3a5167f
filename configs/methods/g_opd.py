"""Generalised on-policy distillation (Yang et al. 2026, G-OPD): reward log q / r of teacher and reference, scaled by lambda.

    python experiments/train.py --config=configs/methods/g_opd.py --workdir=runs/g_opd

Axes: extrapolation.scale=lambda (argument scale=0.5: between the reference and the teacher), the reference is the student as it was; the
advantage of a sampled token is lambda (log q - log r) - (log pi - log r), as published without a normaliser. scale=1 is plain distillation
and does not look at the reference; beyond 1 see ex_opd.py.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, scale=0.5)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.signal.divergence, c.signal.support = "reverse_kl", "sampled"
    c.extrapolation.scale, c.extrapolation.normalise = arg.scale, False
    return c
