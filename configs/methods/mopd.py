"""Multi-teacher on-policy distillation (MiMo-V2-Flash, arXiv 2601.02780; Nemotron-Cascade 2): each prompt by the expert of its domain.

    python experiments/train.py --config=configs/methods/mopd.py --workdir=runs/mopd

Axes: teacher.members with combine=route (by the example's tag), sampled log-ratios, mean within each completion, estimator.importance=drop
with clip=2.0: tokens whose ratio to the law that wrote them lies outside [0.5, 2] are left out (Nemotron-Cascade 2's bounds; each batch is
used once, at temperature 1, so that the gate is there and every ratio is 1 but for rounding). reward=W adds W times the verifier's
advantages within groups of 4 (the outcome term alpha; it has no such gate).

scale=1.25 goes beyond each expert, away from the student as it was (ExOPD with several teachers). keep=shift adds a skill that has no
expert: there the student as it was is the teacher, so that it does not forget.

Experts and student are those of configs/experts.py, whose arguments (skills, level, prompts, seed, and tiny: a run of seconds) it takes
too. Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, reward=0.0, scale=1.0, skills="reverse+sort", keep="")
    skills = f"{arg.skills}+{arg.keep}" if arg.keep else arg.skills
    c = config.load_config(f"configs/experts.py:skills={skills},{rest}")
    if arg.keep:
        c.teacher.members[arg.keep] = config.member(path="student_init")
    c.signal.divergence, c.signal.support = "reverse_kl", "sampled"
    c.loss.normaliser = "sequence_mean"
    c.estimator.importance, c.estimator.clip = "drop", 2.0
    c.extrapolation.scale, c.extrapolation.normalise = arg.scale, arg.scale == 1
    if arg.reward:
        c.reward.weight, c.reward.advantage, c.rollout.group_size = arg.reward, "grpo", 4
    return c
