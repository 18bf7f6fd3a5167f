"""Self-distillation fine-tuning (Shenfeld et al. 2026, SDFT, arXiv 2601.19897): the teacher is the student that reads a demonstration.

    python experiments/train.py --config=configs/methods/sdft.py --workdir=runs/sdft

Axes: teacher.path=student_init, update=ema (rate 0.01), context.privileged.reads=demonstration, mean within each completion. Argument kl:
forward_kl as the official code has it by default, or reverse_kl as the paper writes it. skip=N leaves the first N tokens of a completion
out (the code has 0, some of its runs 3: too many of 6 here). importance: weights by the ratio to the law that sampled, cut off at 2 token
by token; the code averages them over a completion, which is not here.

In the setting of configs/base.py, whose arguments (skill, head_start, prompts, seed, level, width, tiny) it takes too. Figures:
docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, kl=("forward_kl", "reverse_kl"), rate=0.01, skip=0, importance=False)
    c = config.load_config(f"configs/base.py:{rest}")
    c.context.privileged.reads = "demonstration"
    c.teacher.update, c.teacher.rate = "ema", arg.rate
    c.signal.divergence = arg.kl
    c.loss.normaliser = "sequence_mean"
    c.masking.skip_first = arg.skip
    if arg.importance:
        c.estimator.importance, c.estimator.clip = "clip", 2.0
    return c
