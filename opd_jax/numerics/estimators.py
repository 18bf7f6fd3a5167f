"""Gradient estimators: per-token statistics -> the terms of a loss, each with its claim about the gradient that it follows.

Notation: pi student, q teacher, y ~ pi, c_t the prefix of token t, l_t = log q(y_t|c_t) - log pi(y_t|c_t) (reward convention),
K_t = KL(pi(.|c_t) || q(.|c_t)). Gradients are those of a loss to minimise, summed over the tokens of a rollout. Claims hold on-policy,
at temperature 1, without truncation of the sampling law, for normalisers that are constant over rollouts (`sequence_sum`, `constant`).

Targets:
    sequence_reverse_kl  grad KL(pi || q) over whole completions
    token_reverse_kl     E_y sum_t grad K_t with the prefixes held fixed; token_forward_kl and token_jsd (beta 0.5) likewise
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp

from opd_jax.numerics import credit as credit_lib
from opd_jax.numerics.token_stats import DenseHead, Signal, Stats, Target, token_stats

SAMPLED_REVERSE_KL = Signal("reverse_kl", support="sampled")
TARGETS = {
    "sequence_reverse_kl": None,
    "token_reverse_kl": Signal("reverse_kl"),
    "token_forward_kl": Signal("forward_kl"),
    "token_jsd": Signal("jsd", beta=0.5),
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mask_BT", "behaviour_logp_BT", "group_B"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Context:
    """What an estimator may look at beside the statistics; made from the whole batch, before the microbatch split."""

    mask_BT: jax.Array  # 1 on the tokens to learn from
    behaviour_logp_BT: jax.Array | None = None  # nats under the law that sampled
    group_B: jax.Array | None = None  # rollouts of one prompt share a number


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
    if term.local_BT is not None:
        weight_BT = 1.0 if term.w_local_BT is None else jax.lax.stop_gradient(term.w_local_BT)
        loss_BT += weight_BT * term.local_BT
    if term.advantage_BT is not None:
        weight_BT = 1.0 if term.w_score_BT is None else term.w_score_BT
        loss_BT -= jax.lax.stop_gradient(weight_BT * term.advantage_BT) * stats.logp_BT
    return jnp.sum(jnp.where(term.mask_BT != 0, term.mask_BT * loss_BT, 0), axis=1)


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

    def surrogate(
        self,
        student_logits_BTV: jax.Array,
        teacher_logits_BTV: jax.Array,
        tokens_BT: jax.Array,
        mask_BT: jax.Array,
        *,
        behaviour_logp_BT: jax.Array | None = None,
        group_B: jax.Array | None = None,
    ) -> jax.Array:
        """The loss [B] of rollouts whose gradient in the student's logits is the estimate; its value means nothing by itself.

        Logits and tokens where the mask is 0 are ignored; masks may have gaps. The same code as in training, on dense logits.
        """
        mask_BT = mask_BT.astype(bool)
        student, teacher = (DenseHead(jnp.where(mask_BT[..., None], x, 0)) for x in (student_logits_BTV, teacher_logits_BTV))
        needs = {"logp", *self.needs}
        stats = token_stats(student, Target((teacher,)), jnp.where(mask_BT, tokens_BT, 0), signal=self.signal, needs=needs)
        return loss_B(stats, self.terms(stats, Context(mask_BT, behaviour_logp_BT, group_B)))


@dataclasses.dataclass(frozen=True)
class Local(Estimator):
    """A differentiable per-token loss: the signal itself, prefixes taken as data.

    Unbiased for the fixed-prefix gradient of its divergence. It misses g2, the change of the prefixes' law, so it is biased for the
    sequence level. With support "full" it has no sampling noise but that of the prefixes.
    Sources: Agarwal et al., GKD (ICLR 2024), eq. 2; Fu et al., arXiv 2603.25562, eq. 4.
    """

    needs = ("local",)

    def terms(self, stats: Stats, context: Context) -> Term:
        return Term(context.mask_BT, local_BT=stats.local_BT)


@dataclasses.dataclass(frozen=True)
class ScoreFunction(Estimator):
    """REINFORCE on log-ratios: A_t from `credit.advantages`, loss -sum_t sg(A_t) log pi(y_t).

    to_go and sequence credit are unbiased for the sequence-level reverse KL: the past terms have mean 0 (E[s_t | c_t] = 0), and so has the
    gradient of the reward itself. token credit is unbiased for the fixed-prefix reverse KL, and misses g2 of the sequence level. Discounts
    between are biased for both. With `exact_future` the future log-ratios are replaced by their conditional means -K_u (tower rule): the
    same mean, less noise.
    Sources: Liu et al., Theory of On-Policy Distillation (2026), Theorems 1 and 2; Fu et al., arXiv 2603.25562, eq. 2 and 3.
    """

    credit: str = "token"
    gamma: float = 1.0
    exact_future: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logp", "target_logp", "kl") if self.exact_future else ("logp", "target_logp")

    def terms(self, stats: Stats, context: Context) -> Term:
        log_ratio_BT = jax.lax.stop_gradient(stats.target_logp_BT - stats.logp_BT)
        exact_kl_BT = stats.kl_BT if self.exact_future else None
        advantage_BT = credit_lib.advantages(log_ratio_BT, context.mask_BT, credit=self.credit, gamma=self.gamma, exact_kl_BT=exact_kl_BT)
        return Term(context.mask_BT, advantage_BT=advantage_BT)


@dataclasses.dataclass(frozen=True)
class LocalToGo(Estimator):
    """The exact local term, and the future KLs as the advantage of the sampled token: A_t = -sum_{u > t} gamma^(u - t) K_u.

    With gamma 1 unbiased for the sequence-level reverse KL: the local term is g1 exactly at each prefix, the advantage gives g2.
    Source: the product rule on sum_t E[K_t]; Liu et al., Theory of On-Policy Distillation (2026), Theorem 2.
    """

    gamma: float = 1.0

    needs = ("logp", "local", "kl")

    def terms(self, stats: Stats, context: Context) -> Term:
        future_BT = credit_lib.future_return(jnp.where(context.mask_BT.astype(bool), -stats.kl_BT, 0), context.mask_BT, self.gamma)
        return Term(context.mask_BT, local_BT=stats.local_BT, advantage_BT=future_BT)


THEORY = "Liu et al., Theory of On-Policy Distillation (2026)"
REVISITING = "Fu et al., Revisiting On-Policy Distillation, arXiv 2603.25562"
SEQUENCE = "Unbiased for the gradient of the sequence-level reverse KL"

REGISTRY: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        ScoreFunction(
            name="token",
            claim="Unbiased for the token-level reverse KL with prefixes held fixed; for the sequence level it misses g2",
            formula="A_t = l_t",
            reference=f"{REVISITING}, eq. 2",
            target="token_reverse_kl",
            unbiased=True,
            signal=SAMPLED_REVERSE_KL,
        ),
        ScoreFunction(
            name="to_go",
            claim=SEQUENCE,
            formula="A_t = sum_{u >= t} l_u",
            reference=f"{THEORY}, Theorem 1 (ii)",
            target="sequence_reverse_kl",
            unbiased=True,
            signal=SAMPLED_REVERSE_KL,
            credit="to_go",
        ),
        ScoreFunction(
            name="discounted",
            claim="Biased for the sequence-level reverse KL (gamma 0.9): between `token` and `to_go` in bias and in variance",
            formula="A_t = sum_{u >= t} gamma^(u - t) l_u",
            reference=f"{REVISITING}, eq. 3",
            target="sequence_reverse_kl",
            unbiased=False,
            signal=SAMPLED_REVERSE_KL,
            credit="discounted",
            gamma=0.9,
        ),
        ScoreFunction(
            name="sequence",
            claim=f"{SEQUENCE}; the past log-ratios add noise and no mean",
            formula="A_t = sum_u l_u",
            reference=f"{THEORY}, Theorem 1 (i)",
            target="sequence_reverse_kl",
            unbiased=True,
            signal=SAMPLED_REVERSE_KL,
            credit="sequence",
        ),
        ScoreFunction(
            name="rao_blackwell_to_go",
            claim=f"{SEQUENCE}; future log-ratios are replaced by exact KLs",
            formula="A_t = l_t - sum_{u > t} K_u",
            reference=f"{THEORY}, Theorem 1 (iv)",
            target="sequence_reverse_kl",
            unbiased=True,
            signal=SAMPLED_REVERSE_KL,
            credit="to_go",
            exact_future=True,
        ),
        LocalToGo(
            name="local_to_go",
            claim=f"{SEQUENCE}: exact local term, exact future KLs",
            formula="sum_t grad K_t + (sum_{u > t} K_u) s_t",
            reference=f"{THEORY}, Theorem 2",
            target="sequence_reverse_kl",
            unbiased=True,
            signal=Signal("reverse_kl"),
        ),
        Local(
            name="token_full",
            claim="Unbiased for the token-level reverse KL with prefixes held fixed, exact over the vocabulary",
            formula="sum_t grad K_t",
            reference=f"{REVISITING}, eq. 4",
            target="token_reverse_kl",
            unbiased=True,
            signal=Signal("reverse_kl"),
        ),
        Local(
            name="forward_kl",
            claim="Unbiased for the token-level forward KL with prefixes held fixed, exact over the vocabulary",
            formula="sum_t grad KL(q || pi)",
            reference="Agarwal et al., GKD, ICLR 2024",
            target="token_forward_kl",
            unbiased=True,
            signal=Signal("forward_kl"),
        ),
        Local(
            name="jsd",
            claim="Unbiased for the token-level JSD(0.5) with prefixes held fixed, exact over the vocabulary",
            formula="sum_t grad JSD_0.5(q, pi)",
            reference="Agarwal et al., GKD, ICLR 2024, eq. 1",
            target="token_jsd",
            unbiased=True,
            signal=Signal("jsd", beta=0.5),
        ),
    )
}


def build(signal: Signal, credit: str, gamma: float) -> Estimator:
    """The estimator of a training configuration, from the same classes as the registry's. Raises ValueError."""
    if credit not in credit_lib.CREDITS:
        raise ValueError(f"estimator.credit = {credit!r} is not known; valid: {', '.join(credit_lib.CREDITS)}")
    discount = gamma if credit == "discounted" else 1.0
    about = {
        "name": f"{signal.kind}/{signal.support}/{credit}",
        "claim": "",
        "formula": "",
        "reference": "",
        "target": "",
        "unbiased": False,
    }
    if signal.kind == "reverse_kl" and signal.support == "sampled":
        return ScoreFunction(**about, signal=signal, credit=credit, gamma=discount)
    if credit == "token":
        return Local(**about, signal=signal)
    if signal.kind == "reverse_kl" and credit in ("to_go", "discounted"):
        return LocalToGo(**about, signal=signal, gamma=discount)
    raise ValueError(
        f"estimator.credit = {credit!r} does not go with signal.divergence = {signal.kind!r}, signal.support = {signal.support!r}: "
        "use 'token', or signal.divergence = 'reverse_kl' with 'to_go' or 'discounted' (and, with signal.support = 'sampled', 'sequence')"
    )
