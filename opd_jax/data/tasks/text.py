"""Open-ended text with a reference, judged by its overlap with it: lines with `prompt` and `answer`, and task.metric rouge or bleu."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from opd_jax.data.tasks import Example, Verdict, lines

METRICS = ("rouge", "bleu")


@dataclasses.dataclass(frozen=True)
class Text:
    split: lines.Split
    metric: str
    name = "text"
    verifiable = True

    @property
    def digest(self) -> str:
        return self.split.digest

    def examples(self, split: str) -> Sequence[Example]:
        return self.split.examples(split)

    def verify(self, example: Example, text: str) -> Verdict:
        """The metric as a reward from 0 to 1; equal texts have 1."""
        if text.strip() == example.answer.strip():
            return Verdict(1.0)
        reward = min(max(_scorer(self.metric)(example.answer, text), 0.0), 1.0)
        return Verdict(reward, f"{self.metric} {reward:.2f} with {example.answer[:80]!r}")


def read(path: str, *, metric: str, train_size: int, eval_size: int) -> Text:
    """Reads a file; see lines.read for what is held out. Raises UserError."""
    holds = "`prompt` and `answer`"
    return Text(lines.read(path, task="text", holds=holds, make=_example, train_size=train_size, eval_size=eval_size), metric)


def _example(line: lines.Line, index: int) -> Example:
    answer = line.required("answer")
    return Example(id=index, prompt=line.required("prompt"), solution=line.text("solution") or answer, answer=answer)


@functools.cache
def _scorer(metric: str) -> Callable[[str, str], float]:
    """(reference, text) -> score: F1 of ROUGE-L with stemming by rouge-score, or sentence BLEU of effective order by sacrebleu."""
    if metric == "rouge":
        from rouge_score import rouge_scorer

        rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        return lambda reference, text: rouge.score(reference, text)["rougeL"].fmeasure
    import sacrebleu

    bleu = sacrebleu.BLEU(effective_order=True)
    return lambda reference, text: bleu.sentence_score(text, [reference]).score / 100
