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
        self.member = case.member_B
        self.tokens, self.behaviour = tensor(case.tokens_BT).long(), tensor(case.behaviour_logp_BT)
        self.reward, self.stopped = tensor(case.reward_B), tensor(case.stopped_B)
        self.q = torch.log_softmax(next(iter(self.teacher.values()), self.student), -1).detach()
        self.r = torch.log_softmax(tensor(case.logits["reference"]), -1)
        length = torch.tensor([min(len(text) + 1, LENGTH) for text in TEXTS])
        self.mask = (torch.arange(LENGTH)[None] < length[:, None]).double()

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
    value: bool  # its value is ours, not the gradient alone: it is not where a ratio is differentiated in place of a log-prob


ORACLES: dict[str, Oracle] = {}


def oracle(*names: str, on_policy: bool = False, value: bool = True):
    def add(loss):
        ORACLES.update({name: Oracle(loss, on_policy, value) for name in names})
        return loss

    return add


@oracle("sft", "seq_kd")
def cross_entropy(seen, **_):
    return F.cross_entropy(seen.student.flatten(0, 1), seen.labels.flatten(), ignore_index=-100)


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
def local_support_matching(seen, k=16, keep=False):
    """Eq. 6 to 8: logits gathered on the teacher's top k, softmax again."""
    ids = seen.teacher["teacher"].topk(int(k), -1).indices
    student, teacher = (torch.log_softmax(z.gather(-1, ids), -1) for z in (seen.student, seen.teacher["teacher"]))
    return token_mean(reverse_kl(student, teacher), seen.mask if keep else seen.mask * (seen.tokens < SPECIAL))


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
def minillm(seen):
    """w_t (grad KL_t + (sum of the later KL) grad log p), w_t = p / sampler: the paper's two terms, later log-ratios by their means."""
    kl = reverse_kl(seen.p, seen.q)
    known = (kl * seen.mask).detach()
    later = known.flip(1).cumsum(1).flip(1) - known
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


# ---- self-teachers: the losses of their papers, whatever the file calls its arguments


def clipped_forward_kl(seen, clip=0.05):
    """OPSD: sum_v min(q log(q/p), clip)."""
    return torch.clamp(seen.q.exp() * (seen.q - seen.p), max=clip).sum(-1)


def on_top_of_teacher(seen, k, alpha):
    """OPSD with a top-k: both renormalised."""
    ids = seen.q.topk(k, -1).indices
    laws = [law.gather(-1, ids) for law in (seen.p, seen.q)]
    return loss_utils.compute_divergence(*(law - law.logsumexp(-1, keepdim=True) for law in laws), alpha)


def on_top_of_student(seen, k, alpha, tail=True):
    """SDPO."""
    settings = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": tail}
    return loss_utils.compute_topk_self_distillation_loss(seen.student, seen.q, **settings)


def whole(seen, alpha):
    return loss_utils.compute_full_logit_self_distillation_loss(seen.student, seen.q, distillation_alpha=alpha)


def of_the_token(seen):
    return loss_utils.compute_sampled_token_self_distillation_loss(seen.student, seen.q, seen.tokens, distillation_alpha=1.0)


def corrected(seen, loss, clip=2.0):
    ratio = (seen.at(seen.p) - seen.behaviour).exp()
    assert (ratio > clip)[seen.mask > 0].any()
    return loss_utils.apply_importance_sampling_clipping(loss, seen.at(seen.p), seen.behaviour, clip)


def informed(seen, size, feedback):
    """Mask of the tokens of who has something to read: another success of the group, or else feedback on a failure."""
    solved = seen.groups(size) >= 1
    sibling = solved.sum(1, keepdim=True) - solved.long() > 0
    found = (sibling | ~solved) if feedback else sibling
    assert found.any() and not found.all()
    return seen.mask * found.flatten()[:, None]


def skipped(seen, first=3):
    """SDFT leaves the first tokens out."""
    return seen.mask * (torch.arange(LENGTH) >= first)


# ---- ours


def arguments(text: str) -> dict:
    """tau=3.0,full -> {"tau": 3.0, "full": True}."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    return {name: float(value) if given else True for name, given, value in pairs}


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


# Where the default is an end of its range, a value between.
MORE = {"prefix_opd": "first=3", "g_opd": "scale=1.0", "supervised_kd": "tau=3.0,hard=0.25", "iw_opd": "gain=2.0"}
COMPARED = [(path, arg) for path, arg in CASES if path.stem in ORACLES]
COMPARED += [(path, MORE[path.stem]) for path in METHODS if path.stem in MORE]


@pytest.mark.parametrize("path, arg", COMPARED, ids=str)
def test_the_loss_of_a_method_is_the_published_one(path, arg, float64):
    known = ORACLES[path.stem]
    found = case(load(f"{path}:{arg}"), on_policy=known.on_policy)
    compare(found, lambda seen: known.loss(seen, **arguments(arg)), value=known.value)


SELF = {"teacher.recipe": "", "teacher.path": "student_init"}
OPSD = SELF | {"context.privileged.reads": "solution"}
SDFT = SELF | {"context.privileged.reads": "demonstration", "teacher.update": "ema", "masking.skip_first": 3}
SDFT |= {"loss.normaliser": "sequence_mean"}
SDPO = SELF | {"context.privileged.reads": "sibling", "rollout.group_size": 8, "teacher.update": "ema"}
SDPO |= {"signal.divergence": "jsd", "signal.support": "topk_student", "signal.k": 20, "signal.tail": "bucket"}
CLIPPED = {"estimator.importance": "clip", "estimator.clip": 2.0}
SAMPLED = {"signal.divergence": "reverse_kl", "signal.support": "sampled", "signal.tail": "renormalise", "signal.k": 0}


@pytest.mark.parametrize(
    "fields, loss",
    [
        pytest.param(
            OPSD | {"signal.divergence": "forward_kl", "signal.clip": 0.05},
            lambda seen: token_mean(clipped_forward_kl(seen), seen.mask),
            id="opsd",
        ),
        pytest.param(OPSD | {"signal.divergence": "jsd"}, lambda seen: token_mean(whole(seen, 0.5), seen.mask), id="opsd v1"),
        pytest.param(
            OPSD | {"signal.divergence": "jsd", "signal.support": "topk_teacher", "signal.k": 50},
            lambda seen: token_mean(on_top_of_teacher(seen, 50, 0.5), seen.mask),
            id="opsd top-k",
        ),
        pytest.param(OPSD | SAMPLED, lambda seen: token_mean(of_the_token(seen), seen.mask), id="opsd sampled"),
        pytest.param(
            SDFT | {"signal.divergence": "reverse_kl"}, lambda seen: sequence_mean(whole(seen, 1.0), skipped(seen)), id="sdft of the paper"
        ),
        pytest.param(
            SDFT | {"signal.divergence": "forward_kl"}, lambda seen: sequence_mean(whole(seen, 0.0), skipped(seen)), id="sdft of the code"
        ),
        pytest.param(
            SDPO | CLIPPED,
            lambda seen: token_mean(corrected(seen, on_top_of_student(seen, 20, 0.5)), informed(seen, 8, feedback=False)),
            id="sdpo",
        ),
        pytest.param(
            SDPO | {"signal.tail": "renormalise", "signal.divergence": "reverse_kl", "context.privileged.reads": "sibling,feedback"},
            lambda seen: token_mean(on_top_of_student(seen, 20, 1.0, tail=False), informed(seen, 8, feedback=True)),
            id="sdpo renormalised, with feedback",
        ),
        pytest.param(
            SDPO | SAMPLED | CLIPPED,
            lambda seen: token_mean(corrected(seen, of_the_token(seen)), informed(seen, 8, feedback=False)),
            id="sdpo sampled",
        ),
    ],
)
def test_the_loss_of_a_self_teacher_is_the_published_one(fields, loss, float64):
    compare(case(with_fields(fields)), loss, value=True)


def with_fields(fields):
    return load("configs/quickstart.py", fields)


def test_a_trust_region_is_the_lerp_of_the_logits_as_in_the_code_of_sdpo(float64):
    """Both read the teacher's prompt; the student's share is a constant of the gradient."""

    def loss(seen):
        seen.q = torch.log_softmax(torch.lerp(seen.teacher["teacher"], seen.student.detach(), 0.1), -1)
        return token_mean(on_top_of_student(seen, 20, 0.5), informed(seen, 8, feedback=False))

    compare(case(with_fields(SDPO | {"teacher.update": "trust_region", "teacher.rate": 0.1})), loss, value=True)


def test_the_blend_of_sdpo_with_grpo_is_the_sum_of_both(float64):
    """w of the distillation and 1 - w of the clipped policy loss, each by its own mask."""
    reward = {"reward.weight": 0.25, "signal.weight": 0.75, "reward.advantage": "grpo", "reward.clip_low": 0.2, "reward.clip_high": 0.2}

    def loss(seen):
        centred = seen.groups(8) - seen.groups(8).mean(1, keepdim=True)
        policy = trl_policy_loss(seen, centred / (seen.groups(8).std(1, keepdim=True) + 1e-6), seen.mask, "bnpo")
        return 0.25 * policy + 0.75 * token_mean(on_top_of_student(seen, 20, 0.5), informed(seen, 8, feedback=False))

    compare(case(with_fields(SDPO | reward)), loss, value=False)
