"""Exact expectations: students so small that all their completions can be listed.

An `Enumerable` holds every completion of a student, its teacher's logits and its parameters. Expected gradients go through
`Estimator.surrogate`, the code that trains; targets come from autodiff on the definition. Use under `jax.enable_x64`.
"""

import dataclasses
import difflib
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import sampler
from opd_jax.numerics.estimators import REGISTRY, TARGETS, Estimator
from opd_jax.types import UserError

MOST_COMPLETIONS = 3**7  # that are listed
# Floats of the estimates that are in memory at once.
CHUNK = 2**21


@functools.partial(jax.tree_util.register_dataclass, data_fields=["logp_NTV", "logp_NT", "probability_N"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class SamplingLaw:
    """What draws the completions of an `Enumerable`: log-probs of all tokens and of those that stand there (0 where masked)."""

    logp_NTV: jax.Array
    logp_NT: jax.Array
    probability_N: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["theta_FV", "features_NTF", "teacher_logits_NTV", "tokens_NT", "mask_NT"],
    meta_fields=["name"],
)
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
        return jnp.sum(self.token_logp(jax.nn.log_softmax(logits_NTV)), axis=1)

    def token_logp(self, logp_NTV: jax.Array) -> jax.Array:
        """Log-probs of the tokens that stand there, [N, T]; 0 where the mask is 0."""
        return jnp.where(self.mask_NT, jnp.take_along_axis(logp_NTV, self.tokens_NT[..., None], axis=-1)[..., 0], 0)

    @property
    def probability_N(self) -> jax.Array:
        return jnp.exp(self.log_probability(self.logits(self.theta_FV)))

    def truncated(self, length: int) -> "Enumerable":
        """The same student and teacher (theta, and features and teacher's logits of every prefix) with completions cut after `length`."""
        written = np.concatenate([self.tokens_NT[:, :length], self.mask_NT[:, :length]], axis=1)
        first = np.sort(np.unique(written, axis=0, return_index=True)[1])
        rows = ("features_NTF", "teacher_logits_NTV", "tokens_NT", "mask_NT")
        return dataclasses.replace(self, **{name: getattr(self, name)[first, :length] for name in rows})

    def law(self, logits_NTV: jax.Array | None = None, **change) -> SamplingLaw:
        """The law that draws from logits (None: the student's own) changed by temperature, top_p, top_k or min_p, as the sampler does.

        Logits of older parameters give a stale law, `teacher_logits_NTV` the completions of the teacher.
        """
        return _law(self, logits_NTV, sampler.Law(**change))

    def gradients(self, estimator: Estimator) -> jax.Array:
        """The estimate of every completion, each a batch of its own drawn from the student, [N, F * V]. Raises UserError."""
        _check_estimator(estimator)
        return _estimates(estimator, self, self.law(), {"index": np.arange(len(self.tokens_NT))[:, None]})

    def expected_gradient(
        self, estimator: Estimator, *, rollouts: int = 1, law: SamplingLaw | None = None, extra_samples: int = 0
    ) -> jax.Array:
        """The mean, [F * V], of the estimate from a batch of `rollouts` completions of one prompt (the mean of their losses).

        All tuples of completions are listed. `estimator` is an object (REGISTRY[name], or one of your own), not a name. `law` draws the
        completions (None: the student). `extra_samples` further tokens of the same law at each position go to the surrogate as
        `extra_tokens_BTN`. Raises UserError.
        """
        return self._moments(estimator, rollouts, law, extra_samples)[0]

    def trace_covariance(
        self, estimator: Estimator, *, rollouts: int = 1, law: SamplingLaw | None = None, extra_samples: int = 0
    ) -> jax.Array:
        """Trace of the covariance of the estimate from a batch of `rollouts` completions; arguments as `expected_gradient`."""
        return self._moments(estimator, rollouts, law, extra_samples)[1]

    def exact_gradient(self, target: str, *, law: SamplingLaw | None = None) -> jax.Array:
        """The gradient that a target's name means, [F * V], by autodiff on its definition. Raises UserError for a name not in TARGETS."""
        return _target_gradient(target, self, self.law() if law is None else law)

    def objective(self, target: str, theta_FV: jax.Array, *, law: SamplingLaw | None = None) -> jax.Array:
        """The scalar whose gradient is the target. Token-level ones hold the law of the prefixes fixed: `law`, or the student's.

        Raises UserError for a name that is not in TARGETS.
        """
        if target not in TARGETS:
            near = difflib.get_close_matches(target, TARGETS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"target = {target!r} is not known; valid: {', '.join(TARGETS)}{hint}")
        logits_NTV = self.logits(theta_FV)
        if target == "sequence_reverse_kl":
            logp_N = self.log_probability(logits_NTV)
            return jnp.sum(jnp.exp(logp_N) * (logp_N - self.log_probability(self.teacher_logits_NTV)))
        signal = TARGETS[target]
        local_NT = _definition(signal.kind, signal.beta, jax.nn.log_softmax(logits_NTV), jax.nn.log_softmax(self.teacher_logits_NTV))
        probability_N = (self.law() if law is None else law).probability_N
        return jnp.sum(probability_N * jnp.sum(jnp.where(self.mask_NT, local_NT, 0), axis=1))

    def _moments(self, estimator, rollouts: int, law: SamplingLaw | None, extra_samples: int) -> tuple[jax.Array, jax.Array]:
        """(mean, trace of the covariance), merged over chunks as Chan, Golub and LeVeque (1983): no difference of large numbers."""
        _check_estimator(estimator)
        law = self.law() if law is None else law
        total, mean, squares = 0.0, 0.0, 0.0
        for weight_C, rows in _tuples(_draws(self, law, extra_samples), rollouts, CHUNK // self.theta_FV.size):
            estimates = np.asarray(_estimates(estimator, self, law, rows))
            weight = weight_C.sum()
            own_mean = weight_C @ estimates / weight
            squares += weight_C @ np.sum((estimates - own_mean) ** 2, axis=1)
            squares += np.sum((own_mean - mean) ** 2) * total * weight / (total + weight)
            mean = mean + (own_mean - mean) * weight / (total + weight)
            total += weight
        return jnp.asarray(mean), jnp.asarray(squares / total)


def _check_estimator(estimator: Estimator) -> None:
    if not isinstance(estimator, Estimator):
        near = difflib.get_close_matches(str(estimator), REGISTRY, n=1, cutoff=0.5) or ["to_go"]
        raise UserError(
            f"estimator = {estimator!r} is a {type(estimator).__name__}, not an Estimator; give the object, such as REGISTRY[{near[0]!r}] "
            "of opd_jax.numerics.estimators"
        )


def _definition(kind: str, beta: float | None, logp: jax.Array, logq: jax.Array) -> jax.Array:
    """A divergence over the last axis as a textbook has it, apart from numerics/: it is what their gradients are compared with."""

    def kl(log_a, log_b):
        return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)

    def mixed(weight, log_a, log_b):
        return jnp.log(weight * jnp.exp(log_a) + (1 - weight) * jnp.exp(log_b))

    return {
        "reverse_kl": lambda: kl(logp, logq),
        "forward_kl": lambda: kl(logq, logp),
        "jsd": lambda: beta * kl(logq, mixed(beta, logq, logp)) + (1 - beta) * kl(logp, mixed(beta, logq, logp)),
        "skew_forward_kl": lambda: kl(logq, mixed(beta, logq, logp)),
        "skew_reverse_kl": lambda: kl(logp, mixed(beta, logp, logq)),
    }[kind]()


@functools.partial(jax.jit, static_argnames="change")
def _law(model: Enumerable, logits_NTV: jax.Array | None, change: sampler.Law) -> SamplingLaw:
    logits_NTV = model.logits(model.theta_FV) if logits_NTV is None else logits_NTV
    logp_NTV = sampler.law_logp(logits_NTV.reshape(-1, logits_NTV.shape[-1]), change).reshape(logits_NTV.shape)
    logp_NT = model.token_logp(logp_NTV)
    return SamplingLaw(logp_NTV, logp_NT, jnp.exp(jnp.sum(logp_NT, axis=1)))


@functools.partial(jax.jit, static_argnames="target")
def _target_gradient(target: str, model: Enumerable, law: SamplingLaw) -> jax.Array:
    return jax.grad(lambda theta_FV: model.objective(target, theta_FV, law=law))(model.theta_FV).ravel()


@functools.partial(jax.jit, static_argnames="estimator")
def _estimates(estimator: Estimator, model: Enumerable, law: SamplingLaw, rows: dict[str, np.ndarray]) -> jax.Array:
    """The estimate of each of C batches of R rollouts, [C, F * V]: the gradient of the mean of the rows' losses.

    `rows` has which completions they are, `index` [C, R], and their `extra` tokens [C, R, T, N], if any.
    """
    logits_NTV = model.logits(model.theta_FV)

    def one(batch):
        row = batch["index"]
        more = {"extra_tokens_BTN": batch["extra"]} if "extra" in batch else {}
        drawn = {"behaviour_logp_BT": law.logp_NT[row], "group_B": jnp.zeros_like(row), **more}
        given = (model.teacher_logits_NTV[row], model.tokens_NT[row], model.mask_NT[row])
        gradient = jax.grad(lambda logits: jnp.mean(estimator.surrogate(logits, *given, **drawn)))(logits_NTV[row])
        return jnp.einsum("rtf,rtv->fv", model.features_NTF[row], gradient).ravel()

    return jax.vmap(one)(rows)


def _draws(model: Enumerable, law: SamplingLaw, extra_samples: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(probabilities, what is drawn) of one rollout: a completion that the law can give, and extra tokens at its own positions."""
    probability_N, mask_NT = np.asarray(law.probability_N), np.asarray(model.mask_NT)
    index = np.flatnonzero(probability_N > 0)  # what is never drawn has no estimate
    if not extra_samples:
        return probability_N[index], {"index": index}
    p_NTV = np.exp(np.asarray(law.logp_NTV))
    tokens = np.array(list(itertools.product(range(p_NTV.shape[-1]), repeat=extra_samples)))
    rows = [(n, combination) for n in index for combination in itertools.product(*(range(len(tokens) if own else 1) for own in mask_NT[n]))]
    index, chosen = np.array([n for n, _ in rows]), np.array([combination for _, combination in rows])
    extra_RTK = tokens[chosen]
    p_RTK = np.take_along_axis(p_NTV[index], extra_RTK, axis=-1)
    weight_R = probability_N[index] * np.where(mask_NT[index][..., None], p_RTK, 1).prod(axis=(1, 2))
    return weight_R, {"index": index, "extra": extra_RTK}


def _tuples(draws, rollouts: int, chunk: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """All tuples of `rollouts` draws, `chunk` at a time, with their probabilities; the last chunk is filled up with weight 0."""
    weight_R, rows = draws
    count = len(weight_R) ** rollouts
    chunk = max(min(chunk, count), 1)
    for start in range(0, count, chunk):
        number = np.arange(start, start + chunk)
        place = np.stack(np.unravel_index(np.minimum(number, count - 1), (len(weight_R),) * rollouts), axis=1)
        weight_C = np.where(number < count, weight_R[place].prod(axis=1), 0)
        yield weight_C, {name: x[place] for name, x in rows.items()}


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
    """A random enumerable student and teacher. `name` is a free label, which `str` gives back.

    `features` None is the tabular student, with logits of its own at every prefix; a number shares that many random features between
    prefixes. `stop` is an absorbing stop token (ragged lengths). `observed` positions are written by an environment: their token is a
    function of what came before, their mask is 0. Raises UserError where the completions are too many to be listed.
    """
    _check_size(vocab, length, observed)
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


def _check_size(vocab: int, length: int, observed: tuple[int, ...]) -> None:
    own = length - len(observed)
    if (count := vocab**own) > MOST_COMPLETIONS:
        power = "length" if own == length else own
        raise UserError(
            f"vocab = {vocab}, length = {length}: vocab ** {power} = {count} completions are too many to be listed; at most "
            f"{MOST_COMPLETIONS} can be: lower vocab or length"
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
