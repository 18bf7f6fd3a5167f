"""Other systems at the same work, on the same weights: TRL's DistillationTrainer, and transformers' generate. Imported in a worker only.

Both read the folders that this library's hf.save wrote. Prompts are words of one token each. The stop token is suppressed, so that all
completions have the same length. bfloat16 means weights in bfloat16, and so the optimizer's state, too: the fastest setting on a CPU.
"""

import collections
import functools
import os
import pathlib
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

from opd_jax.bench import shapes
from opd_jax.bench.shapes import Shape
from opd_jax.bench.worker import Side


def _words(shape: Shape) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {f"t{i}": i for i in range(min(shape.student.vocab_size, shape.teacher.vocab_size))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t1", padding_side="left")


def _load(folder: str, name: str, dtype: str) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(pathlib.Path(folder) / name, dtype=getattr(torch, dtype))


def _peak() -> dict[str, Any]:
    unit = 1 if sys.platform == "darwin" else 1024
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    return {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "facts": {"libraries": versions}}


class Generate(Side):
    """transformers' generate on the batch of prompts."""

    def __init__(self, order):
        self._shape = shapes.make(order.shape, order.changes)
        self._model = _load(order.folder, "student", order.dtype).eval()
        self._ids = torch.tensor(shapes.prompts(self._shape), dtype=torch.long)
        if torch.cuda.is_available():
            self._model, self._ids = self._model.cuda(), self._ids.cuda()
        self.run("generate")

    def run(self, phase: str) -> dict[str, float]:
        length = self._shape.new_tokens
        law = {"do_sample": True, "top_k": 0, "temperature": 1.0, "min_new_tokens": length, "max_new_tokens": length}
        with torch.no_grad():
            begin = time.perf_counter()
            made = self._model.generate(self._ids, attention_mask=torch.ones_like(self._ids), **law)
            _wait()
        assert made.shape[1] == self._shape.prompt + length, made.shape
        return {"generate": time.perf_counter() - begin}

    def describe(self) -> dict[str, Any]:
        return _peak()


class Trl(Side):
    """TRL's DistillationTrainer: fully on-policy, full-vocabulary reverse KL (beta = 1), AdamW with clipping. A run is one update.

    It trains in the main thread, and waits at the beginning of each update until one is asked for: in another thread its tensors would lie
    in an arena of malloc that gives them back to the system, whatever the setting, and an update would take twice as long.
    """

    def __init__(self, order):
        self._shape = shapes.make(order.shape, order.changes)
        self._asked, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._seconds, self._loss = collections.Counter(), None
        self._trainer = self._make(order)

    def _make(self, order) -> trl.DistillationTrainer:
        shape, student, teacher = self._shape, *(_load(order.folder, name, order.dtype) for name in ("student", "teacher"))
        texts = [" ".join(f"t{i}" for i in row) for row in shapes.prompts(shape)]
        settings = trl.DistillationConfig(
            output_dir=tempfile.mkdtemp(),
            beta=1.0,
            max_completion_length=shape.new_tokens,
            generation_kwargs={"min_new_tokens": shape.new_tokens},
            per_device_train_batch_size=shape.rows,
            gradient_accumulation_steps=shape.microbatches,
            max_steps=10**6,
            learning_rate=1e-6,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = datasets.Dataset.from_dict({"prompt": texts})
        trainer = trl.DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=settings,
            train_dataset=data,
            processing_class=_words(shape),
            callbacks=[_Gate(self)],
        )
        self._watch(trainer)
        return trainer

    def _watch(self, trainer) -> None:
        """Times generation, and the teacher's hidden states."""
        self._timed(trainer, "_generate_single_turn", "generate")
        self._timed(trainer.teacher_model.base_model, "forward", "teacher")
        compute = trainer.compute_loss

        def remember(*arguments, **settings):
            loss = compute(*arguments, **settings)
            self._loss = float(loss) if self._loss is None else self._loss
            return loss

        trainer.compute_loss = remember

    def _timed(self, owner, name: str, part: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def run(*arguments, **settings):
            begin = time.perf_counter()
            value = function(*arguments, **settings)
            _wait()
            self._seconds[part] += time.perf_counter() - begin
            return value

        setattr(owner, name, run)

    def serve(self, answer_all: Callable[[], None]) -> None:
        def answer_and_end() -> None:
            answer_all()
            os._exit(0)

        threading.Thread(target=answer_and_end, daemon=True).start()
        self._trainer.train()

    def begin(self) -> None:
        """Of an update: waits until it is asked for."""
        self._asked.acquire()
        self._seconds.clear()
        self._begun = time.perf_counter()

    def end(self) -> None:
        """Of an update."""
        _wait()
        self._seconds["step"] = time.perf_counter() - self._begun
        self._done.release()

    def run(self, phase: str) -> dict[str, float]:
        self._asked.release()
        self._done.acquire()
        return dict(self._seconds) | {"update": self._seconds["step"] - self._seconds["generate"]}

    def describe(self) -> dict[str, Any]:
        return _peak() | {"loss": self._loss}


class _Gate(transformers.TrainerCallback):
    def __init__(self, side: Trl):
        self._side = side

    def on_step_begin(self, *_, **__) -> None:
        self._side.begin()

    def on_step_end(self, *_, **__) -> None:
        self._side.end()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
