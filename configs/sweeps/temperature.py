"""At which temperature the student writes its completions; the loss is at temperature 1 throughout.

    python experiments/sweep.py --config=configs/sweeps/temperature.py --workdir=runs/sweep_temperature

Away from 1 the completions come from another law than the policy in the loss, which each run says on its stderr: the exact divergence of a
token stays what it is, the prefixes are those of another student. 0 is greedy.

25 runs of 100 updates of the quickstart (17 s on 2 CPU cores, without start-up), after 5 students and a teacher; the sweep as a whole is
NOT MEASURED. Arguments are those of configs/quickstart.py; tiny is a sweep of 2 points and 2 seeds, for tests.
"""

from opd_jax import config, sweeps


def get_config(arg=None):
    return config.load_config(f"configs/quickstart.py:{arg or ''}")


def get_sweep(arg=None):
    tiny = "tiny" in (arg or "").split(",")
    points = sweeps.over("rollout.temperature", *(0.0, 1.0) if tiny else (0.0, 0.5, 1.0, 1.5, 2.0))
    return sweeps.Sweep(points, seeds=2 if tiny else 5, metrics=("eval/sampled_accuracy", "eval/reverse_kl", "eval/forward_kl"))
