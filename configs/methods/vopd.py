"""Distillation with a control variate (vOPD, arXiv 2605.07865): the sampled log-ratio less its mean, A_t = l_t + K_t.

    python experiments/train.py --config=configs/methods/vopd.py --workdir=runs/vopd

Axes: signal.support=sampled, estimator.baseline=kl. The baseline keeps the expected gradient; whether it lowers the variance depends on the
pair (README, Which one, when).

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    c = config.load_config(f"configs/quickstart.py:{arg or ''}")
    c.signal.divergence, c.signal.support = "reverse_kl", "sampled"
    c.estimator.baseline = "kl"
    return c
