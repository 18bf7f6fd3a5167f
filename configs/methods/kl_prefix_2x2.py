"""Which divergence, on whose prefixes: reverse or forward KL on completions of the student or of the teacher.

    python experiments/train.py --config=configs/methods/kl_prefix_2x2.py --workdir=runs/kl_prefix_2x2

Axes: rollout.source and signal.divergence, independent of each other (arguments source and divergence). student and reverse_kl is on-policy
distillation, teacher and forward_kl what cross-entropy on the teacher's samples follows in expectation. As a sweep:
configs/sweeps/direction_source.py.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, source=("student", "teacher"), divergence=("reverse_kl", "forward_kl"))
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.rollout.source = arg.source
    c.signal.divergence = arg.divergence
    return c
