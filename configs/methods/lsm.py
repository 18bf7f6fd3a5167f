"""Local support matching (Fu et al. 2026, arXiv 2603.25562): reverse KL between both laws renormalised on the teacher's top k.

    python experiments/train.py --config=configs/methods/lsm.py --workdir=runs/lsm

Axes: signal.support=topk_teacher, tail=renormalise (argument k=16; the paper: 32), completions drawn from the nucleus (rollout.top_p=0.9),
special tokens left out of the loss (masking.special_tokens=drop; argument special=keep leaves them in, without which a student of this task
never learns to stop: its completions have a fixed length). Argument variant, of the paper's appendix G.3:
    v1  the teacher's top k renormalised: LSM itself
    v2  the student's top k and the drawn token, renormalised         v3  the teacher's top k and the drawn token, renormalised
    v4  sum of p log(p/q) on the student's top k, and the drawn token outside it (EMA-PG)      v5  the same on the teacher's top k
The gradient of v4 and v5, as published, is off by that of the mass on the support, which the run's claim says.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, k=16, special=("drop", "keep"), variant=("v1", "v2", "v3", "v4", "v5"))
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.signal.divergence, c.signal.k = "reverse_kl", arg.k
    c.signal.support, c.signal.tail = {
        "v1": ("topk_teacher", "renormalise"),
        "v2": ("topk_student+token", "renormalise"),
        "v3": ("topk_teacher+token", "renormalise"),
        "v4": ("topk_student", "sampled_tail_published"),
        "v5": ("topk_teacher", "sampled_tail_published"),
    }[arg.variant]
    c.rollout.top_p = 0.9
    c.masking.special_tokens = arg.special
    return c
