"""Knowledge distillation on fixed data (Hinton et al. 2015, arXiv 1503.02531): soft labels of the teacher beside the hard ones.

    python experiments/train.py --config=configs/methods/supervised_kd.py --workdir=runs/supervised_kd

Axes: rollout.source=dataset, forward KL at temperature tau of both laws with weight (1 - hard) tau^2, so that its gradient keeps its size
whatever tau is, and cross-entropy with weight hard. Arguments: tau=2, hard=0.5. With hard=0 and tau=1 it is the supervised
baseline of GKD, but for the normaliser (sequence_mean there).
Differs from token-level distillation on the teacher's samples in who wrote the completions alone.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, tau=2.0, hard=0.5)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.rollout.source = "dataset"
    c.signal.divergence = "forward_kl"
    c.loss.student_temperature = c.loss.teacher_temperature = arg.tau
    c.signal.weight, c.loss.labels = (1 - arg.hard) * arg.tau**2, arg.hard
    return c
