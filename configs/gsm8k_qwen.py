"""Distil a small Qwen from a larger one of its family on grade-school word problems (GSM8K), on the student's own completions.

    python experiments/train.py --config=configs/gsm8k_qwen.py --workdir=runs/gsm8k_qwen

Models and data come from the Hugging Face hub on first use. Without a network, give folders:

    python experiments/train.py --config=configs/gsm8k_qwen.py --workdir=runs/gsm8k_qwen \
        --config.student.path=DIR --config.teacher.path=DIR --config.task.path=FOLDER

FOLDER has train.jsonl and test.jsonl (`question`, and `answer` that ends in "#### number"). Prompts are put into the models' chat template.

Arguments after the colon: qwen2.5 (default) is Qwen2.5-0.5B-Instruct from Qwen2.5-1.5B-Instruct, qwen3 is Qwen3-0.6B from Qwen3-1.7B
without thinking; seed=N; tiny is a run of seconds, offline: the same architecture at a small size with random weights, a byte tokenizer,
and the 24 problems of configs/gsm8k_tiny (`teacher` is its recipe).

Hardware: meant for one accelerator of 40 GB or more. NOT MEASURED: the full run has not been made where this file was written, so no time
and no accuracy are stated; `tiny` is what the tests run. Expect eval/reverse_kl to fall, and eval/accuracy to move from the student's
towards the teacher's, both of which the run reports before the first update.
"""

import pathlib

from opd_jax import config

MODELS = {
    "qwen2.5": ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
    "qwen3": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"),
}


def get_config(arg=None):
    arg = config.parse_arg(arg, family=tuple(MODELS), role=("opd", "teacher"), tiny=False, seed=0)
    if arg.role == "teacher" and not arg.tiny:
        raise config.ConfigError("config argument 'teacher' is the recipe of tiny; write tiny,teacher, or give --config.teacher.path")
    c = config.default()
    c.seed = arg.seed
    c.task.name = "gsm8k"
    c.context.student.template = "chat"
    c.rollout.max_new_tokens = 512
    c.rollout.max_prompt_length = 512
    c.signal.divergence = "reverse_kl"
    c.signal.support = "full"
    if arg.tiny:
        return tiny(c, arg)
    c.student.path, c.teacher.path = MODELS[arg.family]
    if arg.family == "qwen3":
        c.context.student.thinking = "off"
    c.steps = 200
    c.rollout.batch_size = 64
    c.learner.learning_rate = 1e-5
    c.learner.schedule = "constant"
    c.learner.warmup_steps = 10
    c.learner.microbatches = 8
    c.model.compute_dtype = "bfloat16"
    c.model.remat = True
    c.task.eval_size = c.eval.prompts = 256
    c.eval.samples = 1
    c.eval.every = 50
    c.checkpoint.every = 50
    return c


def tiny(c, arg):
    """Both models have random weights; the teacher's have had two updates on the solutions."""
    folder = pathlib.Path(__file__).with_name("gsm8k_tiny")
    c.task.path = str(folder)
    c.context.student.template = str(folder / "chat.jinja")
    c.student.init.model_type = {"qwen2.5": "qwen2", "qwen3": "qwen3"}[arg.family]
    c.student.init.hidden_size, c.student.init.intermediate_size, c.student.init.num_hidden_layers = 32, 64, 2
    c.student.init.num_key_value_heads = 2
    c.student.init.max_position_embeddings = 512
    c.rollout.max_new_tokens = 16
    c.rollout.max_prompt_length = 400
    c.rollout.batch_size = c.eval.batch_size = 8
    c.eval.samples = 1
    c.steps = 3
    if arg.role == "teacher":
        c.rollout.source, c.signal.divergence, c.steps, c.eval.prompts = "dataset", "nll", 2, 0
    else:
        c.teacher.recipe = f"configs/gsm8k_qwen.py:{arg.family},tiny,teacher"
    return c
