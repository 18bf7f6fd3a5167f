"""Completions with an environment's answers: as if written one token after the other, learnt from where drawn, the same on resume."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods import ROOT
from test_sources import without_clock

from opd_jax import config as config_lib
from opd_jax import environments, evaluate, metrics, objective, parallel, rollout, sampler, train
from opd_jax.analysis import study_job
from opd_jax.batches import BatchMaker
from opd_jax.config.loading import load_config
from opd_jax.context_gap import ContextGap
from opd_jax.data import pipeline
from opd_jax.data.tasks.calculator import CalculatorTask
from opd_jax.data.tokenizer import Tokenizer, byte
from opd_jax.environments import Observation
from opd_jax.model_io import LoadedModel
from opd_jax.numerics.token_stats import DenseHead, Target
from opd_jax.turns import Turns, _Log
from opd_jax.types import Prompts, UserError

T, ROWS, STATES, KEY = 24, 12, 97, jax.random.key(5)
TASK = CalculatorTask(level=2, train_size=0, eval_size=4, seed=0)
STOP = byte().eos_ids[0]
WRITES = np.frombuffer(b"<>>12+", np.uint8)


@dataclasses.dataclass(frozen=True)
class Chatter:
    """Writes calls, right and wrong ones: its next token depends on a sum over all that it has read."""

    vocab_size: int = 259
    max_position_embeddings: int = 64
    pad_token_id: int = 258
    valid_vocab_size: int | None = None

    def prefill(self, params, tokens_BS, mask_BS, *, cache_length):
        return self.decode_step(params, jnp.where(mask_BS, tokens_BS, 0).sum(1), jnp.zeros(len(tokens_BS), jnp.int32))

    def decode_step(self, params, tokens_B, state_B):
        state_B = (31 * state_B + tokens_B) % STATES
        return params[state_B], state_B


class Lengths:
    """Answers with the length of the turn, so that one that begins elsewhere is seen."""

    closes = ">"

    def answer(self, turn):
        return Observation(f"{len(turn)};")


@functools.cache
def table():
    """Logits by state."""
    logits = np.full((STATES, 259), -np.inf, np.float32)
    rng = np.random.default_rng(0)
    logits[:, WRITES] = rng.normal(size=(STATES, len(WRITES)))
    logits[:, STOP] = -1.5
    return logits


def prompts(rows=ROWS):
    tokens = np.random.default_rng(1).integers(0, 256, (rows, 4)).astype(np.int32)
    return Prompts(jnp.asarray(tokens), jnp.ones((rows, 4), bool), jnp.arange(rows, dtype=jnp.uint32))


def written(max_turns=9, length=T, read=None, mesh=None, **law):
    read, mesh = read or prompts(), mesh or parallel.make_mesh()
    write = functools.partial(rollout.sample, jnp.asarray(table()), Chatter(), read, key=KEY, max_new_tokens=length, **law)
    return Turns(Lengths(), byte(), max_turns, mesh).write(write, read.id_B, length)


def one_after_the_other(read, row, max_turns, length=T):
    """(tokens, which were drawn, their log-probs, stopped) of a row by the definition, without a beginning that is given again."""
    state, tokens, drawn, logps = 0, [], [], []

    def reads(token):
        nonlocal state
        state = (31 * state + token) % STATES

    reads(int(read.tokens_BS[row].sum()))
    turns, start = 1, 0
    while len(tokens) < length:
        logp = np.asarray(jax.nn.log_softmax(table()[state]), np.float64)
        uniform = float(sampler.uniforms(KEY, read.id_B[row : row + 1], jnp.int32(len(tokens)))[0])
        token = int(np.searchsorted(np.cumsum(np.exp(logp)), uniform * np.exp(logp).sum(), side="right"))
        reads(token)
        tokens, drawn, logps = [*tokens, token], [*drawn, True], [*logps, logp[token]]
        if token == STOP:
            return tokens, drawn, logps, True
        if token == ord(">"):
            answer = list(f"{len(tokens) - start};".encode())
            if turns == max_turns or len(tokens) + len(answer) >= length:
                break
            for one in answer:
                reads(one)
            tokens, drawn, logps = tokens + answer, drawn + [False] * len(answer), logps + [0.0] * len(answer)
            turns, start = turns + 1, len(tokens)
    return tokens, drawn, logps, False


@pytest.mark.parametrize("max_turns", [1, 2, 9])
def test_turns_are_what_one_token_after_the_other_gives(max_turns):
    read, found = prompts(), written(max_turns)
    ends = set()
    for row in range(ROWS):
        tokens, drawn, logps, stopped = one_after_the_other(read, row, max_turns)
        stands = np.asarray(found.standing_BT)[row]
        assert stands.tolist() == [True] * len(tokens) + [False] * (T - len(tokens))
        assert np.asarray(found.tokens_BT)[row][stands].tolist() == tokens
        assert np.asarray(found.mask_BT)[row][stands].tolist() == drawn and not np.asarray(found.mask_BT)[row][~stands].any()
        for name in ("logp_BT", "behaviour_logp_BT"):
            np.testing.assert_allclose(np.asarray(getattr(found, name))[row], np.pad(logps, (0, T - len(logps))), atol=1e-5)
        assert bool(found.stopped_B[row]) == stopped
        ends.add("stop" if stopped else "length" if len(tokens) == T else "turn")
    assert "stop" in ends and ("turn" if max_turns < 9 else "length") in ends
    assert np.asarray(found.standing_BT & ~found.mask_BT).any() == (max_turns > 1)


def test_more_turns_change_nothing_that_fewer_have_written():
    few, many = written(2), written(9)
    for row in range(ROWS):
        stands = np.asarray(few.standing_BT)[row]
        for name in ("tokens_BT", "mask_BT", "logp_BT"):
            np.testing.assert_array_equal(np.asarray(getattr(few, name))[row][stands], np.asarray(getattr(many, name))[row][stands])
    assert np.asarray(many.standing_BT).sum() > np.asarray(few.standing_BT).sum()


def test_without_a_call_turns_are_what_sample_draws():
    silent, read = table().copy(), prompts()
    silent[:, ord(">")] = -np.inf
    write = functools.partial(rollout.sample, jnp.asarray(silent), Chatter(), read, key=KEY, max_new_tokens=T, stop_ids=(STOP,))
    plain, found = write(), Turns(TASK.environment, byte(), 4, parallel.make_mesh()).write(write, read.id_B, T)
    for name in ("tokens_BT", "mask_BT", "logp_BT", "behaviour_logp_BT", "stopped_B", "id_B", "standing_BT"):
        np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))


def test_eight_devices_write_the_same_turns():
    read, mesh = prompts(16), parallel.make_mesh(8, 1, 1)
    one = written(4, read=read)
    with jax.set_mesh(mesh):
        eight = written(4, read=parallel.shard_batch(read, mesh), mesh=mesh)
    for name in ("tokens_BT", "mask_BT", "present_BT", "stopped_B", "id_B"):
        np.testing.assert_array_equal(getattr(eight, name), getattr(one, name))


def test_calls_end_with_a_token_that_ends_in_the_mark():
    assert Turns(TASK.environment, byte(), 2, parallel.make_mesh()).pauses == (ord(">"),)

    class Other(type(TASK.environment)):
        closes = "…"  # three bytes, and no token for them

    with pytest.raises(UserError, match="rollout.max_turns = 2: the tokenizer has no token that ends in '…'"):
        Turns(Other(), byte(), 2, parallel.make_mesh()).pauses  # noqa: B018


def test_of_a_vocabulary_with_longer_tokens_those_that_end_in_the_mark_end_turns():
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers

    characters = {chr(i): i - 32 for i in range(33, 127)} | {"Ġ": 0}
    vocab = characters | {"7>": 200, ">1": 201, "<7>1": 202, "Ġ>": 203}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<eos>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    made = Turns(TASK.environment, Tokenizer(fast, eos_ids=[fast.eos_token_id], adds_bos=False), 2, parallel.make_mesh())
    assert made.pauses == (ord(">") - 32, 200, 203)


def test_the_context_gap_is_measured_with_answers():
    mesh, model = parallel.make_mesh(), LoadedModel(params=jnp.asarray(table()), config=Chatter(), tokenizer=byte())
    settings = config_lib.Privileged(reads="solution")
    encoder = pipeline.Encoder(byte(), 32, "refuse")
    examples = [TASK.example("eval", i) for i in range(4)]
    told = []
    for turns in (None, Turns(TASK.environment, byte(), 4, mesh)):
        gap = ContextGap(model, TASK, examples, settings, encoder, batch_size=4, max_new_tokens=T, mesh=mesh, seed=0, turns=turns)
        seen = []
        gap = dataclasses.replace(gap, task=dataclasses.replace(Watched(2, 0, 4, 0), seen=seen))
        with jax.set_mesh(mesh):
            gap._accuracy([example.prompt for example in examples], range(4))
        told.append(sum(turn.answered for text in seen for turn in environments.turns(TASK.environment, text)))
    assert told[1] > 2 > told[0]


@dataclasses.dataclass(frozen=True)
class Watched(CalculatorTask):
    """Remembers what it was asked to judge."""

    seen: list = dataclasses.field(default_factory=list)

    def verify(self, example, text):
        self.seen.append(text)
        return super().verify(example, text)


@pytest.mark.parametrize("length, room", [(6, True), (5, False), (3, False)])
def test_an_answer_is_given_where_a_token_fits_behind_it(length, room):
    log = _Log.empty(1, length)
    log.tokens_BT[0, :3], log.length_B[0] = list(b"<1>"), 3
    Turns(Lengths(), byte(), 9, parallel.make_mesh())._answer(log, last=False)
    assert (int(log.length_B[0]), bool(log.ended_B[0])) == ((5, False) if room else (3, True))
    assert bytes(log.tokens_BT[0].tolist()).rstrip(b"\0") == (b"<1>3;" if room else b"<1>")


# ---- the loss


def batch_of_solutions(**blocks):
    """(batch, its completions, objective) of two prompts with two completions each, some of them with a call that is none."""
    settings = {"rollout": config_lib.Rollout(batch_size=4, group_size=2, max_new_tokens=T, max_turns=3)}
    settings |= {"loss": config_lib.Loss(normaliser="sequence_sum")} | blocks
    config = dataclasses.replace(config_lib.Config(), **settings)
    goal, mesh = objective.from_config(config, has_teacher=True), parallel.make_mesh()
    read = pipeline.Pipeline(
        TASK.examples("train"), pipeline.Encoder(byte(), 32, "refuse"), prompts_per_step=2, group_size=2, seed=0
    ).batch(0)
    right = [example.solution for example in read.examples]
    texts = [right[0], "<1+>?;" + right[0][-3:], right[1], "<x>?;" + right[1]]
    tokens_BT, mask_BT, stopped_B, present_BT = pipeline.encode_turns(texts, TASK.environment, byte(), max_new_tokens=T)
    arrays = parallel.shard_batch((tokens_BT, mask_BT, stopped_B, read.prompts.id_B, present_BT), mesh)
    found = rollout.from_completions(*arrays)
    return BatchMaker(config, goal, TASK, byte(), None, mesh)(read, found), found, goal


def gradient(goal, made, found):
    """(gradient by the student's logits [B, T, V], log-ratios [B, T], law of the student) in float32, random models."""
    rng = np.random.default_rng(3)
    student, teacher = (jnp.asarray(rng.normal(size=(4, T, 259)), jnp.float32) for _ in range(2))

    def loss(logits_BTV):
        targets = {"teacher": Target((DenseHead(teacher),)), "reference": None}
        batch = made.batch
        return objective.loss(goal, DenseHead(logits_BTV), targets, found.tokens_BT, batch.mask_BT, batch.shares)[0]

    logp, logq = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (student, teacher))
    token_BT1 = np.asarray(found.tokens_BT)[..., None]
    ratio_BT = (np.take_along_axis(logq, token_BT1, -1) - np.take_along_axis(logp, token_BT1, -1))[..., 0]
    return np.asarray(jax.grad(loss)(student)), ratio_BT, np.exp(logp)


@pytest.mark.parametrize("credit, gamma", [("to_go", 1.0), ("discounted", 0.5)])
def test_the_return_goes_through_an_observation_and_observations_have_no_gradient(credit, gamma):
    """By hand, from a real batch: a token answers for the drawn tokens from it on, and each of those discounts, observations do not."""
    signal = config_lib.Signal(support="sampled")
    made, found, goal = batch_of_solutions(signal=signal, estimator=config_lib.Estimator(credit=credit, gamma=gamma))
    grads, ratio_BT, p = gradient(goal, made, found)
    mask_BT, stands_BT = np.asarray(found.mask_BT), np.asarray(found.standing_BT)
    observed_BT = stands_BT & ~mask_BT
    assert observed_BT.any(1).all() and not grads[observed_BT].any() and not grads[~stands_BT].any()
    for row in range(4):
        places = np.flatnonzero(mask_BT[row])
        for number, t in enumerate(places):
            advantage = sum(gamma**step * ratio_BT[row, u] for step, u in enumerate(places[number:]))
            expected = -advantage * (np.eye(259)[int(found.tokens_BT[row, t])] - p[row, t]) / 4
            np.testing.assert_allclose(grads[row, t], expected, atol=1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "nll"])
def test_no_divergence_learns_from_observations(divergence):
    made, found, goal = batch_of_solutions(signal=config_lib.Signal(divergence))
    grads, *_ = gradient(goal, made, found)
    mask_BT = np.asarray(found.mask_BT)
    assert not grads[~mask_BT].any() and grads[mask_BT].any(-1).all()


def test_malformed_calls_are_left_to_the_reward():
    blocks = {"masking": config_lib.Masking(malformed="drop"), "reward": config_lib.Reward(weight=1.0, advantage="rloo")}
    made, found, goal = batch_of_solutions(**blocks)
    malformed_B = np.array([not attempt.well_formed for attempt in made.judged.attempts])
    assert malformed_B.tolist() == [False, True, False, True]
    assert made.judged.attempts[3].text.startswith("<x>?;<")  # verdicts are on all that stands there
    own, rewarded = (np.asarray(share.context.mask_BT) for share in made.batch.shares)
    np.testing.assert_array_equal(own, np.asarray(found.mask_BT) & ~malformed_B[:, None])
    np.testing.assert_array_equal(rewarded, found.mask_BT)


# ---- evaluation and runs


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_the_sources_of_a_config_write_in_turns(source):
    settings = config_lib.Rollout(source=source, batch_size=4, group_size=1, max_new_tokens=T, max_turns=3, temperature=0.9)
    mesh, params = parallel.make_mesh(), {"student": jnp.asarray(table()), "teacher": jnp.asarray(table()[::-1])}
    made = {"tokenizer": byte(), "student": Chatter(), "teacher": Chatter(), "seed": 0, "mesh": mesh}
    read = pipeline.Pipeline(
        TASK.examples("train"), pipeline.Encoder(byte(), 32, "refuse"), prompts_per_step=4, group_size=1, seed=0
    ).batch(2)
    found = rollout.make_source(settings, **made, environment=TASK.environment)(params["student"], params["teacher"], read, 2)
    key = jax.random.fold_in(jax.random.key(0), 2)
    settings = {"key": key, "max_new_tokens": T, "temperature": 0.9}
    write = functools.partial(rollout.sample, params[source], Chatter(), jax.tree.map(jnp.asarray, read.prompts), **settings)
    expected = Turns(TASK.environment, byte(), 3, mesh).write(write, read.prompts.id_B, T)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.asarray(found.standing_BT & ~found.mask_BT).any()


def test_a_study_of_gradients_has_one_turn(tmp_path):
    c = load_config(str(ROOT / "configs" / "gradient_study.py"))
    c.rollout.max_turns = 2
    with pytest.raises(config_lib.ConfigError, match="rollout.max_turns = 2: a study samples completions of one turn; use 1"):
        study_job.run(config_lib.parse(c), tmp_path, make_model=None, progress=None)


def test_every_model_is_evaluated_with_the_environment():
    mesh = parallel.make_mesh()
    model = LoadedModel(params=jnp.asarray(table()), config=Chatter(), tokenizer=byte())
    made = evaluate.Evaluator(
        student=model,
        teacher=model,
        task=TASK,
        examples=[TASK.example("eval", i) for i in range(4)],
        samples=2,
        batch_size=8,
        max_new_tokens=T,
        student_prompts=pipeline.Encoder(byte(), 16, "refuse"),
        teacher_prompts=None,
        seed=0,
        mesh=mesh,
        turns=Turns(TASK.environment, byte(), 4, mesh),
    )
    with jax.set_mesh(mesh):
        for purpose in (evaluate.GREEDY, evaluate.SAMPLED, evaluate.TEACHER):
            batches = made._sample(model.params, model.config, purpose)
            texts = [byte().decode(ids) for ids in evaluate._token_ids(batches)]
            assert any(turn.answered for text in texts for turn in environments.turns(TASK.environment, text))
            if purpose == evaluate.SAMPLED:
                values = made._read_samples(batches)
                assert (values["eval/turns"], values["eval/call_errors"]) == environments.counts(TASK.environment, texts)


def tools_config(tmp_path_factory):
    c = load_config("configs/methods/tools.py:tiny,reward=0.5")
    c.cache_dir = str(tmp_path_factory.getbasetemp() / "models")
    c.rollout.group_size, c.learner.microbatches, c.steps, c.checkpoint.every = 2, 2, 4, 2
    c.estimator.credit, c.signal.support, c.log.samples_every, c.log.samples = "to_go", "sampled", 1, 16
    return c


@pytest.mark.slow
def test_leaving_early_and_resuming_equals_one_run(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(ROOT)
    whole = list(train.run(tools_config(tmp_path_factory), tmp_path / "whole"))
    for record in train.run(tools_config(tmp_path_factory), tmp_path / "left"):
        if record["step"] == 2:
            break
    list(train.run(tools_config(tmp_path_factory), tmp_path / "left"))
    again = without_clock(metrics.read(tmp_path / "left" / "metrics.jsonl"))
    for one, other in zip(again, without_clock(whole), strict=True):
        assert one == other
    assert (tmp_path / "left" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    lines = metrics.read(tmp_path / "whole" / "samples.jsonl")
    for record in whole[1:]:
        texts = [line["completion"] for line in lines if line["step"] == record["step"]]
        assert (record["rollout/turns"], record["rollout/call_errors"]) == environments.counts(TASK.environment, texts)
    answered = [line for line in lines if "given" in line]
    assert answered and sum(record["rollout/turns"] for record in whole[1:]) > 4
    for line in answered:
        observed = "".join(line["tokens"][position] for position in line["given"])
        turns = environments.turns(TASK.environment, line["completion"])
        assert observed == "".join(turn.observation.text for turn in turns if turn.answered)
