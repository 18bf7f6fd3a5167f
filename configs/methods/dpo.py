"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) on the student's own completions, labelled as it learns.

    python experiments/train.py --config=configs/methods/dpo.py --workdir=runs/dpo

Axes: signal.weight=0, preference.weight=1, 4 completions of a prompt, of which the best and the worst are a pair (Guo et al. 2024, arXiv
2402.04792: two completions and a judge); the reference is the student as it was. Argument judge: teacher (the teacher's log-prob of the
completion), teacher_mean (per token) or reward (the verifier, no teacher); beta=0.1. Prompts without a difference have no pair.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, judge=("teacher", "teacher_mean", "reward"), beta=0.1)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.signal.weight, c.preference.weight = 0.0, 1.0
    c.preference.judge, c.preference.beta = arg.judge, arg.beta
    c.rollout.group_size = 4
    if arg.judge == "reward":
        c.teacher.recipe = ""
    return c
