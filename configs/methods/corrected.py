"""Corrected student responses: the student writes, the teacher goes on from a cut, cross-entropy of the teacher's tokens.

    python experiments/train.py --config=configs/methods/corrected.py --workdir=runs/corrected

Axes: rollout.source=corrected; argument cut: random (uniform over the student's tokens) or worst (before the token that the teacher finds
least likely beside the student); argument signal: nll (default), or forward_kl or reverse_kl to the teacher on the same tokens, exact over
the vocabulary. The student's tokens before the cut are read and have no loss.

The teacher takes over on states of the student as the expert does in DAgger (Ross, Gordon and Bagnell 2011), but only once and to the end,
and nothing is kept; speculative knowledge distillation (SKD) replaces single tokens. No paper's procedure is copied.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, cut=("random", "worst"), signal=("nll", "forward_kl", "reverse_kl"))
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.rollout.source, c.rollout.cut = "corrected", arg.cut
    c.signal.divergence = arg.signal
    return c
