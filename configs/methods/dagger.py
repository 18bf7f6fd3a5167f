"""DAgger (Ross, Gordon and Bagnell 2011, arXiv 1011.0686): the teacher labels what both wrote, and all of it so far is learnt from.

    python experiments/train.py --config=configs/methods/dagger.py --workdir=runs/dagger

Axes: rollout.source=dagger, the teacher writes a token with probability beta_i = p^(i - 1) in round i (argument p=0: it writes the first
round alone; a round is round=10 updates); rollout.aggregate=true, each update learns from a batch drawn uniformly from all completions so
far, whose labels the teacher gave when they were written. Argument labels: hard, the teacher's most probable token (the expert's action,
signal.divergence=top1_cross_entropy), or soft, its top k=16 with one entry for the rest, forward KL.
Differs in that it goes on from its parameters where the paper fits anew each round, and returns the last iterate, not the best one.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, labels=("hard", "soft"), p=0.0, round=10, k=16)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.rollout.source, c.rollout.aggregate = "dagger", True
    c.rollout.beta, c.rollout.beta_decay, c.rollout.round = 1.0, arg.p, arg.round
    c.signal.divergence = "top1_cross_entropy"
    if arg.labels == "soft":
        c.signal.divergence, c.signal.support, c.signal.tail, c.signal.k = "forward_kl", "topk_teacher", "bucket", arg.k
    return c
