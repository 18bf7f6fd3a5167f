"""Every field of an experiment with its default, its meaning and its unit. A block of a config is a class, `Config` is the whole."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shape of a model with random weights; field names as in a Hugging Face config.json."""

    model_type: str = "llama"  # llama, mistral, qwen2, qwen3, qwen3_moe, gemma2 or gemma3_text
    hidden_size: int = 64  # width of the residual stream
    intermediate_size: int = 192  # width of the gated feed-forward layer
    num_hidden_layers: int = 3  # layers
    num_attention_heads: int = 4  # query heads
    num_key_value_heads: int = 4  # key and value heads; divides the query heads
    head_dim: int = 0  # width of a head; 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 256  # tokens, prompt and completion together
    tie_word_embeddings: bool = True  # the unembedding is the embedding
    initializer_range: float = 0.02  # standard deviation of the initial weights
    num_experts: int = 0  # experts of a layer, of qwen3_moe alone; 0 in other families
    num_experts_per_tok: int = 0  # experts that a token passes through
    moe_intermediate_size: int = 0  # width of one expert


@dataclasses.dataclass(frozen=True)
class Lora:
    rank: int = 0  # of the update W + alpha / rank * B A that is trained in place of the weights; 0: all weights are trained
    alpha: float = 32.0  # scale of the update, divided by the rank
    targets: str = "all"  # all projections but experts, or some of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj


@dataclasses.dataclass(frozen=True)
class Student:
    path: str = ""  # Hugging Face folder or hub id, or a run directory; empty: see `recipe`, then `init`
    recipe: str = ""  # without a path: configs/FILE.py[:arg] of a run that makes the student on first use (kept under `cache_dir`)
    tokenizer: str = "byte"  # tokenizer of a model made from `init`: "byte", or a Hugging Face folder or hub id
    lora: Lora = Lora()  # a teacher with the same path is the model without the update, at no cost of memory
    init: Architecture = Architecture()  # shape of a model with random weights, when neither path nor recipe is set


class Blocks(dict):
    """Blocks by the names that the user gives; not changed once it is made."""

    def __hash__(self):
        return hash(tuple(self.items()))


@dataclasses.dataclass(frozen=True)
class Member:
    path: str = ""  # as teacher.path
    recipe: str = ""  # as teacher.recipe
    tag: str = ""  # combine=route: the examples of this tag are this member's; empty: its name
    weight: float = 1.0  # combine=geometric or arithmetic: share in the mixture, divided by the sum of all


@dataclasses.dataclass(frozen=True)
class Teacher:
    # student_init: the student as it was before training, a self-teacher
    path: str = ""  # Hugging Face folder or hub id, or a run directory; empty: see `recipe`, then `members`; all empty: no teacher
    recipe: str = ""  # without a path: configs/FILE.py[:arg] of a run that makes the teacher on first use (kept under `cache_dir`)
    members: dict[str, Member] = dataclasses.field(default_factory=Blocks)  # in place of path and recipe: several teachers by name
    combine: str = "route"  # of several members: route (each rollout to one, by its example's tag), geometric or arithmetic mixture
    confidence: float = 0.0  # nats, of a mixture: a member of entropy H at a token weighs exp(-H / confidence) there; 0: off
    update: str = "frozen"  # of path=student_init: frozen, live (the student as it is), ema, sync or trust_region; see opd_jax/teachers.py
    rate: float = 0.05  # ema: share of the student that is taken in after an update; trust_region: share of the live student
    every: int = 1  # sync: updates between copies of the student


@dataclasses.dataclass(frozen=True)
class Reader:
    template: str = "none"  # none: the task's prompt as it is; chat: in the tokenizer's chat template; or a file with a Jinja chat template
    system: str = ""  # system message of a chat template
    thinking: str = ""  # on or off: the template's switch enable_thinking; empty: as the template has it


@dataclasses.dataclass(frozen=True)
class Privileged:
    """What the teacher reads beside the question. The student never reads it."""

    # some of solution, demonstration (both the example's solution), feedback (of the verifier on the own completion), sibling (a completion
    # of the same prompt that succeeded), critique (of the own completion) and analysis (of the solution), which the first teacher
    # writes, as it is before the update; with commas between them
    reads: str = ""  # which sections there are; empty: the teacher reads the question alone
    layout: str = "words"  # words: English sentences; compact: a mark before each section, the prompt last; or a file with a Jinja template
    success: float = 1.0  # reward from which a completion may serve as a sibling
    feedback_with_solution: bool = False  # feedback also where a solution, demonstration or sibling is read
    write_tokens: int = 64  # tokens of a critique or analysis at most
    write_temperature: float = 0.0  # of the law that writes them; 0 is greedy
    strip_thinking: bool = True  # siblings without what stands between <think> and </think>


@dataclasses.dataclass(frozen=True)
class Context:
    student: Reader = Reader()
    teacher: Reader = Reader(template="student")  # student: the ids that the student reads; otherwise as above, with its own tokenizer
    privileged: Privileged = Privileged()


@dataclasses.dataclass(frozen=True)
class Rollout:
    # student (on-policy), teacher (SeqKD), dataset (SFT); mix: the student in some steps, the data set in the others (GKD); dagger: the
    # teacher some tokens, the student the others (DAgger with aggregate; with beta_decay=1 the teacher-mixed sampling of MiniLLM);
    # corrected: the student up to a cut, the teacher the rest, whose tokens alone are learnt from; cache: completions with the teacher's
    # scores, written before (Lightning OPD)
    source: str = "student"  # who writes the completions
    cache: str = ""  # source=cache: folder of a store, as experiments/score_cache.py writes it
    cache_recipe: str = ""  # source=cache, without a folder: configs/FILE.py[:arg] whose store is written on first use (under `cache_dir`)
    # source=student or dagger: each update learns from as many completions as it has, drawn uniformly from all of the run so far; the
    # teacher scores each once
    aggregate: bool = False  # off-policy replay, the data aggregation of DAgger
    student_fraction: float = 0.5  # source=mix: probability with which a step's completions are the student's (lambda of GKD)
    beta: float = 0.2  # source=dagger: probability with which the teacher writes a token, in the first round
    beta_decay: float = 1.0  # source=dagger: factor of beta from round to round; 0: the teacher writes in the first round alone
    round: int = 1  # source=dagger: updates of a round
    # source=corrected: random (uniform over the student's tokens), or worst (before the one with the lowest log q - log pi)
    cut: str = "random"  # where the teacher takes over
    batch_size: int = 64  # rollouts per step
    group_size: int = 1  # rollouts per prompt; divides batch_size
    max_new_tokens: int = 64  # tokens per completion at most, stop token and observations included
    max_turns: int = 1  # turns of a completion at most, between which the task's environment answers calls; 1: it is not asked
    max_prompt_length: int = 256  # tokens per prompt at most
    overlong: str = "refuse"  # prompts beyond max_prompt_length: refuse, or truncate (their first tokens are dropped, and counted)
    temperature: float = 1.0  # of the sampling law; 0 is greedy
    top_p: float = 1.0  # nucleus mass kept by the sampling law; 1 keeps all
    top_k: int = 0  # tokens kept by the sampling law; 0 keeps all
    stop: str = "same"  # stop tokens: same (the student's; a teacher with others is refused), or union (any model's)
    min_p: float = 0.0  # tokens kept have at least this share of the largest probability; 0 keeps all
    # for lengths that differ: as a completion ends, the next prompt takes its row; with turns, two writers or several devices all at once
    slots: int = 0  # rollouts that a model writes at once; 0: all


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """The target is q^scale r^(1 - scale), q the teacher and r the reference (G-OPD; ExOPD beyond 1)."""

    scale: float = 1.0  # lambda; 1: the teacher itself, the reference is not looked at
    adaptive: bool = False  # each token its own lambda, 1 or more, by a rule (our reading of REOPD); see numerics/extrapolation.py
    tau: float = 0.007  # nats, adaptive: how near student and teacher must be on a token to go beyond; infinite in the limit: always
    max_gain: float = 1.0  # adaptive: lambda - 1 is at most this
    normalise: bool = True  # by the sum over the vocabulary; False: as published, log-ratios are off by log Z of their prefix


@dataclasses.dataclass(frozen=True)
class Reference:
    """The model that extrapolation and the regulariser refer to; it reads what the student reads."""

    path: str = "student_init"  # as teacher.path
    recipe: str = ""  # in place of a path: as teacher.recipe


@dataclasses.dataclass(frozen=True)
class Reward:
    """The verifier's rewards as a term of the loss: -weight / Z sum_bt A_b log pi(y_bt)."""

    weight: float = 0.0  # 0: no such term
    advantage: str = "centred"  # within the rollouts of a prompt: none, centred (Dr. GRPO), grpo, rloo; see opd_jax/rewards.py
    clip_low: float = 0.0  # PPO: a ratio to the law that sampled below 1 - clip_low has no gradient where A < 0; 0: no clipping
    clip_high: float = 0.0  # PPO: nor one above 1 + clip_high where A > 0; 0: no clipping
    filter_groups: bool = False  # leave out prompts whose rollouts all have the same reward (DAPO)
    mask_overlong: bool = False  # leave out completions that max_new_tokens cut off (DAPO)
    judge: str = ""  # empty: the task's verifier; own:NAME, which train.run(judge=...) writes: that function, for all but evaluation
    only: str = "all"  # which rollouts have the term: all, or solved (those with a reward of 1)
    tags: str = ""  # tags of the examples whose rollouts have the term, with commas between them; empty: all


@dataclasses.dataclass(frozen=True)
class Preference:
    """DPO on the completions of a prompt: -weight / pairs sum log sigmoid(Delta), the best of a group against its worst."""

    weight: float = 0.0  # 0: no such term
    beta: float = 0.1  # of Delta = beta [(log pi - log r)(best) - (log pi - log r)(worst)], r the reference; log-probs are sums over tokens
    # teacher: its log-prob of the whole completion, which favours short ones; teacher_mean: per token; reward: of the verifier, or of
    # train.run(judge=...); where the best equals the worst there is no pair
    judge: str = "teacher"  # by whose ranking


@dataclasses.dataclass(frozen=True)
class Regulariser:
    kl: float = 0.0  # weight of the divergence to the reference, per token, as a term of the loss; 0: none
    divergence: str = "reverse_kl"  # which, over the whole vocabulary: reverse_kl or forward_kl
    entropy: float = 0.0  # weight of minus the student's entropy, per token: above 0 keeps it high


@dataclasses.dataclass(frozen=True)
class Masking:
    """Which tokens the distillation terms learn from; other terms see all."""

    skip_first: int = 0  # tokens left out at the beginning of each completion
    first_only: int = 0  # tokens from the beginning that count, those left out included (prefix OPD); 0: all
    special_tokens: str = "keep"  # keep, or drop the tokens that the tokenizer calls special (stop tokens among them)
    malformed: str = "keep"  # keep, or drop completions that are no answer in the task's format
    solved: str = "keep"  # keep, or drop completions with a reward of 1
    failed: str = "keep"  # keep, or drop completions with a reward below 1 (rejection of a teacher's samples by the verifier)
    tags: str = ""  # tags of the examples that are distilled, with commas between them; empty: all; others need no teacher


@dataclasses.dataclass(frozen=True)
class Signal:
    # reverse_kl, forward_kl, jsd, jsd_continuous, skew_forward_kl, skew_reverse_kl; without a teacher nll, negative_entropy; cross_entropy,
    # or with the teacher's most probable token alone as a hard label top1_cross_entropy
    divergence: str = "reverse_kl"  # which per-token loss compares student and teacher
    # full: sum over the vocabulary; sampled: the sampled token alone (unbiased in expectation); topk_teacher, topk_student, topk_union (of
    # both): the k most probable tokens; with "+token" the sampled one too
    support: str = "full"  # which part of the vocabulary the sum runs over
    k: int = 0  # tokens of a top-k support, at least 1 (as many as the vocabulary has: full); 0 with the other supports
    # renormalise (both laws on the support), bucket (one entry for the rest), generalised (sum on the support, at least 0), sampled_tail
    # (that, and the sampled token where it is outside: unbiased in expectation); biased, for study: none, sampled_tail_published
    tail: str = "renormalise"  # what becomes of the mass outside a top-k support
    beta: float = 0.5  # mixing weight of jsd, jsd_continuous and the skewed divergences; others ignore it
    # BIASED (clipped entries have no gradient of their own); for support full, or a top-k with the tail renormalise or bucket; OPSD has
    # forward_kl with 0.05
    clip: float = 0.0  # nats at which each entry of the divergence's sum is cut off; 0: off
    weight: float = 1.0  # of the distillation term; 0: none


@dataclasses.dataclass(frozen=True)
class Gate:
    """Weights of a distillation term's tokens, constants of the gradient; see opd_jax/numerics/gates.py.

    The normaliser counts the tokens of the mask, whatever they weigh: small weights make the term small.
    """

    # teacher_entropy_above and teacher_entropy_below: 0 or 1; confidence: exp(-teacher's entropy); importance_decay: from 1 + gain down to
    # 1 along a completion as its log-ratios are used up (IW-OPD)
    kind: str = "none"  # none, teacher_entropy_above, teacher_entropy_below, confidence or importance_decay
    threshold: float = 0.8  # of the teacher's entropy, nats
    gain: float = 0.5  # of importance_decay


@dataclasses.dataclass(frozen=True)
class ExtraSignal(Signal):
    """A second distillation term beside that of `signal`, of token credit, with the same masks, temperatures, normaliser and importance.

    EOPD: weight 1, gate.kind teacher_entropy_above.
    """

    weight: float = 0.0  # 0: none
    divergence: str = "forward_kl"  # this and all others as in signal
    gate: Gate = Gate()  # of this term alone


@dataclasses.dataclass(frozen=True)
class Loss:
    student_temperature: float = 1.0  # softmax temperature of the student in the loss
    teacher_temperature: float = 1.0  # softmax temperature of the teacher in the loss
    normaliser: str = "token_mean"  # token_mean, sequence_mean, sequence_sum, constant; denominators are global
    labels: float = 0.0  # weight of the cross-entropy of the completion itself, a term of its own (hard labels beside soft ones)
    # tag: the weights of each term's tokens are scaled, so that each tag of the batch has the same share of their sum
    balance: str = "none"  # of domains whose completions have different lengths: none or tag


@dataclasses.dataclass(frozen=True)
class Estimator:
    credit: str = "token"  # which log-ratios a token answers for: token, to_go, discounted, sequence
    gamma: float = 0.9  # discount per token of credit=discounted
    exact_future: bool = False  # later log-ratios replaced by exact KLs (signal.support=sampled, credit to_go or discounted): less noise
    length_normalised: bool = False  # later terms of credit to_go or discounted count by their mean (MiniLLM); BIASED
    # none; kl: -K_t; optimal: for the norm of the logits' score; leave_one_out: other rollouts of the prompt; batch_mean and position_mean
    # include the own sample (biased, of order 1/n)
    baseline: str = "none"  # what is subtracted from advantages
    # none, token, clip, drop, sequence, cumulative: see opd_jax/numerics/importance.py, which says which are unbiased
    importance: str = "none"  # correction of completions that another law than the policy wrote (truncation, temperature)
    clip: float = 2.0  # ratio above which importance=clip cuts, and outside [1/clip, clip] of which importance=drop leaves a token out


@dataclasses.dataclass(frozen=True)
class Learner:
    learning_rate: float = 1e-3  # peak of the schedule (AdamW)
    schedule: str = "cosine"  # constant, linear or cosine, after the warm-up
    warmup_steps: int = 0  # updates from 0 to the peak
    decay_steps: int = 0  # updates that the schedule spans, warm-up included; 0: `steps`
    final_fraction: float = 0.0  # learning rate at the end of the schedule, as a fraction of the peak
    weight_decay: float = 0.0  # decoupled, on matrices only (not on norms, biases)
    b1: float = 0.9  # AdamW, decay of the first moment
    b2: float = 0.99  # AdamW, decay of the second moment
    eps: float = 1e-8  # AdamW, added to the root of the second moment
    clip_norm: float = 1.0  # global gradient norm above which gradients are scaled down; 0: off
    microbatches: int = 1  # pieces of a step's batch that are differentiated one after the other; changes memory, not the gradient


@dataclasses.dataclass(frozen=True)
class Model:
    compute_dtype: str = "float32"  # float32 or bfloat16 arithmetic; the student's parameters, log-probs and losses stay float32
    remat: bool = False  # recompute each layer's activations in the backward pass
    # xla runs on any machine; auto takes a kernel where the machine, the type and the layer let it (opd_jax/models/attention_kernels.py),
    # and xla elsewhere
    attention: str = "auto"  # kernel that reads whole sequences: auto, xla, cudnn (GPU, bfloat16) or flash (TPU)


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = 1  # devices along the batch, parameters replicated
    fsdp: int = 1  # devices along the batch, parameters sharded
    tensor: int = 1  # devices along heads, feed-forward width and vocabulary
    sequence: int = 1  # devices along the length of what is scored and learnt from; sampling repeats itself over them
    teacher: int = 0  # further devices, the last of all, that hold the teacher alone; 0: it lies on the student's
    strict: bool = False  # refuse a model with a dimension that an axis does not divide; False: replicate it, and say so once

    @property
    def devices(self) -> int:
        """All of them."""
        return self.data * self.fsdp * self.tensor * self.sequence + self.teacher


@dataclasses.dataclass(frozen=True)
class Eval:
    every: int = 0  # updates between evaluations; 0: before the first and after the last update only
    prompts: int = 64  # held-out prompts; 0: no evaluation
    samples: int = 4  # sampled completions per prompt (avg@k, pass@k, maj@k, KL), at temperature 1
    batch_size: int = 64  # rollouts evaluated at once
    inject_error: bool = False  # also how the student goes on after an error in a gold solution (eval/recovery): one more greedy pass


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 100  # updates between checkpoints; one is always written at the end
    keep: int = 2  # newest checkpoints that are kept, at least 2


@dataclasses.dataclass(frozen=True)
class Log:
    samples_every: int = 50  # updates between logged samples; 0: none
    samples: int = 4  # completions per logged step
    tensorboard: bool = False  # event files for TensorBoard beside metrics.jsonl, in the run's tensorboard/ (package tensorboardX)
    wandb: bool = False  # the same for Weights & Biases (package wandb); WANDB_MODE=offline keeps it on this machine
    wandb_project: str = "opd_jax"  # project of the run there; WANDB_ENTITY names the team
    diagnostics: bool = False  # metrics diag/ of each update (docs/metrics.md); those of gradient noise need learner.microbatches >= 2


@dataclasses.dataclass(frozen=True)
class Task:
    # arithmetic, calculator, countdown, gsm8k, humaneval, jsonl, math, skills, text, tinycode, tooluse or unconditional
    name: str = "arithmetic"  # which; opd_jax/data/tasks has one file for each
    path: str = ""  # file of lines; of gsm8k a folder or a dataset's id on the Hugging Face hub (empty: openai/gsm8k)
    metric: str = "rouge"  # rouge or bleu: the reward of task.name=text, from 0 to 1
    skills: str = "chain,reverse"  # of task.name=skills, with commas: chain, reverse, sort, add, shift, facts
    learn: str = ""  # of task.name=skills: those of them that training prompts are of, evaluation is of all; empty: all
    # digits of arithmetic (2-100), characters of skills (2-20), numbers of countdown and calculator (2-6), most steps of tinycode (2-5)
    level: int = 12  # size of an example
    train_size: int = 0  # prompts to train on, drawn again and again; 0: as many as the task has (generated ones: unlimited)
    eval_size: int = 64  # prompts held out from training; of a file at most half of its lines, of gsm8k the first of its test set
    seed: int = 0  # of generated prompts
    # Training on prompts of middling difficulty: the initial student's success rates are measured before the first update; see
    # opd_jax/difficulty.py. 0 and 1 together: off
    difficulty_low: float = 0.0  # success rate that a training prompt has at least
    difficulty_high: float = 1.0  # and at most
    difficulty_prompts: int = 256  # training prompts that are measured
    difficulty_samples: int = 8  # completions of each
    # For a base that reads contexts: training prompts with something beside the question; see opd_jax/data/tasks/informed.py
    informed: float = 0.0  # share of the training prompts that have; 0: none
    informed_tags: str = ""  # tags, with commas, whose training prompts all have: what is not learnt without
    informed_reads: str = "solution,sibling"  # what: some of solution, demonstration, sibling, feedback (on a solution with an error)
    informed_layout: str = "compact"  # as context.privileged.layout


@dataclasses.dataclass(frozen=True)
class Study:
    """Of experiments/gradient_study.py alone; the base condition is in `rollout`. A field with several values has commas between them.

    Where neither student nor teacher has a path or recipe, a small random pair is studied whose completions can be listed.
    """

    estimators: str = "sequence,to_go,rao_blackwell_to_go,token,token_full"  # names of the registry; all: every one
    rollouts: int = 256  # completions per condition; a multiple of rollout.batch_size
    reference: int = 4  # further completions per prompt, of other draws, for the references
    microbatch: int = 8  # completions differentiated at once; divides rollout.batch_size
    position_parts: int = 4  # equal parts of a completion, whose shares of the variance are told; each costs one more pass back
    lengths: str = ""  # completion lengths to add to the base condition, tokens
    group_sizes: str = ""  # rollouts per prompt to add
    temperatures: str = ""  # temperatures of the sampling law to add
    top_ps: str = ""  # nucleus masses of the sampling law to add
    gammas: str = ""  # discounts per token at which the discounted estimators are repeated
    top_ks: str = ""  # sizes of the support at which the estimators with a top-k are repeated, tokens
    steps: str = ""  # checkpoints of student.path, a run directory, to add: updates done
    sketch: int = 2048  # numbers that stand for a gradient in the bootstrap, and of students beyond exact_parameters in all
    exact_parameters: int = 2_000_000  # parameters of a student up to which sums of gradients are kept whole
    resamples: int = 1000  # of the bootstrap over prompts


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0  # of initial weights, prompt order and all draws
    steps: int = 100  # updates
    cache_dir: str = "runs/cache"  # where the models of recipes and the prepared data of gsm8k are kept
    student: Student = Student()
    teacher: Teacher = Teacher()
    context: Context = Context()
    rollout: Rollout = Rollout()
    signal: Signal = Signal()
    gate: Gate = Gate()  # of the term of `signal`
    extra_signal: ExtraSignal = ExtraSignal()
    extrapolation: Extrapolation = Extrapolation()
    reference: Reference = Reference()
    reward: Reward = Reward()
    preference: Preference = Preference()
    regulariser: Regulariser = Regulariser()
    masking: Masking = Masking()
    loss: Loss = Loss()
    estimator: Estimator = Estimator()
    learner: Learner = Learner()
    model: Model = Model()
    mesh: Mesh = Mesh()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    task: Task = Task()
    study: Study = Study()


# Fields that do not change the numbers of an update (a mesh: but by rounding): they may differ when a run is resumed. `steps` may grow.
FREE_ON_RESUME = ("eval.", "log.", "checkpoint.", "mesh.", "cache_dir", "study.", "model.attention")


def flatten(config: Config | dict, prefix: str = "") -> dict[str, Any]:
    """{"rollout.batch_size": 64, ...}"""
    fields = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat
