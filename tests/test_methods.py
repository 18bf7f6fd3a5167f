"""configs/methods: each parses, says which gradient it follows, sets axes alone, and runs in its tiny form."""

import ast
import pathlib

import numpy as np
import pytest

from opd_jax import claim, objective, train
from opd_jax import config as config_lib
from opd_jax.config.loading import load_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
METHODS = sorted((ROOT / "configs" / "methods").glob("*.py"))
VARIANTS = {
    "grpo": ("dr_grpo", "rloo", "dapo", "kl=0.1"),
    "gkd": ("forward_kl", "on_policy=1.0"),
    "ex_opd": ("full", "scale=1.5"),
    "mopd": ("reward=0.5", "scale=1.25,keep=shift"),
    "pooled": ("arithmetic", "confidence"),
    "reopd": ("full", "gain=0.0"),
    "supervised_kd": ("hard=0.0,tau=1.0",),
    "thinking_machines": ("discount=0.5",),
    "kl_prefix_2x2": ("teacher,forward_kl",),
    "corrected": ("worst,forward_kl",),
    "tools": ("drop,reward=0.5", "teacher", "student", "level=5"),
    "seq_kd": ("greedy", "stored,reject", "stored,greedy,word=0.5", "word=0.5,reject", "store,word=0.5"),
    "dagger": ("soft", "soft,k=4,p=0.5"),
    "lightning": ("store", "k=8", "cumulative"),
    "lsm": ("keep", "k=4", "v4"),
    "routed": ("taught=sort",),
    "dpo": ("teacher_mean", "reward"),
    "rl_opd": ("convex", "route", "kdrl,share=0.1"),
}
CASES = [(path, arg) for path in METHODS for arg in ("", *VARIANTS.get(path.stem, ()))]


def parsed(path, arg=""):
    return config_lib.parse(load_config(f"{path}:{arg}"))


def claim_of(path, arg=""):
    config = parsed(path, arg)
    return claim.of_run(objective.from_config(config, has_teacher=config_lib.has_teacher(config)), config)


@pytest.mark.parametrize("path, arg", CASES, ids=str)
def test_a_method_parses_with_every_field_and_says_its_gradient(path, arg):
    config = load_config(f"{path}:{arg}")
    fields = {name for name in config_lib.flatten(config.to_dict()) if not name.startswith("teacher.members.")}
    assert fields == set(config_lib.flatten(config_lib.Config()))
    assert claim_of(path, arg)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_is_described_and_passes_arguments_on(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"--config=configs/methods/{path.name} " in text and "\nAxes: " in text
    config = parsed(path, "prompts=7,seed=3,tiny")
    assert (config.task.train_size, config.seed, config.task.level) == (7, 3, 4)
    with pytest.raises(config_lib.ConfigError, match="config argument 'tinny' is not known"):
        load_config(f"{path}:tinny")


def test_arguments_are_split_between_a_file_and_the_one_that_it_builds_on():
    own, rest = config_lib.split_arg("tau=3.0,tiny,rloo,seed=2", tau=1.0, variant=("grpo", "rloo"))
    assert own.to_dict() == {"tau": 3.0, "variant": "rloo"} and rest == "tiny,seed=2"
    assert config_lib.split_arg(None, tau=1.0)[1] == ""


@pytest.mark.parametrize(
    "name, arg, words",
    [
        ("thinking_machines", "", "Unbiased for the token-level reverse KL with prefixes held fixed"),
        ("ex_opd", "", "its teacher is q^1.25 r^-0.25, r the reference (extrapolation.scale=1.25)"),
        ("reopd", "", "no fixed objective (extrapolation.adaptive=True)"),
        ("mopd", "", "its teacher is the teacher of the example's tag (teacher.combine=route)"),
        ("pooled", "confidence", "members weigh by their certainty at each token (teacher.confidence=1)"),
        ("prefix_opd", "", "masking.first_only=6 leaves tokens out, which is another objective"),
        ("grpo", "", "prompts weigh by the inverse of their rewards' deviation, which includes the own rollout (reward.advantage=grpo)"),
        ("grpo", "dr_grpo", "the gradient is 1 - 1/n of it (reward.advantage=centred)"),
        ("grpo", "dapo", "rollouts are left out by what they turned out to be (reward.filter_groups)"),
        ("grpo", "kl=0.1", "; beside it regulariser.kl=0.1 of: reverse KL to the reference, token by token"),
        ("supervised_kd", "", "; beside it loss.labels=0.5 of: the cross-entropy of the completions"),
        ("grpo", "rloo", "tokens that have moved far from the law that wrote them have no gradient (reward.clip_low, clip_high)"),
        ("dpo", "reward", "the DPO loss, against the reference, of each prompt's best and worst completion (preference.judge=reward)"),
        ("routed", "", "masking.tags=reverse leaves tokens out, which is another objective"),
        ("routed", "", "rollouts of some prompts alone have the term (reward.tags=sort)"),
        ("rl_opd", "route", "solved rollouts alone have the term (reward.only=solved)"),
        ("rl_opd", "convex,share=0.25", "; beside it reward.weight=0.25 of: Unbiased for minus the gradient of the expected reward"),
        ("corrected", "", "the student's up to a cut at a random place, then the teacher's (rollout.source=corrected, cut=random)"),
        ("corrected", "worst,reverse_kl", "before the student's worst token, which its draws decide"),
        ("tools", "drop", "masking.malformed=drop leaves tokens out, which is another objective"),
        (
            "lightning",
            "",
            "completions and their prefixes are those of the store's law (rollout.source=cache), corrected by estimator.importance=none",
        ),
        ("dagger", "soft", "completions are drawn from all of the run so far (rollout.aggregate), corrected by estimator.importance=none"),
        ("minillm", "normalised", "Biased for the sequence-level reverse KL: what comes later counts by its mean"),
        ("minillm", "", "drawn from the mixture with the teacher, corrected by estimator.importance=token"),
    ],
)
def test_what_spoils_a_claim_is_said(name, arg, words):
    assert words in claim_of(ROOT / "configs" / "methods" / f"{name}.py", arg)


def test_a_balance_of_domains_is_said():
    c = load_config(str(ROOT / "configs" / "methods" / "mopd.py"))
    c.loss.balance = "tag"
    config = config_lib.parse(c)
    said = claim.of_run(objective.from_config(config, has_teacher=True), config)
    assert "rollouts weigh by what others of their tag are (loss.balance=tag)" in said


def test_the_soft_term_of_hinton_keeps_its_gradient():
    """tau^2 in its weight; with hard labels alone there is no soft term."""
    config = parsed(ROOT / "configs" / "methods" / "supervised_kd.py", "tau=3.0,hard=0.25")
    assert (config.signal.weight, config.loss.labels) == (0.75 * 9, 0.25)
    only = parsed(ROOT / "configs" / "methods" / "supervised_kd.py", "hard=1.0")
    assert [part.name for part in objective.from_config(only, has_teacher=True).parts] == ["labels"]


@pytest.mark.slow
def test_experts_extrapolated_beside_the_student_as_it_was(tmp_path, monkeypatch, tmp_path_factory):
    """Each row has its own member; that of the skill without an expert is the reference too, beyond which there is nothing."""
    monkeypatch.chdir(ROOT)
    c = load_config("configs/methods/mopd.py:scale=1.25,skills=reverse,keep=shift,tiny")
    assert c.teacher.members["shift"].path == "student_init" and c.task.skills == "reverse,shift"
    c.cache_dir, c.steps, c.task.skills = str(tmp_path_factory.getbasetemp() / "models"), 2, "shift"
    found = list(train.run(c, tmp_path / "run"))[1]  # before the first update
    assert abs(found["train/log_ratio_mean"]) < 1e-6 and abs(found["train/reverse_kl"]) < 1e-6
    assert found["teacher/disagreement"] > 1e-4  # the other member is another model


def test_the_teachers_of_self_distillation_are_arguments():
    for update in ("frozen", "ema", "live", "trust_region"):
        assert parsed(ROOT / "configs" / "methods" / "opsd.py", update).teacher.update == update
    config = parsed(ROOT / "configs" / "methods" / "opsd.py", "reason_first,ema,rate=0.5")
    assert (config.context.privileged.reads, config.teacher.rate) == ("solution,analysis", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_method_runs_in_its_tiny_form(path, tmp_path, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(ROOT)
    c = load_config(f"{path}:tiny")
    c.cache_dir, c.steps = str(tmp_path_factory.getbasetemp() / "models"), 2
    records = list(train.run(c, tmp_path / "run"))
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(np.isfinite(record["train/loss"]) for record in records[1:]) and "eval/accuracy" in records[-1]
