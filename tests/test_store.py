"""Stores: what is written is read back to the bit, growth is atomic, another teacher is refused, and so is what a stranger has made."""

import dataclasses
import hashlib
import io
import json
import re
import zipfile

import hostile
import numpy as np
import pytest

from opd_jax import store
from opd_jax.data.tasks import Example
from opd_jax.types import Rollout, UserError

B, T, K = 4, 3, 2
LAW = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_new_tokens": T, "max_turns": 1}
TOPK = store.Description("abc", "ids", "own", "theirs", "sums", "student", "def", LAW, B, 2, "topk", K, 2)


def batch(seed):
    """(two examples, two completions of each, their scores)."""
    rng = np.random.default_rng(seed)
    mask_BT = np.arange(T)[None, :] < rng.integers(1, T + 1, B)[:, None]
    logp_BT, behaviour_BT = (-rng.exponential(size=(B, T)).astype(np.float32) for _ in range(2))
    tokens_BT, id_B = rng.integers(0, 50, (B, T)).astype(np.int32), np.arange(B, dtype=np.uint32)
    completions = Rollout(tokens_BT, mask_BT, logp_BT, behaviour_BT, id_B, rng.random(B) < 0.5, rng.random((B, T)) < 0.9)
    scores = {"ids_BTK": rng.integers(0, 50, (B, T, K)).astype(np.int32), "logp_BTK": -rng.random((B, T, K)).astype(np.float32)}
    scores["rest_BT"] = np.where(mask_BT, -1.5, -np.inf).astype(np.float32)  # no mass outside, where the top is the vocabulary
    return [Example(seed, f"é{seed}=", "x", None, "tag"), Example(seed + 1, "\n", None, "7")], completions, scores


def written(folder, batches=2, description=TOPK):
    made = store.begin(folder, description)
    for seed in range(batches):
        made.append(*batch(seed))
    return made


def same(a, b):
    for name, value in vars(a).items() if isinstance(a, Rollout) else a.items():
        other = getattr(b, name) if isinstance(b, Rollout) else b[name]
        assert (value is None) == (other is None)
        if value is not None:
            assert value.dtype == other.dtype
            np.testing.assert_array_equal(value, other)


def test_what_is_written_is_read_back(tmp_path):
    made = written(tmp_path / "a" / "store")
    found = store.read(made.folder)
    assert len(found) == 4 and found.description == TOPK and found.digest == made.digest and store.is_whole(made.folder)
    assert [found.example(prompt) for prompt in range(4)] == batch(0)[0] + batch(1)[0]
    for prompts, rows in (([0, 1], [0, 1, 2, 3]), ([1], [2, 3])):
        for number in (0, 1):
            _, completions, scores = batch(number)
            chosen = [2 * number + prompt for prompt in prompts]
            same(found.completions(chosen), Rollout(**{name: value[rows] for name, value in vars(completions).items()}))
            same(found.scores(chosen, teacher_hash="abc"), {name: value[rows] for name, value in scores.items()})
    same(
        found.completions([3, 0]),
        Rollout(**{name: np.concatenate([vars(batch(1)[1])[name][2:], vars(batch(0)[1])[name][:2]]) for name in vars(batch(0)[1])}),
    )


def test_optional_fields_may_be_missing_in_all_batches(tmp_path):
    made = store.begin(tmp_path, TOPK)
    examples, completions, scores = batch(0)
    made.append(examples, completions.replace(present_BT=None), scores)
    assert store.begin(tmp_path, TOPK).completions([0]).present_BT is None
    made.append(*batch(1))
    with pytest.raises(UserError, match="has other arrays than the first batch"):
        store.read(tmp_path)


def test_scores_are_those_of_one_teacher(tmp_path):
    words = re.escape("its scores are those of the teacher abc, not of xyz; give that teacher")
    with pytest.raises(UserError, match=words):
        written(tmp_path).scores([0], teacher_hash="xyz")


def test_a_store_that_is_not_whole_is_gone_on_with_and_not_read(tmp_path):
    written(tmp_path, batches=1)
    assert not store.is_whole(tmp_path)
    with pytest.raises(UserError, match="holds 1 of 2 batches; run experiments/score_cache.py again"):
        store.read(tmp_path)
    (tmp_path / "000001.npz").write_bytes(b"torn")  # killed before its .json was there
    again = store.begin(tmp_path, TOPK)
    assert again.batches == 1
    again.append(*batch(1))
    assert store.read(tmp_path).digest == written(tmp_path / "whole").digest
    with pytest.raises(UserError, match="describes a store of another config, teacher or tokenizer; give another folder"):
        store.begin(tmp_path, dataclasses.replace(TOPK, teacher_hash="other"))


def test_a_store_is_cut_back(tmp_path):
    written(tmp_path)
    cut = store.begin(tmp_path, TOPK, keep=1)
    assert cut.batches == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["000000.json", "000000.npz", "store.json"]
    with pytest.raises(UserError, match="holds 1 of the 2 batches that its run has written; restore the store"):
        store.begin(tmp_path, TOPK, keep=2)
    other = dataclasses.replace(TOPK, teacher_hash="other")
    with pytest.raises(UserError, match="describes a store of another config"):
        store.begin(tmp_path, other, keep=1)
    assert store.begin(tmp_path, other, keep=0).batches == 0 and [path.name for path in tmp_path.iterdir()] == ["store.json"]


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .*; free space, or give another folder"):
        store.begin(tmp_path / "file", TOPK)
    made = written(tmp_path / "store", batches=1)
    (made.folder / "000001.npz").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        made.append(*batch(1))
    assert made.batches == 1 and not list(made.folder.glob("*.tmp"))


# ---- what a stranger has made


def repacked(folder, change=lambda arrays: None, **settings):
    """Batch 0 with changed arrays, and the right SHA-256."""
    with np.load(folder / "000000.npz") as found:
        arrays = dict(found)
    change(arrays)
    buffer = io.BytesIO()
    (np.savez_compressed if settings.get("compressed") else np.savez)(buffer, **arrays)
    signed(folder, buffer.getvalue())


def signed(folder, content):
    (folder / "000000.npz").write_bytes(content)
    described = json.loads((folder / "000000.json").read_text())
    (folder / "000000.json").write_text(json.dumps(described | {"sha256": hashlib.sha256(content).hexdigest()}))


def promising(shape):
    """An .npz whose only member claims a shape that it does not hold."""
    buffer, header = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tokens_BT.npy", header.getvalue())
    return buffer.getvalue()


def described(folder, **changes):
    path = folder / "store.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "gone"}))


def exemplified(folder, examples):
    path = folder / "000000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"examples": examples}))


EXAMPLE = {"id": 0, "prompt": "a"}
DAMAGES = {
    "torn arrays": (lambda f: (f / "000000.npz").write_bytes((f / "000000.npz").read_bytes()[:-9]), "its SHA-256 is not the one"),
    "no arrays": (lambda f: (f / "000000.npz").unlink(), "cannot be read"),
    "a folder": (lambda f: ((f / "000000.npz").unlink(), (f / "000000.npz").mkdir()), "Is a directory"),
    "no zip": (lambda f: signed(f, b"no zip"), "File is not a zip file"),
    "a pickle": (lambda f: repacked(f, lambda a: a.update(tokens_BT=np.array([[{}] * T] * B))), "is no array of numbers"),
    "compressed": (lambda f: repacked(f, compressed=True), "is compressed"),
    "a promise": (lambda f: signed(f, promising((2**40, 3))), "is no array of numbers of the size that it claims"),
    "another shape": (lambda f: repacked(f, lambda a: a.update(tokens_BT=a["tokens_BT"][:, :2])), "tokens_BT has the shape"),
    "another type": (lambda f: repacked(f, lambda a: a.update(mask_BT=a["mask_BT"].astype(np.int32))), "mask_BT has the type int32"),
    "a wide type": (lambda f: repacked(f, lambda a: a.update(logp_BT=a["logp_BT"].astype(np.float64))), "logp_BT has the type float64"),
    "no number": (lambda f: repacked(f, lambda a: a["logp_BT"].__setitem__((0, 0), np.nan)), "holds what is no log-probability"),
    "an infinity": (lambda f: repacked(f, lambda a: a["score/rest_BT"].__setitem__((0, 0), np.inf)), "holds what is no log-prob"),
    "a negative token": (lambda f: repacked(f, lambda a: a["tokens_BT"].__setitem__((0, 0), -1)), "holds -1, which is no token"),
    "a field missing": (lambda f: repacked(f, lambda a: a.pop("stopped_B")), "stopped_B is missing"),
    "a field too many": (lambda f: repacked(f, lambda a: a.update(more_BT=a["mask_BT"])), "more_BT is not known"),
    "other scores": (lambda f: repacked(f, lambda a: a.pop("score/rest_BT")), "not those of topk"),
    "no json": (lambda f: (f / "000000.json").write_text("{"), "cannot be read"),
    "deep json": (lambda f: (f / "000000.json").write_text("[" * 100_000), "cannot be read"),
    "too few examples": (lambda f: exemplified(f, [EXAMPLE]), "no list of 2 examples"),
    "no example": (lambda f: exemplified(f, [EXAMPLE, EXAMPLE | {"prompt": 3}]), "is no example"),
    "another field": (lambda f: exemplified(f, [EXAMPLE, EXAMPLE | {"run": "rm"}]), "is no example"),
    "another format": (lambda f: described(f, format=2), "format = 2, this version reads 1"),
    "no teacher": (lambda f: described(f, teacher_hash="gone"), "teacher_hash = None must be of the type str"),
    "no rows": (lambda f: described(f, rows=0), "does not describe a store"),
    "an unknown form": (lambda f: described(f, scores="all"), "does not describe a store"),
    "no law": (lambda f: described(f, law={}), "law.temperature = None must be a number"),
    "a law of text": (lambda f: described(f, law=LAW | {"top_k": "3"}), "law.top_k = '3' must be a number"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_store_of_a_stranger_is_refused_in_one_line(name, tmp_path):
    damage, words = DAMAGES[name]
    written(tmp_path)
    damage(tmp_path)
    with hostile.bounded(), pytest.raises(UserError, match=re.escape(words)) as error:
        store.read(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_there_is_no_store(tmp_path):
    with pytest.raises(UserError, match="store.json: cannot be read .*; give a folder that experiments/score_cache.py has written"):
        store.read(tmp_path)
    assert not store.is_whole(tmp_path)
