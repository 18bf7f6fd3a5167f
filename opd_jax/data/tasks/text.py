"""Open-ended text against a reference: the reward is a similarity from 0 to 1, by the library that papers report it with.

`task.path` is a file of lines with `prompt` and `answer`. `task.metric` is "rouge" (rouge-score: F1 of ROUGE-L, lower case, no stemmer,
words of Latin letters and digits only) or "bleu" (sacrebleu: sentence BLEU with its defaults, effective order, divided by 100). Equal
text gives 1, whatever its script; only 1 counts as a success in eval/accuracy.
"""

import dataclasses
import functools

from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.tasks.lines import FileTask, Line, hold_out
from opd_jax.data.tasks.lines import read as read_lines


@dataclasses.dataclass(frozen=True)
class Text(FileTask):
    metric: str = "rouge"
    name = "text"

    def verify(self, example: Example, text: str) -> Verdict:
        """Similarity with `answer`, up to white space at the ends."""
        given, reference = text.strip(), example.answer.strip()
        value = 1.0 if given == reference else min(1.0, METRICS[self.metric](given, reference))
        return Verdict(value, "" if value == 1.0 else f"{self.metric} {value:.2f} against the reference {reference[:200]!r}")


def rouge(text: str, reference: str) -> float:
    """F1 of ROUGE-L."""
    return _scorer().score(reference, text)["rougeL"].fmeasure


@functools.cache
def _scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def bleu(text: str, reference: str) -> float:
    """Sentence BLEU, from 0 to 1."""
    import sacrebleu

    return sacrebleu.sentence_bleu(text, [reference]).score / 100


METRICS = {"rouge": rouge, "bleu": bleu}


def read(path: str, *, metric: str, train_size: int, eval_size: int) -> Text:
    """Reads a file; the last lines are held out, see lines.hold_out. Raises UserError."""
    lines, digest = read_lines(path, task="text", holds="`prompt` and `answer`")
    examples = [_example(line, index) for index, line in enumerate(lines)]
    return Text(*hold_out(path, examples, train_size=train_size, eval_size=eval_size), digest, metric=metric)


def _example(line: Line, index: int) -> Example:
    answer = line.required("answer")
    return Example(index, line.required("prompt"), solution=line.text("solution") or answer, answer=answer)
