"""Writes a store of completions with a teacher's scores, for runs with rollout.source=cache; a store that is not whole is gone on with.

python experiments/score_cache.py --config=configs/NAME.py[:arg] --out=DIR [--config.steps=N]

The config's rollout source writes N batches of rollout.batch_size completions, for the prompts of updates 1 to N; its teacher scores them
once, in the form that its signal needs: log-probs of the sampled tokens (signal.support=sampled), the top k (topk_teacher), or nothing
(nll).
"""

import functools

import _checkout  # noqa: F401
from absl import flags
from ml_collections import config_flags

from opd_jax import cli, config, metrics, score_cache, train

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:arg]; --config.a.b=value changes a field.", lock_config=True)
OUT = flags.DEFINE_string("out", None, "Folder of the store.")
flags.mark_flags_as_required(["config", "out"])


def main(argv: list[str]) -> None:
    stop = cli.StopRequest().install()
    parsed = config.parse(CONFIG.value)
    progress = metrics.Progress()
    make_model = functools.partial(train.make_model, stop=stop, progress=progress)
    found = score_cache.write(parsed, OUT.value, make_model=make_model, progress=progress, stop=stop)
    form = {"none": "no scores", "tokens": "log-probs of their tokens"}.get(found.description.scores, f"the top {found.description.k}")
    print(f"{OUT.value}: {len(found)} prompts, {found.batches * found.description.rows} completions, {form}; digest {found.digest}")


if __name__ == "__main__":
    cli.run(main)
