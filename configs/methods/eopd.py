"""Entropy-aware distillation (EOPD): reverse KL everywhere, and forward KL where the teacher's entropy is above a threshold.

    python experiments/train.py --config=configs/methods/eopd.py --workdir=runs/eopd

Axes: extra_signal.divergence=forward_kl with weight 1 and the gate teacher_entropy_above (argument threshold=0.8 nats).

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, threshold=0.8)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.signal.divergence = "reverse_kl"
    c.extra_signal.weight, c.extra_signal.divergence = 1.0, "forward_kl"
    c.extra_signal.gate.kind, c.extra_signal.gate.threshold = "teacher_entropy_above", arg.threshold
    return c
