"""How far ahead a token answers: discounted credit from gamma = 0 (the token alone) to 1 (all that follows), on the quickstart.

    python experiments/sweep.py --config=configs/sweeps/gamma.py --workdir=runs/sweep_gamma

The sampled log-ratio, or with --config.signal.support=full the exact divergence of the token and the discounted sampled rest. Expect what
the claims of the estimators say: gamma = 0 has the least variance and leaves out what a token does to the prefixes after it.

35 runs of 100 updates of the quickstart (17 s on 2 CPU cores, without start-up), after 5 students and a teacher; the sweep as a whole is
NOT MEASURED. Arguments are those of configs/quickstart.py; tiny is a sweep of 2 points and 2 seeds, for tests.
"""

from opd_jax import config, sweeps


def get_config(arg=None):
    c = config.load_config(f"configs/quickstart.py:{arg or ''}")
    c.signal.support = "sampled"
    c.estimator.credit = "discounted"
    return c


def get_sweep(arg=None):
    tiny = "tiny" in (arg or "").split(",")
    gammas = (0.0, 0.9) if tiny else (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
    points = sweeps.over("estimator.gamma", *gammas)
    return sweeps.Sweep(points, seeds=2 if tiny else 5, metrics=("eval/sampled_accuracy", "eval/reverse_kl", "eval/forward_kl"))
