"""Sequence-level knowledge distillation (Kim and Rush 2016, arXiv 1606.07947): cross-entropy of completions that the teacher writes.

    python experiments/train.py --config=configs/methods/seq_kd.py --workdir=runs/seq_kd

Axes: rollout.source=teacher, signal.divergence=nll. The paper takes the mode by beam search and one completion per source, kept; here each
step has fresh samples, or with greedy the teacher's greedy completion. Arguments: greedy.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too. NOT MEASURED.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, greedy=False)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.rollout.source = "teacher"
    c.signal.divergence = "nll"
    c.rollout.temperature = 0.0 if arg.greedy else 1.0
    return c
