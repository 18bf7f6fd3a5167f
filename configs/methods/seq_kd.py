"""Sequence-level knowledge distillation (Kim and Rush 2016, arXiv 1606.07947): cross-entropy of completions that the teacher writes.

    python experiments/train.py --config=configs/methods/seq_kd.py --workdir=runs/seq_kd

Axes: rollout.source=teacher, signal.divergence=nll. Arguments: greedy (the teacher's greedy completion in place of samples; the paper takes
the mode by beam search); stored, as in the paper one set of completions, written on first use, for all updates (rollout.source=cache,
rollout.cache_recipe: this file with the argument store), otherwise each step has fresh ones; reject leaves out those that the verifier
does not accept (masking.failed=drop); word=W is the paper's mixture, weight W for the word-level forward KL on these completions beside
1 - W for their cross-entropy (extra_signal; of stored ones on the teacher's top 16 with one entry for the rest).

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, part=("run", "store"), greedy=False, stored=False, reject=False, word=0.0)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.rollout.source = "teacher"
    c.rollout.temperature = 0.0 if arg.greedy else 1.0
    c.signal.divergence, c.signal.weight, c.extra_signal.weight = "nll", 1 - arg.word, arg.word
    if arg.part == "store" or arg.stored:
        c.extra_signal.support, c.extra_signal.tail, c.extra_signal.k = "topk_teacher", "bucket", 16
    if arg.part == "store":
        c.steps = 2 if "tiny" in rest.split(",") else 16
        return c
    if arg.stored:
        same = ("greedy" if arg.greedy else "", f"word={arg.word}" if arg.word else "", rest)
        c.rollout.source, c.rollout.cache_recipe = "cache", f"configs/methods/seq_kd.py:{','.join(filter(None, ('store', *same)))}"
    c.masking.failed = "drop" if arg.reject else "keep"
    return c
