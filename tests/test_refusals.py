"""Wrong and hostile input: one exact line, in bounded time and memory, and every file as it was before."""

import ast
import contextlib
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import hostile
import ml_dtypes
import models
import numpy as np
import pytest
import safetensors.numpy
from hostile import also, nothing, text
from wrong_inputs import CASES, open_model, read_report, read_task, resume, run_config

from opd_jax import metrics, train
from opd_jax.checkpoint import Checkpoints
from opd_jax.data import tokenizer
from opd_jax.models import hf, weights
from opd_jax.types import MESSAGE_LENGTH, UserError

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """model/, run/ and data.jsonl, with nothing wrong; everything has been used once, so that what is imported and compiled is there."""
    room = tmp_path_factory.mktemp("sound")
    params, config = models.tiny_model(vocab_size=259)
    hf.save(room / "model", params, config, tokenizer.byte())
    list(train.run(run_config(steps=2), room / "run"))
    (room / "data.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": 2}\n')
    open_model(room), read_task(room), read_report(room)
    (room / "report.html").unlink()
    return room


@pytest.fixture
def room(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "room")


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_refused(case, room, monkeypatch):
    damage, use, message = CASES[case]
    damage(room)
    monkeypatch.chdir(room)
    before = hostile.contents(room)
    with hostile.bounded(), pytest.raises(UserError) as error:
        use(room)
    found = str(error.value)
    assert found.replace(str(room), "ROOM") == message
    assert found.isprintable() and len(found) <= MESSAGE_LENGTH
    assert hostile.contents(room) == before


# ---- the meter, and what is not refused


def test_the_meter_sees_memory_and_hangs(tmp_path):
    with pytest.raises(AssertionError, match="memory grew by"), hostile.bounded():
        np.ones(2**27)  # 1 GB
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AssertionError, match="not done after 1 s"), hostile.bounded(seconds=1):
        (tmp_path / "pipe").read_bytes()
    before = hostile.contents(tmp_path)
    (tmp_path / "new").write_text("")
    assert hostile.contents(tmp_path) != before


def test_what_is_sound_is_accepted(room):
    whole = open_model(room).params
    hostile.split_weights(room)
    assert np.array_equal(open_model(room).params["embed"], whole["embed"])
    (room / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"prompt": "é", "answer": 1.5}\r\n\n{"prompt": "\\u0000"}'.encode())
    assert [e.prompt for e in read_task(room).train + read_task(room).held_out] == ["é", "\0"]
    (room / "data.jsonl").write_text('{"prompt": "' + "a" * (2**24 - 15) + '"}\n{"prompt": "b"}')
    assert len(read_task(room).train[0].prompt) == 2**24 - 15


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2**18 - 1, 2**18, 2**19 + 4])
def test_every_number_of_every_type_is_looked_at(dtype, value, place, tmp_path):
    array = np.full(2**19 + 5, -1.5, dtype)
    path = tmp_path / "x.safetensors"
    for changed in (False, True):
        array[place] = value if changed else float(ml_dtypes.finfo(dtype).max)
        safetensors.numpy.save_file({"x": array}, path)
        if not changed:
            assert weights.read(weights.open_file(path), "x", array.shape).tobytes() == array.tobytes()
    with pytest.raises(UserError, match=f"^{path}: tensor 'x' holds NaN or an infinity; every weight must be finite: restore the file$"):
        weights.read(weights.open_file(path), "x", array.shape)


def test_a_torn_last_line_is_repaired_and_the_rest_is_kept(room):
    path, samples = room / "run" / "metrics.jsonl", room / "run" / "samples.jsonl"
    whole = path.read_bytes(), samples.read_bytes()
    for file in (path, samples):
        file.write_bytes(file.read_bytes() + b'{"step": 3, "tr')
    resume(room)
    assert path.read_bytes().startswith(whole[0]) and samples.read_bytes().startswith(whole[1])
    assert [record["step"] for record in metrics.read(path)] == [1, 2, 3]


def test_a_message_is_one_printable_line_of_bounded_length():
    assert str(UserError("a\nb\t\x1b[31m\u202e é 東")) == r"a\nb\t\x1b[31m\u202e é 東"
    long = str(UserError("field = " + "\n" * 10**6 + "; correct it"))
    assert len(long) == MESSAGE_LENGTH and long.startswith(r"field = \n\n") and long.endswith("; correct it") and " ... " in long


# ---- code in the files


PAYLOAD = """import pathlib
pathlib.Path("ran").write_text("")
class T:
  pass
"""


def test_code_beside_a_tokenizer_is_never_run(room, monkeypatch):
    monkeypatch.chdir(room)
    (room / "model" / "evil.py").write_text(PAYLOAD)
    settings = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    (room / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    before = hostile.contents(room)
    with hostile.bounded():
        assert open_model(room).tokenizer.encode("ab") == [97, 98]
    (room / "model" / "tokenizer.json").rename(room / "elsewhere")  # without it the class that is named would be needed
    before = hostile.contents(room)
    with hostile.bounded(), pytest.raises(UserError, match="^tokenizer .*/model: cannot be loaded .*; give a folder with tokenizer.json$"):
        open_model(room)
    assert hostile.contents(room) == before
    exec(PAYLOAD)  # the payload would have been seen
    assert (room / "ran").exists()


FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# sympy's two evaluate their text as Python.
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "exec_module",
    "unsafe_load",
    "full_load",
    "read_pickle",
    "sympify",
    "parse_expr",
}


def unsafe(source: str) -> list[str]:
    """What a source does that could run the content of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in FORBIDDEN_CALLS or called.rpartition(".")[2] in FORBIDDEN_CALLS - {"eval", "compile"}:
            found.append(called)
        if called in ("torch.load", "yaml.load"):
            found.append(called)
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(keyword.value) != "False":
                found.append(keyword.arg)
    return found


def test_nothing_is_unpickled_or_evaluated():
    """The exceptions are named: a recipe is a config file that the user names on the command line, a sandbox is there to run programs."""
    sources = [path for folder in ("opd_jax", "experiments", "configs") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): unsafe(path.read_text()) for path in sources}
    assert {path: names for path, names in found.items() if names} == {
        "opd_jax/config/loading.py": ["spec.loader.exec_module"],
        "opd_jax/environments/inside.py": ["exec", "compile"],
    }
    wrong = "import pickle as p\nfrom dill import load\neval('1')\nnp.load(f, allow_pickle=True)\ntorch.load(f)\nx(trust_remote_code=yes)"
    assert sorted(unsafe(wrong)) == ["allow_pickle", "dill", "eval", "pickle", "torch.load", "trust_remote_code"]


# ---- disks that are full or read-only


def test_a_model_that_does_not_fit_on_the_disk_costs_none_of_the_old_one(room):
    old = open_model(room)
    before = hostile.contents(room)
    with pytest.raises(UserError) as error, hostile.files_of_at_most(20_000):
        hf.save(room / "model", old.params, old.config)
    assert str(error.value).startswith(f"folder {room / 'model'}: cannot be written (") and "give another one" in str(error.value)
    assert hostile.contents(room) == before


def test_a_checkpoint_that_does_not_fit_costs_none_of_the_old_ones(room):
    checkpoints = Checkpoints(room / "run" / "checkpoints")
    before = hostile.contents(room)
    with pytest.raises(UserError) as error, hostile.files_of_at_most(2_000):
        checkpoints.save(3, {"embed": np.random.default_rng(0).random(10**5)}, {})
    assert str(error.value).startswith(f"{room / 'run' / 'checkpoints'}: a checkpoint cannot be written (")
    assert str(error.value).endswith("; free space or give another --workdir")
    assert hostile.contents(room) == before


def test_a_line_that_does_not_fit_is_taken_back_and_none_follows_it(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write({"step": 1})
    before = hostile.contents(tmp_path)
    message = f"{tmp_path / 'metrics.jsonl'}: cannot be written (File too large); free space, then the same command continues"
    with hostile.files_of_at_most(100), pytest.raises(UserError) as error:
        writer.write({"step": 2, "long": "x" * 10_000})
    assert str(error.value) == message
    with pytest.raises(UserError) as again:  # there is room again; a record of step 3 would leave a gap
        writer.write({"step": 3})
    assert str(again.value) == message
    assert hostile.contents(tmp_path) == before


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_goes_on_without_gaps(tmp_path):
    c = run_config(steps=5, checkpoint__every=100)
    whole = [record["train/loss"] for record in train.run(c, tmp_path / "whole")]
    path = tmp_path / "run" / "metrics.jsonl"
    with pytest.raises(UserError) as error:
        for record in train.run(c, tmp_path / "run"):
            if record["step"] == 2:
                path.rename(tmp_path / "kept")
                path.symlink_to("/dev/full")
    assert str(error.value) == f"{path}: cannot be written (No space left on device); free space, then the same command continues"
    path.unlink()
    (tmp_path / "kept").rename(path)
    list(train.run(c, tmp_path / "run"))
    records = metrics.read(path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["train/loss"] for record in records] == whole


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, options: str):
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs ({mounted.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_refused_and_nothing_on_it_is_touched(tmp_path):
    with small_disk(tmp_path / "disk", "size=64k"):
        with contextlib.suppress(OSError), (tmp_path / "disk" / "mine").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        (tmp_path / "disk" / "run").mkdir()
        before = hostile.contents(tmp_path / "disk")
        with hostile.bounded(), pytest.raises(UserError) as error:
            next(train.run(run_config(), tmp_path / "disk" / "run"))
        assert str(error.value) == (
            f"--workdir={tmp_path / 'disk' / 'run'}: cannot be written (No space left on device); free space, or give another folder"
        )
        assert hostile.contents(tmp_path / "disk") == before


def test_a_read_only_disk_is_refused(tmp_path):
    with small_disk(tmp_path / "disk", "ro"):
        for workdir, reason in ((tmp_path / "disk", None), (tmp_path / "disk" / "run", os.strerror(errno.EROFS))):
            with pytest.raises(UserError) as error:
                next(train.run(run_config(), workdir))
            said = (
                f"cannot be created ({reason}); give a folder that can be written"
                if reason
                else ("is not writable; give another folder or change its permissions")
            )
            assert str(error.value) == f"--workdir={workdir}: {said}"


# ---- the scripts


def script(room, name, *flags):
    """(exit status, lines on stderr); ROOM in flags is the folder, and in the lines stands for it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, f"experiments/{name}", *(flag.replace("ROOM", str(room)) for flag in flags)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, [line.replace(str(room), "ROOM") for line in done.stderr.splitlines() if line.strip()]


QUICK, NEW = "--config=configs/quickstart.py:sft,tiny", "--workdir=ROOM/new"
OWN, RUN = "--config=ROOM/own.py", "--workdir=ROOM/run"
SOUND_CONFIG = f"""import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from wrong_inputs import run_config
def get_config():
  return run_config(2)
"""
OWN_DATA = ("--config.task.name=jsonl", "--config.task.path=ROOM/data.jsonl")


def one_of(case):
    """(damage, message) of the table above."""
    return CASES[case][0], CASES[case][2]


SCRIPTS = {
    "hostile weights": (*one_of("weights: header claims 2^60 bytes"), "train.py", (QUICK, NEW, "--config.student.path=ROOM/model")),
    "a pipe for data": (*one_of("data: a pipe for data"), "train.py", (QUICK, NEW, *OWN_DATA)),
    "a config that raises": (
        text("own.py", "raise ValueError('a\\nb')"),
        "--config: the file cannot be loaded (ValueError: a b); correct the file",
        "train.py",
        (OWN, NEW),
    ),
    "an argument that the config does not have": (
        nothing,
        "config argument 'storys' is not known; valid: one, enumerable, quickstart, stories, tiny, pair=..., seed=...; "
        "did you mean stories?",
        "gradient_study.py",
        ("--config=configs/gradient_study.py:storys", NEW),
    ),
    "a config that exits": (
        text("own.py", "raise SystemExit(0)"),
        "--config: the file ends the program (sys.exit) instead of giving a config; correct the file",
        "train.py",
        (OWN, NEW),
    ),
    "a config that is a pipe": (
        hostile.pipe("own.py"),
        "--config=ROOM/own.py: is not a file; give a config file such as configs/quickstart.py",
        "train.py",
        (OWN, NEW),
    ),
    "a config without fields": (
        text("own.py", "def get_config():\n  return {}"),
        "config is a dict, it must be the ConfigDict of opd_jax.config.default(); correct get_config",
        "train.py",
        (OWN, NEW),
    ),
    "an empty workdir": (nothing, "--workdir='' is no folder; give the folder of the run", "train.py", (QUICK, "--workdir=")),
    "a folder for a file": (nothing, "--out=ROOM/model: is a folder; give a file", "evaluate.py", (QUICK, "--out=ROOM/model")),
    "damaged checkpoints": (*one_of("run: checkpoints damaged"), "export_hf.py", (RUN, "--out=ROOM/out")),
    "weights that are NaN": (*one_of("weights: NaN"), "prune.py", ("--teacher=ROOM/model", "--keep=0", "--out=ROOM/out")),
    "a sample that the report of a finished run cannot show": (
        also(one_of("report of a damaged sample")[0], lambda room: (room / "own.py").write_text(SOUND_CONFIG)),
        one_of("report of a damaged sample")[1],
        "train.py",
        (OWN, RUN),
    ),
    "a damaged run": (*one_of("report of a damaged run"), "report.py", (RUN, "--out=ROOM/report.html")),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SCRIPTS)
def test_scripts_end_with_one_line_and_status_2(case, room):
    damage, message, name, flags = SCRIPTS[case]
    damage(room)
    before = hostile.contents(room)
    status, lines = script(room, name, *flags)
    assert (status, [line for line in lines if not line.startswith("WARNING")]) == (2, [f"error: {message}"])
    assert hostile.contents(room).items() - before.items() <= {("new", hostile.contents(room).get("new"))}  # an empty workdir may remain
