"""How many of the teacher's most probable tokens the loss needs: 2 to 32 of the byte vocabulary's 259, and all of them.

    python experiments/sweep.py --config=configs/sweeps/top_k.py --workdir=runs/sweep_top_k

Both laws are renormalised on the k tokens (signal.tail=renormalise), so that k = 1 would leave nothing to learn. The quickstart's answers
are digits, of which there are 10: from there on little mass is left out. --config.signal.tail=bucket puts that mass into one entry.

30 runs of 100 updates of the quickstart (17 s on 2 CPU cores, without start-up), after 5 students and a teacher; the sweep as a whole is
NOT MEASURED. Arguments are those of configs/quickstart.py; tiny is a sweep of 2 points and 2 seeds, for tests.
"""

from opd_jax import config, sweeps


def get_config(arg=None):
    return config.load_config(f"configs/quickstart.py:{arg or ''}")


def get_sweep(arg=None):
    tiny = "tiny" in (arg or "").split(",")
    cut = sweeps.product(sweeps.over("signal.support", "topk_teacher"), sweeps.over("signal.k", *(2,) if tiny else (2, 4, 8, 16, 32)))
    points = sweeps.chain(cut, sweeps.over("signal.support", "full"))
    return sweeps.Sweep(points, seeds=2 if tiny else 5, metrics=("eval/sampled_accuracy", "eval/reverse_kl", "eval/forward_kl"))
