"""Signal: which per-token loss compares student and teacher, on which part of the vocabulary."""

import dataclasses

from opd_jax.numerics import entries

TOPK = ("topk_teacher", "topk_student", "topk_union")
SUPPORTS = ("full", "sampled", *TOPK, *(f"{name}+token" for name in TOPK))
TAILS = ("generalised", "sampled_tail", "renormalise", "bucket", "none", "sampled_tail_published")
SAMPLED_TAILS = ("sampled_tail", "sampled_tail_published")


@dataclasses.dataclass(frozen=True)
class Signal:
    """Which per-token loss: a sum of the kind's entries f(p, q) (entries.py) over a support, and what is done about the rest.

    Supports:
        full      the vocabulary
        sampled   sg(df/dp(y)) log p(y), right in expectation over y ~ p
        topk_teacher, topk_student, topk_union (of both)   the `k` most probable tokens; with "+token" the sampled one too, counted once.
                  With `k` at least the vocabulary they are `full`, whatever the tail.

    Tails of a top-k S, which is data without a gradient. Only `sampled_tail` keeps the expected gradient of `full`; the next three are
    losses of their own, at least 0, and exactly 0 without a gradient at p = q; the last two are BIASED even there, and for study:
        sampled_tail  `generalised`, and 1[y outside] sg(df/dp(y)) log p(y) (with +token, y is never outside)
        generalised   sum over S of f
        renormalise   f between the two laws renormalised on S; the mass on S itself is free
        bucket        S and one entry for the rest: at most the full divergence
        none          sum over S of f without its linear part (jsd between 0 and 1 has none), such as p log(p/q), which is least at
                      p = q/e on S
        sampled_tail_published  `none`, and 1[y outside] sg(log p/q(y)) log p(y), reverse_kl alone: off by the gradient of p(S)

    `beta` is used by the mixtures (jsd, jsd_continuous, skew_*), others ignore it; temperatures divide logits. `k` is given exactly with a
    top-k; another tail than the default is for a top-k too. `clip` (nats, 0: off) cuts each entry off, sum_v min(f, clip), those of
    forward_kl without their linear part (entries.clipped); it is for supports that are laws: full, or a top-k with the tail renormalise or
    bucket, whose rest is an entry too. BIASED: a clipped entry has no gradient of its own. Of forward_kl the softmax then pushes its token
    down where the divergence pulls it up, until it has no mass: that costs no more than `clip`.

    Losses that are not divergences take `full` alone. Of those, `top1_cross_entropy` is -log p at the teacher's most probable token: its
    law as a hard label, the expert's action of DAgger (Ross, Gordon and Bagnell 2011). Raises ValueError.
    """

    kind: str
    support: str = "full"
    _: dataclasses.KW_ONLY
    tail: str = "renormalise"
    k: int | None = None
    beta: float | None = None
    clip: float = 0.0
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0

    def __post_init__(self):
        for field, value, valid in (
            ("divergence", self.kind, entries.KINDS),
            ("support", self.support, SUPPORTS),
            ("tail", self.tail, TAILS),
        ):
            if value not in valid:
                raise ValueError(f"signal.{field} = {value!r} is not known; valid: {', '.join(valid)}")
        if self.support != "full" and self.kind not in entries.DIVERGENCES:
            raise ValueError(f"signal.support = {self.support!r} is for divergences, not for signal.divergence = {self.kind!r}; use 'full'")
        self._check_topk()
        self._check_clip()
        if entries.DIVERGENCES.get(self.kind):
            self._check_beta()
        for name in ("student_temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss.{name} = {getattr(self, name)!r} must be above 0")

    def _check_topk(self):
        if not self.is_topk and self.k is not None:
            raise ValueError(f"signal.k = {self.k!r} is for top-k supports ({', '.join(TOPK)}), not for signal.support = {self.support!r}")
        if not self.is_topk and self.tail != "renormalise":
            raise ValueError(
                f"signal.tail = {self.tail!r} is for top-k supports ({', '.join(TOPK)}); with signal.support = {self.support!r} "
                "leave it at 'renormalise'"
            )
        if self.is_topk and (not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"signal.k = {self.k!r} must be a whole number of at least 1 for signal.support = {self.support!r}")
        if self.tail == "sampled_tail_published" and self.kind != "reverse_kl":
            raise ValueError(
                f"signal.tail = {self.tail!r} is for signal.divergence = 'reverse_kl', not for {self.kind!r}; use 'sampled_tail'"
            )

    def _check_clip(self):
        if not 0 <= self.clip < float("inf"):
            raise ValueError(f"signal.clip = {self.clip!r} must be 0 (off) or more, and finite")
        if self.clip and self.kind not in entries.DIVERGENCES:
            raise ValueError(f"signal.clip = {self.clip:g} is for divergences, not for signal.divergence = {self.kind!r}; use 0")
        if self.clip and not (self.support == "full" or (self.is_topk and self.tail in ("renormalise", "bucket"))):
            asked = f"signal.tail = {self.tail!r}" if self.is_topk else f"signal.support = {self.support!r}"
            raise ValueError(
                f"signal.clip = {self.clip:g} does not go with {asked}, whose entries are not those of a law; use 0, signal.support = "
                "'full', or a top-k with signal.tail = 'renormalise' or 'bucket'"
            )

    def _check_beta(self):
        if self.beta is None or not 0 <= self.beta <= 1:
            raise ValueError(f"signal.beta = {self.beta!r} must be between 0 and 1 for signal.divergence = {self.kind!r}")
        if self.kind == "jsd" and 0 < min(self.beta, 1 - self.beta) < 1e-3:
            raise ValueError(
                f"signal.beta = {self.beta!r} makes signal.divergence = 'jsd' vanish (it tends to 0 at both ends, a KL exactly there); "
                "use 0, 1, or a value from 0.001 to 0.999"
            )

    @property
    def needs_target(self) -> bool:
        return self.kind not in ("nll", "negative_entropy")

    @property
    def is_topk(self) -> bool:
        return self.support.startswith("topk")

    @property
    def adds_token(self) -> bool:
        return self.support.endswith("+token")

    @property
    def reads_tokens(self) -> bool:
        """The loss depends on the token that was sampled."""
        return self.support == "sampled" or self.adds_token or self.tail in SAMPLED_TAILS or self.kind == "nll"
