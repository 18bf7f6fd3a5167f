"""Prefix distillation (arXiv 2602.15260): the first tokens of each completion alone are distilled.

    python experiments/train.py --config=configs/methods/prefix_opd.py --workdir=runs/prefix_opd

Axes: masking.first_only (argument first=6 tokens) on the exact reverse KL. The paper stops sampling there too; here the completion is drawn
to its end, and the rest of it has no loss: set rollout.max_new_tokens to save it.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, first=6)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.masking.first_only = arg.first
    return c
