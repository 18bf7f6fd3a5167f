"""A base that reads contexts, and the setting in which it teaches itself a new skill: for configs/methods/opsd.py, sdft.py and sdpo.py.

    python experiments/train.py --config=configs/base.py --workdir=runs/self

Self-distillation on a model that makes nothing of its context is vacuous. So the base (role=base: 0.67M weights, bytes) is trained on
strings of 4 digits: to reverse and to shift them, with and without something beside the question, and to sort, add and chain them only WITH
a solution, another answer or feedback to read. Without, it answers none of these, with a solution all; a run measures that.

role=weak is that base after some updates of SFT on the skill, for methods that need a success now and then; role=mid after many on the
skill alone (mid-training), which forgets the old ones. role=self, the default, is the
setting: the student is the base (head_start: the weak one), its teacher is itself as it was, training prompts are a fixed set of one skill
(skill=sort, add or chain; prompts=N, 0: unlimited), evaluation is of that skill and of the two that the base had before. A run without a
method distils with the solution to read. Other arguments: level=N digits, width=N of the base, seed=N, tiny: a run of seconds, for tests.
"""

from opd_jax import config

OLD, NEW = ("reverse", "shift"), ("sort", "add", "chain")
READ = "solution,demonstration,sibling,feedback"
WEAK = {"sort": 24, "add": 48, "chain": 24}  # updates of SFT after which a skill succeeds now and then


def get_config(arg=None):
    arg = config.parse_arg(
        arg, role=("self", "base", "weak", "mid"), skill=NEW, head_start=False, prompts=512, level=0, width=0, seed=0, tiny=False
    )
    c = config.default()
    c.seed = c.task.seed = arg.seed
    c.task.name = "skills"
    c.task.level = arg.level or 4
    c.rollout.max_new_tokens = c.task.level + 2  # a sum has one digit more, and the stop token is one
    c.rollout.batch_size = 16 if arg.tiny else 64
    c.learner.b2 = 0.95
    c.learner.warmup_steps = 2 if arg.tiny else 10
    c.eval.prompts = c.task.eval_size = 18 if arg.tiny else 192
    c.eval.batch_size = 18 if arg.tiny else 192
    c.log.samples_every = 0 if arg.role != "self" else c.log.samples_every
    return {"self": itself, "base": base, "weak": weak, "mid": mid}[arg.role](c, arg)


def shared(arg):
    """The arguments that a recipe of this file is given on."""
    given = {name: getattr(arg, name) for name in ("level", "width", "seed")}
    return "".join(f",{name}={value}" for name, value in given.items() if value) + (",tiny" if arg.tiny else "")


def itself(c, arg):
    start = f"weak,skill={arg.skill}" if arg.head_start else "base"
    c.student.recipe = f"configs/base.py:{start}{shared(arg)}"
    c.teacher.path = "student_init"
    c.context.privileged.reads, c.context.privileged.layout = "solution", "compact"
    c.task.skills, c.task.learn, c.task.train_size = ",".join((*OLD, arg.skill)), arg.skill, arg.prompts
    c.learner.learning_rate = 1e-3
    c.steps = 4 if arg.tiny else 100
    return c


def base(c, arg):
    """SFT from random weights on unlimited fresh prompts."""
    c.rollout.source, c.signal.divergence = "dataset", "nll"
    c.task.skills = ",".join((*OLD, *NEW))
    c.task.informed, c.task.informed_tags, c.task.informed_reads = 0.3, ",".join(NEW), READ
    c.student.init.hidden_size = arg.width or (16 if arg.tiny else 128)
    c.student.init.intermediate_size = 3 * c.student.init.hidden_size
    c.student.init.num_hidden_layers = 1 if arg.tiny else 3
    c.student.init.initializer_range = 0.08
    c.learner.learning_rate = 3e-3
    c.eval.prompts = 0
    c.steps = 8 if arg.tiny else 500
    return c


def weak(c, arg):
    """The base after a little SFT on the skill, among the old ones."""
    c.rollout.source, c.signal.divergence = "dataset", "nll"
    c.student.recipe = f"configs/base.py:base{shared(arg)}"
    c.task.skills = ",".join((*OLD, arg.skill))
    c.task.informed, c.task.informed_reads = 0.3, READ  # it goes on reading
    c.learner.learning_rate = 1e-3
    c.eval.prompts = 0
    c.steps = 4 if arg.tiny else WEAK[arg.skill]
    return c


def mid(c, arg):
    """The base after training on unlimited fresh prompts of the skill, and of nothing else."""
    c.rollout.source, c.signal.divergence = "dataset", "nll"
    c.student.recipe = f"configs/base.py:base{shared(arg)}"
    c.task.skills = arg.skill
    c.learner.learning_rate = 2e-3
    c.eval.prompts = 0
    c.steps = 4 if arg.tiny else 200
    return c
