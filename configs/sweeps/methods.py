"""The methods of the field side by side, at equal budgets: one section of experiments/method_table.py as a sweep.

    python experiments/sweep.py --config=configs/sweeps/methods.py --workdir=runs/methods_few

Argument section: few and unlimited (an external teacher on the quickstart's task, with 48 prompts and with fresh ones); others (further
methods beside those of few; lightning begins where seq_kd ends); opsd (a model that reads solutions, by who its teacher is); sdpo (rewards
and siblings); sequence (three skills, one after the other); scale (extrapolation); mismatch (a teacher four times as sharp as it was
trained to be); recovery (old skills after training on a new one); merge (two experts); switches (rewards for a student too weak to earn
any, after a little SFT, and on prompts that it sometimes solves).
Rows of a section have equal updates of equally many completions; those with @flops have as many updates as make their floating-point
operations those of the first row. A seed draws prompts, initial weights and samples. tiny is a sweep of 2 rows and 2 seeds, for tests.

What it costs and what came out: docs/results.md, made by experiments/method_table.py.
"""

from opd_jax import config, sweeps

# Settings: the config file that a row starts from, before its method's axes.
QUICK, SELF, EXPERTS = "configs/quickstart.py", "configs/base.py", "configs/experts.py"
# Settings of methods' own files; others: QUICK.
HOMES = {"opsd": SELF, "sdft": SELF, "sdpo": SELF, "mopd": EXPERTS, "pooled": EXPERTS, "routed": EXPERTS}
# Of sdpo and sequence: with the larger steps of the setting a student loses what it could, reading contexts included.
GENTLY = {"steps": 200, "learner__learning_rate": 3e-4}
LONG = GENTLY | {"eval__every": 20}
OTHERS = ("vopd", "eopd", "iw_opd", "prefix_opd", "g_opd", "reopd", "dagger", "corrected", "supervised_kd", "rl_opd", "dpo")
SKILLS = ("sort", "add", "chain")  # of section=sequence, in the order in which they are learnt
# Updates that cost as much as 100 of on-policy distillation, by the accounting of opd_jax/cost.py: per token of a completion it samples and
# trains a student of N weights (2 N + 6 N) and reads a teacher of 3.7 N (2 * 3.7 N); SFT trains alone, SeqKD samples the teacher.
AT_EQUAL_FLOPS = {"sft": 257, "seq_kd": 115, "grpo": 193}


def method(name, arg="", **fields):
    """A row of configs/methods/NAME.py:arg with further fields; `.` in their names is `__`."""
    return {"method": name, "arg": arg, **{field.replace("__", "."): value for field, value in fields.items()}}


def as_it_is(recipe):
    """A row that evaluates a model: one update that changes nothing to speak of."""
    return method("", student__recipe=recipe, steps=1, learner__warmup_steps=0, learner__learning_rate=1e-9)


def external(prompts):
    """The methods that have an external teacher, and those that they stand against."""
    given = f"prompts={prompts}"
    rows = {
        "opd": method("", given),
        "thinking_machines": method("thinking_machines", given),
        "lsm": method("lsm", f"{given},special=keep"),
        "gkd": method("gkd", given),
        "minillm": method("minillm", given),
        "seq_kd": method("seq_kd", given),
        "sft": method("sft", given),
        "grpo": method("grpo", f"{given},dr_grpo"),
    }
    if prompts:
        slower = {"learner__learning_rate": 3e-4}
        rows |= {"minillm_gently": method("minillm", given, **slower), "grpo_gently": method("grpo", f"{given},dr_grpo", **slower)}
        rows |= {f"{name}@flops": {**rows[name], "steps": steps} for name, steps in AT_EQUAL_FLOPS.items()}
    return rows


def scaled(scales):
    return {f"{scale:g}": method("ex_opd", f"prompts=48,full,scale={scale}") for scale in scales}


def sharpened(temperature):
    law, sampled = {"loss__teacher_temperature": temperature}, {"signal__support": "sampled"}
    return {
        f"full_T{temperature:g}": method("", "prompts=48", **law),
        f"sampled_T{temperature:g}": method("", "prompts=48", **sampled, **law),
        f"sampled_nucleus_T{temperature:g}": method("", "prompts=48", **sampled, rollout__top_p=0.9, **law),
        f"lsm_T{temperature:g}": method("lsm", "prompts=48,special=keep", **law),
    }


SECTIONS = {
    "few": (QUICK, external(48)),
    "unlimited": (QUICK, external(0)),
    "others": (
        QUICK,
        {
            "opd": method("", "prompts=48"),
            **{name: method(name, "prompts=48") for name in OTHERS},
            "dpo_gently": method("dpo", "prompts=48", learner__learning_rate=3e-4),
            "forward_on_student": method("kl_prefix_2x2", "prompts=48,forward_kl"),
            "reverse_on_teacher": method("kl_prefix_2x2", "prompts=48,teacher"),
            "forward_on_teacher": method("kl_prefix_2x2", "prompts=48,teacher,forward_kl"),
            "lightning": method("lightning", "prompts=48"),
        },
    ),
    "opsd": (
        SELF,
        {teacher: method("opsd", teacher) for teacher in ("frozen", "ema", "trust_region", "live")}
        | {"frozen_width64": method("opsd", "frozen,width=64")},
    ),
    "sdpo": (
        SELF,
        {
            "sdpo": method("sdpo", "head_start", **LONG),
            "sdpo_siblings": method("sdpo", "head_start", context__privileged__reads="sibling", **LONG),
            "sdpo+grpo": method("sdpo", "head_start,hybrid=0.5", **LONG),
            "grpo": method("grpo", "head_start,dr_grpo", **LONG),
        },
    ),
    "sequence": (
        SELF,
        {"sdft": method("sdft", **GENTLY), "sdft_reverse_kl": method("sdft", "reverse_kl", **GENTLY), "sft": method("sft", **GENTLY)},
    ),
    "scale": (QUICK, scaled((1.0, 0.5, 1.25, 1.5, 2.0, 3.0))),
    "mismatch": (QUICK, sharpened(1.0) | sharpened(0.25)),
    "merge": (
        EXPERTS,
        {
            "mopd": method("mopd"),
            "routed_full": method(""),
            "routed_full_x4": method("", steps=400),
            "mopd_scale1.25": method("mopd", "scale=1.25"),
            "routed": method("routed"),
            "pooled": method("pooled"),
            "pooled_confidence": method("pooled", "confidence"),
            "sft": method("sft"),
            **{f"expert_{skill}": as_it_is(f"configs/experts.py:{skill},skills=reverse+sort,level=4") for skill in ("reverse", "sort")},
        },
    ),
    "switches": (
        SELF,
        {
            "cold": method("grpo", "dr_grpo", **GENTLY),
            "head_start": method("grpo", "head_start,dr_grpo", **GENTLY),
            "middling_prompts": method("grpo", "head_start,dr_grpo", task__difficulty_low=0.05, task__difficulty_high=0.95, **GENTLY),
        },
    ),
    "recovery": (SELF, {name: method("" if name == "opd" else "sft") for name in ("opd", "sft")}),
}


def get_config(arg=None):
    arg = config.parse_arg(arg, section=tuple(SECTIONS), row="", stage=len(SKILLS), seed=0, tiny=False)
    setting, rows = SECTIONS[arg.section]
    name = arg.row or next(iter(rows))
    config.check_choice("row", name, tuple(rows))
    row = dict(rows[name])
    c = with_axes(setting, row.pop("method"), row.pop("arg"), f"seed={arg.seed}{',tiny' if arg.tiny else ''}")
    steps = row.pop("steps", c.steps)
    c.steps = c.steps if arg.tiny else steps
    for field, value in row.items():
        put(c, field, value)
    if arg.section == "sequence":
        in_sequence(c, arg, name)
    if arg.section == "recovery":
        recovering(c, arg)
    return c


def with_axes(setting, name, arg, common):
    """The setting with what configs/methods/NAME.py changes in its own: a method is its axes, and has them anywhere."""
    if not name:
        return config.load_config(f"{setting}:{arg},{common}")
    if setting == HOMES.get(name, QUICK):
        return config.load_config(f"configs/methods/{name}.py:{arg},{common}")
    taken, rest = config.split_arg(arg, head_start=False)
    plain, own = (config.flatten(config.load_config(one).to_dict()) for one in (QUICK, f"configs/methods/{name}.py:{rest}"))
    c = config.load_config(f"{setting}:{'head_start,' if taken.head_start else ''}{common}")
    for field, value in own.items():
        if value != plain[field] and not field.startswith(("task.", "student.", "teacher.", "seed")):
            put(c, field, value)
    c.teacher.path = c.context.privileged.reads = ""  # who comes from elsewhere reads no context
    return c


def put(c, field, value):
    *blocks, last = field.split(".")
    block = c
    for one in blocks:
        block = block[one]
    block[last] = value


def in_sequence(c, arg, name):
    """Skill number `stage` (from 1), begun by the student of the stage before; evaluation is of all."""
    stage = arg.stage
    c.task.skills, c.task.learn = ",".join(("reverse", "shift", *SKILLS)), SKILLS[stage - 1]
    if stage > 1:
        tiny = ",tiny" if arg.tiny else ""
        c.student.recipe = f"configs/sweeps/methods.py:section=sequence,row={name},stage={stage - 1},seed={arg.seed}{tiny}"


def recovering(c, arg):
    """A base that was trained on another skill alone, and on its old ones again: from its own earlier self, or from labels."""
    c.student.recipe = f"configs/base.py:mid,skill=sort,seed={arg.seed}{',tiny' if arg.tiny else ''}"
    c.teacher.path, c.teacher.recipe = "", f"configs/base.py:base,seed={arg.seed}{',tiny' if arg.tiny else ''}"
    c.context.privileged.reads = ""
    c.task.skills, c.task.learn, c.task.train_size = "reverse,shift,sort", "reverse,shift", 0


def get_sweep(arg=None):
    asked, _ = config.split_arg(arg, section=tuple(SECTIONS), tiny=False)
    rows = list(SECTIONS[asked.section][1])
    metrics = ("eval/accuracy", "eval/sampled_accuracy", "eval/length", "cost/flops_total", "cost/generated_tokens_total")
    metrics += ("eval/reverse_kl", "eval/forward_kl") if asked.section in ("few", "unlimited", "scale") else ()
    return sweeps.Sweep(sweeps.over(":row", *(rows[:2] if asked.tiny else rows)), seeds=2 if asked.tiny else 3, metrics=metrics)
