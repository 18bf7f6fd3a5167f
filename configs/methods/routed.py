"""Some skills learnt from a teacher and others from a verifier, in one run: each example by its tag.

    python experiments/train.py --config=configs/methods/routed.py --workdir=runs/routed

Axes: masking.tags=reverse: those prompts are distilled, from the expert of that skill (full reverse KL); reward.tags=sort: those have the
verifier's rewards, as advantages within 4 completions (reward.advantage=rloo). A skill with neither is refused. Argument taught=reverse:
the skill with a teacher (other skills of the run have a verifier). Each term is divided by its own
tokens, so that neither skill outweighs the other by its length.

Experts and student are those of configs/experts.py, whose arguments (skills, level, prompts, seed, tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, taught="reverse", skills="reverse+sort")
    c = config.load_config(f"configs/experts.py:skills={arg.skills},{rest}")
    if arg.taught not in arg.skills.split("+"):
        raise config.ConfigError(f"config argument taught = {arg.taught!r} is none of skills = {arg.skills!r}; name one of them")
    tested = [skill for skill in arg.skills.split("+") if skill != arg.taught]
    for skill in tested:
        del c.teacher.members[skill]
    c.masking.tags, c.reward.tags = arg.taught, ",".join(tested)
    c.reward.weight, c.reward.advantage, c.rollout.group_size = 1.0, "rloo", 4
    return c
