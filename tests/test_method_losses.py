"""The loss of each file in configs/methods against what was published: TRL where it has it, otherwise the paper's formula in PyTorch.

A config goes the way of a run from its file to a gradient (config, objective, batch, teacher bank, learner), with models whose parameters
are their logits. Each file has one oracle below, which knows the paper and none of the project's code; a new file needs another.
"""

import collections
import dataclasses
import pathlib
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tables import LENGTH, TEXTS, Case, case, load
from test_methods import CASES, METHODS
from trl.experimental.gkd import GKDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.sdpo import loss_utils
from trl.experimental.sdpo.sdpo_trainer import SDPOTrainer

ROOT = pathlib.Path(__file__).resolve().parents[1]
SPECIAL = 256  # ids from here on are special tokens of the byte tokenizer


class Seen:
    """What an oracle reads: laws [B, T, V] with the student's as the leaf, completions, and what was said of them."""

    def __init__(self, case: Case):
        tensor = lambda x: torch.tensor(np.asarray(x))
        self.student = tensor(case.logits["student"]).requires_grad_()
        self.teacher = {name: tensor(x) for name, x in case.logits.items() if name not in ("student", "reference")}
        self.tag = case.tag_B
        self.tokens, self.behaviour = tensor(case.tokens_BT).long(), tensor(case.behaviour_logp_BT)
        self.reward, self.stopped = tensor(case.reward_B), tensor(case.stopped_B)
        self.q = torch.log_softmax(next(iter(self.teacher.values()), self.student), -1).detach()
        self.r = torch.log_softmax(tensor(case.logits["reference"]), -1)
        length = torch.tensor([min(len(text) + 1, LENGTH) for text in TEXTS])
        place = torch.arange(LENGTH)
        self.mask = ((place[None] < length[:, None]) & ((place < case.gap[0]) | (place >= case.gap[1]))).double()

    @property
    def p(self):
        return torch.log_softmax(self.student, -1)

    def at(self, law):
        """The entry of each token."""
        return law.gather(-1, self.tokens[..., None])[..., 0]

    @property
    def labels(self):
        return torch.where(self.mask > 0, self.tokens, -100)

    def groups(self, size: int):
        return self.reward.reshape(-1, size)


def token_mean(x, mask):
    return (x * mask).sum() / mask.sum().clamp(min=1)


def sequence_mean(x, mask):
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def reverse_kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def forward_kl(p, q):
    return (q.exp() * (q - p)).sum(-1)


def trainer(**fields):
    """What a method of a TRL trainer reads of its trainer."""
    model = types.SimpleNamespace(training=True)
    accelerator = types.SimpleNamespace(gather=lambda x: x)
    metrics = {"train": collections.defaultdict(list)}
    return types.SimpleNamespace(model=model, accelerator=accelerator, _metrics=metrics, **fields)


# ---- one oracle for each file: (what is seen, the arguments of the config) -> loss


@dataclasses.dataclass(frozen=True)
class Oracle:
    loss: Callable
    on_policy: bool  # the paper's loss is for completions of the student itself
    gap: tuple[int, int]  # positions that somebody else has written: a prefix, or an observation
    value: bool  # its value is ours, not the gradient alone: it is not where a ratio is differentiated in place of a log-prob


ORACLES: dict[str, Oracle] = {}


def oracle(*names: str, on_policy: bool = False, gap: tuple[int, int] = (0, 0), value: bool = True):
    def add(loss):
        ORACLES.update({name: Oracle(loss, on_policy, gap, value) for name in names})
        return loss

    return add


@oracle("sft")
def cross_entropy(seen):
    return F.cross_entropy(seen.student.flatten(0, 1), seen.labels.flatten(), ignore_index=-100)


@oracle("seq_kd")
def sequence_level(seen, reject=False, stored=False, store=False, word=0.0, greedy=False):
    """Of what the teacher wrote and, with reject, the verifier accepts; word: a share of the word-level loss."""
    if reject:
        seen.mask = seen.mask * (seen.reward >= 1)[:, None]
    loss = (1 - word) * cross_entropy(seen)
    soft = on_top_of_teacher(seen, 16) if stored or store else forward_kl(seen.p, seen.q)
    return loss + word * token_mean(soft, seen.mask) if word else loss


def on_top_of_teacher(seen, k):
    """Forward KL on the teacher's best tokens and one entry for the rest."""
    ids = seen.q.topk(k, -1).indices
    p, q = (loss_utils.add_tail_bucket(law.gather(-1, ids)) for law in (seen.p, seen.q))
    return loss_utils.compute_divergence(p, q, 0.0)


@oracle("dagger")
def of_the_experts_action(seen, soft=False, k=16, p=0.0):
    if soft:
        return token_mean(on_top_of_teacher(seen, int(k)), seen.mask)
    best = seen.q.argmax(-1)
    return F.cross_entropy(seen.student.flatten(0, 1), torch.where(seen.mask > 0, best, -100).flatten(), ignore_index=-100)


@oracle("lightning")
def offline(seen, k=0, cumulative=False, store=False):
    """The advantage log q - log p of stored completions; k: the stored top of the law."""
    if k:
        return token_mean(on_top_of_teacher(seen, int(k)), seen.mask)
    log_ratio = (seen.at(seen.p) - seen.behaviour).detach() * seen.mask
    weight = log_ratio.cumsum(1).exp() if cumulative else 1
    return reinforce(seen, weight * (seen.at(seen.q) - seen.at(seen.p)))


@oracle("supervised_kd")
def hinton(seen, tau=2.0, hard=0.5):
    """(1 - a) tau^2 KL(q^tau || p^tau) + a CE."""
    student, teacher = (torch.log_softmax(z / tau, -1) for z in (seen.student, seen.teacher["teacher"]))
    soft = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return (1 - hard) * tau**2 * token_mean(soft, seen.mask) + hard * cross_entropy(seen)


def trl_divergence(seen, rows, beta):
    rows = slice(rows, rows + 1) if rows is not None else slice(None)
    student, teacher = seen.student[rows], seen.teacher["teacher"][rows]
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels=seen.labels[rows], beta=beta, temperature=1.0)


@oracle("gkd")
def gkd(seen, beta=0.5, forward_kl=False, reverse_kl=False, on_policy=0.5):
    """Eq. 2: the mean of each completion first."""
    beta = 0.0 if forward_kl else 1.0 if reverse_kl else beta
    return torch.stack([trl_divergence(seen, row, beta) for row in range(len(seen.tokens))]).mean()


@oracle("kl_prefix_2x2")
def either_direction(seen, forward_kl=False, teacher=False):
    return trl_divergence(seen, None, 0.0 if forward_kl else 1.0)


@oracle("thinking_machines", on_policy=True, value=False)
def importance_sampling_loss(seen, discount=0.0):
    """tinker's loss, per completion: -sum exp(log p - log sampler) A, A the discounted sum of -(log sampler - log q)."""
    reward, advantage = -(seen.behaviour - seen.at(seen.q)) * seen.mask, torch.zeros_like(seen.mask)
    for t in range(LENGTH):
        for later in range(t, LENGTH):
            advantage[:, t] += discount ** (later - t) * reward[:, later]
    return -((seen.at(seen.p) - seen.behaviour).exp() * advantage * seen.mask).sum() / len(seen.tokens)


@oracle("lsm")
def local_support_matching(seen, k=16, keep=False, **variant):
    """Eq. 6 to 8: logits gathered on a top k, softmax again; G.3: with the drawn token, or EMA-PG's head and tail on the whole laws."""
    source = seen.student if variant.keys() & {"v2", "v4"} else seen.teacher["teacher"]
    chosen = torch.zeros_like(source, dtype=torch.bool).scatter(-1, source.topk(int(k), -1).indices, True)
    drawn = torch.nn.functional.one_hot(seen.tokens, source.shape[-1]).bool()
    mask = seen.mask if keep else seen.mask * (seen.tokens < SPECIAL)
    if variant.keys() & {"v4", "v5"}:
        head = torch.where(chosen, seen.p.exp() * (seen.p - seen.q), 0).sum(-1)
        tail = torch.where(drawn & ~chosen, (seen.p - seen.q).detach() * seen.p, 0).sum(-1)
        return token_mean(head + tail, mask)
    support = chosen | drawn if variant.keys() & {"v2", "v3"} else chosen
    student, teacher = (
        torch.log_softmax(z.masked_fill(~support, -torch.inf), -1).masked_fill(~support, 0) for z in (seen.student, seen.teacher["teacher"])
    )
    return token_mean(torch.where(support, student.exp() * (student - teacher), 0).sum(-1), mask)


def reinforce(seen, advantage, reduce=token_mean):
    return reduce(-advantage.detach() * seen.at(seen.p), seen.mask)


@oracle("vopd")
def with_control_variate(seen):
    return reinforce(seen, seen.at(seen.q) - seen.at(seen.p) + reverse_kl(seen.p, seen.q))


@oracle("g_opd")
def generalised(seen, scale=0.5):
    """The paper's advantage as it stands: lambda (log q - log r) - (log p - log r)."""
    p, q, r = (seen.at(law) for law in (seen.p, seen.q, seen.r))
    return reinforce(seen, scale * (q - r) - (p - r))


@oracle("ex_opd")
def extrapolated(seen, scale=1.25, full=False):
    """Full: the optimum is proportional to q (q / r)^(lambda - 1)."""
    if not full:
        return generalised(seen, scale)
    return token_mean(reverse_kl(seen.p, torch.log_softmax(seen.q + (scale - 1) * (seen.q - seen.r), -1)), seen.mask)


@oracle("prefix_opd")
def prefix(seen, first=6):
    return token_mean(reverse_kl(seen.p, seen.q), seen.mask * (torch.arange(LENGTH) < first))


@oracle("iw_opd")
def importance_weighted(seen, gain=0.5):
    stub = trainer(temperature=1.0, iw_opd_gamma=gain, iw_opd_epsilon=1e-8)
    return IWOPDTrainer._compute_iw_opd_loss(stub, seen.student, seen.tokens, seen.labels, seen.at(seen.q))


@oracle("eopd")
def entropy_aware(seen, threshold=0.8):
    high = -(seen.q.exp() * seen.q).sum(-1) > threshold
    assert high[seen.mask > 0].any() and not high[seen.mask > 0].all()
    return token_mean(reverse_kl(seen.p, seen.q) + high * forward_kl(seen.p, seen.q), seen.mask)


@oracle("minillm")
def minillm(seen, normalised=False, discount=1.0):
    """w_t (grad KL_t + (sum of the later KL) grad log p), w_t = p / sampler: the paper's two terms, later log-ratios by their means."""
    kl = reverse_kl(seen.p, seen.q)
    known = (kl * seen.mask).detach()
    length = known.shape[1]
    power = torch.tensor([[discount ** (u - t) if u > t else 0.0 for t in range(length)] for u in range(length)]).double()
    later, number = known @ power, seen.mask.double() @ power
    if normalised:
        later = later / number.clamp_min(1e-300)
    ratio = (seen.at(seen.p) - seen.behaviour).exp().detach()
    return token_mean(ratio * (kl + later * seen.at(seen.p)), seen.mask)


@oracle("grpo", value=False)
def group_relative(seen, dr_grpo=False, rloo=False, dapo=False, kl=0.0):
    """The clipped losses by TRL's trainer; that of rloo is not there. Regularised by the exact KL to the reference."""
    reward, mask = seen.groups(8), seen.mask
    centred = reward - reward.mean(1, keepdim=True)
    advantage = centred if dr_grpo else centred * 8 / 7 if rloo else centred / (reward.std(1, keepdim=True) + 1e-6)
    if dapo:
        differ = (reward != reward[:, :1]).any(1).repeat_interleave(8)
        mask = mask * (differ & seen.stopped)[:, None]
    loss = trl_policy_loss(seen, advantage, mask, "dr_grpo" if dr_grpo or rloo else "dapo" if dapo else "grpo", high=0.28 if dapo else 0.2)
    loss = loss * LENGTH if rloo else loss  # the sum over tokens, where dr_grpo has a mean over the longest completion
    return loss + kl * sequence_mean(reverse_kl(seen.p, seen.r), seen.mask) if kl else loss


def trl_policy_loss(seen, advantage, mask, loss_type, high=0.2):
    moved = ((seen.at(seen.p) - seen.behaviour).exp() - 1)[mask > 0]
    assert (moved > high).any() and (moved < -0.2).any()  # on both sides of the clip
    inputs = {"completion_ids": seen.tokens, "completion_mask": mask, "old_per_token_logps": seen.behaviour}
    settings = {"epsilon_low": 0.2, "epsilon_high": high, "loss_type": loss_type, "max_completion_length": LENGTH}
    stub = trainer(importance_sampling_level="token", **settings)
    return SDPOTrainer._compute_policy_loss(stub, inputs | {"advantages": advantage.flatten()}, seen.student)


@oracle("reopd")
def adaptive(seen, tau=0.007, gain=1.0, full=False):
    """A lambda for each token, 1 + gamma exp(-(e^x - x - 1) / tau), x the token's log-ratio."""
    gamma = min(0.1 * 0.5 / 0.2, gain)
    x = (seen.at(seen.q) - seen.at(seen.p)).detach()
    scale = 1 + gamma * torch.exp(-(torch.exp(x) - x - 1) / tau)
    if not full:
        return generalised(seen, scale)
    return extrapolated(seen, scale[..., None], full=True)


def rloo(seen, size=8):
    group = seen.groups(size)
    return (group - (group.sum(1, keepdim=True) - group) / (size - 1)).flatten()[:, None]


@oracle("routed")
def by_domain(seen, taught="reverse"):
    """A term for each domain, of its own tokens alone."""
    own = torch.tensor([tag == taught for tag in seen.tag]).double()[:, None]
    (teacher,) = seen.teacher.values()
    policy = reinforce(seen, rloo(seen, 4), lambda x, mask: token_mean(x, mask * (1 - own)))
    return policy + token_mean(reverse_kl(seen.p, teacher.log_softmax(-1)), seen.mask * own)


@oracle("rl_opd", value=False)
def with_rewards(seen, share=0.5, convex=False, route=False, kdrl=False):
    """Distillation and REINFORCE, each by the tokens that it learns from."""
    solved = (seen.reward >= 1).double()[:, None]
    if route:
        policy = reinforce(seen, rloo(seen), lambda x, mask: token_mean(x, mask * solved))
        return policy + token_mean(reverse_kl(seen.p, seen.q), seen.mask * (1 - solved))
    policy = reinforce(seen, rloo(seen))
    if kdrl:
        return policy + share * token_mean((seen.at(seen.p) - seen.at(seen.q)) ** 2 / 2, seen.mask)
    return (1 - share if convex else 1) * token_mean(reverse_kl(seen.p, seen.q), seen.mask) + share * policy


@oracle("mopd")
def routed(seen, reward=0.0, scale=1.0, keep=""):
    """w_t A_t, w_t the ratio or, outside [1/2, 2], 0; A_t of the teacher of the row's domain."""
    teachers = {name: law.log_softmax(-1) for name, law in seen.teacher.items()}
    assert len(set(seen.tag)) == len(teachers) == 2 + bool(keep)
    q, r = torch.stack([seen.at(teachers[name])[row] for row, name in enumerate(seen.tag)]), seen.at(seen.r)
    ratio = (seen.at(seen.p) - seen.behaviour).exp().detach()
    weight = torch.where((ratio >= 0.5) & (ratio <= 2), ratio, 0)
    loss = reinforce(seen, weight * (scale * (q - r) - (seen.at(seen.p) - r)), sequence_mean)
    if not reward:
        return loss
    group = seen.groups(4)
    advantage = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-6)
    return loss + reward * reinforce(seen, advantage.flatten()[:, None], sequence_mean)


@oracle("pooled", value=False)
def of_all_members(seen, arithmetic=False, confidence=False, temperature=1.0):
    """The weighted sum of the divergences from each teacher, whose gradient is that from the pool."""
    laws = [law.log_softmax(-1) for law in seen.teacher.values()]
    certain = torch.stack([(law.exp() * law).sum(-1) for law in laws])
    weights = torch.softmax(certain / temperature if confidence else 0 * certain, 0)
    divergence = forward_kl if arithmetic else reverse_kl
    return token_mean(sum(weight * divergence(seen.p, law) for weight, law in zip(weights, laws, strict=True)), seen.mask)


@oracle("dpo")
def direct_preference(seen, beta=0.1, reward=False, teacher_mean=False):
    """Eq. 7 of the best and the worst completion of each prompt; where they are as good there is no pair."""
    total = lambda law: (seen.at(law) * seen.mask).sum(1)
    score = seen.reward if reward else total(seen.q) / seen.mask.sum(1) if teacher_mean else total(seen.q)
    implicit, losses = beta * (total(seen.p) - total(seen.r)).reshape(-1, 4), []
    for group, ours in zip(score.reshape(-1, 4), implicit, strict=True):
        if group.max() > group.min():
            losses.append(-F.logsigmoid(ours[group.argmax()] - ours[group.argmin()]))
    return torch.stack(losses).mean()


@oracle("corrected", gap=(0, 2))
def of_the_teachers_tokens(seen, worst=False, forward_kl=False, reverse_kl=False):
    """On what stands after the cut."""
    return either_direction(seen, forward_kl) if forward_kl or reverse_kl else cross_entropy(seen)


@oracle("tools", gap=(1, 3), value=False)
def between_observations(seen, drop=False, reward=0.0, teacher=False, student=False, level=0):
    """Neither distillation nor rewards speak of the tokens of an observation."""
    if teacher or student:
        return cross_entropy(seen)
    readable = torch.tensor([not (drop and "c" in text) for text in TEXTS])
    loss = token_mean(reverse_kl(seen.p, seen.q), seen.mask * readable[:, None])
    return loss + reward * reinforce(seen, rloo(seen)) if reward else loss


# ---- self-teachers


def topk_divergence(p, q, ids, alpha):
    """Both laws renormalised on the ids."""
    laws = [law.gather(-1, ids).log_softmax(-1) for law in (p, q)]
    return loss_utils.compute_divergence(*laws, alpha)


@oracle("opsd")
def opsd(seen, clipped=False, sampled=False, topk=0, paper_law=False, trust_region=False):
    """JSD(0.5), sum_v min(q log(q/p), 0.05), or the sampled log-ratio; the top k is the teacher's, the temperature that of the loss."""
    if trust_region:
        follow(seen, 0.05)
    student, q = (z / (1.1 if paper_law else 1.0) for z in (seen.student, seen.q))
    p, q = student.log_softmax(-1), q.log_softmax(-1)
    if clipped:
        loss = torch.clamp(q.exp() * (q - p), max=0.05).sum(-1)
    elif sampled:
        loss = loss_utils.compute_sampled_token_self_distillation_loss(student, q, seen.tokens, distillation_alpha=1.0)
    elif topk:
        loss = topk_divergence(p, q, q.topk(int(topk), -1).indices, 0.5)
    else:
        loss = loss_utils.compute_full_logit_self_distillation_loss(student, q, distillation_alpha=0.5)
    return token_mean(loss, seen.mask)


def follow(seen, mix):
    """The trust region as the code of SDPO has it: logits between those of the first and the live student, both constants."""
    seen.q = torch.lerp(seen.teacher["teacher"], seen.student.detach(), mix).log_softmax(-1)


@oracle("sdft")
def sdft(seen, reverse_kl=False, skip=0, importance=False):
    """The mean of each completion first; the first tokens are left out."""
    alpha = 1.0 if reverse_kl else 0.0
    loss = loss_utils.compute_full_logit_self_distillation_loss(seen.student, seen.q, distillation_alpha=alpha)
    loss = corrected(seen, loss) if importance else loss
    return sequence_mean(loss, seen.mask * (torch.arange(LENGTH) >= skip))


def corrected(seen, loss, clip=2.0):
    ratio = (seen.at(seen.p) - seen.behaviour).exp()
    assert (ratio > clip)[seen.mask > 0].any()
    return loss_utils.apply_importance_sampling_clipping(loss, seen.at(seen.p), seen.behaviour, clip)


@oracle("sdpo")
def sdpo(seen, rich=False, trust_region=False, hybrid=0.0, always=False):
    """The student's top k with one entry for the rest, over the tokens of who has something to read."""
    if trust_region:
        follow(seen, 0.05)
    loss = token_mean(corrected(seen, on_top_of_student(seen, *((20, 1.0) if rich else (100, 0.5)))), informed(seen, feedback=True))
    if not hybrid:
        return loss
    advantage = (seen.groups(8) - seen.groups(8).mean(1, keepdim=True)).flatten()[:, None]
    return (1 - hybrid) * loss + hybrid * reinforce(seen, advantage)


def on_top_of_student(seen, k, alpha, tail=True):
    settings = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": tail}
    return loss_utils.compute_topk_self_distillation_loss(seen.student, seen.q, **settings)


def informed(seen, feedback):
    """Mask of the tokens of who has something to read: another success of the group, or else feedback on a failure."""
    solved = seen.groups(8) >= 1
    sibling = solved.sum(1, keepdim=True) - solved.long() > 0
    found = (sibling | ~solved) if feedback else sibling
    assert found.any() and not found.all()
    return seen.mask * found.flatten()[:, None]


# ---- ours


def arguments(text: str) -> dict:
    """tau=3.0,full,keep=shift -> {"tau": 3.0, "full": True, "keep": "shift"}."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    return {name: (value if value.isalpha() else float(value)) if given else True for name, given, value in pairs}


def compare(ours: Case, theirs: Callable, *, value: bool) -> Seen:
    loss, _, gradient = ours.evaluate()
    seen = Seen(ours)
    wanted = theirs(seen)
    wanted.backward()
    if value:
        assert float(loss) == pytest.approx(wanted.item(), rel=1e-5)
    size = seen.student.grad.abs().max().item()
    assert size > 1e-4  # there is something to compare
    np.testing.assert_allclose(gradient, seen.student.grad.numpy(), atol=1e-5 * size)
    return seen


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_every_method_has_an_oracle(path):
    assert path.stem in ORACLES, f"configs/methods/{path.name}: add its published loss to the oracles of {pathlib.Path(__file__).name}"


# Beside the variants that run elsewhere: where a default is an end of its range a value between, and other losses of the paper.
MORE = {
    "lsm": ("v2,k=4", "v3,k=4,keep", "v4,k=4,keep", "v5,k=4,keep"),
    "minillm": ("normalised", "discount=0.5", "discount=0.5,normalised"),
    "prefix_opd": ("first=3",),
    "g_opd": ("scale=1.0",),
    "supervised_kd": ("tau=3.0,hard=0.25",),
    "iw_opd": ("gain=2.0",),
    "reopd": ("tau=2.0", "tau=2.0,full"),
    "pooled": ("confidence,temperature=0.5",),
    "dpo": ("beta=1.0",),
    "corrected": ("reverse_kl",),
    "opsd": ("clipped", "sampled", "topk=50", "paper_law", "trust_region"),
    "sdft": ("reverse_kl", "skip=3,importance"),
    "sdpo": ("rich", "trust_region", "hybrid=0.25"),
}
COMPARED = [(path, arg) for path, arg in CASES if path.stem in ORACLES]
COMPARED = list(dict.fromkeys(COMPARED + [(path, arg) for path in METHODS for arg in MORE.get(path.stem, ())]))


@pytest.mark.parametrize("path, arg", COMPARED, ids=str)
def test_the_loss_of_a_method_is_the_published_one(path, arg, float64):
    known = ORACLES[path.stem]
    found = case(load(f"{path}:{arg}"), on_policy=known.on_policy, gap=known.gap)
    compare(found, lambda seen: known.loss(seen, **arguments(arg)), value=known.value)


# Losses of TRL's trainer that no file has: the axes make them too.
SDPO = {"context.privileged.reads": "sibling"}
SAMPLED = {"signal.divergence": "reverse_kl", "signal.support": "sampled", "signal.tail": "renormalise", "signal.k": 0}
CLIPPED = {"reward.advantage": "grpo", "reward.clip_low": 0.2, "reward.clip_high": 0.2}


def test_sdpo_on_the_sampled_token(float64):
    def loss(seen):
        of_the_token = loss_utils.compute_sampled_token_self_distillation_loss(seen.student, seen.q, seen.tokens, distillation_alpha=1.0)
        return token_mean(corrected(seen, of_the_token), informed(seen, feedback=False))

    compare(case(load("configs/methods/sdpo.py", SDPO | SAMPLED)), loss, value=True)


def test_sdpo_renormalised_and_blended_with_the_clipped_loss_of_grpo(float64):
    def loss(seen):
        centred = seen.groups(8) - seen.groups(8).mean(1, keepdim=True)
        policy = trl_policy_loss(seen, centred / (seen.groups(8).std(1, keepdim=True) + 1e-6), seen.mask, "bnpo")
        distilled = corrected(seen, on_top_of_student(seen, 100, 0.5, tail=False))
        return 0.25 * policy + 0.75 * token_mean(distilled, informed(seen, feedback=False))

    found = case(load("configs/methods/sdpo.py:hybrid=0.25", SDPO | CLIPPED | {"signal.tail": "renormalise"}))
    compare(found, loss, value=False)
