"""Self-distillation policy optimisation (Huebotter et al. 2026, SDPO, arXiv 2601.20802): the teacher reads the prompt's other rollouts.

    python experiments/train.py --config=configs/methods/sdpo.py --workdir=runs/sdpo

Axes: 8 rollouts of a prompt; context.privileged.reads=sibling,feedback: another rollout that succeeded or, where there is none, what the
verifier says of the own one; without either a rollout is left out. Student's top k with one entry for the rest, ratios cut off at 2.
Argument runs: plain (the code's actor.yaml: JSD 0.5, k = 100, EMA 0.05) or rich (the runs with rich feedback: reverse KL, k = 20, EMA
0.01). teacher=ema, trust_region, frozen or live. hybrid=W: W times the term of the centred reward (GRPO without its deviation, as the
authors' baseline has it) and 1 - W times this one. feedback=only_without: off for solved prompts, or always.

In the setting of configs/base.py, whose arguments (skill, head_start, prompts, seed, level, width, tiny) it takes too. Figures:
docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(
        arg,
        runs=("plain", "rich"),
        teacher=("ema", "trust_region", "frozen", "live"),
        rate=0.0,
        hybrid=0.0,
        feedback=("only_without", "always"),
    )
    c = config.load_config(f"configs/base.py:{rest}")
    c.rollout.group_size = 8
    c.context.privileged.reads = "sibling,feedback"
    c.context.privileged.success = 1.0
    c.context.privileged.feedback_with_solution = arg.feedback == "always"
    c.signal.divergence, c.signal.support, c.signal.tail = "jsd" if arg.runs == "plain" else "reverse_kl", "topk_student", "bucket"
    c.signal.k = 100 if arg.runs == "plain" else 20
    c.teacher.update = arg.teacher
    c.teacher.rate = arg.rate or {"plain": 0.05, "rich": 0.01}[arg.runs]
    c.estimator.importance, c.estimator.clip = "clip", 2.0
    if arg.hybrid:
        c.signal.weight, c.reward.weight, c.reward.advantage = 1 - arg.hybrid, arg.hybrid, "centred"
    return c
