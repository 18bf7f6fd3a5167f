"""On-policy distillation of Thinking Machines (Lu et al. 2025, blog; tinker-cookbook): minus the sampled log-ratio is the reward.

    python experiments/train.py --config=configs/methods/thinking_machines.py --workdir=runs/thinking_machines

Axes: signal.support=sampled, estimator.credit=token (kl_discount_factor 0; argument discount=G gives credit=discounted), the sum over
tokens (loss.normaliser=sequence_sum, as tinker's importance_sampling loss, which is not divided by the number of completions), 4
completions of a prompt. Completions are used once, by the parameters that wrote them, so that the loss's ratio is 1.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, discount=0.0)
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.signal.divergence, c.signal.support = "reverse_kl", "sampled"
    c.loss.normaliser = "sequence_sum"
    c.rollout.group_size = 4
    if arg.discount:
        c.estimator.credit, c.estimator.gamma = "discounted", arg.discount
    return c
