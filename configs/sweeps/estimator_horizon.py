"""Which estimator, and over how many tokens: five estimators of the reverse KL on prompts of 4, 8 and 12 digits (5, 9 and 13 tokens).

    python experiments/sweep.py --config=configs/sweeps/estimator_horizon.py --workdir=runs/sweep_estimator_horizon

Credit `token` is the gradient of the token-level objective, `to_go` and `sequence` are that of the sequence-level one; `full` is exact over
the vocabulary where the estimator allows it. A horizon has a teacher and students of its own, so that rows of one horizon compare.

75 runs of 100 updates of the quickstart (at most 17 s on 2 CPU cores, without start-up), after 15 students and 3 teachers; the sweep as a
whole is NOT MEASURED. Arguments are those of configs/quickstart.py; tiny is a sweep of 2 points and 2 seeds, for tests.
"""

from opd_jax import config, sweeps


def get_config(arg=None):
    return config.load_config(f"configs/quickstart.py:{arg or ''}")


def get_sweep(arg=None):
    tiny = "tiny" in (arg or "").split(",")
    levels = sweeps.over(":level", *(2, 4) if tiny else (4, 8, 12))
    sampled = sweeps.product(sweeps.over("signal.support", "sampled"), sweeps.over("estimator.credit", "token", "to_go", "sequence"))
    exact = sweeps.product(sweeps.over("signal.support", "full"), sweeps.over("estimator.credit", "token", "to_go"))
    points = sweeps.product(levels, exact[:1] if tiny else sweeps.chain(exact, sampled))
    return sweeps.Sweep(points, seeds=2 if tiny else 5, metrics=("eval/sampled_accuracy", "eval/reverse_kl", "eval/forward_kl"))
