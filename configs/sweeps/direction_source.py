"""Which divergence, on whose prefixes: reverse and forward KL, exact over the vocabulary, on completions of the student and of the teacher.

    python experiments/sweep.py --config=configs/sweeps/direction_source.py --workdir=runs/sweep_direction_source

student x reverse_kl is on-policy distillation, teacher x forward_kl is distillation on the teacher's samples; the other two tell apart what
the direction does and what the prefixes do.

20 runs of 100 updates of the quickstart (17 s on 2 CPU cores, without start-up), after 5 students and a teacher; the sweep as a whole is
NOT MEASURED. Arguments are those of configs/quickstart.py; tiny is a sweep of 2 points and 2 seeds, for tests.
"""

from opd_jax import config, sweeps

METRICS = ("eval/accuracy", "eval/sampled_accuracy", "eval/reverse_kl", "eval/forward_kl", "eval/entropy")


def get_config(arg=None):
    return config.load_config(f"configs/quickstart.py:{arg or ''}")


def get_sweep(arg=None):
    tiny = "tiny" in (arg or "").split(",")
    sources = sweeps.over("rollout.source", "student", "teacher")
    points = sweeps.product(sources, sweeps.over("signal.divergence", "reverse_kl", "forward_kl"))
    return sweeps.Sweep(points[1:3] if tiny else points, seeds=2 if tiny else 5, metrics=METRICS)
