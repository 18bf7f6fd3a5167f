"""Expectations over tuples of completions, sampling laws and extra tokens, against plain loops in NumPy."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.analysis import enumeration
from opd_jax.numerics import estimators
from opd_jax.numerics.estimators import REGISTRY, TARGETS, Context, Estimator, Term, loss_B
from opd_jax.numerics.token_stats import DenseHead, Signal, Target, token_stats
from opd_jax.types import UserError

pytestmark = pytest.mark.usefixtures("float64")

ABOUT = {"name": "", "claim": "", "formula": "", "reference": "", "target": "token_reverse_kl", "unbiased": False}


@dataclasses.dataclass(frozen=True)
class GroupMean(Estimator):
    """l_t less the mean over the prompt's rollouts, and pi/mu on top: it needs the tuple, its groups and the behaviour."""

    needs = ("logp", "target_logp")

    def terms(self, stats, context: Context) -> Term:
        log_ratio_BT = jax.lax.stop_gradient(stats.target_logp_BT - stats.logp_BT)
        same_BB = context.group_B[:, None] == context.group_B[None, :]
        mean_BT = same_BB @ log_ratio_BT / jnp.sum(same_BB, axis=1, keepdims=True)
        weight_BT = jnp.exp(jax.lax.stop_gradient(stats.logp_BT) - context.behaviour_logp_BT)
        return Term(context.mask_BT, advantage_BT=log_ratio_BT - mean_BT, w_score_BT=weight_BT)


@dataclasses.dataclass(frozen=True)
class ExtraTokens(Estimator):
    """The mean of the sampled loss over further tokens of each position."""

    needs = ()

    def terms(self, stats, context: Context) -> Term:
        return Term(context.mask_BT, local_BT=stats.local_BT)

    def surrogate(self, student, teacher, tokens_BT, mask_BT, *, extra_tokens_BTN, **_):
        each = (
            token_stats(DenseHead(student), Target((DenseHead(teacher),)), t_BT, signal=self.signal, needs=("logp", "local"))
            for t_BT in jnp.moveaxis(extra_tokens_BTN, -1, 0)
        )
        losses = [loss_B(stats, self.terms(stats, Context(mask_BT))) for stats in each]
        return sum(losses) / len(losses)


def distance(a, b):
    return float(jnp.max(jnp.abs(a - b)))


def by_hand(model, logits_NTV):
    """(log-probs of the tokens that stand there [N, T], their scores [N, T, F, V]) of the student, by a loop."""
    logp_NT, score_NTFV = np.zeros(model.mask_NT.shape), np.zeros((*model.mask_NT.shape, *model.theta_FV.shape))
    for n, t in zip(*np.nonzero(np.asarray(model.mask_NT)), strict=True):
        p_V = np.exp(logits_NTV[n, t]) / np.exp(logits_NTV[n, t]).sum()
        token = int(model.tokens_NT[n, t])
        logp_NT[n, t] = np.log(p_V[token])
        score_NTFV[n, t] = np.outer(model.features_NTF[n, t], np.eye(len(p_V))[token] - p_V)
    return logp_NT, score_NTFV


@pytest.mark.parametrize("rollouts", [1, 2, 3])
@pytest.mark.parametrize("change", [{}, {"temperature": 0.6}, {"top_k": 2}, {"top_p": 0.7}])
def test_batches_of_any_law_against_a_loop(rollouts, change, monkeypatch):
    """Mean and trace of the covariance of an estimator that looks across rows and at the sampling law, over all tuples."""
    monkeypatch.setattr(enumeration, "CHUNK", 150)
    model = enumeration.make("stop", vocab=3, length=2, stop=1, features=2, seed=3)
    law = model.law(**change)
    logits_NTV = np.asarray(model.logits(model.theta_FV))
    logp_NT, score_NTFV = by_hand(model, logits_NTV)
    target_NT, _ = by_hand(model, np.asarray(model.teacher_logits_NTV))
    behaviour_NT, probability_N = np.asarray(law.logp_NT), np.exp(np.asarray(law.logp_NT).sum(axis=1))
    estimates, weights = [], []
    for rows in itertools.product(np.flatnonzero(probability_N), repeat=rollouts):
        rows = list(rows)
        log_ratio_BT = (target_NT - logp_NT)[rows]
        weight_BT = np.exp((logp_NT - behaviour_NT)[rows]) * (log_ratio_BT - log_ratio_BT.mean(axis=0, keepdims=True))
        estimates.append(-np.einsum("bt,btfv->fv", weight_BT * np.asarray(model.mask_NT)[rows], score_NTFV[rows]).ravel() / rollouts)
        weights.append(probability_N[rows].prod())
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    estimates, mean = np.array(estimates), np.array(weights) @ np.array(estimates)
    variance = np.array(weights) @ ((estimates - mean) ** 2).sum(axis=1)
    estimator = GroupMean(**ABOUT, signal=Signal("reverse_kl", "sampled"))
    np.testing.assert_allclose(model.expected_gradient(estimator, rollouts=rollouts, law=law), mean, atol=1e-12)
    assert float(model.trace_covariance(estimator, rollouts=rollouts, law=law)) == pytest.approx(variance, rel=1e-10)


def test_independent_rollouts_divide_the_variance():
    model = enumeration.make("tabular", seed=1)
    for name in ("to_go", "token_full"):
        one, three = (float(model.trace_covariance(REGISTRY[name], rollouts=n)) for n in (1, 3))
        assert three == pytest.approx(one / 3, rel=1e-10)
        assert distance(model.expected_gradient(REGISTRY[name]), model.expected_gradient(REGISTRY[name], rollouts=3)) < 1e-12


@pytest.mark.parametrize("change", [{}, {"top_k": 2}])
def test_laws_are_those_of_the_sampler(change):
    model = enumeration.make("observations", observed=(1,), length=3, stop=2, seed=5)
    law = model.law(temperature=0.5, **change)
    p_NTV = np.exp(2 * np.asarray(model.logits(model.theta_FV)))
    if change:
        p_NTV[p_NTV < np.sort(p_NTV)[..., -2:-1]] = 0
    p_NTV /= p_NTV.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.exp(law.logp_NTV), p_NTV, atol=1e-12)
    tokens, mask = np.asarray(model.tokens_NT), np.asarray(model.mask_NT)
    expected = [np.prod([p_NTV[n, t, tokens[n, t]] for t in range(3) if mask[n, t]]) for n in range(len(tokens))]
    np.testing.assert_allclose(law.probability_N, expected, atol=1e-12)
    assert float(jnp.sum(law.probability_N)) == pytest.approx(1, abs=1e-12)


def test_laws_of_other_parameters_and_of_the_teacher():
    model = enumeration.make("shared", features=2)
    stale = model.law(model.logits(model.theta_FV + 0.3))
    np.testing.assert_allclose(stale.probability_N, dataclasses.replace(model, theta_FV=model.theta_FV + 0.3).probability_N, atol=1e-12)
    teacher = model.law(model.teacher_logits_NTV)
    np.testing.assert_allclose(teacher.probability_N, jnp.exp(model.log_probability(model.teacher_logits_NTV)), atol=1e-12)


@pytest.mark.parametrize("target", [name for name, signal in TARGETS.items() if signal is not None])
def test_token_targets_take_their_prefixes_from_the_law(target):
    """The exact local loss is unbiased for the fixed-prefix divergence whatever law drew the prefixes."""
    model = enumeration.make("stop", stop=1, features=2, seed=2)
    law = model.law(temperature=0.5, top_k=2)
    local = estimators.build(TARGETS[target], "token", 1.0)
    assert distance(model.expected_gradient(local, law=law), model.exact_gradient(target, law=law)) < 1e-12
    assert distance(model.exact_gradient(target), model.exact_gradient(target, law=law)) > 1e-3
    assert distance(model.exact_gradient("sequence_reverse_kl"), model.exact_gradient("sequence_reverse_kl", law=law)) == 0


@pytest.mark.parametrize("signal", [Signal("skew_forward_kl", beta=0.2), Signal("jsd", beta=0.2)])
def test_targets_are_read_from_their_signal(signal, monkeypatch):
    monkeypatch.setitem(TARGETS, "new", signal)
    model = enumeration.make("tabular")
    stats = token_stats(
        DenseHead(model.logits(model.theta_FV)),
        Target((DenseHead(model.teacher_logits_NTV),)),
        model.tokens_NT,
        signal=signal,
        needs=("local",),
    )
    assert float(model.objective("new", model.theta_FV)) == pytest.approx(
        float(model.probability_N @ stats.local_BT.sum(axis=1)), abs=1e-12
    )


@pytest.mark.parametrize("model", [{"length": 2}, {"stop": 0, "length": 2}, {"observed": (0,), "length": 3}, {"vocab": 2, "length": 3}])
def test_extra_tokens_have_the_mean_of_the_full_sum_and_less_noise_with_each(model):
    model = enumeration.make("", features=2, seed=4, **model)
    estimator = ExtraTokens(**ABOUT, signal=Signal("reverse_kl", "sampled"))
    for n in (1, 2):
        assert distance(model.expected_gradient(estimator, extra_samples=n), model.exact_gradient("token_reverse_kl")) < 1e-12
    floor = float(model.trace_covariance(REGISTRY["token_full"]))
    one, two = (float(model.trace_covariance(estimator, extra_samples=n)) - floor for n in (1, 2))
    assert two == pytest.approx(one / 2, rel=1e-9) and one > 0


def test_completions_stop_at_the_students_own_stop_token_alone():
    """An observation that happens to be the stop token ends nothing: 1 + 2 + 4 x 3 completions."""
    model = enumeration.make("", vocab=3, length=4, observed=(2,), stop=2)
    rows = dict(zip(map(tuple, model.tokens_NT.tolist()), map(tuple, model.mask_NT.astype(int).tolist()), strict=True))
    assert len(rows) == 15
    assert rows[2, 0, 0, 0] == (1, 0, 0, 0) and rows[1, 2, 0, 0] == (1, 1, 0, 0)
    assert [rows[1, 1, 2, last] for last in range(3)] == [(1, 1, 0, 1)] * 3


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: enumeration.make("", vocab=32, length=8), "vocab ** length = 1099511627776 completions"),
        (lambda: enumeration.make("", vocab=3, length=9, observed=(0,)), "vocab ** 8 = 6561 completions"),
        (lambda: enumeration.make("").exact_gradient("reverse_kl"), "valid: sequence_reverse_kl, .* did you mean token_reverse_kl?"),
        (lambda: enumeration.make("").expected_gradient("token"), "estimator = 'token' is a str, .* such as REGISTRY['token']"),
        (lambda: enumeration.make("").trace_covariance("togo"), "such as REGISTRY['to_go']"),
        (lambda: enumeration.make("").gradients(REGISTRY), "is a dict, not an Estimator"),
    ],
)
def test_what_cannot_be_listed_or_is_not_known_is_refused(call, words):
    with pytest.raises(UserError, match=words.replace("**", r"\*\*").replace("[", r"\[").replace("?", r"\?")):
        call()


def test_as_many_completions_as_are_allowed_are_listed():
    assert len(enumeration.make("", features=1, length=8, observed=(0,)).tokens_NT) == enumeration.MOST_COMPLETIONS
