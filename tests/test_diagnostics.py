"""Diagnostics against NumPy in float64 and exact enumeration; who looks on changes no number of an update."""

import dataclasses
import functools
import itertools
import logging
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import context_of, ragged_prompts, ragged_rollout, tiny_model

from opd_jax import config as config_lib
from opd_jax import diagnostics, glossary, learner, metrics, model_io, objective, observed, parallel, teachers, train
from opd_jax.analysis import report, runs
from opd_jax.data import tokenizer
from opd_jax.models import hf, spec, transformer
from opd_jax.numerics import diagnostics as numerics
from opd_jax.numerics.estimators import Context
from opd_jax.numerics.token_stats import DenseHead, Signal, Target, token_stats
from opd_jax.types import Rollout, view

# ---- arithmetic on [B, T]


def ragged(rng, rows=6, length=10):
    """(values with garbage where the mask is False, mask with a row without tokens and a gap)."""
    mask = np.arange(length)[None, :] < rng.integers(1, length + 1, rows)[:, None]
    mask[0], mask[1] = False, True
    mask[1, 1] = False
    values = rng.normal(size=(rows, length)) * 6
    values[~mask] = rng.choice([np.nan, np.inf, -np.inf, 1e30], (~mask).sum())
    return values.astype(np.float32), mask


@pytest.mark.parametrize("length", [10, 3])
def test_log_ratios_are_those_of_the_tokens_alone(length):
    values, mask = ragged(np.random.default_rng(length), length=length)
    found = {name: float(value) for name, value in jax.jit(numerics.log_ratios)(values, mask).items()}
    kept = values[mask].astype(np.float64)
    expected = {"diag/negative_log_ratios": np.mean(kept < 0), "diag/outlier_tokens": np.sum(np.abs(kept) > 10)}
    parts = {"": (0, length)} | {f"_quarter_{n}": (math.floor((n - 1) * length / 4), math.floor(n * length / 4)) for n in (1, 2, 3, 4)}
    for part, (start, end) in parts.items():
        if end > start:
            inside = values[:, start:end][mask[:, start:end]].astype(np.float64)
            expected |= {f"diag/log_ratio_p{level:02d}{part}": np.quantile(inside, level / 100) for level in (5, 50, 95)}
    assert 0 < expected["diag/negative_log_ratios"] < 1 and expected["diag/outlier_tokens"] >= 1
    assert ("diag/log_ratio_p50_quarter_1" in found) == (length == 10)
    assert found == pytest.approx(expected, rel=1e-5)


def test_effective_samples_are_those_of_the_tokens_alone():
    values, mask = ragged(np.random.default_rng(1))
    found = numerics.effective_samples(jnp.asarray(values), jnp.asarray(mask))
    ess = lambda w: w.sum() ** 2 / (len(w) * (w**2).sum())
    rows = np.array([np.exp(v[m].astype(np.float64).sum()) for v, m in zip(values, mask, strict=True) if m.any()])
    assert float(found["diag/ess_token"]) == pytest.approx(ess(np.exp(values[mask].astype(np.float64))), rel=1e-5)
    assert float(found["diag/ess_sequence"]) == pytest.approx(ess(rows), rel=1e-4)
    equal = numerics.effective_samples(jnp.full((3, 4), -200.0), jnp.ones((3, 4)))  # exp(-800) is 0 in float32
    assert [float(value) for value in equal.values()] == [1.0, 1.0]
    one = numerics.effective_samples(jnp.array([[300.0, 0.0], [0.0, 0.0]]), jnp.ones((2, 2), bool))
    assert [float(value) for value in one.values()] == [0.25, 0.5]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def by_hand(logits, teacher, tokens, mask, k):
    """Every quantity that compares with a teacher, in float64, token by token."""
    rows = {name: [] for name in ("l", "H", "overlap", "p", "q", "gap", "h", "g")}
    for b, t in zip(*np.nonzero(mask), strict=True):
        logp, logq = log_softmax(logits[b, t]), log_softmax(teacher[b, t])
        p, q, best = np.exp(logp), np.exp(logq), np.argsort(-logq)[:k]
        own, theirs = p[best] / p[best].sum(), q[best] / q[best].sum()
        full, short = np.sum(p * (logp - logq)), np.sum(own * np.log(own / theirs))
        h = np.zeros_like(p)
        h[best] = own * (np.log(own / theirs) - short)
        for name, value in (
            ("l", logq[tokens[b, t]] - logp[tokens[b, t]]),
            ("H", -np.sum(q * logq)),
            ("overlap", len(set(best) & set(np.argsort(-logp)[:k])) / k),
            ("p", p[best].sum()),
            ("q", q[best].sum()),
            ("gap", short - full),
            ("h", h),
            ("g", p * (logp - logq - full)),
        ):
            rows[name].append(value)
    rows = {name: np.array(values) for name, values in rows.items()}
    h, g = rows["h"].ravel(), rows["g"].ravel()
    return {
        "diag/teacher_entropy": rows["H"].mean(),
        "diag/topk_overlap": rows["overlap"].mean(),
        "diag/topk_student_mass": rows["p"].mean(),
        "diag/topk_teacher_mass": rows["q"].mean(),
        "diag/topk_kl_gap": rows["gap"].mean(),
        "diag/topk_gradient_cosine": h @ g / np.linalg.norm(h) / np.linalg.norm(g),
        "diag/topk_gradient_error": np.linalg.norm(h - g) / np.linalg.norm(g),
        "diag/log_ratio_p50": np.median(rows["l"]),
        "diag/negative_log_ratios": np.mean(rows["l"] < 0),
    }


def make_objective(*, k=0, diagnose=True):
    signal = {"support": "topk_student", "k": k, "tail": "bucket"} if k else {}
    config = config_lib.Config(
        rollout=config_lib.Rollout(max_new_tokens=7),
        signal=config_lib.Signal(**signal),
        log=config_lib.Log(diagnostics=diagnose),
    )
    return objective.from_config(config, has_teacher=True)


@pytest.mark.parametrize("k", [0, 3])
def test_the_comparison_with_the_teacher_is_that_of_dense_laws(k):
    """k is the signal's, whose support may be another; otherwise 16."""
    rng = np.random.default_rng(2)
    logits, teacher = rng.normal(size=(2, 3, 5, 24)) * 2
    tokens, mask = rng.integers(0, 24, (3, 5)), np.arange(5)[None, :] < np.array([[5], [2], [3]])
    garbage = np.where(mask[..., None], logits, 50 * rng.normal(size=logits.shape))
    goal = make_objective(k=k)
    stats = observed.look(goal, DenseHead(jnp.asarray(garbage, jnp.float32)), Target((DenseHead(jnp.asarray(teacher)),)), tokens)
    found = observed.diagnose(stats, None, jnp.ones(()), Context(jnp.asarray(mask)))
    for name, value in by_hand(logits, teacher, tokens, mask, k or 16).items():
        assert float(found[name]) == pytest.approx(value, rel=2e-4), name
    assert found["log_ratio_BT"].shape == (3, 5)
    assert not any(name.startswith(("diag/ess", "diag/gradient", "diag/noise")) for name in found)  # no sampling law, one microbatch


def test_a_support_of_the_whole_vocabulary_has_no_bias():
    rng = np.random.default_rng(3)
    heads = [DenseHead(jnp.asarray(x, jnp.float32)) for x in rng.normal(size=(2, 2, 3, 7))]
    stats = observed.look(make_objective(), heads[0], Target((heads[1],)), jnp.zeros((2, 3), int))
    found = numerics.against_teacher(stats, jnp.ones((2, 3)))
    assert float(found["diag/topk_gradient_cosine"]) == pytest.approx(1, abs=1e-6)
    assert float(found["diag/topk_gradient_error"]) == float(found["diag/topk_kl_gap"]) == 0
    same = numerics.against_teacher(
        observed.look(make_objective(), heads[0], Target((heads[0],)), jnp.zeros((2, 3), int)), jnp.ones((2, 3))
    )
    assert math.isnan(same["diag/topk_gradient_cosine"]) and float(same["diag/topk_kl_gap"]) == 0  # no gradient has no direction


def test_gradient_products_are_of_the_gradients_by_the_logits(float64):
    """Against autodiff through the statistic itself, whose gradient test_token_stats.py checks."""
    rng = np.random.default_rng(4)
    logits, teacher = (jnp.asarray(x) for x in rng.normal(size=(2, 2, 3, 9)))
    tokens = jnp.zeros((2, 3), int)
    local = lambda z, signal: jnp.sum(
        token_stats(DenseHead(z), Target((DenseHead(teacher),)), tokens, signal=signal, needs=("local",)).local_BT
    )
    names = ("gradient_square", "full_gradient_square", "gradient_dot")
    for kind in ("reverse_kl", "forward_kl"):
        signal = Signal(kind, "topk_teacher", k=4)
        h, g = jax.grad(local)(logits, signal), jax.grad(local)(logits, Signal(kind))
        stats = token_stats(DenseHead(logits), Target((DenseHead(teacher),)), tokens, signal=signal, needs=names)
        for name, value in zip(names, (h * h, g * g, h * g), strict=True):
            np.testing.assert_allclose(getattr(stats, f"{name}_BT"), value.sum(-1), rtol=1e-9)


# ---- gradient noise


def noise_of(rollouts_BD, microbatches):
    """gradient_noise of rows dealt out in turn, as learner.py deals them."""
    shares_MD = jnp.stack([rollouts_BD[m::microbatches].sum(0) for m in range(microbatches)]) / len(rollouts_BD)
    found = numerics.gradient_noise(jnp.sum(shares_MD**2, -1), jnp.sum(shares_MD.sum(0) ** 2), len(rollouts_BD))
    return float(found["diag/gradient_signal"]), float(found["diag/gradient_noise"])


@pytest.mark.parametrize("rollouts,microbatches", [(2, 2), (4, 2), (4, 4), (6, 3)])
def test_signal_and_noise_are_unbiased_over_all_batches(float64, rollouts, microbatches):
    """All batches of independent rollouts whose gradients are one of three vectors, with their probabilities."""
    vectors, p = np.array([[1.0, 2.0], [-3.0, 0.5], [0.0, -1.0]]), np.array([0.5, 0.2, 0.3])
    mean = p @ vectors
    trace = p @ np.square(vectors - mean).sum(1)
    expected = np.zeros(2)
    for batch in itertools.product(range(3), repeat=rollouts):
        expected += p[list(batch)].prod() * np.array(noise_of(vectors[list(batch)], microbatches))
    np.testing.assert_allclose(expected, [mean @ mean, trace], rtol=1e-12)


def test_rollouts_of_one_prompt_hide_the_noise_of_the_prompts(float64):
    """What the glossary says of rollout.group_size: where microbatches divides it, the noise is that of the completions alone."""
    prompts, noise = np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([[0.5, 1.0], [-0.5, -1.0]])
    results = []
    for chosen in itertools.product(range(2), repeat=2):
        for drawn in itertools.product(range(2), repeat=4):
            results.append(noise_of(prompts[list(np.repeat(chosen, 2))] + noise[list(drawn)], 2))
    signal, found = np.mean(results, axis=0)
    mean, between = prompts.mean(0), np.square(prompts - prompts.mean(0)).sum(1).mean()
    assert found == pytest.approx(np.square(noise).sum(1).mean())
    assert signal == pytest.approx(mean @ mean + between / 2)  # two prompts


def test_signal_to_noise_and_the_noise_scale():
    rng = np.random.default_rng(5)
    shares = rng.normal(size=(4, 50)) + 3
    small, big = np.square(4 * shares).sum(1).mean(), np.square(shares.sum(0)).sum()
    # McCandlish et al. 2018, equations A.2 and A.3, with batches of 2 and 8.
    signal, noise = (8 * big - 2 * small) / (8 - 2), (small - big) / (1 / 2 - 1 / 8)
    found = numerics.gradient_noise(jnp.asarray(np.square(shares).sum(1)), jnp.asarray(big), 8)
    expected = {"signal": signal, "noise": noise, "snr": signal / noise}
    assert {name: float(found[f"diag/gradient_{name}"]) for name in expected} == pytest.approx(expected, rel=1e-4)
    assert float(found["diag/noise_scale"]) == pytest.approx(noise / signal, rel=1e-4)
    opposed = numerics.gradient_noise(jnp.ones(2), jnp.zeros(()), 8)
    assert float(opposed["diag/gradient_snr"]) < 0 and math.isnan(opposed["diag/noise_scale"])


# ---- in the update


@functools.cache
def compiled(microbatches, mesh_shape, diagnose):
    """(function that makes a state, the update, teacher's parameters, batch): one program for all tests that ask for it."""
    rng, goal, mesh = np.random.default_rng(0), make_objective(diagnose=diagnose), parallel.make_mesh(*mesh_shape)
    (params, config), (teacher_params, teacher_config) = (tiny_model(seed, vocab_size=41, num_hidden_layers=1) for seed in (0, 1))
    place = lambda tree, c: jax.device_put(jax.device_get(tree), spec.shardings(transformer.param_specs(c), mesh))
    optimizer = learner.make_optimizer(config_lib.Learner(learning_rate=1e-2), steps=10)
    fresh = lambda: learner.init_state(place(params, config), optimizer)
    update = learner.make_update(goal, config, teachers.single(teacher_config), optimizer, microbatches=microbatches, state=fresh())
    prompts, rollout = ragged_prompts(rng, vocab_size=41), ragged_rollout(rng, vocab_size=41)
    # A sampling law that is not the policy: otherwise every effective sample size would be 1.
    behaviour_BT = jnp.asarray(rng.normal(size=rollout.tokens_BT.shape) - 3, jnp.float32)
    context = dataclasses.replace(context_of(rollout), behaviour_logp_BT=behaviour_BT)
    batch = learner.place(mesh, learner.make_batch(goal, view(prompts, rollout), view(prompts, rollout), context))
    return mesh, fresh, update, {"teacher": place(teacher_params, teacher_config)}, batch


@functools.cache
def updates(microbatches=1, mesh_shape=(1, 1, 1), diagnose=True):
    """(metrics of each of two updates, the state after them)."""
    mesh, fresh, update, teacher_params, batch = compiled(microbatches, mesh_shape, diagnose)
    with jax.set_mesh(mesh):
        state, first = update(fresh(), teacher_params, batch)
        state, second = update(state, teacher_params, batch)
    return jax.device_get((first, second, state))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(1,), (4,), (2, (2, 2, 2))], ids=str)
def test_looking_on_changes_no_bit_of_an_update(settings):
    bare, watched = updates(*settings, diagnose=False), [dict(one) for one in updates(*settings)[:2]] + [updates(*settings)[2]]
    assert [len(one.pop("diagnostics")) > 20 for one in watched[:2]] == [True, True] and "diagnostics" not in bare[0]
    for a, b in zip(jax.tree.leaves(bare), jax.tree.leaves(tuple(watched)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_any_split_and_any_mesh_measure_the_same():
    """All but the noise of the gradient, which is that of the split."""
    whole = updates()[0]["diagnostics"]
    assert len(whole) > 20 and not any("noise" in name for name in whole)
    for settings in ((4,), (2, (2, 2, 2))):
        other = updates(*settings)[0]["diagnostics"]
        assert "diag/gradient_noise" in other
        for name, value in whole.items():
            np.testing.assert_allclose(value, other[name], rtol=2e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_noise_is_that_of_the_shares_of_microbatches():
    """Each share by a gradient of its own, with the weights and the denominator of the whole batch."""
    _, fresh, _, teacher_params, batch = compiled(4, (1, 1, 1), True)
    configs = [tiny_model(seed, vocab_size=41, num_hidden_layers=1)[1] for seed in (0, 1)]
    gradient = jax.jit(functools.partial(learner.gradient, make_objective(diagnose=False), configs[0], teachers.single(configs[1])))
    shares, params = [], fresh().params
    for m in range(4):
        share = jax.tree.map(lambda x, m=m: x[m::4] if x.ndim else x, batch)
        shares.append(np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(gradient(params, teacher_params, share)[2])]))
    small, big = 16 * np.mean([share @ share for share in shares]), np.sum(shares, axis=0) @ np.sum(shares, axis=0)
    found = updates(4)[0]["diagnostics"]
    assert float(found["diag/gradient_signal"]) == pytest.approx((8 * big - 2 * small) / 6, rel=1e-3)
    assert float(found["diag/gradient_noise"]) == pytest.approx((small - big) / (1 / 2 - 1 / 8), rel=1e-3)


@pytest.mark.slow
def test_an_update_without_tokens_goes_on():
    mesh, fresh, update, teacher_params, batch = compiled(4, (1, 1, 1), True)
    context = batch.shares[0].context
    empty = dataclasses.replace(context, mask_BT=jnp.zeros_like(context.mask_BT))
    batch = learner.place(mesh, learner.make_batch(make_objective(), batch.student, batch.teacher, empty))
    with jax.set_mesh(mesh):
        state, measured = update(fresh(), teacher_params, batch)
    assert bool(state.finite) and int(state.step) == 1 and math.isnan(measured["diagnostics"]["diag/topk_overlap"])
    looks = diagnostics.Diagnostics(tokenizer.byte())
    record = looks.record(measured["diagnostics"], completions(batch.student.completion_BT, empty.mask_BT), own_draws=True)
    assert set(record.values()) == {0.0}
    assert set(record) == {"diag/outlier_tokens", "diag/terminal_loops", "diag/gradient_signal", "diag/gradient_noise"}


# ---- on the host


def test_repeated_ngrams_are_counted_once_each():
    assert diagnostics.repeated_ngrams([1, 2, 3]) is None
    assert diagnostics.repeated_ngrams([1, 2, 3, 4, 5]) == 0
    assert diagnostics.repeated_ngrams([7] * 8) == pytest.approx(4 / 5)
    ids = np.random.default_rng(6).integers(0, 2, 60).tolist()
    grams = [tuple(ids[i : i + 4]) for i in range(57)]
    assert diagnostics.repeated_ngrams(ids) == pytest.approx(sum(gram in grams[:i] for i, gram in enumerate(grams)) / 57)


def loops(ids):
    """The definition, block by block."""
    for period in range(1, 65):
        repeats = max(3, math.ceil(12 / period))
        block = ids[len(ids) - period :]
        size = max(3 * period, 12)
        if len(ids) >= size and (block * repeats)[-size:] == ids[len(ids) - size :]:
            return True
    return False


def test_terminal_loops_follow_their_definition():
    rng = np.random.default_rng(7)
    looped = 0
    for _ in range(300):
        period, repeats = int(rng.integers(1, 70)), int(rng.integers(1, 6))
        ids = (
            rng.integers(0, 3, 20).tolist()
            + rng.integers(0, 3, period).tolist() * repeats
            + rng.integers(0, 3, rng.integers(0, 2)).tolist()
        )
        assert diagnostics.ends_in_loop(ids) == loops(ids), ids
        looped += loops(ids)
    assert 50 < looped < 250
    edge = [1, 2, 3, 4]
    assert diagnostics.ends_in_loop(edge * 3) and not diagnostics.ends_in_loop(edge[1:] + edge * 2)
    assert diagnostics.ends_in_loop([9] * 12) and not diagnostics.ends_in_loop([9] * 11)
    block = list(range(64))
    assert diagnostics.ends_in_loop(block * 3) and not diagnostics.ends_in_loop([*block, 64] * 3)
    assert not diagnostics.ends_in_loop([])


def test_repetition_leaves_out_the_stop_token_and_what_follows():
    tokens = np.array([[5] * 12 + [2, 5], [1, 2, 3, 4, 1, 2, 3, 4] + [7] * 6, [9] * 14])
    mask = np.array([[True] * 13 + [False], [True] * 8 + [False] * 6, [False] * 14])
    found = diagnostics.repetition(tokens, mask, stop_ids=(2,))
    assert found == pytest.approx({"diag/terminal_loops": 1 / 3, "diag/repeated_ngrams": np.mean([8 / 9, 1 / 5])})
    assert diagnostics.repetition(tokens[2:], mask[2:], (2,)) == {"diag/terminal_loops": 0.0}


def completions(tokens, mask):
    return Rollout(np.array(tokens), np.array(mask, bool), None, None, None, None)


def test_the_lowest_special_token_is_named_and_warned_of_once(caplog):
    text = tokenizer.byte()
    stop = text.eos_ids[0]
    rollout = completions([[65, stop, stop], [66, 67, 68]], [[1, 1, 0], [1, 1, 1]])
    looks = diagnostics.Diagnostics(text)
    ratios = np.array([[-90.0, -20.5, -99.0], [-1.0, 3.0, -30.0]])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            record = looks.record(
                {"log_ratio_BT": ratios, "diag/ess_token": np.float32(0.5), "diag/x": np.float32(np.nan)}, rollout, own_draws=True
            )
    assert record == {
        "diag/special_log_ratio_min": -20.5,
        "diag/special_token_min": stop,
        "diag/ess_token": 0.5,
        "diag/terminal_loops": 0.0,
    }
    (warning,) = [r.getMessage() for r in caplog.records]
    assert f"(id {stop}) a log-ratio of -20.5 nats" in warning and text.piece(stop) in warning
    ratios[0, 1] = -np.inf
    assert "diag/special_log_ratio_min" not in looks.record({"log_ratio_BT": ratios}, rollout, own_draws=True)
    plain = completions([[65, 66]], [[1, 1]])
    assert diagnostics.Diagnostics(text).record({"log_ratio_BT": ratios[:1, :2], "diag/ess_token": 0.5}, plain, own_draws=False) == {
        "diag/terminal_loops": 0.0
    }


# ---- in a run


@pytest.fixture(scope="module")
def both_runs(tmp_path_factory):
    """(run of three updates without diagnostics, the same run from its first update on with them)."""
    folder = tmp_path_factory.mktemp("runs")
    params, config = tiny_model(1, vocab_size=259, num_hidden_layers=1, eos_token_id=257)
    hf.save(folder / "teacher", params, config, tokenizer.byte())
    c = config_lib.default()
    c.teacher.path = str(folder / "teacher")
    c.task.level, c.rollout.batch_size, c.rollout.max_new_tokens, c.learner.microbatches = 3, 8, 8, 2
    c.student.init.hidden_size = c.student.init.intermediate_size = 16
    c.student.init.num_hidden_layers, c.student.init.initializer_range = 1, 0.3
    c.steps, c.eval.prompts, c.checkpoint.every, c.checkpoint.keep = 3, 0, 1, 9
    list(train.run(c, folder / "off"))
    shutil.copytree(folder / "off", folder / "on")
    for step in (2, 3):
        shutil.rmtree(folder / "on" / "checkpoints" / str(step))
    c.log.diagnostics = True
    list(train.run(c, folder / "on"))
    return folder / "off", folder / "on"


@pytest.mark.slow
def test_a_run_that_is_looked_at_is_the_same_run_bit_for_bit(both_runs):
    off, on = (metrics.read(folder / "metrics.jsonl") for folder in both_runs)
    known = lambda record: {name: value for name, value in record.items() if not glossary.depends_on_clock(name)}
    assert [known(record) for record in off] == [
        {name: value for name, value in known(record).items() if not name.startswith("diag/")} for record in on
    ]
    for a, b in zip(*(jax.tree.leaves(model_io.open_model(str(folder)).params) for folder in both_runs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [len([name for name in record if name.startswith("diag/")]) > 25 for record in on] == [False, True, True]
    for record in on:
        assert all(math.isfinite(value) for value in record.values()) and set(record) <= set(metrics.GLOSSARY)


@pytest.mark.slow
def test_the_report_has_a_section_where_there_are_diagnostics(both_runs):
    bare, watched = (report.render(runs.read_runs([folder])) for folder in both_runs)
    assert "<h2>Diagnostics</h2>" in watched and "<h2>Diagnostics</h2>" not in bare
    for name in ("diag/gradient_noise", "diag/log_ratio_p05_quarter_4", "diag/topk_gradient_cosine"):
        assert f'aria-label="{name}"' in watched and name not in bare
    assert "trace of the covariance of the gradient of one completion" in watched
    assert 'aria-label="diag/special_token_min"' not in watched  # an id is no curve
