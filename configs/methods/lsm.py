"""Local support matching (Fu et al. 2026, arXiv 2603.25562): reverse KL between both laws renormalised on the teacher's top k.

    python experiments/train.py --config=configs/methods/lsm.py --workdir=runs/lsm

Axes: signal.support=topk_teacher, tail=renormalise (argument k=16), completions drawn from the nucleus (rollout.top_p=0.9), special tokens
left out of the loss (masking.special_tokens=drop; argument special=keep leaves them in, without which a student of this task never learns
to stop: its completions have a fixed length).

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too. NOT MEASURED.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, k=16, special=("drop", "keep"))
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.signal.divergence, c.signal.support, c.signal.tail = "reverse_kl", "topk_teacher", "renormalise"
    c.signal.k = arg.k
    c.rollout.top_p = 0.9
    c.masking.special_tokens = arg.special
    return c
