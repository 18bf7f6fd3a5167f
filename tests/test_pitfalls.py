"""The mistakes that distillation code makes, as its users reported them: one test each, on a run's own objective, batches and updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from models import context_of, ragged_prompts, ragged_rollout, tiny_model
from tables import BYTES, LENGTH, Bigrams, Letters, Table, case, load, of_each_token

from opd_jax import claim, learner, objective, rollout, score, teachers, train
from opd_jax import config as config_lib
from opd_jax.config import ConfigError
from opd_jax.models import transformer
from opd_jax.numerics.estimators import REGISTRY, Context
from opd_jax.numerics.token_stats import DenseHead, Target
from opd_jax.types import UserError, View, view

QUICKSTART = "configs/quickstart.py"
V = 7
SELF = {"teacher.recipe": "", "teacher.path": "student_init"}


def laws(seed, count=2, size=V, scale=1.0):
    return scipy.special.log_softmax(scale * np.random.default_rng(seed).normal(size=(count, size)), axis=-1)


def batch_for(goal, tokens_BT, mask_BT):
    """A batch of completions that anyone reads after nothing."""
    read = View(jnp.zeros((len(tokens_BT), 1), jnp.int32), jnp.ones((len(tokens_BT), 1), bool), jnp.asarray(tokens_BT))
    return learner.make_batch(goal, read, read, Context(jnp.asarray(mask_BT)))


# ---- 1: what must not be differentiated


@pytest.mark.parametrize("signal", [("reverse_kl", "full"), ("jsd", "full"), ("reverse_kl", "sampled"), ("forward_kl", "topk_teacher")])
def test_1_a_teacher_has_no_gradient(signal, float64):
    k = {"signal.k": 3} if signal[1].startswith("topk") else {}
    goal = objective.from_config(load(QUICKSTART, {"signal.divergence": signal[0], "signal.support": signal[1]} | k), has_teacher=True)
    student, teacher = (jnp.asarray(x)[None, None] for x in laws(0))
    batch = batch_for(goal, np.array([[2]]), np.ones((1, 1), bool))
    loss = lambda student, teacher: learner.gradient(goal, Table(), teachers.single(Table()), student, {"teacher": teacher}, batch)[0]
    own, theirs = jax.grad(loss, argnums=(0, 1))(student, teacher)
    assert (theirs == 0).all() and jnp.abs(own).max() > 1e-2


def test_1_the_log_ratio_as_a_loss_teaches_nothing(float64):
    """E grad (log p(y) - log q(y)) = 0; as the constant weight of log p(y) its mean is the gradient of the reverse KL."""
    p, q = laws(1)
    sampled = load(QUICKSTART, {"signal.support": "sampled"})
    naive = objective.Objective((objective.Part("distillation", REGISTRY["k1_loss"]),), LENGTH, True)
    mean = lambda config: np.exp(p) @ of_each_token(config, p, q)[1]
    np.testing.assert_allclose(mean(naive), 0, atol=1e-13)
    np.testing.assert_allclose(mean(sampled), of_each_token(load(QUICKSTART), p, q)[1][0], atol=1e-13)
    assert np.abs(mean(sampled)).max() > 1e-2


# ---- 2, 3: divergences


def test_2_beta_of_jsd_counts_from_the_forward_kl(float64):
    """A student that misses a token of the teacher: the forward KL is large, the reverse one is not. GKD's config, its own argument."""
    p, q = np.log([0.998, 0.001, 0.001]), np.log([0.4, 0.3, 0.3])
    at = lambda arg: of_each_token(load(f"configs/methods/gkd.py:{arg}"), p, q)[0]
    forward, reverse = at("forward_kl"), at("reverse_kl")
    assert forward > 2 * reverse
    assert at("beta=0.0") == forward and at("beta=1.0") == reverse
    assert at("beta=0.002") / 0.002 == pytest.approx(forward, rel=0.25) and at("beta=0.998") / 0.002 == pytest.approx(reverse, rel=0.25)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_3_logits_in_bfloat16_make_no_negative_loss(divergence):
    """Laws that differ little: what bfloat16 makes of a sum of 64 entries of both signs is below 0 as often as above."""
    rng = np.random.default_rng(2)
    student = rng.normal(size=(64, 1, 64)).astype(np.float32)
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (student, student + 0.01 * rng.normal(size=student.shape)))
    goal = objective.from_config(load(QUICKSTART, {"signal.divergence": divergence}), has_teacher=True)
    share = batch_for(goal, np.zeros((1, 1), int), np.ones((1, 1), bool)).shares

    def loss(student, teacher):
        targets = {"teacher": Target((DenseHead(teacher[None]),)), "reference": None}
        return objective.loss(goal, DenseHead(student[None]), targets, jnp.zeros((1, 1), int), jnp.ones((1, 1), bool), share)[0]

    found = jnp.stack([jax.jit(loss)(*pair) for pair in zip(student, teacher, strict=True)])
    assert found.dtype == jnp.float32 and (found >= 0).all() and (found > 0).any() and (found < 1e-3).all()
    logp, logq = (jax.nn.log_softmax(x) for x in (student, teacher))
    assert (jnp.sum(jnp.exp(logp) * (logp - logq), -1) < 0).any()


# ---- 4, 5: batches


@pytest.mark.parametrize("normaliser", ["token_mean", "sequence_mean"])
def test_4_microbatches_divide_by_the_tokens_of_the_whole_batch(normaliser, float64):
    goal = objective.from_config(load(QUICKSTART, {"loss.normaliser": normaliser}), has_teacher=True)
    completions = ragged_rollout(np.random.default_rng(0), 8, vocab_size=V)
    lengths = np.asarray(completions.mask_BT).sum(1)
    assert len(set(lengths.reshape(2, 4).sum(0))) > 1  # microbatches of unlike size
    batch = batch_for(goal, completions.tokens_BT, completions.mask_BT)
    student, teacher = (jnp.asarray(laws(seed, V)) for seed in (0, 1))

    def of(pieces):
        function = functools.partial(learner.gradient, goal, Bigrams(V), teachers.single(Bigrams(V)), microbatches=pieces)
        loss, _, gradient = jax.jit(function)(student, {"teacher": teacher}, batch)
        return float(loss), np.asarray(gradient)

    whole, split = of(1), of(4)
    assert split[0] == pytest.approx(whole[0], rel=1e-6)
    np.testing.assert_allclose(split[1], whole[1], atol=1e-6 * np.abs(whole[1]).max())


@functools.cache
def readers():
    """(two transformers, prompts of each, completions of both)."""
    rng, models = np.random.default_rng(0), [tiny_model(seed, num_hidden_layers=1) for seed in (0, 1)]
    return models, ragged_prompts(rng, 4), ragged_prompts(rng, 4, width=9), ragged_rollout(rng, 4)


def reverse_kl_to(model, theirs):
    """The loss of the first transformer against a teacher that reads `theirs`."""
    (own, _), own_prompts, _, completions = readers()
    goal, (params, config) = objective.from_config(load(QUICKSTART), has_teacher=True), model
    batch = learner.make_batch(goal, view(own_prompts, completions), view(theirs, completions), context_of(completions))
    return float(jax.jit(lambda: learner.gradient(goal, own[1], teachers.single(config), own[0], {"teacher": params}, batch)[0])())


@pytest.mark.slow
def test_5_the_logits_of_student_and_teacher_are_those_before_each_token():
    """Prompts of other lengths and widths: row by row, without padding, logits[prompt length - 1 : -1] of each model."""
    models, *prompts, completions = readers()
    values = []
    for row in range(4):
        answer = np.asarray(completions.tokens_BT[row])[np.asarray(completions.mask_BT[row])]
        laws = []
        for (params, config), read in zip(models, prompts, strict=True):
            prompt = np.asarray(read.tokens_BS[row])[np.asarray(read.mask_BS[row])]
            tokens = np.zeros(16, int)  # one length for all: one compilation of each model
            tokens[: len(prompt) + len(answer)] = [*prompt, *answer]
            logits = jax.jit(transformer.apply, static_argnums=1)(params, config, jnp.asarray(tokens)[None])[0]
            laws.append(scipy.special.log_softmax(np.asarray(logits, np.float64), -1)[len(prompt) - 1 :][: len(answer)])
        values.extend((np.exp(laws[0]) * (laws[0] - laws[1])).sum(-1))
    assert reverse_kl_to(models[1], prompts[1]) == pytest.approx(np.mean(values), rel=1e-4)


def test_5_who_reads_the_same_with_the_same_parameters_has_loss_0():
    """However wide the padding of the prompts."""
    models, own, theirs, _ = readers()
    wide = own.replace(tokens_BS=jnp.pad(own.tokens_BS, ((0, 0), (5, 0))), mask_BS=jnp.pad(own.mask_BS, ((0, 0), (5, 0))))
    assert abs(reverse_kl_to(models[0], wide)) < 1e-6 < 1e-2 < reverse_kl_to(models[0], theirs)


# ---- 6 to 8: tokens


def test_6_a_stop_token_that_is_the_padding_too_is_learnt_and_what_follows_it_is_not():
    stop = 3
    prompts = ragged_prompts(np.random.default_rng(0), 16, vocab_size=V)
    params = jnp.asarray(laws(7, V), jnp.float32)
    drawn = rollout.sample(params, Bigrams(V, stop), prompts, key=jax.random.key(0), max_new_tokens=8, stop_ids=(stop,))
    tokens, mask = np.asarray(drawn.tokens_BT), np.asarray(drawn.mask_BT)
    stops = tokens == stop
    length = np.where(stops.any(1), stops.argmax(1) + 1, 8)
    assert len(set(length[stops.any(1)])) > 1  # some stop, and not all at once
    np.testing.assert_array_equal(mask, np.arange(8)[None] < length[:, None])
    goal = objective.from_config(load(QUICKSTART, {"signal.divergence": "nll"}), has_teacher=False)
    batch = batch_for(goal, tokens, mask)
    pulled = learner.gradient(goal, Table(), None, jnp.zeros((16, 8, V)), {}, batch)[2]
    np.testing.assert_array_equal(np.asarray(pulled[..., stop] < 0), stops & mask)


@pytest.mark.parametrize("name", ["gkd", "thinking_machines", "minillm", "eopd", "iw_opd", "vopd"])
def test_7_nothing_to_learn_from_is_0_and_a_number(name):
    found = case(load(f"configs/methods/{name}.py", {"masking.skip_first": 4}), texts=("cb",) * 24)  # three tokens each
    loss, _, gradient = found.evaluate()
    assert float(loss) == 0 and (gradient == 0).all()


def test_7_rewards_that_are_all_alike_are_0_and_a_number():
    loss, _, gradient = case(load("configs/methods/grpo.py:dapo"), texts=("cb",) * 24).evaluate()
    assert float(loss) == 0 and (gradient == 0).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_8_padding_rows_of_a_larger_vocabulary_are_cut_before_the_softmax(divergence, float64):
    (p, q), config = laws(3), load(QUICKSTART, {"signal.divergence": divergence})
    padded = np.concatenate([q, [9.0, 8.0, 7.0]])
    plain, found = of_each_token(config, p, q), of_each_token(config, p, padded)
    assert found[0] == plain[0] and (found[1] == plain[1]).all()
    wide = of_each_token(config, np.concatenate([p, [9.0, 8.0]]), q)
    np.testing.assert_allclose(wide[1][:V, :V], plain[1], atol=1e-13)
    assert (wide[1][:, V:] == 0).all()


# ---- 9, 10: supports and references


@pytest.mark.parametrize("tail, stationary", [("renormalise", True), ("bucket", True), ("generalised", True), ("none", False)])
def test_9_a_top_k_stands_still_where_the_laws_agree(tail, stationary, float64):
    p, *_ = laws(4)
    for support in ("topk_teacher", "topk_student"):
        _, found = of_each_token(load("configs/methods/lsm.py:k=3", {"signal.support": support, "signal.tail": tail}), p, p)
        assert (np.abs(found).max() < 1e-12) if stationary else (np.abs(found).max() > 1e-2)


def test_10_lambda_1_does_not_see_the_reference(float64):
    """The config of G-OPD; and of other scales the reference matters."""
    p, q, *references = laws(5, 4)
    at = lambda scale, r: of_each_token(load(f"configs/methods/g_opd.py:scale={scale}"), p, q, r)[1]
    plain = of_each_token(load(QUICKSTART, {"signal.support": "sampled"}), p, q)[1]
    assert all((at(1.0, r) == plain).all() for r in references)
    assert np.abs(at(1.01, references[0]) - at(1.01, references[1])).max() > 1e-3


# ---- 11, 12: teachers that follow the student


@functools.cache
def after_updates(update, rate=0.0):
    """Logits after some updates by labels, which move the student, and by the teacher that it began as."""
    fields = SELF | {"teacher.update": update, "teacher.rate": rate, "loss.labels": 1.0, "learner.learning_rate": 0.1}
    fields |= {"signal.weight": 10.0, "learner.warmup_steps": 0}
    config = load(QUICKSTART, fields)
    goal, bank = objective.from_config(config, has_teacher=True), teachers.make_bank(config, {"teacher": Table()}, None)
    start = jnp.asarray(laws(6, 2), jnp.float32)[:, None]
    batch = batch_for(goal, np.array([[1], [4]]), np.ones((2, 1), bool))
    optimizer = learner.make_optimizer(config.learner, config.steps)
    state = learner.init_state(jnp.copy(start), optimizer, bank)
    run = learner.make_update(goal, Table(), bank, optimizer, microbatches=1, state=state)
    for _ in range(4):
        state, _ = run(state, {"teacher": start}, batch)
    return np.asarray(state.params)


@pytest.mark.slow
@pytest.mark.parametrize("rate, end", [(0.0, "frozen"), (1.0, "live")])
@pytest.mark.parametrize("update", ["ema", "trust_region"], ids=["11", "12"])
def test_11_and_12_at_its_ends_a_rate_is_a_frozen_or_a_live_teacher(update, rate, end):
    np.testing.assert_allclose(after_updates(update, rate), after_updates(end), atol=1e-5)
    assert np.abs(after_updates("frozen") - after_updates("live")).max() > 1e-2
    assert np.abs(after_updates(update, 0.5) - after_updates(end)).max() > 1e-3


# ---- 13, 14, 16: what the teacher reads, and which


def told(fields, texts):
    """(what the teacher reads of each row, which rows are learnt from)."""
    fields = SELF | {"rollout.group_size": len(texts), "context.privileged.layout": "compact", "rollout.max_new_tokens": 32} | fields
    made = case(load(QUICKSTART, fields), texts=texts).made
    masks = np.asarray(made.batch.teacher.prompt_mask_BS)
    read = [BYTES.decode(row[mask].tolist()) for row, mask in zip(np.asarray(made.batch.teacher.prompt_BS), masks, strict=True)]
    return read, np.asarray(made.batch.shares[0].context.mask_BT).any(1).tolist(), made.counts


def test_13_nobody_reads_the_own_success_nor_thoughts_and_feedback_gives_way_to_a_solution():
    reads = {"context.privileged.reads": "sibling,feedback"}
    read, learnt, _ = told(reads, ("b", "<think>baab</think>aac", "a"))
    assert read == ["+aac\n0=", "0=", "+aac\n0="] and learnt == [True, False, True]
    read, learnt, _ = told(reads, ("b", "aa", "aab"))
    assert read == ["+aa\n0=", "+aab\n0=", "+aa\n0="] and all(learnt)
    read, learnt, _ = told(reads, ("b", "c", "a"))
    assert read == ["!2 missing\n0=", "!2 missing\n0=", "!1 missing\n0="] and all(learnt)


def test_14_an_example_that_no_teacher_is_for_is_refused(tmp_path):
    """By its tag, before any work: the first teacher is no answer."""
    config = config_lib.load_config(QUICKSTART)
    config.teacher.recipe, config.rollout.group_size = "", 1
    config.teacher.members = {name: {"path": f"nowhere/{name}", "recipe": "", "tag": name, "weight": 1.0} for name in ("maths", "code")}
    with pytest.raises(ConfigError, match="no member has the tag 'law' of the example '2='; there are code, maths"):
        next(train.run(config, tmp_path / "run", task=Letters(("maths", "code", "law"))))
    assert not (tmp_path / "run").exists()


def test_16_a_prompt_that_does_not_fit_loses_feedback_alone_and_is_counted():
    """A question or a solution is never cut: there is no such teacher prompt then, and the row is not learnt from."""
    room = lambda tokens, reads: {"rollout.max_prompt_length": tokens, "context.privileged.reads": reads}
    read, learnt, counts = told(room(12, "feedback"), ("b", "c"))
    assert all(text.startswith("!2") and text.endswith("...\n0=") for text in read) and all(learnt) and counts["context/shortened"] == 1
    read, learnt, counts = told(room(5, "solution"), ("b", "c"))
    assert read == ["0=", "0="] and not any(learnt) and counts["context/too_long"] == 1
    with pytest.raises(UserError, match="a prompt has 2 tokens, at most 1 fit"):
        told(room(1, "solution"), ("b", "c"))


# ---- 15, 17: which law drew the tokens


def corrected(importance, **settings):
    fields = {"estimator.importance": importance, "estimator.clip": 1.5}
    found = case(load("configs/methods/thinking_machines.py", fields), **settings)
    return found, np.asarray(found.evaluate()[2])


@pytest.mark.slow
def test_15_ratios_are_1_on_policy_and_dropping_is_not_clipping(float64):
    plain = corrected("none", on_policy=True)[1]
    for importance in ("token", "clip", "drop", "sequence", "cumulative"):
        np.testing.assert_allclose(corrected(importance, on_policy=True)[1], plain, atol=1e-12)
    (found, plain), (_, clipped), (_, dropped) = (corrected(name) for name in ("none", "clip", "drop"))
    logp = scipy.special.log_softmax(found.logits["student"], -1)
    rho = np.exp(np.take_along_axis(logp, found.tokens_BT[..., None], -1)[..., 0] - found.behaviour_logp_BT)[..., None]
    mask = np.asarray(found.made.batch.mask_BT)
    assert (rho[mask] > 1.5).any() and (rho[mask] < 1 / 1.5).any()
    np.testing.assert_allclose(clipped, np.minimum(rho, 1.5) * plain, atol=1e-12)
    np.testing.assert_allclose(dropped, np.where((rho <= 1.5) & (rho >= 1 / 1.5), rho, 0) * plain, atol=1e-12)


def test_17_log_probs_in_the_loss_are_the_policys_whatever_law_drew():
    prompts, params = ragged_prompts(np.random.default_rng(1), 8, vocab_size=V), jnp.asarray(laws(8, V), jnp.float32)
    drawn = rollout.sample(params, Bigrams(V), prompts, key=jax.random.key(1), max_new_tokens=5, temperature=0.5, top_p=0.8)
    policy = score.logprobs(params, Bigrams(V), prompts, drawn)
    np.testing.assert_allclose(drawn.logp_BT, policy, atol=1e-4)
    assert (np.asarray(drawn.behaviour_logp_BT) - np.asarray(policy)).max() > 0.1
    run = load("configs/methods/thinking_machines.py", {"rollout.temperature": 0.5})
    assert "drawn at temperature 0.5" in claim.of_run(objective.from_config(run, has_teacher=True), run)
    same, other = corrected("none", on_policy=True)[1], corrected("none")[1]
    assert (same == other).all()
