"""The laboratory: sampled tables against enumeration, sizes and meshes that change nothing, its script and what it refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import ragged_prompts, tiny_model
from test_configs import ROOT, load, script

from opd_jax import config as config_lib
from opd_jax import parallel, train
from opd_jax.analysis import (
    enumeration,
    gradient_stats,
    gradient_study,
    plots,
    plots_study,
    shadow,
    study_conditions,
    study_cost,
    study_enumerated,
    study_job,
    study_report,
    study_tables,
)
from opd_jax.analysis.study_conditions import Condition, Plan, Shadow
from opd_jax.config import ConfigError
from opd_jax.data import tokenizer
from opd_jax.metrics import Progress
from opd_jax.model_io import LoadedModel
from opd_jax.models import spec, transformer
from opd_jax.numerics.estimators import REGISTRY, TARGETS
from opd_jax.types import Prompts, UserError

NAMES = ("sequence", "to_go", "rao_blackwell_to_go", "token", "token_full")
NUMBERS = study_report.NUMBERS


# ---- against enumeration

MODELS = {"shared": {"features": 4, "length": 4, "seed": 2}, "stop": {"stop": 2, "length": 4, "seed": 3}}


@pytest.mark.parametrize("model", MODELS)
def test_enumerated_gradients_are_those_of_the_proofs(model, float64):
    model = enumeration.make(model, **MODELS[model])
    index = np.arange(len(model.tokens_NT))
    for name in NAMES:
        found = study_enumerated.rollout_gradients(model, REGISTRY[name], index)
        np.testing.assert_allclose(found, model.gradients(REGISTRY[name]), atol=1e-10)


@pytest.mark.slow
def test_sampled_tables_agree_with_exact_ones():
    """Over seeds, at least 88% of 95% intervals hold the exact number, for each kind of number."""
    with jax.enable_x64(True):
        model = enumeration.make("stop", **MODELS["stop"])
    names = (*NAMES, "discounted", "forward_kl")
    exact = gradient_study.enumerated(model, names, exact=True)
    inside = {name: [] for name in ("variance", "snr", "bias", "bias_sequence")}
    for seed in range(8):
        for a, b in zip(exact, gradient_study.enumerated(model, names, rollouts=1024, resamples=400, seed=seed), strict=True):
            assert a["name"] == b["name"]
            for name, hits in inside.items():
                hits.append(b[f"{name}_low"] - 1e-9 <= a[name] <= b[f"{name}_high"] + 1e-9)
            assert b["cosine_sequence"] is None or abs(a["cosine_sequence"] - b["cosine_sequence"]) < 0.1
            assert b["bias"] is None or not a["unbiased"]
    assert min(np.mean(hits) for hits in inside.values()) >= 0.88, {name: np.mean(hits) for name, hits in inside.items()}


def test_exact_tables_are_the_enumeration():
    with jax.enable_x64(True):
        model = enumeration.make("shared", **MODELS["shared"])
        mean, target = model.expected_gradient(REGISTRY["token"]), model.exact_gradient("sequence_reverse_kl")
        variance, bias = float(model.trace_covariance(REGISTRY["token"])), float(jnp.linalg.norm(mean - target))
        cosine = float(mean @ target / jnp.linalg.norm(mean) / jnp.linalg.norm(target))
        snr = float(mean @ mean) / variance
    (row,) = gradient_study.enumerated(model, ["token"], exact=True)
    for name, value in {"variance": variance, "bias_sequence": bias, "bias": 0, "cosine_sequence": cosine, "snr": snr}.items():
        assert row[name] == row[f"{name}_low"] == row[f"{name}_high"] == pytest.approx(value, abs=1e-12)


def test_rollouts_of_a_group_are_correlated_where_a_baseline_looks_across():
    """sequence_leave_one_out: n times the variance of the batch mean is told apart from one rollout's; without groups they are one."""
    with jax.enable_x64(True):
        model = enumeration.make("shared", **MODELS["shared"])
    names = ("sequence", "sequence_leave_one_out")
    alone = gradient_study.enumerated(model, names, rollouts=512)
    grouped = gradient_study.enumerated(model, names, rollouts=2048, group_size=4)
    assert alone[0]["variance"] == pytest.approx(alone[1]["variance"]) == alone[1]["variance_batch"]
    assert grouped[1]["variance_high"] < grouped[0]["variance_low"]
    assert grouped[0]["prompts"] == 512 and abs(grouped[0]["variance_batch"] / grouped[0]["variance"] - 1) < 0.2
    assert grouped[1]["bias"] is None
    with pytest.raises(UserError, match="looks across rows"):
        gradient_study.enumerated(model, names, exact=True)


@pytest.mark.parametrize("changes", [{"features": 2}, {"stop": 2, "observed": (1,)}], ids=["shared", "ragged"])
def test_a_truncated_model_is_the_same_student_on_shorter_completions(changes, float64):
    """Every completion has the probability of those it begins; features and teacher of a prefix stay; nothing changes at full length."""
    whole = enumeration.make("whole", length=4, seed=1, **changes)
    short = whole.truncated(2)
    keys = lambda model: [(*t, *m) for t, m in zip(model.tokens_NT[:, :2].tolist(), model.mask_NT[:, :2].tolist(), strict=True)]
    assert len(keys(short)) == len(set(keys(short))) == len(set(keys(whole))) < len(keys(whole))
    np.testing.assert_array_equal(short.theta_FV, whole.theta_FV)
    for at, key in enumerate(keys(short)):
        same = [n for n, other in enumerate(keys(whole)) if other == key]
        assert float(whole.probability_N[np.array(same)].sum()) == pytest.approx(float(short.probability_N[at]))
        for n in same:
            np.testing.assert_array_equal(short.features_NTF[at], whole.features_NTF[n, :2])
            np.testing.assert_array_equal(short.teacher_logits_NTV[at], whole.teacher_logits_NTV[n, :2])
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(whole.truncated(4)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_lengths_of_an_enumerable_study_are_of_one_student(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(study_enumerated, "measured", lambda model, *_, **__: (seen.append(model), ([], None))[1])
    monkeypatch.setattr(study_tables, "neighbours", lambda *_: [])
    monkeypatch.setattr(study_tables, "growth_of", lambda _: [])
    run_job(default(study__lengths="2,5", study__group_sizes="4"), tmp_path / "out")
    assert [model.tokens_NT.shape for model in seen] == [(81, 4), (9, 2), (243, 5), (81, 4)]
    for model in seen:
        np.testing.assert_array_equal(model.theta_FV, seen[2].theta_FV)
        np.testing.assert_array_equal(model.features_NTF[0], seen[2].features_NTF[0, : model.tokens_NT.shape[1]])


# ---- a student and a teacher

PLAN = Plan(reference=2, batch_size=16, microbatch=8, position_parts=2, sketch=256, resamples=200)


def prompts(rows=32):
    rng = np.random.default_rng(0)
    return jax.tree.map(np.asarray, ragged_prompts(rng, rows))


def study(plan=PLAN, names=("sequence", "to_go_leave_one_out", "token", "token_full"), **settings):
    settings = {"lengths": (5,), "prompts": prompts()} | settings
    return gradient_study.study(tiny_model(0, scale=4.0), tiny_model(1, scale=4.0), settings.pop("prompts"), names, plan=plan, **settings)


@pytest.fixture(scope="module")
def table():
    return study()


def close(a, b, rtol):
    assert [row["name"] for row in a] == [row["name"] for row in b]
    for one, other in zip(a, b, strict=True):
        for name in NUMBERS:
            for key in (name, f"{name}_low", f"{name}_high"):
                assert (one[key] is None) == (other[key] is None), key
                assert one[key] is None or one[key] == pytest.approx(other[key], rel=rtol, abs=1e-3 * abs(one["variance"]) ** 0.5), key


def test_a_table_has_a_row_per_estimator_with_its_condition_and_numbers(table):
    assert [row["name"] for row in table] == ["sequence", "to_go_leave_one_out", "token", "token_full"]
    json.dumps(table, allow_nan=False)
    for row in table:
        assert {name: row[name] for name in study_report.CONDITION} == {
            "T": 5, "gamma": None, "k": None, "group_size": 1, "temperature": 1.0, "top_p": 1.0, "step": None,
        }  # fmt: skip
        assert row["target"] in TARGETS and row["reference"].endswith("on 64 further rollouts")
        assert row["variance_low"] < row["variance"] < row["variance_high"] and row["rollouts"] == 32
        for kind in ("position", "parameters"):
            assert sum(v["share"] for v in row[f"share_by_{kind}"].values()) == pytest.approx(1, abs=1e-3)
        assert list(row["share_by_position"]) == ["0-2", "3-4"]
        for name in NUMBERS:
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            assert low <= high and (row[name] is None or low - 1e-6 <= row[name] <= high + 1e-6)
    assert table[0]["variance"] > table[2]["variance"] > table[3]["variance"]
    assert set(table[0]) <= set(study_report.KEYS) | {f"{name}{end}" for name in NUMBERS for end in ("_low", "_high")}


def test_a_table_is_a_function_of_the_seed(table):
    assert study() == table
    assert study(dataclasses.replace(PLAN, seed=1))[0]["variance"] != table[0]["variance"]


@pytest.mark.slow
def test_a_microbatch_changes_nothing(table):
    close(table, study(dataclasses.replace(PLAN, microbatch=16)), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_mesh_changes_nothing(axes, table):
    mesh = parallel.make_mesh(**axes)
    place = lambda params, config: jax.device_put(params, spec.shardings(transformer.param_specs(config), mesh))
    student, teacher = ((place(*model), model[1]) for model in (tiny_model(0, scale=4.0), tiny_model(1, scale=4.0)))
    found = gradient_study.study(student, teacher, prompts(), [row["name"] for row in table], lengths=(5,), plan=PLAN, mesh=mesh)
    close(table, found, rtol=1e-3)


@pytest.mark.slow
def test_numbers_are_those_of_whole_gradients():
    """Variance and bias from gradients that this test keeps whole, on the rollouts of the study."""
    kept = []
    original = shadow.measure

    def spy(running, *rest, **settings):
        kept.append((rest, settings))
        return original(running, *rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shadow, "measure", spy)
        rows = study(names=("token", "token_full"))
    vectors, references = [], []
    for (params, teacher_params, own, independent), s in kept:
        vectors.append(shadow.rollout_gradients(s["estimators"], s["models"], s["projection"], 1, params, teacher_params, own).vector_EN)
        references.append(
            shadow.rollout_gradients(s["references"], s["models"], s["projection"], 1, params, teacher_params, independent).vector_EN
        )
    vectors, references = np.concatenate(vectors).astype(np.float64), np.concatenate(references).astype(np.float64)
    assert vectors.shape[:2] == (32, 3) and references.shape[:2] == (64, 2)
    for e, row in enumerate(rows):
        assert row["variance"] == pytest.approx(np.var(vectors[:, e], axis=0, ddof=1).sum(), rel=1e-3)
    names = [e.name for e in kept[0][1]["estimators"]]
    assert names == ["token", "token_full", "local_to_go"]


def rows_of(setting, names=("token", "to_go_leave_one_out")):
    """The rows of a condition's first batch: (of the estimators, of the references), microbatches joined."""
    (params, config), (teacher_params, teacher_config) = tiny_model(0, scale=4.0), tiny_model(1, scale=4.0)
    subject = gradient_study.Subject(
        lambda step: params, teacher_params, shadow.Models(config, teacher_config), prompts(), prompts(), (), parallel.make_mesh()
    )
    shadows = [Shadow(REGISTRY[name]) for name in names]
    references = study_conditions.references_of([one.estimator for one in shadows])
    sample = gradient_study._Sample(subject, setting, shadows, references, 32, PLAN)
    pieces = list(sample._microbatches(0))
    return [jax.tree.map(lambda *x: np.concatenate(x), *side) for side in zip(*pieces, strict=True)]


def test_draws_are_of_the_law_of_their_purpose_and_shared_by_conditions():
    own, independent = rows_of(Condition(6), ("token",))
    hot, same = rows_of(Condition(6, temperature=3.0), ("token",))
    longer, _ = rows_of(Condition(9), ("token",))
    completions = lambda rows: rows.student.completion_BT
    assert completions(own).shape == (16, 6) and completions(independent).shape == (32, 6)
    np.testing.assert_array_equal(completions(independent), completions(same))  # references: the policy itself
    np.testing.assert_array_equal(completions(own), completions(longer)[:, :6])  # lengths are paired
    assert np.mean(completions(own) != completions(hot)) > 0.2
    pairs = completions(independent).reshape(16, 2, 6)
    assert np.mean(pairs[:, 0] != pairs[:, 1]) > 0.2 and np.mean(pairs[:, 0] != completions(own)) > 0.2
    assert np.any(pairs[0, 0] != completions(own)[0])  # the same prompt and the same id
    np.testing.assert_array_equal(independent.student.prompt_BS[::2], own.student.prompt_BS)


def test_what_looks_across_rows_sees_the_batch_before_the_split():
    """Groups of four rollouts side by side, over two microbatches; the baseline of a row is the mean of the other three's returns."""
    own, _ = rows_of(Condition(6, group_size=4))
    assert len(np.unique(own.student.prompt_BS.reshape(4, 4, -1)[:, 0], axis=0)) == 4
    np.testing.assert_array_equal(own.contexts["1"].group_B, np.repeat(np.arange(4), 4))
    assert own.contexts["0"].baseline_BT is None
    baseline = own.contexts["1"].baseline_BT.reshape(4, 4, 6)
    returns = baseline.sum(1, keepdims=True) - 3 * baseline  # of one length: each baseline leaves one out
    np.testing.assert_allclose((returns.sum(1, keepdims=True) - returns) / 3, baseline, rtol=1e-3, atol=1e-3)
    assert np.abs(baseline).max() > 0.1 and np.ptp(baseline, axis=1).max() > 0.1


def test_conditions_are_the_base_and_one_change_each():
    base = Condition(8)
    found = study_conditions.conditions(base, lengths=(8, 16), group_sizes=(4,), temperatures=(0.5,), steps=(0, 10))
    assert found == [base, Condition(16), Condition(8, 4), Condition(8, temperature=0.5), Condition(8, step=0), Condition(8, step=10)]
    assert base.on_policy and not Condition(8, temperature=0.5).on_policy and not Condition(8, top_p=0.9).on_policy


def test_variants_change_gamma_and_k_where_there_is_one():
    names = ["token", "discounted", "topk_renormalised"]
    found = study_conditions.variants([REGISTRY[name] for name in names], gammas=(0.0, 0.9), top_ks=(4,))
    assert [(one.estimator.name, one.gamma, one.k, one.default) for one in found] == [
        ("token", None, None, True),
        ("discounted", 0.9, None, True),
        ("topk_renormalised", None, 16, True),
        ("discounted", 0.0, None, False),
        ("topk_renormalised", None, 4, False),
    ]


@pytest.mark.parametrize("order", [list, reversed])
def test_references_are_unbiased_and_sum_over_the_vocabulary(order, monkeypatch):
    monkeypatch.setattr(study_conditions, "REGISTRY", dict(order(list(REGISTRY.items()))))
    found = study_conditions.references_of(list(REGISTRY.values()))
    assert set(found) == {e.target for e in REGISTRY.values()}
    assert found["token_reverse_kl"].name == "token_full" and found["sequence_reverse_kl"].name == "local_to_go"
    for target, estimator in found.items():
        assert estimator.unbiased and estimator.target == target and not estimator.looks_across


@pytest.mark.slow
def test_sweeps_pair_conditions_and_tell_laws_apart():
    """gamma 0 and 1 are token and to_go; groups and laws are conditions of their own, without the variants."""
    names = ("to_go", "discounted", "token")
    rows = study(
        names=names, lengths=(4,), gammas=(0.0, 1.0), group_sizes=(1, 2), temperatures=(1.0, 0.5), prompts=prompts(64),
        plan=dataclasses.replace(PLAN, position_parts=1),
    )  # fmt: skip
    find = lambda **keys: [row for row in rows if all(row[name] == value for name, value in keys.items())]
    assert len(rows) == 5 + 2 * 3
    (zero,), (one,) = (find(name="discounted", gamma=gamma, T=4, group_size=1) for gamma in (0.0, 1.0))
    token, to_go = (find(name=name, T=4, group_size=1, temperature=1.0)[0] for name in ("token", "to_go"))
    assert zero["variance"] == pytest.approx(token["variance"], rel=1e-4)
    assert one["variance"] == pytest.approx(to_go["variance"], rel=1e-4)
    assert find(name="token", temperature=0.5)[0]["variance"] != token["variance"]
    assert find(name="token", group_size=2)[0]["prompts"] == 32 and token["prompts"] == 64


def test_growth_and_neighbours():
    """Of vectors that grow as T, and of noise half as large beside them; a condition that differs in more than T is no point."""
    rng = np.random.default_rng(0)
    shadows = [Shadow(REGISTRY[name]) for name in ("to_go", "token")]
    counts = gradient_stats.resample(40, 300, 0)
    found = []
    for setting in (Condition(3), Condition(12), Condition(6), Condition(24, temperature=0.5)):
        noise = rng.normal(size=(40, 1, 5))
        vectors = np.concatenate([setting.T * noise, 0.5 * setting.T * noise], axis=1)
        units = study_enumerated.units_of_vectors(vectors, np.zeros((0, 5)), 1)
        found.append((setting, shadows, gradient_stats.Laboratory(units, counts)))
    (pair,) = study_tables.neighbours(found[0][2], shadows, found[0][0])
    assert (pair["name"], pair["other"], pair["T"], pair["gamma"]) == ("to_go", "token", 3, None)
    assert (pair["ratio"], pair["ratio_low"], pair["ratio_high"]) == pytest.approx((4, 4, 4))
    growth = study_tables.growth_of(found)
    logs = [np.log(found[i][2].variances()[1]) for i in (0, 2, 1)]
    assert [row["values"] for row in growth] == [[3, 6, 12]] * 2
    assert growth[1]["exponent"] == pytest.approx(np.polyfit(np.log([3, 6, 12]), logs, 1)[0])
    assert growth[1]["exponent_low"] < 2 < growth[1]["exponent_high"]
    assert study_tables.growth_of(found[:1]) == []


def test_cost_is_counted_before_it_is_spent():
    params, config = tiny_model(0)
    shadows = [Shadow(REGISTRY[name]) for name in ("to_go", "token")]
    settings = [Condition(4), Condition(8, group_size=2)]
    references = study_conditions.references_of([one.estimator for one in shadows])
    counts = study_cost.Cost(params, shadows, settings, references, 32, PLAN).counts
    assert counts["conditions"] == 2 and counts["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    assert counts["rollouts"] == (32 + 64) + (32 + 32) and counts["tokens"] == 4 * 96 + 8 * 64
    assert counts["forward_passes"] == 2 * counts["rollouts"]
    assert counts["backward_passes"] == 2 * 32 * 4 * 2 + (64 + 32) * 2  # two parts of four estimators, then two references
    assert counts["memory_bytes"] > 4 * counts["parameters"] * PLAN.microbatch


def test_nothing_to_measure_is_null():
    """Equal models have no gradient under an exact estimator."""
    with jax.enable_x64(True):
        model = enumeration.make("shared", **MODELS["shared"])
        model = dataclasses.replace(model, teacher_logits_NTV=model.logits(model.theta_FV))
    (row,) = gradient_study.enumerated(model, ["token_full"], rollouts=32, resamples=100)
    assert row["variance"] == pytest.approx(0, abs=1e-20) and row["cosine"] is None
    assert row["bias"] is None or row["bias"] < 1e-12  # the target's own rounding
    json.dumps(row, allow_nan=False)


def test_figures_take_rows_that_differ_in_their_field_alone():
    row = lambda name, **changes: {"name": name, **Condition(4).keys(None)} | changes
    rows = [row("token"), row("discounted", gamma=0.9), row("discounted", gamma=0.0), row("token", T=2), row("discounted", T=2, gamma=0.9)]
    rows += [row("token", temperature=0.5), row("discounted", temperature=0.5, gamma=0.9)]
    assert plots_study.base_rows(rows) == rows[:2]
    assert plots_study.sweep(rows, "T") == {"token": [rows[3], rows[0]], "discounted": [rows[4], rows[1]]}
    assert plots_study.sweep(rows, "gamma") == {"discounted": [rows[2], rows[1]]}
    assert plots_study.sweep(rows, "top_p") == {} and list(plots_study.sweep(rows[5:], "T")) == []


def told(name, group_size=1, T=4, gamma=None, unresolved=(), **values):
    """A row as the laboratory gives it, its numbers 2 [1, 3] unless they are in `values`."""
    row = {"name": name, **Condition(T, group_size).keys(None), "gamma": gamma, "target": "t", "reference": "exact"}
    row |= {"reference_sequence": "exact", "prompts": 64 // group_size}
    for number in NUMBERS:
        value, low, high = values.get(number, (2.0, 1.0, 3.0))
        row |= {number: None if number in unresolved else value, f"{number}_low": low, f"{number}_high": high}
    return row


def test_figures_say_what_their_axes_and_pale_bars_are():
    rows = [told("token", unresolved=["bias_sequence"]), told("discounted", gamma=0.9), told("to_go", unresolved=["bias_sequence"])]
    rows += [told("discounted", gamma=0.5), told("token", group_size=4), told("token", T=8)]
    figures = plots_study.figures(rows)
    assert {name.partition("_by_")[2] for name in figures if name.startswith("variance_by_")} == {"T", "gamma", "group_size"}
    assert {"bias_sequence", "cosine_sequence_by_T", "cosine_sequence_by_gamma", "snr_by_group_size"} <= set(figures)
    assert not {"bias_sequence_by_group_size", "cosine_sequence_by_group_size"} & set(figures)  # constant by construction
    for name, figure in figures.items():
        (axes,) = figure.axes
        quantity = name.partition("_by_")[0]
        title, label = plots_study.QUANTITIES[quantity]
        assert axes.get_title(loc="left") == title and label == (axes.get_ylabel() if "_by_" in name else axes.get_xlabel())
    assert figures["bias_sequence"].axes[0].get_title(loc="left") == "distance of E g from the sequence-level gradient"
    (legend,) = figures["bias_sequence"].legends  # two pale bars, one entry
    assert [text.get_text() for text in legend.get_texts()] == ["not resolved from 0: what is possible"]
    assert figures["variance"].legends == []
    style = lambda figure: [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figures[figure].axes[0].lines]
    assert style("variance_by_gamma") == [(plots.colour(1), "--", plots.marker(1))]  # its place in the study, not in the figure


def test_styles_of_24_curves_are_distinct_in_line_and_colour_and_neighbours_in_marker():
    assert len({(plots.colour(n), plots.line(n)) for n in range(24)}) == 24
    assert len({(plots.colour(n), plots.line(n), plots.marker(n)) for n in range(120)}) == 120
    assert all(plots.marker(n) != plots.marker(n + 8) != plots.marker(n + 1) for n in range(24))


def test_ticks_have_no_superscripts():
    written = [plots_study.plain(value) for value in (0.3, 1, 300, 3e6, 1e-7)]
    assert written == ["0.3", "1", "300", "3e6", "1e-7"]
    wide = told("token", variance=(1e5, 10.0, 1e7))
    figure = plots_study.intervals([wide], "variance")
    figure.draw_without_rendering()
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert "1e5" in labels and not [label for label in labels if "$" in label or label.startswith("3")]


def test_the_page_has_the_variance_in_a_batch_where_prompts_have_several_rollouts():
    rows = [told("token"), told("token", group_size=4, variance_batch=(0.123456, 0.1, 12345.6))]
    header, alone, grouped = study_report.table(rows)
    at = header.index("variance in a batch, per rollout")
    assert alone[at] == "" and grouped[at] == "0.123 [0.100, 1.23e4]"
    assert study_report.table(rows[:1])[0] == ["estimator", "variance", "SNR of a rollout", "bias", "bias, sequence level",
                                               "cosine, sequence level"]  # fmt: skip
    assert study_report.bootstraps(rows) == ["64 prompts where group_size = 1", "16 prompts where group_size = 4"]


def test_the_page_explains_the_names_that_are_on_it():
    result = study_tables.Result([told("token"), told("token", group_size=4)], [], [], {})
    names = dict(study_report.meanings(result, ["variance", "share_by_position"]))
    assert {"group_size", "SNR of a rollout", "variance in a batch, per rollout", "share of the variance by position"} <= set(names)
    assert not {"T", "step", "snr", "norm_error", "unbiased", "share of the variance by parameters"} & set(names)
    page = study_report.render(result, {}, {})
    section = page[page.index("What the names mean") :]
    assert "`" not in page and "other than <code>variance</code> where" in section and 'class="wrapped"' in section
    assert all(f">{name}<" in section for name in set(names) - {"share of the variance by position"})
    assert "64 prompts where group_size = 1, 16 prompts where group_size = 4." in page and "null" not in section


def test_the_table_for_a_terminal_says_which_condition_it_is():
    rows = [told("token", unresolved=["bias"]), told("discounted", gamma=0.9), told("discounted", gamma=0.0), told("token", T=8)]
    assert study_report.text_table(rows).splitlines() == [
        "base condition: T = 4, group_size = 1, temperature = 1.0, top_p = 1.0; 95% bootstrap over 64 prompts",
        "estimator                 variance           SNR of a rollout   bias                       bias, sequence level",
        "token                     2.00 [1.00, 3.00]  2.00 [1.00, 3.00]  not resolved [1.00, 3.00]  2.00 [1.00, 3.00]",
        "discounted (gamma = 0.9)  2.00 [1.00, 3.00]  2.00 [1.00, 3.00]  2.00 [1.00, 3.00]          2.00 [1.00, 3.00]",
    ]


# ---- the script


@pytest.mark.slow
def test_script_from_end_to_end(tmp_path):
    flags = ["--config=configs/gradient_study.py:tiny", f"--workdir={tmp_path / 'out'}", f"--config.cache_dir={tmp_path / 'cache'}"]
    out = script("gradient_study.py", *flags, "--config.study.lengths=3")
    assert "making configs/quickstart.py:teacher,tiny" in out and "backward passes" in out and "page: " in out
    rows = json.loads((tmp_path / "out" / "gradient_study.json").read_text())
    assert [(row["name"], row["T"]) for row in rows] == [(n, t) for t in (5, 3) for n in ("sequence", "to_go", "token", "token_full")]
    lines = (tmp_path / "out" / "gradient_study.csv").read_text().splitlines()
    assert lines[0].startswith("name,T,gamma,k,group_size,temperature,top_p,step,target,reference,quantity,value,low,high")
    about = json.loads((tmp_path / "out" / "gradient_study_about.json").read_text())
    assert about["keys"] == study_report.KEYS and about["config"]["study.lengths"] == "3" and about["cost"]["conditions"] == 2
    assert len(json.loads((tmp_path / "out" / "gradient_study_pairs.json").read_text())) == 6
    assert len(json.loads((tmp_path / "out" / "gradient_study_growth.json").read_text())) == 4
    page = (tmp_path / "out" / "gradient_study.html").read_text()
    assert (
        page.count("<svg") >= 5 and "currentColor" in page and "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    )
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"variance.png", "variance.svg", "variance_by_T.png", "share_by_position.svg"} <= figures
    assert not [path for path in (tmp_path / "out").rglob("*.tmp")]


def default(**changes):
    c = load(ROOT / "configs" / "gradient_study.py").get_config()
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return c


def run_job(c, workdir):
    return study_job.run(
        config_lib.parse(c), workdir, make_model=lambda *_: pytest.fail("work before refusal"), progress=Progress(quiet=True)
    )


@pytest.mark.slow
def test_the_default_is_one_condition_with_exact_references(tmp_path):
    c = default(study__rollouts=256, study__resamples=100)
    result = run_job(c, tmp_path / "out")
    names = [row["name"] for row in result.rows]
    assert len(set(names)) == len(names) and {"token", "to_go", "sequence"} <= set(names)
    assert {row["reference"] for row in result.rows} == {"exact"}
    study_report.write(result, tmp_path / "out", config=config_lib.parse(c))
    first = (tmp_path / "out" / "gradient_study.json").read_bytes()
    study_report.write(run_job(c, tmp_path / "out"), tmp_path / "out", config=config_lib.parse(c))
    assert (tmp_path / "out" / "gradient_study.json").read_bytes() == first
    other = run_job(default(study__rollouts=256, study__resamples=100, seed=1), tmp_path / "other")
    assert other.rows[0]["variance"] != result.rows[0]["variance"]


RECIPE = {"student__recipe": "configs/quickstart.py:student,tiny", "teacher__recipe": "configs/quickstart.py:teacher,tiny"}
WRONG = {
    "a name": ({"study__estimators": "tokn"}, ["config field study.estimators: 'tokn'", "did you mean token?"]),
    "a name twice": ({"study__estimators": "token,token"}, ["study.estimators", "different names"]),
    "no name": ({"study__estimators": ","}, ["study.estimators", "different names"]),
    "no teacher": ({"student__path": "x"}, ["teacher.path = ''", "must name a model"]),
    "too few": ({"study__rollouts": 4} | RECIPE, ["study.rollouts = 4", "must be a multiple of rollout.batch_size = 64"]),
    "too few prompts": (
        {"study__rollouts": 64, "rollout__group_size": 16, "study__microbatch": 16, "task__name": "unconditional"} | RECIPE,
        ["study.rollouts = 64", "are 4 prompts", "from 8"],
    ),
    "more than there are": ({"study__rollouts": 64, "task__train_size": 48} | RECIPE, ["study.rollouts = 64", "to 48, which there are"]),
    "a microbatch": ({"study__microbatch": 7} | RECIPE, ["rollout.batch_size = 64", "multiple of study.microbatch = 7"]),
    "lengths": ({"study__lengths": "2,x"}, ["study.lengths = '2,x'", "with commas"]),
    "a nucleus": ({"study__top_ps": "0"}, ["study.top_ps = '0'"]),
    "gammas of nothing": ({"study__estimators": "token", "study__gammas": "0.5"}, ["study.gammas", "has a discount"]),
    "greedy": ({"rollout__temperature": 0.0} | RECIPE, ["temperature"]),
    "another source": ({"rollout__source": "dataset"}, ["rollout.source", "'student'"]),
    "an adapter": ({"student__lora__rank": 4} | RECIPE, ["student.lora.rank = 4"]),
    "no run": ({"study__steps": "1", "student__path": "x", "teacher__path": "y"}, ["study.steps", "run directory"]),
    "prompts for no models": ({"task__name": "unconditional"}, ["student.path = '' and teacher.path = ''", "'unconditional'"]),
    "a long enumeration": ({"rollout__max_new_tokens": 30}, ["T = 30", "lengths up to 7"]),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_inputs_are_refused_before_any_work(wrong, tmp_path):
    changes, words = WRONG[wrong]
    with pytest.raises(ConfigError) as error:
        run_job(default(**changes), tmp_path / "out")
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    for workdir in (tmp_path / "file", ""):
        with pytest.raises(UserError, match="--workdir"):
            run_job(default(), workdir)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_with_other_settings_is_refused_by_their_names(tmp_path):
    """Before any work; what no number depends on may differ, and a study with the same settings is made again."""
    c = default(study__rollouts=64, study__resamples=100, study__estimators="token,token_full")
    result = run_job(c, tmp_path)
    study_report.write(result, tmp_path, config=config_lib.parse(c))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    c.log.samples, c.cache_dir = 3, "elsewhere"
    assert run_job(c, tmp_path).rows == result.rows
    c.study.rollouts, c.seed = 128, 1
    with pytest.raises(UserError, match=r"other settings \(seed: 0 -> 1; study.rollouts: 64 -> 128\); give another --workdir, or the old"):
        run_job(c, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    for previous in (3, {}):  # damaged; written from a notebook
        (tmp_path / study_report.ABOUT).write_text(json.dumps({"config": previous}))
        with pytest.raises(UserError, match="does not hold the config of a study"):
            run_job(c, tmp_path)


def few(rows):
    return Prompts(*(np.asarray(x)[:rows] for x in (prompts().tokens_BS, prompts().mask_BS, prompts().id_B)))


WRONG_ARGUMENTS = {
    "texts without a tokenizer": ({"prompts": ["a", "b"]}, ["give encoded Prompts"]),
    "no text": ({"prompts": []}, ["prompts = [] must be a list of texts"]),
    "one text": ({"prompts": "abc"}, ["prompts = 'abc' must be a list of texts"]),
    "few prompts": ({"prompts": few(4)}, ["len(prompts) = 4 must be a multiple of plan.batch_size = 16"]),
    "few groups": ({"prompts": few(8), "group_sizes": (8, 2)}, ["len(prompts) * min(group_sizes) = 16 with 8 per prompt are 2 prompts"]),
    "a group": ({"group_sizes": (3,)}, ["plan.microbatch = 8 must be a multiple of the group size = 3"]),
    "one length": ({"lengths": 4}, ["lengths = 4 must be a list", "write lengths=(4,)"]),
    "no length": ({"lengths": ()}, ["lengths = () must be a list of tokens, at least 1; the first is the base condition"]),
    "half a token": ({"lengths": (2.5,)}, ["lengths = (2.5,)"]),
    "a nucleus": ({"top_ps": (1.0, 0.0)}, ["top_ps = (1.0, 0.0)", "above 0 and at most 1"]),
    "one name": ({"names": "token"}, ["estimators = 'token' must be a list of names"]),
    "an unknown name": ({"names": ("token", "tokenfull")}, ["estimators: 'tokenfull' is not known; did you mean token_full?"]),
    "gammas of nothing": ({"names": ("token",), "gammas": (0.5,)}, ["gammas = '0.5', but none of estimators has a discount"]),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_arguments_that_do_not_fit_are_refused_by_their_own_names(wrong):
    changes, words = WRONG_ARGUMENTS[wrong]
    with pytest.raises(UserError) as error:
        study(**changes)
    assert all(word in str(error.value) for word in words) and "config field" not in str(error.value), error.value


def test_a_prompt_beyond_the_context_is_refused_beside_the_longest_completion():
    params, config = tiny_model(0)
    student = LoadedModel(params, config, tokenizer.byte())
    text = "x" * config.max_position_embeddings
    with pytest.raises(UserError, match=r"beside 9 of a completion .* reads at most \d+; leave it out, or lower lengths"):
        gradient_study.study(student, student, ["ab", text], lengths=(4, 9))


@pytest.mark.slow
def test_checkpoints_of_a_run_are_conditions(tmp_path):
    """Each step's own weights: those of two steps differ, the newest is the student as given."""
    c = load(ROOT / "configs" / "quickstart.py").get_config("teacher,tiny")
    c.checkpoint.every, c.checkpoint.keep = 4, 4
    list(train.run(c, tmp_path / "run"))
    d = load(ROOT / "configs" / "gradient_study.py").get_config("tiny")
    d.student.path = d.teacher.path = str(tmp_path / "run")
    d.study.estimators, d.study.steps, d.study.position_parts = "token", "0,8", 1
    rows = run_job(d, tmp_path / "out").rows
    assert [row["step"] for row in rows] == [None, 0, 8]
    assert rows[0]["variance"] == rows[2]["variance"] < 1e-6 < rows[1]["variance"]
    d.study.steps = "5"
    with pytest.raises(ConfigError, match=r"no checkpoint 5; valid: 0, 4, 8"):
        run_job(d, tmp_path / "out")
