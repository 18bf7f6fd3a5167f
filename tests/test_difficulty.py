"""Success rates of the initial student: exact in the limit, the same however they are batched; the run that they choose prompts for."""

import dataclasses
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_model

from opd_jax import config as config_lib
from opd_jax import difficulty, metrics, parallel, train
from opd_jax.data import tokenizer
from opd_jax.data.contexts import Reader
from opd_jax.data.pipeline import Encoder, Pipeline
from opd_jax.data.tasks import Example, make
from opd_jax.difficulty import Measured
from opd_jax.glossary import depends_on_clock
from opd_jax.metrics import Progress
from opd_jax.model_io import LoadedModel
from opd_jax.models import transformer
from opd_jax.types import UserError

BYTES = tokenizer.byte()
EXAMPLES = [Example(id=7 * i + 2, prompt=f"{i}=") for i in range(5)]


def low_byte(example, text):
    """Of one token: many of a random student's pass, not all."""
    return float(text[:1].isascii())


def config_of(samples=8, batch_size=8, **task):
    blocks = {"difficulty_low": 0.1, "difficulty_samples": samples, "difficulty_prompts": 5, **task}
    rollout = config_lib.Rollout(batch_size=batch_size, max_new_tokens=1)
    return dataclasses.replace(config_lib.Config(), rollout=rollout, task=config_lib.Task(**blocks))


@pytest.fixture(scope="module")
def student():
    params, model = tiny_model(1, scale=2.0, vocab_size=BYTES.vocab_size)
    return LoadedModel(params, model, BYTES)


def measured(student, config, examples=EXAMPLES, judge=low_byte):
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        return difficulty.measure(config, None, judge, student, Encoder(Reader(BYTES), 16, "refuse"), mesh, examples)


def test_rates_tend_to_the_probability_of_success(student):
    """One token, whose law is known: within 4 standard errors."""
    samples = 256
    found = measured(student, config_of(samples, batch_size=256), EXAMPLES[:2]).rate_P
    for example, rate in zip(EXAMPLES, found, strict=False):
        ids = BYTES.encode_prompt(example.prompt)
        law = np.asarray(jax.nn.softmax(transformer.apply(student.params, student.config, jnp.array([ids]))[0, -1]), float)
        exact = sum(p for token, p in enumerate(law[: BYTES.vocab_size]) if low_byte(None, BYTES.decode([token])))
        assert 0.05 < exact < 0.95
        assert abs(rate - exact) < 4 * np.sqrt(exact * (1 - exact) / samples)


@pytest.mark.slow
def test_rates_depend_on_the_seed_and_the_example_alone(student):
    whole = measured(student, config_of(batch_size=8))
    assert len(set(whole.rate_P.tolist())) > 1 and whole.examples == EXAMPLES
    np.testing.assert_array_equal(measured(student, config_of(batch_size=64)).rate_P, whole.rate_P)  # 40 rows, filled up
    np.testing.assert_array_equal(measured(student, config_of(), EXAMPLES[3:]).rate_P, whole.rate_P[3:])
    other = measured(student, dataclasses.replace(config_of(), seed=1)).rate_P
    assert other.tolist() != whole.rate_P.tolist()


def test_a_judge_that_fails_is_no_success(student):
    def fails(example, text):
        raise RuntimeError("no idea")

    assert measured(student, config_of(), judge=fails).rate_P.tolist() == [0.0] * 5


def test_completions_are_judged_by_their_own_example(student):
    rates = measured(student, config_of(), judge=lambda example, text: example.id == EXAMPLES[1].id).rate_P
    assert rates.tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_candidates_are_drawn_by_the_seed_without_repetition():
    examples = make("arithmetic", path="", level=3, train_size=0, eval_size=1, seed=0).examples("train")
    first, again = (difficulty.candidates(config_of(difficulty_prompts=50), examples) for _ in range(2))
    assert first == again and len({example.id for example in first}) == 50
    assert difficulty.candidates(dataclasses.replace(config_of(difficulty_prompts=50), seed=1), examples) != first
    assert difficulty.candidates(config_of(difficulty_prompts=50), EXAMPLES) == EXAMPLES


def test_the_range_includes_its_ends():
    rates = Measured(EXAMPLES, np.array([0.0, 0.25, 0.5, 0.75, 1.0]), 4)
    assert [example.id for example in rates.kept(0.25, 0.75)] == [9, 16, 23]


def test_a_range_without_prompts_is_refused_with_what_was_measured():
    rates = Measured(EXAMPLES, np.array([0.0, 0.0, 0.5, 1.0, 0.0]), 4)
    with pytest.raises(UserError, match="none of the 5 prompts that were measured is within; .* of 4 samples: 0: 3, 0.5: 1, 1: 1; widen"):
        difficulty.chosen(config_of(difficulty_low=0.6, difficulty_high=0.9), rates)


def test_what_was_measured_is_read_again_and_nothing_else(tmp_path):
    config, rates = config_of(samples=4), Measured(EXAMPLES, np.array([0.0, 0.25, 0.5, 0.75, 1.0]), 4)
    difficulty.write(tmp_path, rates)
    found = difficulty.read(tmp_path, config, EXAMPLES)
    assert found.examples == EXAMPLES and found.digest == rates.digest
    np.testing.assert_array_equal(found.rate_P, rates.rate_P)
    path = tmp_path / difficulty.FILE
    whole = json.loads(path.read_text())
    for spoilt in ({}, whole | {"samples": 5}, whole | {"prompts": whole["prompts"][1:]}, whole | {"prompts": [1]}):
        path.write_text(json.dumps(spoilt))
        with pytest.raises(UserError, match="is not what this run measured of 5 prompts; restore it"):
            difficulty.read(tmp_path, config, EXAMPLES)
    path.unlink()
    with pytest.raises(UserError, match="difficulty.json: cannot be read"):
        difficulty.read(tmp_path, config, EXAMPLES)


def test_a_prompt_that_comes_twice_draws_by_an_id_of_its_own():
    """Also where ids are not below the number of examples, as those of a choice are."""
    encoder = Encoder(Reader(BYTES), 16, "refuse")
    some = [EXAMPLES[0], EXAMPLES[1]]  # ids 2 and 9: with the number of examples as their distance, 2 + 7 * ... would meet
    pipeline = Pipeline(some, encoder, prompts_per_step=16, group_size=2, seed=0, ids_below=10)
    ids = pipeline.batch(0).prompts.id_B
    assert len(set(ids.tolist())) == 32


@pytest.mark.parametrize(
    "task, words",
    [
        ({"difficulty_low": 0.6, "difficulty_high": 0.5}, "task.difficulty_low = 0.6 must be at most task.difficulty_high = 0.5"),
        ({"difficulty_high": 1.5}, "task.difficulty_high = 1.5 must be between 0 and 1"),
        ({"difficulty_samples": 0}, "task.difficulty_samples = 0 must be at least 1"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(task, words):
    with pytest.raises(UserError, match=words):
        config_lib.validate(config_of(**task))


def test_a_task_without_a_verifier_needs_a_judge():
    task = make("unconditional", path="", level=1, train_size=0, eval_size=1, seed=0)
    with pytest.raises(UserError, match="need a verifier, which task.name = 'unconditional' has not"):
        difficulty.check(config_of(), task)
    difficulty.check(dataclasses.replace(config_of(), reward=config_lib.Reward(judge="own:mine")), task)
    difficulty.check(config_of(difficulty_low=0.0), task)


# ---- a run with a judge and a choice


class Lines(Progress):
    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def phase(self, text):
        self.said.append(text)


def config_of_run():
    c = config_lib.default()
    c.steps, c.rollout.batch_size, c.rollout.group_size, c.rollout.max_new_tokens = 3, 8, 2, 2
    c.learner.decay_steps, c.signal.weight, c.reward.weight = 4, 0.0, 1.0
    c.student.init.hidden_size, c.student.init.num_hidden_layers, c.student.init.initializer_range = 16, 1, 0.3
    c.task.level, c.task.eval_size, c.eval.prompts, c.log.samples_every = 3, 0, 0, 1
    c.task.difficulty_low, c.task.difficulty_high, c.task.difficulty_prompts, c.task.difficulty_samples = 0.25, 0.75, 16, 4
    return c


@pytest.mark.slow
def test_a_run_with_a_judge_trains_on_what_it_chose_and_resumes(tmp_path):
    c, lines = config_of_run(), Lines()
    run = train.run(c, tmp_path / "run", judge=low_byte, progress=lines)
    first = next(run)
    run.close()  # the state is saved
    found = json.loads((tmp_path / "run" / difficulty.FILE).read_text())
    kept = {one["id"] for one in found["prompts"] if 0.25 <= one["rate"] <= 0.75}
    assert 0 < len(kept) < 16 and found["samples"] == 4
    assert any(line.startswith(f"{len(kept)} of 16 prompts are within task.difficulty_low") for line in lines.said)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["reward"]["judge"] == "own:low_byte"
    assert 0 < first["rollout/reward"] < 1 and "eval/accuracy" not in first

    with pytest.raises(UserError, match="reward.judge: 'own:low_byte' -> ''"):
        next(train.run(c, tmp_path / "run"))
    for workdir in ("run", "other"):  # taken up again, and in one go
        list(train.run(c, tmp_path / workdir, judge=low_byte))
    one, other = (metrics.read(tmp_path / workdir / "metrics.jsonl") for workdir in ("run", "other"))
    timeless = lambda record: {name: value for name, value in record.items() if not depends_on_clock(name)}
    assert [record["step"] for record in one] == [1, 2, 3] and list(map(timeless, one)) == list(map(timeless, other))

    task = make("arithmetic", path="", level=3, train_size=0, eval_size=0, seed=0).examples("train")
    prompts = {task[one["id"]].prompt: one["id"] for one in found["prompts"]}
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert Counter(prompts[sample["prompt"]] in kept for sample in samples) == {True: len(samples)} and samples

    path = tmp_path / "run" / difficulty.FILE
    path.write_text(path.read_text().replace('"rate": 0.0', '"rate": 0.5').replace('"rate": 1.0', '"rate": 0.5'))
    c.steps = 4
    with pytest.raises(UserError, match="difficulty.json: is not what this run began with"):
        list(train.run(c, tmp_path / "run", judge=low_byte))


@pytest.mark.parametrize("judge, words", [("no function", "judge = 'no function' cannot be called"), (None, "is no function; give it as")])
def test_a_judge_that_is_none_is_refused(judge, words, tmp_path):
    c = config_of_run()
    c.reward.judge = "own:mine" if judge is None else ""
    with pytest.raises(UserError, match=words):
        next(train.run(c, tmp_path / "run", judge=judge))
    assert not (tmp_path / "run").exists()
