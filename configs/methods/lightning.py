"""Lightning OPD (arXiv 2604.13010): offline on-policy distillation, the teacher scores completions of the initial student once.

    python experiments/train.py --config=configs/methods/lightning.py --workdir=runs/lightning

Axes: rollout.source=cache with a store that is written on first use (rollout.cache_recipe: this file with the argument store), whose
completions are those of the initial student; signal.support=sampled, as published the log-ratio of the sampled token, without a correction
for the student that moves away from them: the run says so. The student comes from SeqKD with the same teacher, without which the gradient
has a bias of its own (teacher consistency; a run warns where it can see another). Arguments: k=N stores the teacher's top N in place of the
sampled token's log-prob (forward KL with one entry for the rest), correct=cumulative (or another choice of estimator.importance).

No update asks the teacher. It is loaded for the evaluation's KL alone: --config.teacher.recipe= leaves it out. Stores of your own:
experiments/score_cache.py, then --config.rollout.cache=DIR.

On the pair of the quickstart, whose arguments (prompts, seed, level, width, and tiny: a run of seconds) it takes too.
Figures: docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    arg, rest = config.split_arg(arg, part=("run", "store"), k=0, correct=("none", "token", "clip", "drop", "sequence", "cumulative"))
    c = config.load_config(f"configs/quickstart.py:{rest}")
    c.student.recipe = f"configs/quickstart.py:{','.join(filter(None, ('seqkd', rest)))}"
    c.signal.divergence, c.signal.support = "reverse_kl", "sampled"
    if arg.k:
        c.signal.divergence, c.signal.support, c.signal.tail, c.signal.k = "forward_kl", "topk_teacher", "bucket", arg.k
    if arg.part == "store":
        c.steps = 2 if "tiny" in rest.split(",") else 16
        return c
    c.rollout.source = "cache"
    c.rollout.cache_recipe = f"configs/methods/lightning.py:{','.join(filter(None, ('store', f'k={arg.k}' if arg.k else '', rest)))}"
    c.estimator.importance = arg.correct
    return c
