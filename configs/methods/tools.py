"""On-policy distillation of completions with tool calls: a calculator answers in between, and its answers are not learnt from.

    python experiments/train.py --config=configs/methods/tools.py --workdir=runs/tools

Axes: task.name=calculator, rollout.max_turns. Observations are read by student and teacher and have no loss; a return
(estimator.credit=to_go) goes through them. Argument malformed=drop keeps completions with a call that cannot be read out of the
distillation term (masking.malformed), reward=W adds W times the verifier's reward within groups of 8 (reward.weight, RLOO): such
completions then learn from the reward alone. Both are the remedies that Liu et al. (Theory of On-Policy Distillation, 2026; notes on
practice) name for students that exploit a teacher; they give no weights, W is ours.

The teacher is made by SFT on worked solutions, the student by less of it, on first use. Arguments teacher and student are the recipes;
level=N numbers, seed, width and tiny as in the quickstart, prompts=N too, but the default is fresh prompts without end.

One run, seed 0, 128 held-out prompts of 3 numbers: 100 updates bring greedy accuracy from 0.22 to 0.70 and the reverse KL to the teacher
from 0.41 to 0.14 nats per token, no call is malformed in the end. The arguments malformed and reward are NOT MEASURED.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, role=("opd", "teacher", "student"), level=0, malformed=("keep", "drop"), reward=0.0)
    c = config.load_config(f"configs/quickstart.py:{rest},{arg.role}")
    parts = rest.split(",")
    tiny = "tiny" in parts
    c.task.name = "calculator"
    c.task.level = arg.level or (4 if tiny else 3)
    c.rollout.max_turns = c.task.level + 1  # a call for each number but the first, the sum, and one more
    c.rollout.max_new_tokens = 12 * c.task.level
    if arg.role != "opd":
        if not tiny:
            c.steps, c.learner.decay_steps = {"teacher": (150, 0), "student": (110, 500)}[arg.role]
        return c
    shared = [part for part in parts if part == "tiny"] + ([f"level={arg.level}"] if arg.level else [])
    own = [part for part in parts if part.startswith(("width=", "seed="))]
    c.teacher.recipe = "configs/methods/tools.py:" + ",".join(["teacher", *shared])
    c.student.recipe = "configs/methods/tools.py:" + ",".join(["student", *shared, *own])
    c.masking.malformed = arg.malformed
    if not any(part.startswith("prompts=") for part in parts):
        c.task.train_size = 0  # 48 prompts teach their sums, not how to copy numbers into calls
    if not tiny:  # each evaluation goes through the turns, three times
        c.eval.prompts = c.eval.batch_size = 128
        c.eval.samples = 2
    if arg.reward:
        c.reward.weight, c.reward.advantage, c.rollout.group_size = arg.reward, "rloo", 8
    return c
