"""Distillation and the verifier's rewards in one loss: added, in a convex sum, or each on the rollouts that it suits.

    python experiments/train.py --config=configs/methods/rl_opd.py --workdir=runs/rl_opd

Axes: signal.weight, reward.weight, reward.only, masking.solved; 8 completions of a prompt. Argument variant:
    add     distillation + share x reward (MOPD, arXiv 2601.02780: A_KD + alpha A_ORM; Thinking Machines with a reward)
    convex  (1 - share) x distillation + share x reward (GKD, Agarwal et al. 2024, eq. 5)
    route   rollouts that succeed have the reward's term alone, the others are distilled (SRPO; its weight exp(-H) of the teacher's entropy
            is --config.gate.kind=confidence, up to its normalisation, its teacher that reads a sibling --config.context.privileged.reads)
    kdrl    reward + share x k2 of the sampled log-ratio (KDRL): signal.support=sampled, whose gradient is that of k2 on every sample; the
            published share falls from step to step, here it is a constant
share=0.5 is the default. The reward's advantage is rloo, which is unbiased.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, variant=("add", "convex", "route", "kdrl"), share=0.5)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.rollout.group_size = 8
    c.reward.advantage = "rloo"
    c.signal.weight, c.reward.weight = {
        "add": (1.0, arg.share),
        "convex": (1 - arg.share, arg.share),
        "route": (1.0, 1.0),
        "kdrl": (arg.share, 1.0),
    }[arg.variant]
    if arg.variant == "route":
        c.reward.only, c.masking.solved = "solved", "drop"
    if arg.variant == "kdrl":
        c.signal.support = "sampled"
    return c
