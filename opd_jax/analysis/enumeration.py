"""Exact expectations: students so small that all their completions can be listed.

An `Enumerable` holds every completion of a student, its teacher's logits and its parameters. Expected gradients go through
`Estimator.surrogate`, the code that trains; targets come from autodiff on the definition. Use under `jax.enable_x64`.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.numerics.divergences import divergence
from opd_jax.numerics.estimators import TARGETS, Estimator


@dataclasses.dataclass(frozen=True, eq=False)
class Enumerable:
    """A student, its teacher, and all N completions: `features_NTF @ theta_FV` are the student's logits before each token."""

    name: str
    theta_FV: jax.Array
    features_NTF: jax.Array
    teacher_logits_NTV: jax.Array
    tokens_NT: jax.Array
    mask_NT: jax.Array

    def __str__(self) -> str:
        return self.name

    def logits(self, theta_FV: jax.Array) -> jax.Array:
        return jnp.einsum("ntf,fv->ntv", self.features_NTF, theta_FV)

    def log_probability(self, logits_NTV: jax.Array) -> jax.Array:
        """log pi of each completion, [N]; tokens with mask 0 are given by the environment."""
        logp_NT = jnp.take_along_axis(jax.nn.log_softmax(logits_NTV), self.tokens_NT[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(self.mask_NT, logp_NT, 0), axis=1)

    @property
    def probability_N(self) -> jax.Array:
        return jnp.exp(self.log_probability(self.logits(self.theta_FV)))

    def gradients(self, estimator: Estimator) -> jax.Array:
        """The estimate of every completion, [N, F * V]."""

        def surrogate(theta_FV):
            return estimator.surrogate(self.logits(theta_FV), self.teacher_logits_NTV, self.tokens_NT, self.mask_NT)

        return jax.jacrev(surrogate)(self.theta_FV).reshape(len(self.tokens_NT), -1)

    def expected_gradient(self, estimator: Estimator) -> jax.Array:
        return self.probability_N @ self.gradients(estimator)

    def trace_covariance(self, estimator: Estimator) -> jax.Array:
        """Trace of the covariance of the estimate from one rollout."""
        gradients = self.gradients(estimator)
        mean = self.probability_N @ gradients
        return self.probability_N @ jnp.sum(jnp.square(gradients - mean[None]), axis=1)

    def exact_gradient(self, target: str) -> jax.Array:
        """The gradient that a target's name means, [F * V], by autodiff on its definition."""
        return jax.grad(self.objective, argnums=1)(target, self.theta_FV).ravel()

    def objective(self, target: str, theta_FV: jax.Array) -> jax.Array:
        """The scalar whose gradient is the target; token-level ones hold the law of the prefixes fixed."""
        logits_NTV = self.logits(theta_FV)
        if target == "sequence_reverse_kl":
            logp_N = self.log_probability(logits_NTV)
            return jnp.sum(jnp.exp(logp_N) * (logp_N - self.log_probability(self.teacher_logits_NTV)))
        signal = TARGETS[target]
        local_NT = divergence(logits_NTV, self.teacher_logits_NTV, kind=signal.kind, beta=signal.beta)
        return jnp.sum(self.probability_N * jnp.sum(jnp.where(self.mask_NT, local_NT, 0), axis=1))


def make(
    name: str,
    *,
    vocab: int = 3,
    length: int = 3,
    features: int | None = None,
    stop: int | None = None,
    observed: tuple[int, ...] = (),
    seed: int = 0,
    scale: float = 1.0,
) -> Enumerable:
    """A random enumerable student and teacher.

    `features` None is the tabular student, with logits of its own at every prefix; a number shares that many random features between
    prefixes. `stop` is an absorbing stop token (ragged lengths). `observed` positions are written by an environment: their token is a
    function of what came before, their mask is 0.
    """
    rng = np.random.default_rng(seed)
    tokens_NT, mask_NT = _completions(vocab, length, stop, observed)
    prefixes: dict[tuple[int, ...], int] = {}
    index_NT = np.array([[prefixes.setdefault(tuple(row[:t]), len(prefixes)) for t in range(length)] for row in tokens_NT.tolist()])
    table = np.eye(len(prefixes)) if features is None else rng.normal(size=(len(prefixes), features))
    return Enumerable(
        name=name,
        theta_FV=jnp.asarray(scale * rng.normal(size=(table.shape[1], vocab))),
        features_NTF=jnp.asarray(table[index_NT]),
        teacher_logits_NTV=jnp.asarray(rng.normal(size=(len(prefixes), vocab))[index_NT]),
        tokens_NT=jnp.asarray(tokens_NT),
        mask_NT=jnp.asarray(mask_NT),
    )


def _completions(vocab: int, length: int, stop: int | None, observed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """All different completions (tokens [N, T], mask [N, T]); 0 stands after the stop token."""
    seen = {}
    for written in itertools.product(range(vocab), repeat=length - len(observed)):
        written, tokens, mask, stopped = list(written), [], [], False
        for t in range(length):
            own = t not in observed
            token = written.pop(0) if own else sum(tokens) % vocab
            tokens.append(0 if stopped else token)
            mask.append(own and not stopped)
            stopped = stopped or (own and token == stop)
        seen[tuple(tokens), tuple(mask)] = None
    return np.array([tokens for tokens, _ in seen]), np.array([mask for _, mask in seen])
