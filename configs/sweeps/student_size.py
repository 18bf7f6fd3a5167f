"""How wide the student is: widths 32, 48, 64 and 96 (the quickstart's is 64) under the teacher of width 128.

    python experiments/sweep.py --config=configs/sweeps/student_size.py --workdir=runs/sweep_student_size

Each width and seed has a student of its own, made by the same recipe with equal updates: wider students start better, so that the table
shows where a run ends, not how much distillation adds.

20 runs of 100 updates of the quickstart (about 17 s on 2 CPU cores, without start-up), after 20 students and a teacher; the sweep as a
whole is NOT MEASURED. Arguments are those of configs/quickstart.py; tiny is a sweep of 2 points and 2 seeds, for tests.
"""

from opd_jax import config, sweeps


def get_config(arg=None):
    return config.load_config(f"configs/quickstart.py:{arg or ''}")


def get_sweep(arg=None):
    tiny = "tiny" in (arg or "").split(",")
    points = sweeps.over(":width", *(8, 16) if tiny else (32, 48, 64, 96))
    return sweeps.Sweep(points, seeds=2 if tiny else 5, metrics=("eval/accuracy", "eval/sampled_accuracy", "eval/reverse_kl"))
