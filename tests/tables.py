"""Models whose parameters are their logits: a config's loss and gradient by the code that trains, on completions that the tests choose."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import config as config_lib
from opd_jax import labels, learner, objective, parallel, teachers
from opd_jax.batches import BatchMaker, Made
from opd_jax.data import tokenizer
from opd_jax.data.contexts import Reader
from opd_jax.data.pipeline import Encoder, Pipeline, encode_completions
from opd_jax.data.tasks import Example, Verdict
from opd_jax.data.teacher_prompts import TeacherPrompts
from opd_jax.numerics.estimators import Context
from opd_jax.numerics.heads import DenseHead
from opd_jax.replay import Recalled
from opd_jax.rollout import from_completions
from opd_jax.types import View

BYTES = tokenizer.byte()
LENGTH = 6  # tokens of a completion at most
ROWS = 24
# Of a rule that is past its first updates: gamma is 0.1 * 0.5 / 0.2.
ADAPTED = {name: jnp.float32(value) for name, value in {"share": 0.5, "size": 0.2, "budget": 0.1, "updates": 10.0}.items()}
# Groups of 8 or of 4: the last 8 have equal rewards; "bcabca" and the like are cut off before their stop token.
TEXTS = ("aa", "b", "caa", "abcb", "bcabca", "cab", "a", "cc") + ("bcabb", "ca", "b", "aabaca", "c", "ab", "bb", "abb")
TEXTS += ("b", "cbc", "bbcc", "c", "bcbcbc", "bc", "ccc", "cb")


@dataclasses.dataclass(frozen=True)
class Table:
    """Says what its parameters say, logits [B, T, V] of one batch, whatever it reads before the completions."""

    vocab_size: int = BYTES.vocab_size
    max_position_embeddings: int = 2048
    pad_token_id: int | None = None
    valid_vocab_size: int | None = None

    def hidden(self, params: jax.Array, view: View) -> DenseHead:
        return DenseHead(params)


@dataclasses.dataclass(frozen=True)
class Bigrams:
    """Its parameters are the logits [V, V] of the token after each token: reads, samples and splits as a transformer, and compiles fast."""

    vocab_size: int
    pad_token_id: int | None = None
    max_position_embeddings: int = 2048
    valid_vocab_size: int | None = None

    def hidden(self, params: jax.Array, view: View) -> DenseHead:
        return DenseHead(params[jnp.concatenate([view.prompt_BS[:, -1:], view.completion_BT[:, :-1]], axis=1)])

    def prefill(self, params: jax.Array, tokens_BS: jax.Array, mask_BS: jax.Array, *, cache_length: int) -> tuple[jax.Array, tuple]:
        return params[tokens_BS[:, -1]], ()

    def decode_step(self, params: jax.Array, tokens_B: jax.Array, cache: tuple) -> tuple[jax.Array, tuple]:
        return params[tokens_B], cache


class Letters:
    """A task whose reward is 1 from two letters a on, and half of it for one."""

    name, verifiable, digest = "letters", True, ""

    def __init__(self, tags=("",), prompts=ROWS):
        self._tags, self._prompts = tags, prompts

    def examples(self, split):
        return [Example(i, f"{i}=", solution="ab", tag=self._tags[i % len(self._tags)]) for i in range(self._prompts)]

    def verify(self, example, text):
        reward = min(text.count("a"), 2) / 2
        return Verdict(reward, "" if reward == 1 else f"{2 - 2 * reward:g} missing", well_formed="c" not in text)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a published loss is a function of, and our loss of it."""

    config: config_lib.Config
    made: Made
    tokens_BT: np.ndarray
    logits: dict[str, np.ndarray]  # of student, reference and each teacher
    behaviour_logp_BT: np.ndarray
    reward_B: np.ndarray
    stopped_B: np.ndarray
    gap: tuple[int, int]
    tag_B: list[str]
    evaluate: Callable  # student's logits -> (loss, sums for the metrics, gradient)


def load(path: str, fields: dict | None = None) -> config_lib.Config:
    """A config file's config for these completions, with some fields changed."""
    found = config_lib.load_config(path)
    found.update_from_flattened_dict({"rollout.batch_size": ROWS, "rollout.max_new_tokens": LENGTH} | (fields or {}))
    return config_lib.parse(found)


def case(config: config_lib.Config, *, seed: int = 0, on_policy: bool = False, texts=TEXTS, gap=(0, 0)) -> Case:
    """Random laws of everybody whom the config asks. Call it in float64.

    `on_policy`: the completions' law is the student's; `gap`: from where to where somebody else has written them.
    """
    rng = np.random.default_rng(seed)
    has_teacher = config_lib.has_teacher(config)
    goal = objective.from_config(config, has_teacher=has_teacher)
    tags = tuple(map(config_lib.names_in, (config.masking.tags, config.reward.tags)))
    tags = sum(tags, ()) or teachers.tags(config) or ("",)
    names = list(teachers.asked(config)) if has_teacher else []
    tokens_BT, mask_BT, stopped_B = encode_completions(texts, BYTES, max_new_tokens=config.rollout.max_new_tokens)
    # Peaked laws beside flat ones; what all models share is more than what tells them apart.
    shared = rng.normal(size=(*tokens_BT.shape, Table.vocab_size)) * rng.choice([1.0, 6.0], (*tokens_BT.shape, 1))
    logits = {name: shared + rng.normal(size=shared.shape) for name in ("student", teachers.REFERENCE, *names)}
    logp_BT = np.take_along_axis(jax.nn.log_softmax(jnp.asarray(logits["student"])), tokens_BT[..., None], -1)[..., 0]
    behaviour_BT = np.asarray(logp_BT) + (0 if on_policy else 0.5 * rng.normal(size=tokens_BT.shape))
    task, group = Letters(tags, len(texts) // config.rollout.group_size), config.rollout.group_size
    encoder, mesh = Encoder(Reader(BYTES), config.rollout.max_prompt_length, config.rollout.overlong), parallel.make_mesh()
    inform = TeacherPrompts(config.context.privileged, encoder) if config.context.privileged.reads else None
    prompts = Pipeline(task.examples("train"), encoder, prompts_per_step=len(texts) // group, group_size=group, seed=0).batch(0)
    with jax.set_mesh(mesh):
        rollout = from_completions(*parallel.shard_batch((tokens_BT, mask_BT, stopped_B, prompts.prompts.id_B), mesh))
        outside_T = (np.arange(tokens_BT.shape[1]) < gap[0]) | (np.arange(tokens_BT.shape[1]) >= gap[1])
        written = {"mask_BT": rollout.mask_BT & outside_T[None], "present_BT": rollout.mask_BT} if gap[1] else {}
        rollout = rollout.replace(behaviour_logp_BT=jnp.asarray(behaviour_BT), **written)
        scorer, recalled = jnp.asarray(logits[names[0]]) if names else None, None
        if config_lib.keeps_scores(config):
            scores = labels.make_scorer(labels.form_of(goal), Table())(scorer, prompts.teacher_prompts, rollout)
            recalled = Recalled(prompts, rollout, labels.target(scores))
        made = BatchMaker(config, goal, task, BYTES, inform, mesh, teacher=Table())(prompts, rollout, scorer, recalled)
    bank = teachers.make_bank(config, {name: Table() for name in names}, Table() if config_lib.needs_reference(config) else None)
    frozen = {name: jnp.asarray(logits[name]) for name in (teachers.REFERENCE, *names)}

    # Laws are arguments of what is compiled: of constants the compiler would sort the vocabulary itself.
    gradient = jax.jit(functools.partial(learner.gradient, goal, Table(), bank))
    kept = frozen[names[0]] if names and bank.keeps else None

    def evaluate(student=None):
        student = logits["student"] if student is None else student
        return gradient(jnp.asarray(student), frozen, made.batch, kept=kept, adaptive=ADAPTED)

    rows = [example for example in prompts.examples for _ in range(group)]
    return Case(
        config=config,
        made=made,
        tokens_BT=tokens_BT,
        logits=logits,
        behaviour_logp_BT=behaviour_BT,
        reward_B=np.array([task.verify(example, text).reward for example, text in zip(rows, texts, strict=True)]),
        stopped_B=stopped_B,
        gap=gap,
        tag_B=[example.tag for example in rows],
        evaluate=evaluate,
    )


def of_each_token(config: config_lib.Config | objective.Objective, student_V, teacher_V, reference_V=None) -> tuple[float, np.ndarray]:
    """(mean loss, gradients [V, V] over the student's logits) of completions of one token, each token of the vocabulary once."""
    own = isinstance(config, objective.Objective)
    goal = config if own else objective.from_config(config, has_teacher=True)
    reference = None if reference_V is None else Table()
    bank = teachers.single(Table()) if own else teachers.make_bank(config, {"teacher": Table()}, reference)
    tokens_B1 = jnp.arange(len(student_V))[:, None]
    read = View(jnp.zeros_like(tokens_B1), jnp.ones(tokens_B1.shape, bool), tokens_B1)
    batch = learner.make_batch(goal, read, read, Context(jnp.ones(tokens_B1.shape, bool)))
    laws = [("teacher", teacher_V)] if reference_V is None else [("teacher", teacher_V), (teachers.REFERENCE, reference_V)]
    frozen = {name: jnp.tile(jnp.asarray(law_V), (len(tokens_B1), 1, 1)) for name, law_V in laws}
    losses = jax.jit(lambda student: learner.gradient(goal, Table(), bank, student, frozen, batch))
    loss, _, gradient = losses(jnp.tile(jnp.asarray(student_V), (len(tokens_B1), 1, 1)))
    return float(loss), len(tokens_B1) * np.asarray(gradient)[:, 0]
