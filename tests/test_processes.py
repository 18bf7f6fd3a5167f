"""Two real processes on loopback: they start by themselves, draw and learn what one process does, stop together, and one writes."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import process_worker
import pytest

from opd_jax import assembly, checkpoint, config, machine, metrics, model_io, parallel, processes, rollout, sampler, score, store, train
from opd_jax.data import tasks
from opd_jax.data.pipeline import Encoder
from opd_jax.models import hf, spec, transformer
from opd_jax.pair import Pair
from opd_jax.types import UserError

WORKER = pathlib.Path(process_worker.__file__)
ROOT = WORKER.parents[1]
CLOCK = ("time/", "per_second", "memory")


def launch(folder: pathlib.Path, name: str, *flags: str, devices: int, **variables: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in processes.VARIABLES}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | variables
    command = [sys.executable, str(WORKER), f"--cache={folder / 'cache'}", f"--model={folder / 'model'}", f"--notes={folder / name}.json"]
    log = (folder / f"{name}.log").open("w")
    return subprocess.Popen([*command, *flags], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def wait(process: subprocess.Popen) -> int:
    try:
        return process.wait(900)
    finally:
        process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_two(folder: pathlib.Path, name: str, *flags: str) -> list[int]:
    """Statuses of two processes with a device each, called NAME0 and NAME1."""
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    flags = f"--workdir={folder / name}", *flags
    pair = [launch(folder, f"{name}{i}", *flags, devices=1, JAX_PROCESS_ID=str(i), **address) for i in range(2)]
    return [wait(process) for process in pair]


def launch_one(folder: pathlib.Path, name: str, *flags: str) -> int:
    """Status of one process with two devices."""
    return wait(launch(folder, name, f"--workdir={folder / name}", *flags, devices=2))


def logs(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.log")}


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> pathlib.Path:
    """`two`: a run of two processes with a device each, whose second process got SIGTERM after step 2; `one`: one process, two devices."""
    folder = tmp_path_factory.mktemp("processes")
    hf.save(folder / "model", transformer.init(jax.random.key(3), process_worker.MODEL), process_worker.MODEL)
    assert (launch_two(folder, "two", "--interrupted"), launch_one(folder, "one")) == ([143, 143], 0), logs(folder)
    return folder


@pytest.fixture(scope="session")
def features(runs) -> pathlib.Path:
    """The runs of process_worker.features(): `many` of two processes, `single` of one process with two devices."""
    assert (launch_two(runs, "many", "--features"), launch_one(runs, "single", "--features")) == ([0, 0], 0), logs(runs)
    return runs


def notes(folder: pathlib.Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def records(run: pathlib.Path) -> list[dict]:
    found = metrics.read(run / "metrics.jsonl")
    return [{name: value for name, value in one.items() if not any(word in name for word in CLOCK)} for one in found]


def compare(two: list[dict], one: list[dict]) -> float:
    """The largest relative difference of records that agree."""
    worst = 0.0
    for a, b in zip(two, one, strict=True):
        final = {name for name in a.keys() ^ b.keys() if name.startswith("eval/")}
        assert a.keys() - final == b.keys() - final
        for name in a.keys() & b.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (a["step"], name)
            worst = max(worst, abs(a[name] - b[name]) / max(abs(b[name]), 1e-6))
    return worst


# ---- how they start


CASES = {
    "one of three": ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES=2, but not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID; set all"),
    "two of three": ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "0"}, "but not JAX_NUM_PROCESSES; set all"),
    "no port": ({"JAX_COORDINATOR_ADDRESS": "h", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "give HOST:PORT of process 0"),
    "no number": ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "give HOST:PORT of process 0"),
    "one too many": (
        {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
        "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_variables_that_do_not_say_enough_are_refused(case, monkeypatch):
    variables, message = CASES[case]
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)):
        processes.start()


@pytest.mark.parametrize(
    "environment, found",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a shell in an allocation: no step runs
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "a"}, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "a,b"}, {"cluster_detection_method": "slurm"}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, {}),
    ],
)
def test_others_are_waited_for_only_where_they_are_known_to_run(environment, found):
    assert processes.detect(environment) == found


def test_one_process_shares_with_itself():
    assert processes.share({"a": 1}) == [{"a": 1}] and processes.divide(lambda rows: [2 * x for x in rows], [1, 2, 3]) == [2, 4, 6]
    agreed = processes.Agreement()
    assert [agreed(number) for number in (0, 15)] == [0, 15]
    with pytest.raises(UserError, match="no such luck"):
        processes.by_first(lambda: (_ for _ in ()).throw(UserError("no such luck")))


# ---- what two of them do


@pytest.mark.slow
def test_the_processes_found_each_other_and_divided_the_rows(runs):
    for i in range(2):
        said = notes(runs, f"two{i}")
        assert (said["index"], said["count"], said["devices"]) == (i, 2, 2)
        assert said["divided"] == [[0, 0], [1, 0], [2, 1], [3, 1], [4, 1]]
        assert "No space left on device" in said["refused"]  # in both, though the first alone tried to write
    assert machine.read(runs / "two")[0]["processes"] == 2 and machine.read(runs / "one")[0]["processes"] == 1


@pytest.mark.slow
def test_uniforms_are_the_same_bits(runs):
    here = process_worker.uniforms(parallel.make_mesh(2, 2, 2))
    assert len(np.unique(here)) == here.size
    for name in ("one", "two0", "two1"):
        np.testing.assert_array_equal(np.array(notes(runs, name)["uniforms"], np.float32), here)


@pytest.mark.slow
def test_each_process_reads_its_part_of_a_model(runs):
    expected = spec.content_hash(hf.load(runs / "model")[0])
    assert {notes(runs, name)["loaded"] for name in ("one", "two0", "two1")} == {expected}


@pytest.mark.slow
def test_metrics_are_those_of_one_process(runs, record_property):
    two, one = records(runs / "two"), records(runs / "one")
    assert len(two) >= 3 and one[-1]["step"] == 6
    record_property("largest relative difference", compare(two, one[: len(two)]))
    assert any("eval/reverse_kl" in one for one in two) and any("reward/well_formed" in one for one in two)


@pytest.mark.slow
def test_tokens_are_those_of_one_process_but_at_draws_that_rounding_decides(runs, record_property):
    """Of the first update, whose student is in the first checkpoint: margins are those of its draws, drawn here on one device."""
    logged = {name: [s for s in metrics.read(runs / name / "samples.jsonl") if s["step"] == 1] for name in ("one", "two")}
    drawn, margin_BT, mask_BT = first_completions(runs)
    assert len(logged["one"]) == len(drawn) == 16
    record_property("smallest margin", float(margin_BT[mask_BT].min()))
    for name, samples in logged.items():
        for row, sample in enumerate(samples):
            expected, found = drawn[row], sample["token_ids"]
            if found != expected:
                first = next(t for t in range(len(expected)) if found[t : t + 1] != expected[t : t + 1])
                assert margin_BT[row, first] < 1e-5, (name, row, first)


def first_completions(runs):
    """(token ids of each row, distance of every draw's uniform to the nearer end of its token's interval [B, T], mask)."""
    c = config.parse(process_worker.make_config(str(runs / "cache")))
    student = model_io.open_model(str(runs / "two"), step=0)
    task = tasks.from_config(c)
    pair = Pair(student, {}, None, Encoder(student.tokenizer, c.rollout.max_prompt_length, "refuse"), None)
    batch = assembly.make_pipeline(c, pair, task.examples("train")).batch(0)
    key = jax.random.fold_in(jax.random.key(c.seed), 0)
    settings = {"key": key, "max_new_tokens": c.rollout.max_new_tokens, "stop_ids": student.tokenizer.eos_ids}
    drawn = rollout.sample(student.params, student.config, batch.prompts, **settings)
    tokens_BT, mask_BT = np.asarray(drawn.tokens_BT), np.asarray(drawn.mask_BT)
    head = score.hidden(student.params, student.config, batch.prompts, drawn)
    logits_BTV = np.einsum("btd,dv->btv", np.asarray(head.hidden_BTD, np.float64), np.asarray(head.unembed_DV, np.float64))
    law_BTV = np.exp(logits_BTV - logits_BTV.max(-1, keepdims=True))
    end_BTV = np.cumsum(law_BTV, -1) / law_BTV.sum(-1, keepdims=True)
    high_BT = np.take_along_axis(end_BTV, tokens_BT[..., None], -1)[..., 0]
    low_BT = np.where(tokens_BT > 0, np.take_along_axis(end_BTV, np.maximum(tokens_BT - 1, 0)[..., None], -1)[..., 0], 0)
    uniform_BT = np.stack([sampler.uniforms(key, batch.prompts.id_B, t) for t in range(tokens_BT.shape[1])], 1)
    margin_BT = np.minimum(np.abs(uniform_BT - low_BT), np.abs(uniform_BT - high_BT))
    return [ids[mask].tolist() for ids, mask in zip(tokens_BT, mask_BT, strict=True)], margin_BT, mask_BT


@pytest.mark.slow
def test_the_first_process_alone_writes_what_is_no_shard(runs):
    first, second = (notes(runs, f"two{i}")["written"] for i in range(2))
    assert any(path.endswith("metrics.jsonl") for path in first) and any("cache" in path for path in first)
    others = [path for path in second if not re.search(r"/two/checkpoints/\d+\.tmp/state", path)]
    assert others == []


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step_with_the_state_saved(runs):
    stopped = checkpoint.newest_step(runs / "two" / "checkpoints")
    assert 2 < stopped < 6 and records(runs / "two")[-1]["step"] == stopped
    for i in range(2):
        assert "stopped by SIGTERM; the state is saved" in (runs / f"two{i}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_what_two_processes_saved_comes_back_bit_for_bit_on_another_mesh(runs, shape):
    saved = notes(runs, "two0")["state"]
    assert saved == notes(runs, "two1")["state"]
    abstract = process_worker.abstract_state(parallel.make_mesh(*shape))
    step, state, info = checkpoint.Checkpoints(runs / "two0_state").restore(abstract)
    assert (step, info) == (3, {"seconds": 1.5}) and spec.content_hash(state) == saved


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped_on_another_mesh(runs, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "run")
    at = checkpoint.newest_step(tmp_path / "run" / "checkpoints")
    c = process_worker.make_config(str(runs / "cache"), fsdp=2, data=2, tensor=2)
    assert [record["step"] for record in train.run(c, tmp_path / "run")] == list(range(at + 1, 7))
    two, one = records(tmp_path / "run"), records(runs / "one")
    assert [record["step"] for record in two] == list(range(7))
    for name in ("train/loss", "train/grad_norm", "rollout/length", "eval/reverse_kl"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-4), name


# ---- what else they do: process_worker.features()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agent", "dagger", "stored"])
def test_a_run_of_many_parts_taken_up_again_is_that_of_one_process(features, name, record_property):
    two, one = (features / folder / name for folder in ("many", "single"))
    found = records(two)
    assert [record["step"] for record in found] == [1, 2, 3]
    record_property("largest relative difference", compare(found, records(one)))
    assert metrics.read(two / "samples.jsonl")[-1]["step"] == 3
    drawn = [[sample["token_ids"] for sample in metrics.read(run / "samples.jsonl")] for run in (two, one)]
    assert drawn[0] == drawn[1]
    assert np.allclose(*(weights(run) for run in (two, one)), rtol=1e-4, atol=1e-6)


def weights(run: pathlib.Path) -> np.ndarray:
    """All of the newest student's, an adapter merged, as an export would write them."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(model_io.open_model(str(run)).params)])


@pytest.mark.slow
def test_their_parts_are_there(features):
    agent, dagger, stored = (records(features / "many" / name)[-1] for name in ("agent", "dagger", "stored"))
    assert agent["rollout/turns"] > 1 and 0 < agent["rollout/reward"] < 1 and agent["reward/well_formed"] < 1
    assert agent["context/present"] > 0 and agent["preference/pairs"] > 0 and abs(agent["train/loss_reward"]) > 0
    assert dagger["replay/age"] > 0 and stored["preference/pairs"] > 0
    assert (features / "many" / "agent" / "model" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_what_they_measured_and_collected_is_the_same_and_written_once(features):
    assert len({(features / run / "agent" / "difficulty.json").read_text() for run in ("many", "single")}) == 1
    two, one = (store.read(features / run / "dagger" / "replay") for run in ("many", "single"))
    assert two.batches == one.batches == 3 and not list((two.folder).glob("*.tmp"))
    everything = range(len(two))
    np.testing.assert_array_equal(*(found.completions(everything).tokens_BT for found in (two, one)))
    others = [path for path in notes(features, "many1")["written"] if not re.search(r"/checkpoints/\d+\.tmp/state", path)]
    assert set(others) <= {f"{features}/many/{name}" for name in (*process_worker.RUNS, "refused_agent", "refused_stored")}  # made by all


@pytest.mark.slow
def test_what_cannot_be_used_is_refused_by_all(features):
    first, second = (notes(features, f"many{i}")["refusals"] for i in range(2))
    assert first == second and len(first) == 3
    assert "task.difficulty_low = 0.3" in first[0] and "store.json: cannot be read" in first[1] and "nowhere: cannot be written" in first[2]


@pytest.mark.slow
def test_saves_have_the_same_number_in_all_though_the_first_made_models_alone(features):
    """Orbax holds back who would write before there is a folder, by a number that each process counts."""
    first, second = (notes(features, f"many{i}")["saves"] for i in range(2))
    assert first == second
