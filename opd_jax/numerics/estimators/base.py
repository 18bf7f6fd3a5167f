"""What an estimator is: per-token statistics in, one term of the loss out, with a claim about the gradient that it follows.

Notation: pi student, q teacher, y ~ pi, c_t the prefix of token t, l_t = log q(y_t|c_t) - log pi(y_t|c_t) (reward convention),
K_t = KL(pi(.|c_t) || q(.|c_t)), s_t = grad log pi(y_t|c_t). Gradients are those of a loss to minimise, summed over the tokens of a rollout.
Claims hold on-policy, at temperature 1, without truncation of the sampling law, for normalisers that are constant over rollouts
(`sequence_sum`, `constant`).

Targets:
    sequence_reverse_kl  grad KL(pi || q) over whole completions
    token_reverse_kl     E_y sum_t grad K_t with the prefixes held fixed; the other token-level targets likewise
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp

from opd_jax.numerics import importance
from opd_jax.numerics.token_stats import DenseHead, Signal, Stats, Target, token_stats

TARGETS = {
    "sequence_reverse_kl": None,
    "token_reverse_kl": Signal("reverse_kl"),
    "token_forward_kl": Signal("forward_kl"),
    "token_jsd": Signal("jsd", beta=0.5),
    "token_skew_forward_kl": Signal("skew_forward_kl", beta=0.1),
    "token_skew_reverse_kl": Signal("skew_reverse_kl", beta=0.1),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask_BT", "behaviour_logp_BT", "group_B", "baseline_BT", "advantage_BT", "drawn_BT", "partner_B", "sign_B", "delta_B"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """What an estimator may look at beside the statistics; made from the whole batch, before the microbatch split."""

    mask_BT: jax.Array  # 1 on the tokens to learn from
    behaviour_logp_BT: jax.Array | None = None  # nats under the law that sampled; None: the policy itself
    group_B: jax.Array | None = None  # rollouts of one prompt share a number; None: each is alone
    baseline_BT: jax.Array | None = None  # nats, of an estimator that looks across rows: see Estimator.prepare
    advantage_BT: jax.Array | None = None  # of an estimator whose advantages are given: rewards
    drawn_BT: jax.Array | None = None  # 1 on all tokens that were drawn, where the mask has not all of them; None: the mask
    # Of pairs of completions, for Preference:
    partner_B: jax.Array | None = None  # number of the other row of the pair, in the whole batch
    sign_B: jax.Array | None = None  # 1: preferred to its partner, -1: its partner is preferred, 0: in no pair
    delta_B: jax.Array | None = None  # nats, the margin of the pair, which both rows share: see Estimator.prepare

    def log_ratios(self, logp_BT: jax.Array) -> jax.Array:
        """log rho_t to the law that sampled, [B, T], constant: of every token that was drawn, learnt from or not."""
        drawn_BT = self.mask_BT if self.drawn_BT is None else self.drawn_BT
        return importance.ratios(logp_BT, self.behaviour_logp_BT, drawn_BT)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["mask_BT", "local_BT", "advantage_BT", "w_local_BT", "w_score_BT"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the loss: sum_t m (sg(w_local) local - sg(w_score advantage) log pi). None: absent, or weight 1."""

    mask_BT: jax.Array
    local_BT: jax.Array | None = None
    advantage_BT: jax.Array | None = None
    w_local_BT: jax.Array | None = None
    w_score_BT: jax.Array | None = None


def loss_B(stats: Stats, term: Term) -> jax.Array:
    """The loss of a term, summed over tokens, [B]; what stands where the mask is 0 does not count."""
    loss_BT = jnp.zeros(term.mask_BT.shape, stats.logp_BT.dtype)

    def counted(x_BT):  # before the products: the gradient of a product with NaN is NaN, masked later or not
        return jnp.where(term.mask_BT != 0, x_BT, 0)

    if term.local_BT is not None:
        weight_BT = 1.0 if term.w_local_BT is None else jax.lax.stop_gradient(term.w_local_BT)
        loss_BT += counted(weight_BT) * counted(term.local_BT)
    if term.advantage_BT is not None:
        weight_BT = 1.0 if term.w_score_BT is None else term.w_score_BT
        loss_BT -= jax.lax.stop_gradient(counted(weight_BT * term.advantage_BT)) * counted(stats.logp_BT)
    return jnp.sum(term.mask_BT * loss_BT, axis=1)


@dataclasses.dataclass(frozen=True)
class Estimator(abc.ABC):
    """Base of all estimators. `unbiased` speaks of the estimator's own `target`."""

    name: str
    claim: str
    formula: str
    reference: str
    target: str
    unbiased: bool
    signal: Signal

    @property
    @abc.abstractmethod
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that `terms` reads."""

    @abc.abstractmethod
    def terms(self, stats: Stats, context: Context) -> Term:
        """The term of the loss, by [B, T] arithmetic on the statistics."""

    @property
    def looks_across(self) -> bool:
        """Whether a row's term depends on other rows, by `context.baseline_BT` or `context.delta_B`."""
        return False

    def prepare(self, stats: Stats, context: Context) -> Context:
        """Fills in what looks across rows, from the statistics of the whole batch: call it before the batch is split."""
        return context

    def surrogate(
        self,
        student_logits_BTV: jax.Array,
        teacher_logits_BTV: jax.Array,
        tokens_BT: jax.Array,
        mask_BT: jax.Array,
        *,
        behaviour_logp_BT: jax.Array | None = None,
        group_B: jax.Array | None = None,
        extra_tokens_BTN: jax.Array | None = None,
    ) -> jax.Array:
        """The loss [B] of rollouts whose gradient in the student's logits is the estimate; its value means nothing by itself.

        Logits and tokens where the mask is 0 are ignored; masks may have gaps. `group_B`: rollouts of one prompt share a number, without
        it each is alone. `extra_tokens_BTN`: further draws from pi at each prefix, for MultiSample. The code of training, on dense logits.

        Raises ValueError, which names the argument, for shapes that do not fit and, unless traced, tokens outside the vocabulary.
        """
        _check_arguments(student_logits_BTV, teacher_logits_BTV, tokens_BT, mask_BT, behaviour_logp_BT, group_B, extra_tokens_BTN)
        mask_BT = mask_BT.astype(bool)
        student, teacher = (DenseHead(jnp.where(mask_BT[..., None], x, 0)) for x in (student_logits_BTV, teacher_logits_BTV))
        if extra_tokens_BTN is not None:
            extra_tokens_BTN = jnp.where(mask_BT[..., None], extra_tokens_BTN, 0)
        stats = token_stats(
            student,
            Target((teacher,)),
            jnp.where(mask_BT, tokens_BT, 0),
            signal=self.signal,
            needs={"logp", *self.needs},
            extra_tokens_BTN=extra_tokens_BTN,
        )
        group_B = jnp.arange(len(mask_BT)) if group_B is None else group_B
        context = self.prepare(jax.lax.stop_gradient(stats), Context(mask_BT, behaviour_logp_BT, group_B))
        return loss_B(stats, self.terms(stats, context))


def _check_arguments(student_logits_BTV, teacher_logits_BTV, tokens_BT, mask_BT, behaviour_logp_BT, group_B, extra_tokens_BTN) -> None:
    shape = jnp.shape(student_logits_BTV)
    if len(shape) != 3:
        raise ValueError(f"student_logits_BTV has the shape {shape}; must be [B, T, V] (for one rollout [1, T, V])")
    B, T, V = shape
    own = () if extra_tokens_BTN is None else jnp.shape(extra_tokens_BTN)[2:3]
    for name, value, letters, expected in (
        ("teacher_logits_BTV", teacher_logits_BTV, "[B, T, V]", (B, T, V)),
        ("tokens_BT", tokens_BT, "[B, T]", (B, T)),
        ("mask_BT", mask_BT, "[B, T]", (B, T)),
        ("behaviour_logp_BT", behaviour_logp_BT, "[B, T]", (B, T)),
        ("group_B", group_B, "[B]", (B,)),
        ("extra_tokens_BTN", extra_tokens_BTN, "[B, T, N]", (B, T, *(own or ("N",)))),
    ):
        if value is not None and jnp.shape(value) != expected:
            raise ValueError(f"{name} has the shape {jnp.shape(value)}; must be {letters} = {expected}, as student_logits_BTV is {shape}")
    for name, tokens, counted in (("tokens_BT", tokens_BT, mask_BT), ("extra_tokens_BTN", extra_tokens_BTN, mask_BT[..., None])):
        if tokens is not None:
            _check_tokens(name, tokens, counted, V)


def _check_tokens(name: str, tokens: jax.Array, counted: jax.Array, vocabulary: int) -> None:
    """Refuses tokens that no logit is of; values that are traced are not known yet."""
    if isinstance(tokens, jax.core.Tracer) or isinstance(counted, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # inside jit, too
        outside = (counted != 0) & ((tokens < 0) | (tokens >= vocabulary))
        if outside.any():
            token = int(jnp.broadcast_to(tokens, outside.shape)[outside][0])
            said = f"{name} holds {token} where mask_BT is not 0"
            raise ValueError(f"{said}; must be in 0 to {vocabulary - 1}, as student_logits_BTV has {vocabulary} tokens")
