"""Bias, variance and signal-to-noise of gradient estimators, on the same rollouts of a student and its teacher.

    python experiments/gradient_study.py --config=configs/gradient_study.py --workdir=runs/gradient_study

Without models it studies a random student of 3 tokens whose completions can be listed: sampled rollouts against exact gradients, in
seconds. `--config.student.path=DIR --config.teacher.path=DIR` studies your pair. Arguments after the colon:

one         the default: that random student at one condition, completions of 4 tokens, one rollout per prompt
enumerable  the same kind of student at completion lengths 2 to 6 (each that of 6, cut off), three discounts, and 4 rollouts per prompt
quickstart  the pair of the quickstart (0.18M parameters, made on first use), by discount, group size, temperature and nucleus mass
stories     your pair (student.path and teacher.path), completion lengths 16 to 128 from unconditional prompts; the figures in README.md
            are for a pruned Llama of 0.21M parameters (karpathy's stories260K)
tiny        the quickstart's pair with a few thousand parameters, one condition, in seconds: for tests
seed=N      of the student, its teacher and all draws; 0
"""

from opd_jax import config


def get_config(arg=None):
    arg = config.parse_arg(arg, pair=("one", "enumerable", "quickstart", "stories"), tiny=False, seed=0)
    c = config.default()
    c.seed = arg.seed
    c.rollout.batch_size = 64
    c.rollout.max_new_tokens = 4
    c.study.estimators = "sequence,to_go,rao_blackwell_to_go,local_to_go,discounted,token,token_kl_baseline,token_full,forward_kl"
    c.study.rollouts = 2048
    if arg.pair == "enumerable":
        c.study.lengths, c.study.gammas, c.study.group_sizes = "2,3,5,6", "0,0.5,1", "4"
        c.study.estimators += ",to_go_leave_one_out"
    elif arg.pair == "stories":
        c.task.name = "unconditional"
        c.study.estimators = "sequence,to_go,rao_blackwell_to_go,token,token_kl_baseline,token_full"
        c.rollout.max_new_tokens, c.study.lengths = 16, "32,64,128"
        c.study.rollouts = 512
    elif arg.pair == "quickstart" or arg.tiny:
        arithmetic(c, tiny=arg.tiny)
    return c


def arithmetic(c, tiny):
    suffix = ",tiny" if tiny else ""
    c.teacher.recipe, c.student.recipe = (f"configs/quickstart.py:{role}{suffix}" for role in ("teacher", "student"))
    c.task.level = 4 if tiny else 12
    c.rollout.max_new_tokens = c.task.level + 1
    c.study.estimators = "sequence,to_go,token,token_full"
    if tiny:
        c.study.rollouts, c.rollout.batch_size, c.study.resamples, c.study.reference = 32, 16, 200, 2
        return
    c.study.rollouts = 256
    c.study.estimators = "sequence,to_go,to_go_leave_one_out,rao_blackwell_to_go,discounted,token,token_kl_baseline,token_full"
    c.study.gammas, c.study.group_sizes, c.study.temperatures, c.study.top_ps = "0,0.5,1", "4", "0.7", "0.9"
