"""Heal a pruned language model: layers dropped from a real one, then distilled from the whole model on the student's own completions.

    python experiments/prune.py --teacher=TEACHER --keep=0,1,3,4 --out=runs/pruned
    python experiments/train.py --config=configs/prune_distill.py --workdir=runs/prune_distill \
        --config.student.path=runs/pruned --config.teacher.path=TEACHER

TEACHER is a Hugging Face folder or hub id; the figures are for a Llama of 260K parameters and 5 layers (karpathy's stories260K), batch 32,
127 tokens from the beginning-of-sequence token at temperature 1. On 2 CPU cores, seed 0: reverse KL 1.33 before, 0.19 after 110
updates (51 s), 0.10 after 440 (202 s); forward KL 0.73, 0.22, 0.13. Argument `tiny`: a run of seconds, for tests.
"""

from opd_jax import config


def get_config(arg=None):
    arg = config.parse_arg(arg, tiny=False, seed=0)
    c = config.default()
    c.seed = arg.seed
    c.steps = 3 if arg.tiny else 475
    c.task.name = "unconditional"
    c.rollout.batch_size = 8 if arg.tiny else 32
    c.rollout.max_new_tokens = 15 if arg.tiny else 127
    c.signal.divergence = "reverse_kl"
    c.signal.support = "full"
    c.learner.learning_rate = 1.5e-3
    c.learner.schedule = "cosine"
    c.learner.b2 = 0.95
    c.eval.every = 0 if arg.tiny else 110
    c.eval.prompts = 8 if arg.tiny else 64
    c.eval.samples = 1
    c.eval.batch_size = 8 if arg.tiny else 32
    c.checkpoint.every = 50
    return c
