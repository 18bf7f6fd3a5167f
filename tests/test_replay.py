"""Updates that learn from stored completions: against a live teacher, resumed, refused; the aggregation of DAgger."""

import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
import test_sources
from test_sources import parsed, without_clock

from opd_jax import checkpoint, job, labels, learner, metrics, model_io, objective, pair, parallel, replay, score, score_cache, store, train
from opd_jax import config as config_lib
from opd_jax.config import ConfigError
from opd_jax.metrics import Progress
from opd_jax.sweeps import sweep
from opd_jax.types import UserError

QUIET = Progress(quiet=True)
SAMPLED = {"signal__support": "sampled"}
TOPK = {"signal__divergence": "forward_kl", "signal__support": "topk_teacher", "signal__k": 5, "signal__tail": "bucket"}
HARD = {"signal__divergence": "top1_cross_entropy"}


def run_config(teacher, **changes):
    """With weights whose laws are far from uniform, and a teacher that is another model."""
    return test_sources.run_config(teacher, **({"student__init__initializer_range": 0.4} | changes))


def form(**changes):
    config = parsed(**changes)
    return labels.form_of(objective.from_config(config, has_teacher=True))


def write(config, folder):
    return score_cache.write(config_lib.parse(config), folder, make_model=None, progress=QUIET)


def cached(folder, teacher="", **changes):
    return run_config(teacher, rollout__source="cache", rollout__cache=str(folder), **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    list(train.run(run_config("", seed=3, rollout__source="dataset", signal__divergence="nll", steps=1), workdir))
    return workdir


@pytest.fixture(scope="module")
def stores(teacher, tmp_path_factory):
    """Folders of stores by their form; one batch each, the first of the run."""
    folder = tmp_path_factory.mktemp("stores")
    for name, changes in {"tokens": SAMPLED, "topk": TOPK}.items():
        write(run_config(teacher, **changes, steps=1), folder / name)
    return folder


# ---- what is kept of a law


def test_the_form_is_the_least_that_the_signal_needs():
    assert form(**SAMPLED) == labels.Form("tokens")
    assert form(**SAMPLED, gate__kind="importance_decay") == labels.Form("tokens")
    assert form(**TOPK) == labels.Form("topk", 5)
    assert form(**HARD) == labels.Form("topk", 1)
    assert form(signal__divergence="nll") == labels.Form()
    extra = {"extra_signal__weight": 1.0, "extra_signal__support": "topk_teacher", "extra_signal__k": 9}
    assert form(**TOPK, **extra) == labels.Form("topk", 9) == form(signal__divergence="nll", **extra)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "signal.support = 'full' with signal.divergence = 'reverse_kl' needs more of the teacher's law than is stored"),
        ({"signal__support": "topk_student", "signal__k": 2}, "signal.support = 'topk_student'"),
        (SAMPLED | {"gate__kind": "confidence"}, "the statistic 'target_entropy' needs more than log-probs of the sampled tokens"),
        (TOPK | {"loss__teacher_temperature": 2.0}, "loss.teacher_temperature = 2: cached log-probs are those of temperature 1"),
        (SAMPLED | {"extra_signal__weight": 1.0}, "config field extra_signal.support = 'full'"),
    ],
)
def test_what_no_store_keeps_is_refused(changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        form(**changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rollout__source": "cache"}, "rollout.cache = '' must name a folder that experiments/score_cache.py has written"),
        ({"rollout__cache": "x"}, "rollout.cache = 'x' needs rollout.source = 'cache', not 'student'"),
        ({"rollout__aggregate": True, "rollout__source": "teacher"}, "rollout.source = 'teacher' must be 'student' or 'dagger'"),
        ({"rollout__aggregate": True, "teacher__path": ""}, "rollout.aggregate = True needs a teacher, whose labels it keeps"),
        ({"rollout__aggregate": True, "reward__weight": 1.0} | HARD, "rollout.aggregate = True must be False: reward.weight = 1"),
        ({"rollout__aggregate": True} | SAMPLED, "rollout.aggregate = True must be False, because signal.support = 'sampled' needs draws"),
        ({"masking__failed": "drop", "masking__solved": "drop"}, "masking.failed = 'drop' leaves nothing to learn from"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        parsed(**changes)
    parsed(rollout__aggregate=True, estimator__importance="cumulative", **SAMPLED)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"context__privileged__reads": "solution"}, "context.privileged.reads = 'solution' must be ''"),
        ({"teacher__update": "ema", "teacher__path": "student_init"}, "teacher.update = 'ema' must be 'frozen'"),
        ({"extrapolation__scale": 1.5}, "extrapolation.scale = 1.5 must be 1, because a store keeps a teacher's scores"),
        ({"rollout__source": "mix"}, "rollout.source = 'mix' writes no store; valid: rollout.source = student, teacher, dagger, dataset"),
        ({"rollout__aggregate": True}, "rollout.aggregate = True writes no store"),
        ({"steps": 0}, "steps = 0 must be at least 1, the batches of a store"),
        ({"rollout__max_turns": 2}, "rollout.max_turns = 2 is for tasks with an environment, and task.name = 'arithmetic' has none"),
    ],
)
def test_what_gives_no_store_is_refused_before_any_work(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(words)):
        write(run_config("nowhere", **({"signal__divergence": "nll"} | changes)), tmp_path / "store")
    assert not (tmp_path / "store").exists()


# ---- rollout.source=cache


def first_batch(workdir, **changes):
    """(job, what its loop makes for the first update)."""
    c = run_config(**changes)
    made = job.setup(config_lib.parse(c), workdir, make_model=None, make_store=None, progress=QUIET)
    with jax.set_mesh(made.mesh):
        prompts = made.pipeline.batch(0)
        scorer = made.scorer(made.state)
        completions = made.rollouts(made.policy(made.state.params), scorer, prompts, 0)
        return made, made.make_batch(prompts, completions, scorer, made.recall(prompts, completions, scorer, 0))


def gradient_of(made, batch):
    with jax.set_mesh(made.mesh):
        arguments = (made.objective, made.student.config, made.bank, made.state.params, made.frozen, batch.batch)
        return jax.jit(learner.gradient, static_argnums=(0, 1, 2))(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name, signal", [("tokens", SAMPLED), ("topk", TOPK)])
def test_the_first_update_is_that_of_the_live_teacher(name, signal, teacher, stores, tmp_path):
    """The same completions, in another order: loss and gradient agree; no teacher is there."""
    live = gradient_of(*first_batch(tmp_path / "live", teacher=teacher, **signal))
    made, batch = first_batch(tmp_path / "cache", teacher="", rollout__source="cache", rollout__cache=str(stores / name), **signal)
    assert made.teacher is None and made.bank is None and not made.frozen and batch.batch.teacher is None
    loss, _, gradient = gradient_of(made, batch)
    assert float(loss) == pytest.approx(float(live[0]), abs=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(live[2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3


@pytest.mark.slow
def test_stored_scores_are_those_of_the_teacher(teacher, stores):
    """By another road: the teacher's log-softmax on the stored completions."""
    mesh = parallel.make_mesh()
    opened = pair.open_pair(config_lib.parse(run_config(teacher)), None, mesh)
    found = {name: store.read(stores / name) for name in ("tokens", "topk")}
    prompts, _ = opened.student_prompts.encode([found["tokens"].example(p).prompt for p in range(4) for _ in range(2)], range(8))
    completions = found["tokens"].completions(range(4))
    np.testing.assert_array_equal(completions.tokens_BT, found["topk"].completions(range(4)).tokens_BT)
    annotated = score.annotate(opened.teacher.params, opened.teacher.config, prompts, completions, k=5)
    (hash_,) = {store.description.teacher_hash for store in found.values()}
    scores = found["tokens"].scores(range(4), teacher_hash=hash_)
    np.testing.assert_allclose(scores["logp_BT"], annotated.logp_BT, atol=1e-5)
    scores, mask_BT = found["topk"].scores(range(4), teacher_hash=hash_), completions.mask_BT
    np.testing.assert_array_equal(scores["ids_BTK"][mask_BT], np.asarray(annotated.top_ids_BTK)[mask_BT])
    np.testing.assert_allclose(scores["logp_BTK"][mask_BT], np.asarray(annotated.top_logp_BTK)[mask_BT], atol=1e-5)
    total = np.exp(scores["logp_BTK"]).sum(-1) + np.exp(scores["rest_BT"])
    np.testing.assert_allclose(total, 1, atol=1e-5)


REFUSED = {
    "another teacher": (lambda other: {"teacher__path": str(other)}, "its scores are those of the teacher"),
    "another temperature": (
        lambda _: {"rollout__temperature": 0.7},
        "rollout.temperature = 0.7 must be 1.0, as in what wrote rollout.cache",
    ),
    "other lengths": (lambda _: {"rollout__max_new_tokens": 5}, "rollout.max_new_tokens = 5 must be 4"),
    "other groups": (lambda _: {"rollout__group_size": 1}, "rollout.group_size = 1 must be 2"),
    "another task": (lambda _: {"task__name": "countdown"}, "task.name = 'countdown' must be 'arithmetic'"),
    "another form": (lambda _: TOPK, "holds log-probs of the sampled tokens, the signal needs the top 5; write a store"),
    "another template": (lambda _: {"context__student__template": "TEMPLATE"}, "its prompts were read with another context.student"),
    "another template of the teacher": (
        lambda teacher: {"context__teacher__template": "TEMPLATE", "teacher__path": str(teacher)},
        "its teacher read prompts with another context.teacher",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_a_store_of_something_else_is_refused(name, stores, tmp_path, teacher):
    changes, words = REFUSED[name]
    other = tmp_path / "other"
    if name == "another teacher":
        list(train.run(run_config("", seed=8, rollout__source="dataset", signal__divergence="nll", steps=1), other))
    changes = changes(other if name == "another teacher" else teacher)
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}!")
    changes = {field: str(tmp_path / "chat.jinja") if value == "TEMPLATE" else value for field, value in changes.items()}
    c = cached(stores / "tokens", **(SAMPLED | changes))
    with pytest.raises(UserError, match=re.escape(words)):
        next(train.run(c, tmp_path / "run"))


@pytest.mark.slow
def test_a_data_sets_completions_have_no_law_to_correct_for(tmp_path):
    write(run_config("", rollout__source="dataset", signal__divergence="nll", steps=1), tmp_path / "store")
    c = cached(tmp_path / "store", estimator__importance="token", **SAMPLED)
    with pytest.raises(ConfigError, match="estimator.importance = 'token' needs the law that wrote the completions, and those of"):
        next(train.run(c, tmp_path / "run"))
    with pytest.raises(ConfigError, match="holds no scores, the signal needs log-probs of the sampled tokens"):
        next(train.run(cached(tmp_path / "store", **SAMPLED), tmp_path / "run"))
    compared = {"signal__divergence": "nll", "preference__weight": 1.0, "preference__judge": "reward"}
    with pytest.raises(ConfigError, match="preference.weight = 1 compares completions of a prompt, and rollout.cache = .* has one of each"):
        next(train.run(cached(tmp_path / "store", **compared), tmp_path / "run"))


@pytest.mark.slow
def test_a_store_with_tokens_beyond_the_vocabulary_is_refused(stores, tmp_path):
    found = store.read(stores / "tokens")
    made = store.begin(tmp_path / "store", found.description)
    completions = found.completions(range(4))
    completions.tokens_BT[0, 0] = 259
    made.append([found.example(p) for p in range(4)], completions, found.scores(range(4), teacher_hash=found.description.teacher_hash))
    with pytest.raises(ConfigError, match="holds the token 259, the tokenizer has 259; write the store again"):
        next(train.run(cached(tmp_path / "store", **SAMPLED), tmp_path / "run"))


@pytest.mark.slow
def test_a_run_from_a_store_resumes_says_its_law_and_knows_its_store(teacher, tmp_path, capsys):
    folder = tmp_path / "store"
    write(run_config(teacher, **SAMPLED, steps=2), folder)
    c = cached(folder, teacher=teacher, estimator__importance="token", masking__failed="drop", eval__prompts=4, **SAMPLED)
    whole = list(train.run(c, tmp_path / "whole", progress=Progress()))
    assert "completions and their prefixes are those of the store's law (rollout.source=cache)" in capsys.readouterr().out
    assert "eval/reverse_kl" in whole[-1]
    for record in whole[1:]:
        assert not {"train/reverse_kl", "train/log_ratio_mean"} & set(record) and record["cost/scored_tokens_total"] == 0
        assert record["cost/generated_tokens_total"] == 0 and record["rollout/reward"] == 0
    for leave_after in (1, 4, 6):
        for record in train.run(c, tmp_path / "left"):
            if record["step"] == leave_after:
                break
    assert without_clock(metrics.read(tmp_path / "left" / "metrics.jsonl")) == without_clock(whole)
    shutil.rmtree(folder)
    write(run_config(teacher, **SAMPLED, steps=1), folder)
    c.steps = 7
    with pytest.raises(UserError, match="rollout.cache = .* is not the store this run began with; restore it"):
        next(train.run(c, tmp_path / "left"))


@pytest.mark.slow
def test_a_student_of_another_teacher_is_told(teacher, stores, tmp_path, caplog):
    """Teacher consistency: SeqKD with the store's teacher is silent, with another it warns."""
    list(train.run(run_config("", seed=8, rollout__source="dataset", signal__divergence="nll", steps=1), tmp_path / "other"))
    for name, path in (("same", teacher), ("another", tmp_path / "other")):
        list(train.run(run_config(path, rollout__source="teacher", signal__divergence="nll", steps=1), tmp_path / name))
        next(train.run(cached(stores / "tokens", student__path=str(tmp_path / name), **SAMPLED), tmp_path / f"{name}_run"))
        assert ("learnt from another teacher than the one whose scores rollout.cache holds" in caplog.text) == (name == "another")


@pytest.mark.slow
def test_a_store_is_gone_on_with(teacher, tmp_path):
    c = run_config(teacher, **TOPK, steps=2)
    whole = write(c, tmp_path / "whole")
    write(c, tmp_path / "left")
    (tmp_path / "left" / "000001.json").unlink()
    assert write(c, tmp_path / "left").digest == whole.digest
    examples = [whole.example(prompt).prompt for prompt in range(8)]
    assert examples == [
        e.prompt for step in range(2) for e in first_batch(tmp_path / "run", teacher=teacher, **TOPK)[0].pipeline.batch(step).examples
    ]


# ---- rollout.aggregate


def test_draws_are_a_function_of_seed_and_step_uniform_and_distinct():
    assert replay.drawn(0, 0, 5) == [0, 1, 2, 3, 4]
    assert replay.drawn(3, 7, 5) == replay.drawn(3, 7, 5) != replay.drawn(4, 7, 5)
    counts = np.zeros(24)
    for seed in range(3000):
        chosen = replay.drawn(seed, 5, 4)
        assert len(set(chosen)) == 4 and chosen == sorted(chosen)
        counts[chosen] += 1
    expected = 3000 * 4 / 24
    assert abs(counts - expected).max() < 4 * np.sqrt(expected)


AGGREGATED = {
    "rollout__source": "dagger",
    "rollout__aggregate": True,
    "rollout__beta": 0.6,
    "rollout__beta_decay": 0.5,
    "rollout__round": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("signal", [HARD, TOPK], ids=["hard", "soft"])
def test_an_aggregate_whose_members_are_all_drawn_once_is_plain(signal, teacher, tmp_path):
    """The first update draws all there is: that of the same config without aggregation, whose teacher reads the completions."""
    dagger = {"teacher": teacher, "rollout__source": "dagger", "rollout__beta": 0.6, **signal}
    plain = gradient_of(*first_batch(tmp_path / "plain", **dagger))
    made, batch = first_batch(tmp_path / "all", rollout__aggregate=True, **dagger)
    assert batch.batch.teacher is None and batch.learnt.age == 0
    loss, _, gradient = gradient_of(made, batch)
    assert float(loss) == pytest.approx(float(plain[0]), abs=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain[2]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_a_killed_run_with_a_replay_continues_bit_for_bit(teacher, tmp_path):
    c = run_config(teacher, **AGGREGATED, **TOPK, log__diagnostics=True)
    whole = list(train.run(c, tmp_path / "whole"))
    for leave_after in (1, 3):
        for record in train.run(c, tmp_path / "left"):
            if record["step"] == leave_after:
                break
    list(train.run(c, tmp_path / "left"))
    # As after a kill: the newest checkpoint has not seen the last two batches, of which one is torn.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "6")
    (tmp_path / "killed" / "replay" / "000005.npz").write_bytes(b"torn")
    list(train.run(c, tmp_path / "killed"))
    for name in ("left", "killed"):
        assert without_clock(metrics.read(tmp_path / name / "metrics.jsonl")) == without_clock(whole)
        a, b = (jax.tree.leaves(model_io.open_model(str(tmp_path / path)).params) for path in (name, "whole"))
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        for path in (tmp_path / "whole" / "replay").iterdir():
            assert (tmp_path / name / "replay" / path.name).read_bytes() == path.read_bytes()
    ages = [record["replay/age"] for record in whole]
    expected = [np.mean([step - prompt // 4 for prompt in replay.drawn(7, step, 4)]) for step in range(6)]
    assert ages == expected and ages[0] == 0 < ages[-1]
    assert not {"train/reverse_kl", "train/log_ratio_mean", "diag/ess_token"} & {name for record in whole for name in record}
    totals = {name: np.diff([r[f"cost/{name}_tokens_total"] for r in whole], prepend=0) for name in ("generated", "scored")}
    lengths = np.array([record["rollout/length"] * 8 for record in whole])
    for total in totals.values():  # written and scored once, whatever is learnt from
        np.testing.assert_array_equal(total, lengths)
    assert [record["train/tokens"] for record in whole] != lengths.tolist()
    shutil.rmtree(tmp_path / "left" / "replay")
    c.steps = 7
    with pytest.raises(UserError, match="replay: holds 0 of the 6 batches that its run has written"):
        next(train.run(c, tmp_path / "left"))


@pytest.mark.slow
def test_labels_are_made_once_and_kept(teacher, tmp_path):
    """The replay of a run holds what its teacher says of its completions, also of those that many updates ago another student wrote."""
    list(train.run(run_config(teacher, **AGGREGATED, **HARD, steps=3), tmp_path / "run"))
    found = store.begin(tmp_path / "run" / "replay", store.read_description(tmp_path / "run" / "replay"))
    opened = pair.open_pair(config_lib.parse(run_config(teacher)), None, parallel.make_mesh())
    assert found.batches == 3 and found.description.k == 1 and found.description.writer_hash == ""
    scorer = labels.make_scorer(labels.Form("topk", 1), opened.teacher.config)
    for step in range(3):
        rows = range(4 * step, 4 * step + 4)
        texts = [found.example(prompt).prompt for prompt in rows for _ in range(2)]
        completions, kept = found.completions(rows), found.scores(rows, teacher_hash=found.description.teacher_hash)
        fresh = scorer(opened.teacher.params, opened.student_prompts.encode(texts, range(8))[0], completions)
        for name in store.SCORES["topk"]:
            np.testing.assert_allclose(kept[name][completions.mask_BT], np.asarray(fresh[name])[completions.mask_BT], atol=1e-5)
    assert checkpoint.remembered(tmp_path / "run" / "checkpoints")["teacher_hash"] == found.description.teacher_hash


# ---- stores of recipes


@pytest.mark.slow
def test_a_recipe_is_written_once(teacher, tmp_path):
    file = tmp_path / "recipe.py"
    c = run_config(teacher, **SAMPLED, steps=1)
    values = json.loads(c.to_json())
    file.write_text(f"from ml_collections import ConfigDict\ndef get_config(arg=None):\n    return ConfigDict({values!r})\n")
    c = run_config("", rollout__source="cache", rollout__cache_recipe=str(file), steps=1, **SAMPLED)
    c.cache_dir = str(tmp_path / "models")
    first = list(train.run(c, tmp_path / "first"))
    (folder,) = (tmp_path / "models").glob("**/store.json")
    before = folder.stat().st_mtime_ns
    assert without_clock(train.run(c, tmp_path / "second")) == without_clock(first)
    assert folder.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "first" / "config.json").read_text())["rollout"]["cache_recipe"] == str(file)


def test_recipes_of_a_recipe_are_kept_beside_it_and_a_sweep_makes_them_before(tmp_path):
    c = config_lib.load_config("configs/methods/lightning.py:tiny")
    config, folder = train.locate_recipe(c.rollout.cache_recipe, str(tmp_path))
    assert config.cache_dir == str(tmp_path) and folder.parent == tmp_path
    assert folder.name == train.locate_recipe(c.rollout.cache_recipe, "elsewhere")[1].name
    runner, jobs = object.__new__(sweep._Runner), {}
    runner._folder = types.SimpleNamespace(point=tmp_path.joinpath)
    c.cache_dir = str(tmp_path)
    needs = runner._recipes(config_lib.parse(c), jobs)
    kinds = ["teacher", "student", "seqkd", "store"]
    made = {kind: next(name for name in jobs if f"_{kind}_" in name) for kind in kinds}
    assert set(needs) == {made["seqkd"], made["teacher"], made["store"]} and set(jobs) == set(made.values())
    assert set(jobs[made["store"]].needs) == {made["seqkd"], made["teacher"]}
    command = jobs[made["store"]].command
    assert command[1].endswith("score_cache.py") and f"--out={folder}" in command and f"--config.cache_dir={tmp_path}" in command
    order = list(jobs)
    assert all(order.index(need) < order.index(name) for name in order for need in jobs[name].needs)
