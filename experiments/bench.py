"""Times each phase of a step beside what the machine can do at most, and beside other systems at the same work.

python experiments/bench.py [--workdir=runs/bench] [--quick] [--curves] [--shape=prototype|qwen3_0.6b|tiny]

Each side (this library, TRL's DistillationTrainer, transformers' generate; each with operands in float32 and in bfloat16) is a process of
its own, with the same weights and the allocator setting that suits it best; they are asked in turns, round by round. This library is timed
with glibc's own setting, too (default_malloc). Medians of at least 5 runs, with the least and the most. DIR gets bench.json, bench.md and
logs/; --curves adds how the time grows with batch, length, vocabulary, width and
virtual devices (curves.png; a point that is in DIR/points is not measured again).

Ratios (shares of the floor, peers' times over ours) are compared with those in --baseline for the same shape and platform: a line for each
that got worse by more than the file's tolerance, and status 1. --update_baseline keeps those of this run instead.

Takes about 4 minutes on 2 cores, --quick (float32 alone) under 2, --curves about 5 more. A side that fails or hangs is left out and
named; status 1.
--shape=qwen3_0.6b is for an accelerator: 64k completion tokens of a Qwen3-0.6B with a Qwen2.5-1.5B as teacher, random weights, bfloat16.
"""

import pathlib
import shlex
import sys

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli
from opd_jax.bench import baseline, run
from opd_jax.types import UserError

WORKDIR = flags.DEFINE_string("workdir", "runs/bench", "Folder of the tables, figures and logs.")
SHAPE = flags.DEFINE_string("shape", "prototype", "What is timed: prototype, qwen3_0.6b or tiny (see opd_jax/bench/shapes.py).")
QUICK = flags.DEFINE_bool("quick", False, "Operands in float32 alone, fewer rounds.")
PEERS = flags.DEFINE_bool("peers", True, "Time TRL and transformers, too.")
CURVES = flags.DEFINE_bool("curves", False, "Also how the time of a step grows.")
BASELINE = flags.DEFINE_string("baseline", "experiments/bench_baseline.json", "File with the ratios to compare with.")
UPDATE_BASELINE = flags.DEFINE_bool("update_baseline", False, "Keep the ratios of this run in the file, in place of comparing.")


def main(argv: list[str]) -> None:
    workdir, path = pathlib.Path(WORKDIR.value), pathlib.Path(BASELINE.value)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be created ({error.strerror}); give a folder that can be written") from None
    command = shlex.join(["python", *sys.argv])
    baseline.read(path, "")  # refuses a damaged file before minutes of work
    what = {"quick": QUICK.value, "peers": PEERS.value, "curved": CURVES.value}
    result = run.run(SHAPE.value, workdir, command, **what, say=lambda text: print(text, flush=True))
    print(f"\n{result.text}\n\n{workdir / 'bench.md'}")
    found = baseline.figures(result.rows, result.ratios)
    if UPDATE_BASELINE.value:
        baseline.write(path, result.key, found)
        print(f"{len(found)} ratios kept in {path}")
        sys.exit(1 if result.failures else 0)
    kept = baseline.read(path, result.key)
    if kept is None:
        print(f"{path} has no ratios of {result.key!r} to compare with; --update_baseline keeps these")
    lines = baseline.worse(found, kept) if kept else []
    for line in [*result.failures, *lines]:
        print(line, file=sys.stderr)
    sys.exit(1 if result.failures or lines else 0)


if __name__ == "__main__":
    cli.run(main)
