"""Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300) and its relatives: the verifier's reward, no teacher.

    python experiments/train.py --config=configs/methods/grpo.py --workdir=runs/grpo

Axes: signal.weight=0, reward.weight=1, 8 completions of a prompt. Argument variant: grpo (divided by the group's deviation, mean within
each completion), dr_grpo (Liu et al. 2025: centred, constant divisor), rloo (Ahmadian et al. 2024: the mean of the others), dapo (Yu et
al. 2025: token mean, upper bound 0.28, prompts without a difference left out, cut-off completions masked; prompts are not drawn again in
their place). Each batch is used once, so that the clipping is there and never active; kl=W adds W times the reverse KL to the student as
it was, exact over the vocabulary. (GRPO differentiates k3 as a loss, which follows the forward KL:
--config.regulariser.divergence=forward_kl; the other three have no such term.)

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, variant=("grpo", "dr_grpo", "rloo", "dapo"), kl=0.0)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.teacher.recipe = ""
    c.signal.weight, c.reward.weight = 0.0, 1.0
    c.rollout.group_size = 8
    c.reward.advantage = {"grpo": "grpo", "dr_grpo": "centred", "rloo": "rloo", "dapo": "grpo"}[arg.variant]
    c.loss.normaliser = {"grpo": "sequence_mean", "dr_grpo": "constant", "rloo": "sequence_sum", "dapo": "token_mean"}[arg.variant]
    c.reward.clip_low = c.reward.clip_high = 0.2
    if arg.variant == "dapo":
        c.reward.clip_high = 0.28
        c.reward.filter_groups = c.reward.mask_overlong = True
    c.regulariser.kl = arg.kl
    return c
