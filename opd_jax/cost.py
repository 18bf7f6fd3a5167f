"""What a run costs by the field's accounting: 2 FLOPs per parameter and token forward, 6 in training; tokens generated and scored.

N counts the parameters that multiply a token: not the embedding, which is looked up, but the output projection, also where the two are
one matrix (a distillation computes it for each token, and in a small model it is much of N); of a mixture's experts those that a token
meets. Attention scores, recomputation (model.remat, second looks at logits), the optimizer, diagnostics, logged samples and evaluations
are not counted, and neither is padding. Source: Kaplan et al. 2020, Scaling Laws for Neural Language Models, 2.1, whose N leaves out the
output projection.
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig
from opd_jax.models.forward import Model


class Work(NamedTuple):
    """Of an update, or summed over those of a run."""

    flops: int
    generated_tokens: int  # completion tokens that a model sampled
    scored_tokens: int  # completion tokens that teacher and reference models read, once for each of them

    def plus(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class Account:
    """What the tokens of a run cost. Parameters are counted by `parameters`."""

    student: int  # parameters, those of an adapter included
    trained: int  # those that have a gradient: all, or the adapter's
    scorers: tuple[int, ...]  # parameters of each law of the teachers that reads the completions, after the teachers' prompts
    references: tuple[int, ...]  # of each that reads them after the student's
    generator: int  # parameters of the student where it samples; 0: it does not
    teacher_generator: int = 0  # of the teacher where it samples, after its own prompts; both 0: the data set's completions

    def work(self, *, prompt: int, teacher_prompt: int, completion: int, drawn: int | None = None, learnt: int | None = None) -> Work:
        """Of so many tokens of completions, and of their prompts as the student and as the teacher reads them, once per completion.

        `drawn` of the completions' tokens were sampled, the others observed or given; None: all. `learnt`: tokens, prompts included, of
        other completions, which the update learns from in their place (rollout.aggregate).
        """
        sampling = 2 * self.generator * (prompt + completion) + 2 * self.teacher_generator * (teacher_prompt + completion)
        scoring = 2 * sum(self.scorers) * (teacher_prompt + completion) + 2 * sum(self.references) * (prompt + completion)
        # Forward 2 N; back 2 N by the activations, and 2 by each parameter that is trained. Where all are: 6 N.
        training = (4 * self.student + 2 * self.trained) * (prompt + completion if learnt is None else learnt)
        sampled = completion if drawn is None else drawn
        generated = sampled if self.generator or self.teacher_generator else 0
        return Work(sampling + scoring + training, generated, completion * (len(self.scorers) + len(self.references)))


def account(
    writer: str, student: int, trained: int, teacher: int | None, *, scorers: tuple[int, ...] = (), references: tuple[int, ...] = ()
) -> Account:
    """Of steps whose completions `writer` wrote (student, teacher, dagger: both together, each reading all tokens; dataset or cache: none).

    corrected is counted as dagger is, as if what the student wrote behind the cut had as many tokens as what took its place. All numbers
    are parameters: of the student, of the teacher that may write, and of each model that scores every completion.
    """
    both = (student, teacher)
    generators = {"student": (student, 0), "teacher": (0, teacher), "dataset": (0, 0), "cache": (0, 0), "dagger": both, "corrected": both}
    return Account(student, trained, scorers, references, *generators[writer])


def writing(teacher: int, prompt: int, drawn: int) -> Work:
    """Of a teacher of so many parameters that reads prompts and writes texts of so many tokens for teachers to read."""
    return Work(2 * teacher * (prompt + drawn), drawn, 0)


def parameters(config: ModelConfig | Model, params: Any) -> int:
    """N of a model; of a model of the user's, whose parts are unknown, all numbers that its `params` hold."""
    return active_parameters(config) if isinstance(config, ModelConfig) else size(params)


def active_parameters(config: ModelConfig) -> int:
    """N by the shape of a model alone; see above."""
    total = 0
    for path, spec in jax.tree_util.tree_leaves_with_path(transformer.param_specs(config)):
        name, numbers = path[-1].key, size(jax.ShapeDtypeStruct(spec.shape, "float32"))
        if name.startswith("expert_"):
            numbers = numbers // config.num_experts * config.experts_per_token
        if name != "embed" or config.tie_word_embeddings:
            total += numbers
    return total


def size(params: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def totals(info: dict, account: Account) -> Work:
    """What a run has cost so far, from what its checkpoint remembers.

    Runs of versions that did not count remember their completion tokens alone: from these everything follows but what prompts cost.
    """
    if all(name in info for name in Work._fields):
        return Work(*(info[name] for name in Work._fields))
    return account.work(prompt=0, teacher_prompt=0, completion=info["tokens_total"])
