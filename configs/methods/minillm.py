"""MiniLLM (Gu et al. 2024, arXiv 2306.08543): sequence-level reverse KL, completions written by a mixture of student and teacher.

    python experiments/train.py --config=configs/methods/minillm.py --workdir=runs/minillm

Axes: rollout.source=dagger with a constant share of the teacher (rollout.beta=0.2); the exact term of each token and the rest of the return
as the advantage of the sampled one (signal.support=full, estimator.credit=to_go); token ratios to the law that wrote. Later terms are
the student's exact KLs, where the paper has log-ratios of tokens that the mixture drew, whose mean is another. `normalised` divides
them by their number (its length normalisation), discount=G discounts them. Its language-modelling loss on other text is not here.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, normalised=False, discount=1.0)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.rollout.source, c.rollout.beta = "dagger", 0.2
    c.signal.divergence, c.signal.support = "reverse_kl", "full"
    c.estimator.credit, c.estimator.importance = "to_go" if arg.discount == 1 else "discounted", "token"
    c.estimator.gamma, c.estimator.length_normalised = arg.discount, arg.normalised
    return c
