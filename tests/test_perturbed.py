"""The proofs see a wrong estimator: every claim of the registry fails when its estimator is perturbed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from enumerable import distance

from opd_jax.analysis import enumeration
from opd_jax.numerics import estimators
from opd_jax.numerics.estimators import REGISTRY, TARGETS, Context, Estimator, Term

pytestmark = pytest.mark.usefixtures("float64")


@dataclasses.dataclass(frozen=True)
class Perturbed(Estimator):
    """An estimator of the registry with a fault."""

    base: Estimator
    fault: str

    needs = ()

    def terms(self, stats, context: Context) -> Term:
        return self.base.terms(stats, context)

    def surrogate(self, student_logits_BTV, teacher_logits_BTV, tokens_BT, mask_BT, **given):
        if self.fault == "last token lost":
            later_BT = jnp.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1] - mask_BT
            mask_BT = mask_BT & (later_BT > 0)
        loss_B = self.base.surrogate(student_logits_BTV, teacher_logits_BTV, tokens_BT, mask_BT, **given)
        if self.fault == "larger by 1%":
            return 1.01 * loss_B
        if self.fault == "a reward for one token":
            logp_BT = jax.nn.log_softmax(student_logits_BTV)[..., 0]
            return loss_B - 0.01 * jnp.sum(jnp.where(mask_BT & (tokens_BT == 0), logp_BT, 0), axis=1)
        return loss_B


@functools.cache
def wide():
    """More tokens than any registered top-k holds, so that truncation shows."""
    return enumeration.make("wide", vocab=18, length=2, features=3, stop=2, seed=8)


def claim_holds(estimator, base):
    """What `test_estimators.py` asserts of a claim, on one model."""
    found = wide().expected_gradient(estimator, rollouts=2 if base.looks_across else 1)
    error = distance(found, wide().exact_gradient(base.target))
    return error < 1e-6 if base.unbiased else error > 1e-4


def faulty(base, fault):
    about = {field.name: getattr(base, field.name) for field in dataclasses.fields(Estimator)}
    return Perturbed(**about, base=base, fault=fault)


def slow_but(fast, names):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


UNBIASED = [name for name, estimator in REGISTRY.items() if estimator.unbiased]
SCORES = [name for name in UNBIASED if isinstance(REGISTRY[name], estimators.ScoreFunction)]


@pytest.mark.parametrize("name", slow_but(("to_go", "token_full"), UNBIASED))
def test_each_proof_fails_when_its_estimator_is_perturbed(name):
    base = REGISTRY[name]
    for fault in ("larger by 1%", "last token lost", "a reward for one token"):
        assert not claim_holds(faulty(base, fault), base), fault


@pytest.mark.parametrize("name", slow_but(("to_go",), SCORES))
def test_each_proof_of_an_advantage_fails_without_stop_gradients(name, monkeypatch):
    """Differentiated, log-ratios in the advantage bring the gradient of an entropy with them."""
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)
    assert not claim_holds(faulty(REGISTRY[name], "no stop-gradient"), REGISTRY[name])


@pytest.mark.parametrize("name", slow_but(("discounted",), [name for name in REGISTRY if name not in UNBIASED]))
def test_a_claim_of_bias_fails_for_an_unbiased_estimator(name):
    base = REGISTRY[name]
    signal = TARGETS[base.target]
    right = REGISTRY["to_go"] if signal is None else estimators.build(signal, "token", 1.0)
    assert claim_holds(base, base) and not claim_holds(right, base)
