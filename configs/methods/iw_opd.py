"""Importance-decayed distillation (IW-OPD): tokens weigh 1 + gain at the beginning of a completion, and 1 once its log-ratios are used up.

    python experiments/train.py --config=configs/methods/iw_opd.py --workdir=runs/iw_opd

Axes: gate.kind=importance_decay (argument gain=0.5), w_t = 1 + gain (1 - sum_{i<t} |l_i| / sum |l|), on the sampled log-ratio.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, gain=0.5)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.signal.divergence, c.signal.support = "reverse_kl", "sampled"
    c.gate.kind, c.gate.gain = "importance_decay", arg.gain
    return c
