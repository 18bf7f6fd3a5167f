"""Several experts and their student: a base that knows a little of each skill, an expert of each made from it, and a run that unites them.

    python experiments/train.py --config=configs/experts.py --workdir=runs/experts

The default role distils the experts into the base, each prompt by the expert of its skill (reverse KL, exact over the vocabulary). Base and
experts are recipes, made on first use and kept under `cache_dir`: configs/experts.py:base and configs/experts.py:reverse (or sort, shift,
add). The base is trained on all skills and stopped early; an expert goes on from it, by SFT on its own skill alone. Prompts are fresh.

Seed 0, 256 held-out prompts, greedy accuracy: base 0.43 (reverse 0.18, sort 0.67), experts on their skills 1.00 and 0.98, the student after
100 updates 0.76 (0.63, 0.89). Base and experts took 44 to 57 s each on two cores that had much other work.

Arguments: skills=reverse+sort (of the student; some of reverse, sort, shift and add), level=N characters, prompts=N (0: unlimited fresh
ones), seed=N (of prompts and draws; models are the same for all seeds), tiny (a run of seconds, for tests).
"""

from opd_jax import config

SKILLS = ("reverse", "sort", "shift", "add")


def get_config(arg=None):
    roles = ("student", "base", *SKILLS)
    arg = config.parse_arg(arg, role=roles, skills="reverse+sort", level=4, prompts=0, seed=0, tiny=False)
    skills = arg.skills.split("+")
    for skill in skills:
        if skill not in SKILLS:
            raise config.ConfigError(f"config argument skills = {arg.skills!r}: no expert has {skill!r}; valid: {', '.join(SKILLS)}")
    c = config.default()
    c.seed = c.task.seed = arg.seed
    c.task.name, c.task.level, c.task.train_size = "skills", arg.level, arg.prompts
    c.task.skills = arg.role if arg.role in SKILLS else ",".join(skills)
    c.rollout.max_new_tokens = arg.level + 2  # sums have one digit more; the stop token is one of them
    c.rollout.batch_size = 16 if arg.tiny else 64
    c.learner.b2 = 0.95
    c.learner.warmup_steps = 2 if arg.tiny else 10
    c.task.eval_size = c.eval.prompts = 16 if arg.tiny else 256
    c.eval.batch_size = 16 if arg.tiny else 256
    shared = f"skills={arg.skills},level={arg.level}" + (",tiny" if arg.tiny else "")
    if arg.role == "student":
        c.student.recipe = f"configs/experts.py:base,{shared}"
        c.teacher.members.update({skill: config.member(recipe=f"configs/experts.py:{skill},{shared}") for skill in skills})
        c.signal.divergence, c.signal.support = "reverse_kl", "full"
        c.learner.learning_rate = 2e-3
        c.steps = 4 if arg.tiny else 100
        return c

    c.rollout.source = "dataset"
    c.signal.divergence = "nll"
    c.eval.prompts = 0
    c.log.samples_every = 0
    c.learner.learning_rate = 4e-3
    c.steps = 4 if arg.tiny else (90 if arg.role == "base" else 150)
    if arg.role == "base":
        c.student.init.hidden_size, c.student.init.intermediate_size = (16, 32) if arg.tiny else (96, 288)
        c.student.init.initializer_range = 0.12
        c.learner.decay_steps = 4 if arg.tiny else 300
    else:
        c.student.recipe = f"configs/experts.py:base,{shared}"
    return c
