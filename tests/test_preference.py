"""The preference term against DPO's loss by PyTorch, by TRL and by differentiation; pairs, ties, microbatches, refusals."""

import collections
import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import context_of
from test_bank import batch_of, case, config_of, goal_of, gradient, same

from opd_jax import config as config_lib
from opd_jax import objective, rewards, teachers
from opd_jax.models import transformer
from opd_jax.numerics import masked
from opd_jax.numerics.estimators import Context, loss_B
from opd_jax.numerics.estimators.preference import build
from opd_jax.numerics.token_stats import DenseHead, Signal, Target, token_stats
from opd_jax.types import UserError, view

BETA = 0.3
ONLY = {"signal": config_lib.Signal(weight=0.0), "rollout": config_lib.Rollout(group_size=4)}


def paired(mask_BT, partner, sign) -> Context:
    sign_B = jnp.asarray(sign, jnp.float32)
    return Context(jnp.asarray(mask_BT) & (sign_B != 0)[:, None], partner_B=jnp.asarray(partner, jnp.int32), sign_B=sign_B)


def random_case(seed=0, rows=8, length=5, vocab=4):
    """(student's and reference's logits, tokens, ragged mask): rows 0 and 3 are one pair, 6 and 4 the other."""
    rng = np.random.default_rng(seed)
    logits, other = rng.normal(size=(2, rows, length, vocab)) * 2
    mask = np.arange(length)[None, :] < rng.integers(1, length + 1, rows)[:, None]
    return logits, other, rng.integers(0, vocab, (rows, length)), mask


PARTNER = [3, 1, 2, 0, 6, 5, 4, 7]
SIGN = [1, 0, 0, -1, -1, 0, 1, 0]
CHOSEN, REJECTED = [0, 6], [3, 4]


def ours(logits, other, tokens, mask, context=None):
    """(loss, gradient in the student's logits) by the code of training, on dense logits."""
    built = build(beta=BETA, student_temperature=1.0)
    context = paired(mask, PARTNER, SIGN) if context is None else context
    share = objective.share(objective.Part("preference", built, normaliser=masked.PAIR_MEAN), context, max_length=mask.shape[1])

    def loss(z):
        target = Target((DenseHead(jnp.asarray(other)),))
        stats = token_stats(DenseHead(z), target, jnp.asarray(tokens), signal=built.signal, needs={"logp", "target_logp"})
        term = built.terms(stats, built.prepare(jax.lax.stop_gradient(stats), share.context))
        return loss_B(stats, dataclasses.replace(term, mask_BT=term.mask_BT * share.weights_BT)).sum() / share.denominator

    return jax.value_and_grad(loss)(jnp.asarray(logits))


def log_probs(logits, tokens, mask):
    """[B, T] by PyTorch, 0 where the mask is False."""
    logp = torch.log_softmax(logits, -1).gather(-1, torch.tensor(tokens)[..., None])[..., 0]
    return logp * torch.tensor(mask)


def test_value_and_gradient_are_those_of_the_textbook_loss(float64):
    logits, other, tokens, mask = random_case()
    z = torch.tensor(logits, requires_grad=True)
    ratio_B = (log_probs(z, tokens, mask) - log_probs(torch.tensor(other), tokens, mask)).sum(1)
    expected = -torch.nn.functional.logsigmoid(BETA * (ratio_B[CHOSEN] - ratio_B[REJECTED])).mean()
    expected.backward()
    loss, grad = ours(logits, other, tokens, mask)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(grad, z.grad.numpy(), atol=1e-12)
    assert np.abs(grad[0]).max() > 1e-2 and not np.any(grad[1])  # row 1 is in no pair


@pytest.mark.slow
def test_value_and_gradient_are_those_of_trl(float64):
    """DPOTrainer._compute_loss itself, given per-token log-probs by models that are tables of logits."""
    trainer = pytest.importorskip("trl").DPOTrainer
    logits, other, tokens, mask = random_case(1)
    rows = [*CHOSEN, *REJECTED]  # TRL's order: chosen, then rejected
    z = torch.tensor(logits, requires_grad=True)
    outputs = lambda x: types.SimpleNamespace(
        log_probs=log_probs(x, tokens, mask)[rows],
        **{name: torch.zeros(len(rows), mask.shape[1]) for name in ("entropy", "mean_logits", "log_sum_sq_probs")},
        is_top1=torch.zeros(len(rows), mask.shape[1], dtype=torch.bool),
    )
    everywhere = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    everywhere.unwrap_model, everywhere.autocast = (lambda model: model), contextlib.nullcontext
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False
    itself = types.SimpleNamespace(
        model=model, ref_model=lambda **_: outputs(torch.tensor(other)), accelerator=everywhere, beta=BETA, ld_alpha=None,
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False), aux_loss_enabled=False,
        precompute_ref_logps=False, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], use_weighting=False,
        _metrics={"train": collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    ids = torch.tensor(np.concatenate([np.zeros((len(rows), 1), int), tokens[rows]], 1))  # one token of a prompt before each
    completion = torch.tensor(np.concatenate([np.zeros((len(rows), 1), int), mask[rows]], 1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    expected = trainer._compute_loss(itself, lambda **_: outputs(z), inputs, False)
    expected.backward()
    loss, grad = ours(logits, other, tokens, mask)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(grad, z.grad.numpy(), atol=1e-12)


def test_at_the_reference_the_gradient_is_half_of_beta_times_the_difference_of_scores(float64):
    logits, _, tokens, mask = random_case()
    z = torch.tensor(logits, requires_grad=True)
    logp_B = log_probs(z, tokens, mask).sum(1)
    (BETA / 2 * (logp_B[REJECTED] - logp_B[CHOSEN]).mean()).backward()
    loss, grad = ours(logits, logits, tokens, mask)
    assert float(loss) == pytest.approx(np.log(2), rel=1e-12)
    np.testing.assert_allclose(grad, z.grad.numpy(), atol=1e-12)


def test_a_pair_far_on_the_wrong_side_has_a_finite_value_and_all_of_its_gradient(float64):
    logits, other, tokens, mask = random_case()
    other = other.copy()
    np.put_along_axis(other[0], tokens[0][:, None], -4000.0, -1)  # the reference never writes this y-, which the student does
    flipped = [-sign for sign in SIGN]
    loss, grad = ours(logits, other, tokens, mask, paired(mask, PARTNER, flipped))
    assert np.isfinite(loss) and float(loss) > 100 and np.all(np.isfinite(grad)) and np.abs(grad[0]).max() > 1e-3


def test_without_a_pair_there_is_no_loss(float64):
    logits, other, tokens, mask = random_case()
    loss, grad = ours(logits, other, tokens, mask, paired(mask, range(8), [0] * 8))
    assert float(loss) == 0 and not np.any(grad)


# ---- in an update


@pytest.fixture(scope="module")
def update():
    """(objective, bank, frozen parameters, batch): a reference of another shape, two groups of four, one pair in each."""
    (_, _), (_, (params, config)), *_ = case()
    goal = goal_of(preference=config_lib.Preference(weight=0.5, beta=BETA), **ONLY)
    bank = dataclasses.replace(teachers.single(case()[1][0][1]), reference=config)
    frozen = {"teacher": case()[1][0][0], teachers.REFERENCE: params}
    context = dataclasses.replace(paired(case()[4].mask_BT, PARTNER, SIGN), behaviour_logp_BT=context_of(case()[4]).behaviour_logp_BT)
    return goal, bank, frozen, batch_of(goal, contexts={"preference": context})


def textbook(params):
    """0.5 times the mean of -log sigmoid(Delta), from whole logits of student and reference."""
    (_, config), (_, (other, other_config)), prompts, _, completions = case()
    read = view(prompts, completions)
    tokens_BL = jnp.concatenate([read.prompt_BS, read.completion_BT], 1)
    mask_BL = jnp.concatenate([read.prompt_mask_BS, jnp.ones_like(read.completion_BT, bool)], 1)
    start = read.prompt_BS.shape[1]

    def logp_B(params, config):
        logits = transformer.apply(params, config, tokens_BL, mask_BL=mask_BL)[:, start - 1 : -1]
        logp_BT = jnp.take_along_axis(jax.nn.log_softmax(logits), read.completion_BT[..., None], -1)[..., 0]
        return jnp.where(completions.mask_BT, logp_BT, 0).sum(1)

    ratio_B = logp_B(params, config) - logp_B(other, other_config)
    return -0.5 * jnp.mean(jax.nn.log_sigmoid(BETA * (ratio_B[jnp.array(CHOSEN)] - ratio_B[jnp.array(REJECTED)])))


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_the_gradient_of_an_update_is_that_of_the_textbook_loss(microbatches, update):
    """Rows of a pair fall into different microbatches."""
    expected, grads = jax.value_and_grad(textbook)(case()[0][0])
    loss, _, found = gradient(*update, microbatches=microbatches)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert same(found, grads, 2e-6)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)) > 1e-2


# ---- pairs


def pairs_of(score_B, group_size, tokens_BT=None):
    tokens_BT = np.arange(len(score_B))[:, None] if tokens_BT is None else tokens_BT
    return rewards.best_and_worst(np.array(score_B), group_size, tokens_BT, np.ones_like(tokens_BT, bool))


def test_pairs_by_hand():
    partner_B, sign_B = pairs_of([0.1, 0.7, 0.7, -3, 2, 2, 2, 2], 4)
    assert sign_B.tolist() == [0, 1, 0, -1, 0, 0, 0, 0] and partner_B.tolist() == [0, 3, 2, 1, 4, 5, 6, 7]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(2, 5), groups=st.integers(1, 4))
def test_a_pair_is_the_best_and_the_worst_of_its_group(data, size, groups):
    score_B = data.draw(st.lists(st.sampled_from([0.0, 1.0, -2.5, 0.1, -np.inf]), min_size=size * groups, max_size=size * groups))
    partner_B, sign_B = pairs_of(score_B, size)
    for first in range(0, size * groups, size):
        group, own = score_B[first : first + size], slice(first, first + size)
        tied = max(group) == min(group)
        assert sorted(sign_B[own].tolist()) == ([0] * size if tied else [-1] + [0] * (size - 2) + [1])
        for row in np.flatnonzero(sign_B[own]) + first:
            assert partner_B[partner_B[row]] == row and first <= partner_B[row] < first + size
            assert score_B[row] == (max(group) if sign_B[row] > 0 else min(group))


def test_one_completion_twice_is_no_pair_however_its_scores_are_rounded():
    same_BT, other_BT = np.array([[1, 2], [1, 2]]), np.array([[1, 2], [1, 3]])
    assert not pairs_of([0.5, 0.5 + 1e-9], 2, same_BT)[1].any() and pairs_of([0.5, 0.5 + 1e-9], 2, other_BT)[1].tolist() == [-1, 1]


# ---- configs


def asked(**changes):
    blocks = {"preference": config_lib.Preference(weight=1.0), "rollout": config_lib.Rollout(group_size=2)} | changes
    return dataclasses.replace(config_of(teacher=config_lib.Teacher(path="somewhere")), **blocks)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rollout": config_lib.Rollout(group_size=1)}, "rollout.group_size = 1 must be at least 2, because preference.weight = 1"),
        ({"rollout": config_lib.Rollout(group_size=2, source="dataset")}, "rollout.source = 'dataset' has one completion of a prompt"),
        ({"rollout": config_lib.Rollout(group_size=2, source="corrected")}, "rollout.source = 'corrected' gives the ends of completions"),
        ({"rollout": config_lib.Rollout(group_size=2, temperature=0.0)}, "is greedy, but preference.weight = 1 needs draws"),
        ({"teacher": config_lib.Teacher()}, "must name a model, because preference.judge = 'teacher' asks it"),
        ({"preference": config_lib.Preference(weight=1.0, judge="best")}, "preference.judge = 'best' is not known; valid: teacher,"),
        ({"preference": config_lib.Preference(weight=1.0, beta=0.0)}, "preference.beta = 0.0 must be above 0"),
        ({"preference": config_lib.Preference(weight=-1.0)}, "preference.weight = -1.0 must be 0 or more"),
        (
            {"teacher": config_lib.Teacher(members={name: config_lib.Member(path=name) for name in "ab"})},
            "preference.judge = 'teacher' is one teacher, and there are 2",
        ),
    ],
)
def test_what_has_no_pairs_is_refused(changes, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        config_lib.validate(asked(**changes))
    config_lib.validate(asked())


def test_the_part_is_against_the_reference_at_the_temperature_of_the_student():
    config = asked(loss=config_lib.Loss(student_temperature=2.0, teacher_temperature=3.0))
    part = objective.from_config(config, has_teacher=True).parts[1]
    assert (part.name, part.against, part.normaliser) == ("preference", "reference", masked.PAIR_MEAN)
    assert part.estimator.signal == Signal("nll", student_temperature=2.0, teacher_temperature=2.0)
    assert config_lib.needs_reference(config) and not config_lib.needs_reference(config_of())
    assert config_lib.needs_verdicts(asked(preference=config_lib.Preference(weight=1.0, judge="reward")))
    assert not config_lib.needs_verdicts(config)
