"""On-policy self-distillation (Zhao et al. 2026, OPSD, arXiv 2601.18734): the teacher is the student with the solution to read.

    python experiments/train.py --config=configs/methods/opsd.py --workdir=runs/opsd

Axes: teacher.path=student_init, context.privileged.reads=solution. Argument loss: jsd (0.5, the whole vocabulary, first version), clipped
(forward KL whose entries are cut off at 0.05, later versions: clipped entries pull the other way, which is how long texts come to repeat
themselves), sampled (log-ratio of the sampled token). teacher=frozen (recommended by the authors), ema (rate 0.001), live or trust_region.
topk=K: both laws renormalised on the teacher's K best tokens (the authors' script: 50). The paper's setting samples and compares at
temperature 1.1 with top-p 0.95 and top-k 20: `paper_law`. `reason_first`: the teacher first writes an analysis of the solution, and
reads it (the base here was not trained to write one).

In the setting of configs/base.py, whose arguments (skill, head_start, prompts, seed, level, width, tiny) it takes too. Figures:
docs/results.md.
"""

from opd_jax import config


def get_config(arg=None):
    loss, teacher = ("jsd", "clipped", "sampled"), ("frozen", "ema", "live", "trust_region")
    arg, rest = config.split_arg(arg, loss=loss, teacher=teacher, rate=0.0, topk=0, paper_law=False, reason_first=False)
    c = config.load_config(f"configs/base.py:{rest}")
    c.context.privileged.reads = "solution"
    c.signal.divergence = {"jsd": "jsd", "clipped": "forward_kl", "sampled": "reverse_kl"}[arg.loss]
    c.signal.support = "sampled" if arg.loss == "sampled" else "topk_teacher" if arg.topk else "full"
    c.signal.k = 0 if arg.loss == "sampled" else arg.topk
    c.signal.clip = 0.05 if arg.loss == "clipped" else 0.0
    c.teacher.update = arg.teacher
    c.teacher.rate = arg.rate or {"ema": 0.001, "trust_region": 0.05}.get(arg.teacher, c.teacher.rate)
    if arg.reason_first:
        c.context.privileged.reads = "solution,analysis"
        c.context.privileged.write_tokens = 16
    if arg.paper_law:
        c.rollout.temperature = c.loss.student_temperature = c.loss.teacher_temperature = 1.1
        c.rollout.top_p, c.rollout.top_k = 0.95, 20
    return c
