"""Several teachers and a reference beside one student: how they are opened, what they cost, whom evaluations and samples compare with."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

from opd_jax import assembly, evaluate, pair, parallel, recipes, recorder
from opd_jax import config as config_lib
from opd_jax.data import pipeline
from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.data.tasks import Example
from opd_jax.data.tasks.jsonl import Jsonl
from opd_jax.model_io import LoadedModel
from opd_jax.models import hf
from opd_jax.numerics.extrapolation import Rule
from opd_jax.samples import SampleLog
from opd_jax.teachers import Bank
from opd_jax.types import Prompts, UserError

V = 259


def folder(path, seed=0, tokenizer=None, template=None, **changes):
    params, config = models.tiny_model(seed, **({"vocab_size": V} | changes))
    hf.save(path, params, config, tokenizer or tokenizer_lib.byte())
    if template:
        (path / "chat_template.jinja").write_text(template)
    return str(path)


def opened(c):
    return pair.open_pair(config_lib.parse(c), None, parallel.make_mesh())


def config_of(**paths):
    c = config_lib.default()
    c.rollout.max_new_tokens = 4
    c.student.path = paths["student"]
    for name, path in paths.items():
        if name not in ("student", "reference"):
            c.teacher.members[name] = config_lib.member(path=path)
    if "reference" in paths:
        c.extrapolation.scale, c.reference.path = 1.25, paths["reference"]
    return c


# ---- opened


@pytest.mark.slow
def test_models_of_one_path_share_their_arrays(tmp_path):
    student = folder(tmp_path / "s")
    found = opened(config_of(student=student, a="student_init", b=student, reference="student_init"))
    assert found.reference.params["embed"] is found.members["a"].params["embed"]
    assert found.members["b"].params["embed"] is not found.members["a"].params["embed"]
    assert found.student.params["embed"] is not found.members["a"].params["embed"]  # an update takes the student's buffers


@pytest.mark.slow
def test_the_union_of_stop_tokens_is_that_of_all_models(tmp_path):
    stops = {"student": tokenizer_lib.byte()} | {name: tokenizer_lib.byte().stopping_at([i]) for name, i in (("a", 5), ("reference", 6))}
    paths = {name: folder(tmp_path / name, tokenizer=one) for name, one in stops.items()}
    c = config_of(**paths)
    with pytest.raises(UserError, match="stop ids"):
        opened(c)
    c.rollout.stop = "union"
    found = opened(c)
    for model in (found.student, found.members["a"], found.reference):
        assert set(model.tokenizer.eos_ids) == {*tokenizer_lib.byte().eos_ids, 5, 6}
    del c.teacher.members["a"]  # a reference alone
    c.signal.weight, c.reward.weight, c.extrapolation.scale, c.regulariser.kl = 0.0, 1.0, 1.0, 0.1
    assert set(opened(c).student.tokenizer.eos_ids) == {*tokenizer_lib.byte().eos_ids, 6}


@pytest.mark.slow
def test_members_that_would_read_other_templates_are_refused(tmp_path):
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    own = {"student": folder(tmp_path / "s"), "a": folder(tmp_path / "a", 1, template=template)}
    c = config_of(**own, b=folder(tmp_path / "b", 2, template=template.replace("[", "<")))
    c.context.teacher.template = "chat"
    with pytest.raises(UserError, match="the teacher b has another chat template than a, and all read one prompt"):
        opened(c)
    same = config_of(**own, b=folder(tmp_path / "c", 2, template=template))
    same.context.teacher.template = "chat"
    assert opened(same).teacher_prompts.reader.template == template


# ---- what they cost


def test_every_model_that_scores_is_counted():
    tiny, small = models.tiny_config(), models.tiny_config(num_hidden_layers=1)
    n, m = (recorder.cost.active_parameters(config) for config in (tiny, small))

    def counted(bank, **changes):
        asked = types.SimpleNamespace(**{"has_teacher": True, "has_reference": False} | changes)
        frozen = dict.fromkeys(("a", "b", "reference"))
        return recorder._scorers(types.SimpleNamespace(bank=bank, objective=asked, frozen=frozen, config=config_lib.Config()), 1000)

    two = Bank((("a", tiny), ("b", small)), (0.5, 0.5))
    assert counted(None) == ((), ()) and counted(two) == ((n, m), ())
    assert counted(Bank((("a", tiny),), update="trust_region")) == ((n, 1000), ())
    assert counted(Bank((("a", tiny),), update="ema")) == ((n,), ())
    for bank in (dataclasses.replace(two, reference=small, scale=1.5), dataclasses.replace(two, reference=small, rule=Rule())):
        assert counted(bank) == ((n, m), (m,))
    regularised = dataclasses.replace(two, reference=small)
    assert counted(regularised) == ((n, m), ()) and counted(regularised, has_reference=True) == ((n, m), (m,))
    assert counted(dataclasses.replace(two, reference=small, scale=1.5), has_teacher=False) == ((), ())


# ---- whom an evaluation compares with

EXAMPLES = tuple(Example(i, f"{i}+{i}=", "1", "1", tag="ab"[i % 2]) for i in range(3))


@pytest.fixture(scope="module")
def evaluator():
    student, a, b = (LoadedModel(*models.tiny_model(seed, vocab_size=V), tokenizer_lib.byte()) for seed in range(3))
    bank = Bank((("a", a.config), ("b", b.config)), (0.25, 0.75))
    several = evaluate.Several(bank, {"a": a.params, "b": b.params}, np.array([0, 1, 0]))
    settings = {"samples": 2, "batch_size": 4, "max_new_tokens": 4, "seed": 0, "mesh": parallel.make_mesh(1, 1, 1)}
    encoder = pipeline.Encoder(tokenizer_lib.byte(), 16, "refuse")
    task = Jsonl((), (), "", verifiable=True)
    routed = evaluate.Evaluator(student, a, task, EXAMPLES, student_prompts=encoder, teacher_prompts=None, several=several, **settings)
    return routed, [dataclasses.replace(routed, teacher=one, several=None) for one in (a, b)]


@pytest.mark.slow
def test_each_prompt_is_compared_with_the_teacher_of_its_tag(evaluator):
    routed, single = evaluator
    with jax.set_mesh(routed.mesh):
        rollouts = routed._teacher_rollouts
        alone = [one._teacher_rollouts for one in single]
        for batch, (_, found, _) in enumerate(rollouts):
            for row, prompt in enumerate(np.minimum(np.arange(4 * batch, 4 * batch + 4), 5) // 2):
                expected = alone[prompt % 2][batch][1]
                assert (np.asarray(found.tokens_BT)[row] == np.asarray(expected.tokens_BT)[row]).all()
        params = routed.student.params
        found = routed._score(params, rollouts, "forward_kl")["local"]
        each = [one._score(params, rollouts, "forward_kl")["local"] for one in single]
        np.testing.assert_allclose(found, np.where(np.arange(3) % 2 == 0, each[0], each[1]), rtol=1e-5)
        assert abs(each[0] - each[1]).min() > 1e-3


@pytest.mark.slow
def test_of_a_mixture_the_divergence_is_that_to_the_mixture(evaluator):
    """Between both ends: with all weight on one member it is that member."""
    routed, single = evaluator
    with jax.set_mesh(routed.mesh):
        for weights in ((1.0, 0.0), (0.25, 0.75)):
            bank = dataclasses.replace(routed.several.bank, combine="arithmetic", weights=weights)
            mixed = dataclasses.replace(routed, several=dataclasses.replace(routed.several, bank=bank, route_P=None))
            rollouts = mixed._teacher_rollouts
            found = mixed._score(mixed.student.params, rollouts, "reverse_kl")["local"]
            alone = single[0]._score(mixed.student.params, rollouts, "reverse_kl")["local"]
            assert np.allclose(found, alone, rtol=1e-5) == (weights == (1.0, 0.0))


@pytest.mark.slow
def test_prompts_that_no_teacher_is_for_are_not_compared(evaluator):
    routed, single = evaluator
    has_P = np.array([True, False, True])
    some = dataclasses.replace(routed, several=dataclasses.replace(routed.several, route_P=np.array([0, 0, 0]), has_P=has_P))
    with jax.set_mesh(routed.mesh):
        found, stats = some(some.student.params), single[0]._score(some.student.params, some._teacher_rollouts, "forward_kl")
        np.testing.assert_allclose(found["eval/forward_kl"], stats["local"][has_P].sum() / stats["tokens"][has_P].sum(), rtol=1e-5)
        none = dataclasses.replace(routed, several=dataclasses.replace(some.several, has_P=np.zeros(3, bool)))(some.student.params)
    assert not any("kl" in name or "teacher" in name for name in none) and none["eval/entropy"] == found["eval/entropy"]


def test_an_evaluation_asks_teachers_for_distilled_prompts_alone():
    c = config_lib.default()
    c.teacher.members.update({tag: config_lib.member(path=tag) for tag in "ac"})
    c.masking.tags, c.reward.tags, c.reward.weight, c.rollout.group_size = "a", "b", 1.0, 2
    tiny = types.SimpleNamespace(config=models.tiny_config(), params={})
    pair = types.SimpleNamespace(members={"a": tiny, "c": tiny})
    several = assembly._several(config_lib.parse(c), pair, EXAMPLES)
    assert several.has_P.tolist() == [True, False, True] and several.route_P.tolist() == [0, 0, 0]
    c.masking.tags = "a,b"
    with pytest.raises(UserError, match="no member has the tag 'b'"):
        assembly._several(config_lib.parse(c), pair, EXAMPLES)


def test_the_student_of_a_run_is_not_compared_with_itself():
    c = config_lib.default()
    c.student.recipe, c.teacher.path, c.teacher.update = "configs/base.py", "student_init", "ema"
    found = recipes.of_run(config_lib.parse(c), "runs/x")
    assert (found.student.path, found.teacher.path, found.teacher.recipe) == ("runs/x", "", "configs/base.py")
    c.teacher.path, c.teacher.update, c.student.path = "", "frozen", "runs/first"
    c.teacher.members.update(own=config_lib.member(path="student_init", tag="t"), other=config_lib.member(path="runs/y"))
    members = recipes.of_run(config_lib.parse(c), "runs/x").teacher.members
    assert (members["own"].path, members["own"].tag, members["other"].path) == ("runs/first", "t", "runs/y")
    c.student.path = c.student.recipe = ""
    with pytest.raises(UserError, match="began with random weights, which are not kept"):
        recipes.of_run(config_lib.parse(c), "runs/x")


@pytest.mark.slow
def test_a_logged_sample_has_the_thoughts_of_its_own_teacher():
    rng = np.random.default_rng(0)
    (own, config), (a, a_config), (b, b_config) = (models.tiny_model(seed) for seed in range(3))
    prompts, completions, route_B = models.ragged_prompts(rng), models.ragged_rollout(rng), jnp.array([0, 1, 1, 0, 1, 0, 0, 1])
    parsed = dataclasses.replace(config_lib.Config(), rollout=config_lib.Rollout(batch_size=8), log=config_lib.Log(samples=8))
    log = lambda first, others=(): SampleLog(parsed, tokenizer_lib.byte(), config, first, parallel.make_mesh(1, 1, 1), others=others)
    read = (prompts, Prompts(prompts.tokens_BS, prompts.mask_BS, prompts.id_B))
    found = log(a_config, (b_config,)).annotate(own, a, read, completions, others=(b,), route_B=route_B).teacher
    each = [log(c).annotate(own, p, read, completions).teacher for p, c in ((a, a_config), (b, b_config))]
    for row, number in enumerate(route_B.tolist()):
        np.testing.assert_allclose(found.logp_BT[row], each[number].logp_BT[row], atol=1e-5)
    assert abs(each[0].logp_BT - each[1].logp_BT).max() > 0.1
