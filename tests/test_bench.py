"""The benchmark: counts against XLA's, numbers by hand, processes that fail, kept ratios, a tiny run of all of it. No test of time."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from opd_jax.bench import baseline, curves, loss_memory, phases, processes, rounds, run, shapes, table, work
from opd_jax.bench.processes import Worker, WorkerFailed
from opd_jax.bench.rounds import Measured
from opd_jax.bench.work import Limits
from opd_jax.bench.worker import Order
from opd_jax.models import forward, spec, transformer
from opd_jax.numerics.heads import Head
from opd_jax.numerics.targets import Target
from opd_jax.numerics.token_stats import Signal, token_stats
from opd_jax.types import UserError, View

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = dataclasses.replace(shapes.make("prototype"), batch_size=4)  # one tile of logits: a loop's body would be counted once


# ---- FLOPs and bytes


def counted(function, *arguments) -> float:
    """FLOPs by XLA's count of the program before it is compiled."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_flops_are_those_that_xla_counts():
    """Counted here are matmuls alone, so that XLA has a few percent more; the gradient makes its logits a second time."""
    model, B, S, T = SMALL.student, SMALL.batch_size, SMALL.prompt, SMALL.new_tokens
    params = spec.abstract(transformer.param_specs(model), jnp.float32)
    ints, bools = (lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_))
    view = View(ints(B, S), bools(B, S), ints(B, T))
    read = lambda params, view: forward.hidden(params, model, view).hidden_BTD

    def loss(params, hidden_BTD, view):
        teacher = Target((Head(hidden_BTD, jax.lax.stop_gradient(params["unembed"])),))
        head = forward.hidden(params, model, view)
        stats = token_stats(head, teacher, view.completion_BT, signal=Signal("reverse_kl"), needs={"local"})
        return jnp.mean(stats.local_BT)

    prefill = lambda params, tokens, mask: forward.prefill(params, model, tokens, mask, cache_length=S + T)[0]
    cache = jax.eval_shape(
        lambda params, tokens, mask: forward.prefill(params, model, tokens, mask, cache_length=S + T)[1], params, ints(B, S), bools(B, S)
    )
    step = lambda params, token, cache: forward.decode_step(params, model, token, cache)[0]
    found = {
        "prefill": counted(prefill, params, ints(B, S), bools(B, S)),
        "decode": counted(step, params, ints(B), cache) * (T - 1),
        "teacher": counted(read, params, view),
        "gradient": counted(jax.grad(loss), params, jax.ShapeDtypeStruct((B, T, model.hidden_size), jnp.float32), view),
    }
    most = {"prefill": 1.06, "decode": 1.06, "teacher": 1.06, "gradient": 1.35}
    for phase, flops in found.items():
        assert 0.99 <= flops / work.work(SMALL, phase, "float32").flops < most[phase], phase


def test_work_by_hand():
    shape = shapes.make("tiny")  # width 32, ffn 88, 2 layers, 4 heads of 8 (2 of keys and values), vocabulary 64, 4 rows of 8 + 8
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 88
    linear, head = 2 * layer + 5 * 32, 32 * 64
    total = linear + 2 * head
    assert spec.count(transformer.param_specs(shape.student)) == total
    pairs = lambda start, end: sum(place + 1 for place in range(start, end))
    prefill = 4 * (2 * linear * 8 + 2 * 4 * 4 * 8 * pairs(0, 8)) + 4 * 2 * head
    assert work.work(shape, "prefill", "bfloat16") == (prefill, 2 * (total - head + 2 * 4 * 2 * 2 * 8 * 8))
    decode = 4 * (2 * linear * 7 + 2 * 4 * 4 * 8 * pairs(8, 15) + 7 * 2 * head)
    slots = sum(2 * 4 * 2 * 2 * 8 * place for place in range(8, 15))
    assert work.work(shape, "decode", "float32") == (decode, 4 * (7 * (total - head) + slots))
    assert work.work(shape, "optimizer", "bfloat16") == (0, 28 * total)
    halves = dataclasses.replace(shape, microbatches=2)
    assert work.work(halves, "update", "float32").flops == work.work(shape, "update", "float32").flops
    assert work.tokens(halves, "gradient") == 16 and work.tokens(shape, "prefill") == work.tokens(shape, "generate") == 32


def test_a_floor_is_the_slower_of_matmuls_and_memory_summed_over_the_parts():
    shape = shapes.make("tiny")
    fast, slow = Limits(1e30, 1.0), Limits(1.0, 1e30)
    assert work.floor_seconds(shape, "decode", "float32", fast) == work.work(shape, "decode", "float32").bytes
    assert work.floor_seconds(shape, "decode", "float32", slow) == work.work(shape, "decode", "float32").flops
    even = Limits(1.0, 1.0)
    parts = ("prefill", "decode", "teacher", "gradient", "optimizer")
    assert work.floor_seconds(shape, "step", "float32", even) == sum(work.floor_seconds(shape, part, "float32", even) for part in parts)


def test_the_memory_of_the_loss_is_far_from_whole_logits(monkeypatch):
    monkeypatch.setattr(loss_memory, "VOCAB", 20_000)
    found = loss_memory.measure()
    assert found["logits_bytes"] == 4 * 4096 * 20_000
    assert 0 < found["temp_bytes"] < 2 * found["logits_bytes"]


# ---- tables


def measured() -> Measured:
    samples = {
        ("limits", "float32"): {"matmul_float32": [[2.0], [1.0]], "matmul_bfloat16": [[1.0], [0.5]], "stream": [[4.0], [2.0]]},
        ("opd_jax", "float32"): {"prefill": [[0.5], [0.5]], "generate": [[2.0, 2.0], [3.0]], "step": [[4.0], [5.0]]},
        ("trl", "float32"): {"generate": [[6.0], [6.0]], "step": [[8.0], [5.0]]},
    }
    told = {("limits", "float32"): {"work": {"matmul_float32": 100.0, "matmul_bfloat16": 100.0, "stream": 20.0}}}
    told[("opd_jax", "float32")] = {"programs": {"prefill": {"compile_seconds": 7.0, "temp_bytes": 2**20}}, "peak_host_bytes": 2**30}
    return Measured(samples, told)


def test_limits_are_the_best_rates_of_all_rounds():
    assert table.limits(measured(), "float32") == Limits(100.0, 10.0)
    assert table.limits(measured(), "bfloat16") == Limits(200.0, 10.0)


def test_rows_are_medians_beside_the_limits():
    shape = shapes.make("tiny")
    found = {row.phase: row for row in table.rows(shape, measured())}
    assert list(found) == ["prefill", "decode", "generate", "step"]
    assert (found["generate"].seconds, found["generate"].low, found["generate"].high, found["generate"].runs) == (2.0, 2.0, 3.0, 3)
    assert found["decode"].seconds == 1.5 and found["generate"].tokens_per_second == 16
    prefill = found["prefill"]
    assert prefill.matmul_share == prefill.flops / 0.5 / 100 and prefill.bandwidth_share == prefill.bytes / 0.5 / 10
    assert prefill.floor_share == max(prefill.flops / 100, prefill.bytes / 10) / 0.5
    assert (prefill.compile_seconds, prefill.temp_bytes, found["decode"].temp_bytes) == (7.0, 2**20, None)
    line = next(line for line in table.phases_table(list(found.values())).splitlines() if line.startswith("| prefill"))
    assert "500.0" in line and "500.0 to 500.0 (2)" in line


def test_ratios_are_peers_times_over_ours_with_their_range_by_round():
    found = {one.phase: one for one in table.ratios(measured())}
    assert (found["generate"].ratio, found["generate"].low, found["generate"].high) == (3.0, 2.0, 3.0)
    assert (found["step"].ours, found["step"].theirs, found["step"].low, found["step"].high) == (4.5, 6.5, 1.0, 2.0)
    assert "| trl" in table.peers_table(list(found.values()))


def test_exponents_are_those_of_power_laws():
    assert curves.exponent([1, 2, 8], [3.0, 6.0, 24.0]) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-7))
    assert curves.exponent([2, 4], [1.0, 8.0]) == (pytest.approx(3.0), 0.0)
    slope, error = curves.exponent([1, 2, 4, 8], [1.0, 4.4, 15.0, 66.0])
    assert abs(slope - 2) < 3 * error < 0.5


# ---- ratios that are kept


def test_ratios_that_fell_beyond_the_tolerance_are_named():
    kept = {"tolerance": 0.25, "ratios": {"trl/step/float32": 2.0, "floor/decode/float32": 0.4, "trl/step/bfloat16": 3.0}}
    assert baseline.worse({"trl/step/float32": 1.5, "floor/decode/float32": 0.31}, kept) == []
    (line,) = baseline.worse({"trl/step/float32": 1.49, "floor/decode/float32": 0.8}, kept)
    assert line == "trl/step/float32 fell from 2.000 to 1.490, by more than 25%"


def test_kept_ratios_of_other_shapes_and_types_stay(tmp_path):
    path = tmp_path / "kept.json"
    assert baseline.read(path, "tiny cpu") is None
    baseline.write(path, "tiny cpu", {"a": 0.12345})
    baseline.write(path, "tiny gpu", {"a": 1.0})
    baseline.write(path, "tiny cpu", {"b": 2.0})
    assert baseline.read(path, "tiny cpu") == {"tolerance": 0.25, "ratios": {"a": 0.123, "b": 2.0}}
    assert baseline.read(path, "tiny gpu")["ratios"] == {"a": 1.0} and baseline.read(path, "other") is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("[]", "must hold a JSON object"),
        ('{"tiny cpu": {"ratios": {"a": "fast"}, "tolerance": 0.2}}', "tiny cpu must have a tolerance and ratios, which are numbers"),
        ('{"tiny cpu": 3}', "tiny cpu must have a tolerance and ratios"),
    ],
)
def test_a_damaged_file_of_ratios_is_refused(text, message, tmp_path):
    (tmp_path / "kept.json").write_text(text)
    with pytest.raises(UserError, match=message):
        baseline.read(tmp_path / "kept.json", "tiny cpu")


def test_the_committed_ratios_can_be_read():
    kept = baseline.read(ROOT / "experiments" / "bench_baseline.json", "prototype cpu")
    assert {f"floor/{phase}/float32" for phase in baseline.KEPT} <= set(kept["ratios"])
    assert {f"trl/{phase}/{dtype}" for phase in table.COMPARED for dtype in shapes.DTYPES} <= set(kept["ratios"])


# ---- refusals and failures


def test_what_does_not_exist_is_refused_by_name(tmp_path):
    settings = {"quick": True, "peers": False, "say": print}
    with pytest.raises(UserError, match="--shape=huge: is not known; valid: prototype, tiny, qwen3_0.6b"):
        run.run("huge", tmp_path / "a", "", curved=False, **settings)
    with pytest.raises(UserError, match="--curves: there are none of --shape=qwen3_0.6b; valid: prototype, tiny"):
        run.run("qwen3_0.6b", tmp_path / "a", "", curved=True, **settings)
    assert not (tmp_path / "a").exists()


def test_a_side_that_ends_or_hangs_is_left_out_and_named(tmp_path):
    orders = [Order("limits"), Order("transformers", folder=str(tmp_path / "nothing"))]
    found = rounds.measure(orders[1:], tmp_path, rounds=1, say=lambda text: None)
    assert found.samples == {} and len(found.failures) == 1
    assert re.match(r"transformers float32 ended: .*nothing.*; .*transformers_float32.log has all it said", found.failures[0])
    with Worker(orders[0], tmp_path / "log") as worker, pytest.raises(WorkerFailed, match="limits float32 did not answer within 0.01 s"):
        worker.ask({"run": "stream", "least_seconds": 0.0}, 0.01)


def test_our_processes_have_the_allocator_of_the_makefile_and_peers_what_is_best_for_them(monkeypatch, tmp_path):
    exported = re.findall(r"^[\w ]+: export (\w+) \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert dict(exported) == processes.ALLOCATOR
    assert " ".join(f"{name}={value}" for name, value in processes.ALLOCATOR.items()) in (ROOT / "README.md").read_text()
    if not processes.allocator("opd_jax"):
        pytest.skip("the C library is not glibc")
    assert processes.allocator("opd_jax") == processes.ALLOCATOR and processes.allocator("default_malloc") == {}
    assert processes.allocator("trl") == processes.allocator("transformers") == processes.KEPT
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")  # as a user's: none of the workers has it
    for kind in ("limits", "default_malloc"):
        with Worker(Order(kind), tmp_path / "log") as worker:
            worker.ready()
            lines = pathlib.Path(f"/proc/{worker.pid}/environ").read_text().split("\0")  # where glibc cuts GLIBC_TUNABLES at its colons
        expected = [line for name, value in processes.allocator(kind).items() for line in f"{name}={value}".split(":")]
        assert {line for line in lines if re.match("MALLOC_|GLIBC_TUNABLES|glibc", line)} == set(expected)


# ---- all of it


@pytest.mark.slow
def test_a_tiny_run_times_every_phase_beside_its_peers(tmp_path):
    """Peers train on the same weights: at the beginning their loss is ours, but for the draws of the completions."""
    command = [sys.executable, "experiments/bench.py", "--shape=tiny", "--quick", "--curves", f"--workdir={tmp_path / 'out'}"]
    done = subprocess.run([*command, f"--baseline={tmp_path / 'kept.json'}", "--update_baseline"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert record["failures"] == [] and record["machine"]["allocator"]["opd_jax"] == processes.allocator("opd_jax")
    assert [row["phase"] for row in record["rows"]] == list(work.PHASES)
    assert all(row["runs"] >= 5 and row["low"] <= row["seconds"] <= row["high"] for row in record["rows"])
    programs = [row for row in record["rows"] if row["phase"] in ("prefill", "generate", "teacher", "gradient", "update")]
    assert all(row["compile_seconds"] > 0 and row["temp_bytes"] > 0 for row in programs)
    assert {(one["peer"], one["phase"]) for one in record["ratios"]} == {("trl", phase) for phase in table.COMPARED} | {
        ("transformers", "generate")
    }
    losses = record["first_losses"]
    assert losses["opd_jax float32"] == pytest.approx(losses["trl float32"], rel=0.2)
    (curve,) = record["curves"]
    assert curve["values"] == [4, 8] and (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    kept = baseline.read(tmp_path / "kept.json", "tiny cpu")
    assert set(kept["ratios"]) == {f"floor/{phase}/float32" for phase in baseline.KEPT} | {
        f"trl/{phase}/float32" for phase in table.COMPARED
    } | {"transformers/generate/float32"}
    text = (tmp_path / "out" / "bench.md").read_text()
    assert text in done.stdout and "limits: " in text and "| whole step" in text


def test_the_phases_of_microbatches_see_their_rows_alone():
    shape = dataclasses.replace(shapes.make("tiny"), microbatches=2)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        made = phases.Phases(shape, "bfloat16", mesh)
        assert made.phase("teacher")().shape == (2, 8, 32)
        (loss, _), grads = made.phase("gradient")()
        assert loss.dtype == jnp.float32 and jax.tree.structure(grads) == jax.tree.structure(made.phase("optimizer")())
        assert made.first_loss() > 0
