"""Several teachers at once: every completion is compared with a mixture of all of them, whatever its domain.

    python experiments/train.py --config=configs/methods/pooled.py --workdir=runs/pooled

Axes: teacher.members with teacher.combine. Argument variant: geometric (reverse KL: what sum_m w_m KL(pi || q_m) follows, as in
DeepSeek-V4), arithmetic (forward KL: what sum_m w_m KL(q_m || pi) follows), confidence (geometric, members weigh exp(-H / temperature=1.0)
at each token: the confidence softmax of MAD-OPD, arXiv 2605.01347, without its debate). Weights are equal otherwise.

Experts and student are those of configs/experts.py, whose arguments (skills, level, prompts, seed, and tiny: a run of seconds) it takes
too. Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, variant=("geometric", "arithmetic", "confidence"), temperature=1.0)
    c = config.load_config(f"configs/experts.py:{rest}")
    c.teacher.combine = "arithmetic" if arg.variant == "arithmetic" else "geometric"
    c.teacher.confidence = arg.temperature if arg.variant == "confidence" else 0.0
    c.signal.divergence, c.signal.support = "forward_kl" if arg.variant == "arithmetic" else "reverse_kl", "full"
    return c
