"""Runs one config many times, with other values of a few fields and other seeds, and writes a table of what came out.

python experiments/sweep.py --config=configs/NAME.py[:arg] --workdir=DIR --sweep=FIELD=v1,v2 [--sweep=...] --seeds=N --metric=NAME [...]
python experiments/sweep.py --config=configs/sweeps/NAME.py[:arg] --workdir=DIR

Several --sweep flags give every combination. FIELD is one of opd_jax/config/fields.py, or with a colon before it an argument of the config
file: --sweep=:role=opd,sft. A file with a function get_sweep(arg), as those in configs/sweeps/ are, brings points, seeds and metrics of its
own; --sweep adds fields to it, --seeds and --metric replace what it says. --config.FIELD=value holds for all runs.

--seeds=N: N runs of each point, with seeds from the config's own on. A config file with an argument `seed` is given each of them (which of
the fields differ is printed), any other config has its field `seed` set. --sweep=seed=0,1,2 sets that field alone.

DIR gets table.json (a row for each point and metric: swept fields, n, mean, low and high of the 95% t-interval over seeds, each seed's
value), comparisons.json (each two points, paired by seed: bootstrap-t, Holm), table.csv, table.html, and runs/NAME/, which are run
directories of experiments/train.py. A metric is its last value in metrics.jsonl.

Killed at any moment, the same command goes on; finished runs are not made again. Points may be added to a sweep, not changed.
--workers=N: runs at a time, in processes of their own. The processor cores are shared out between them (which may change numbers in the
last digits, as another machine may); on GPU or TPU each has devices of its own. --memory_gb=X: no run is started when the
runs at a time, each taken to need the largest peak of main memory that any process of the sweep has had, would exceed X; so the first runs
alone. What a model takes of the memory of an accelerator is not counted.

Exit status: 0 all runs are done, 1 some failed (--retry_failed makes them again), 2 a mistake in the command, 143/130 after
SIGTERM/SIGINT with all runs saved.
"""

import shlex
import sys

import _checkout  # noqa: F401
from absl import flags
from ml_collections import config_flags

from opd_jax import cli
from opd_jax.sweeps import Sweep, plan, product, sweep, table

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:arg]; --config.a.b=value changes a field.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep; an existing sweep goes on.")
SWEEP = flags.DEFINE_multi_string("sweep", [], "FIELD=v1,v2; the flag may be repeated.")
SEEDS = flags.DEFINE_integer("seeds", None, "Runs of each point; without it 1, or what the file says.")
METRIC = flags.DEFINE_multi_string("metric", [], "A metric of docs/metrics.md, whose last value counts; the flag may be repeated.")
WORKERS = flags.DEFINE_integer("workers", 1, "Runs at a time.")
MEMORY_GB = flags.DEFINE_float("memory_gb", 0.0, "Main memory for all runs at a time, in 10**9 bytes; 0: no limit.")
RETRY_FAILED = flags.DEFINE_bool("retry_failed", False, "Make failed runs again.")
flags.mark_flags_as_required(["config", "workdir"])


def asked() -> tuple[plan.Base, Sweep]:
    """What the flags and the file ask for."""
    flag = flags.FLAGS["config"]
    command = shlex.join(["python", *sys.argv])
    base = plan.Base(config_flags.get_config_filename(flag), config_flags.get_override_values(flag), command)
    own = plan.read_file(base.name) or Sweep([{}])
    points = product(own.points, *map(plan.parse_flag, SWEEP.value))
    return base, Sweep(points, own.seeds if SEEDS.value is None else SEEDS.value, tuple(METRIC.value) or own.metrics)


def main(argv: list[str]) -> None:
    stop = cli.StopRequest().install()
    budget = sweep.Budget(WORKERS.value, MEMORY_GB.value)
    made, results = sweep.run(*asked(), WORKDIR.value, budget=budget, retry_failed=RETRY_FAILED.value, stop=stop)
    print(f"\n{table.text(made, table.rows(made, results))}\n\ntable: {WORKDIR.value}/table.html")
    if failed := sweep.failures(WORKDIR.value, results):
        print(failed, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
