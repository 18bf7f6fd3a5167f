"""Wrong and hostile input: one exact line, in bounded time and memory, and every file as it was before."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys

import hostile
import jax.numpy as jnp
import models
import numpy as np
import pytest
from hostile import INDEX, WEIGHTS, also, cut, entry, fields, folder, index, link, nothing, pipe, put_before, remove, rename, swap, text

from opd_jax import checkpoint, metrics, model_io, parallel, teachers, train
from opd_jax import config as config_lib
from opd_jax.analysis import report
from opd_jax.data import tasks, tokenizer
from opd_jax.models import hf
from opd_jax.types import MESSAGE_LENGTH, UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEEP = "[" * 200_000


def run_config(steps=3, **changes):
    c = config_lib.default()
    c.task.level, c.rollout.source, c.rollout.batch_size, c.rollout.max_new_tokens = 3, "dataset", 8, 4
    c.signal.divergence, c.steps, c.learner.decay_steps, c.eval.prompts, c.checkpoint.every = "nll", steps, 9, 0, 1
    c.student.init.hidden_size, c.student.init.intermediate_size, c.student.init.num_hidden_layers = 16, 16, 1
    for name, value in changes.items():
        c.update_from_flattened_dict({name.replace("__", "."): value})
    return c


@pytest.fixture(scope="session")
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


# ---- what a user does with the files


def open_model(room):
    return model_io.open_model(str(room / "model"))


def open_teacher(room):
    return teachers.open_teacher(str(room / "model"), tokenizer.byte(), mesh=parallel.make_mesh(), dtype=jnp.float32)


def train_student(room):
    next(train.run(run_config(student__path=str(room / "model")), room / "new"))


def read_task(room):
    return tasks.make("jsonl", path=str(room / "data.jsonl"), level=3, train_size=0, eval_size=1, seed=0)


def resume(room):
    next(train.run(run_config(), room / "run"))


def recipe(room):
    train.make_model(str(room / "recipe.py"), str(room / "cache"))


def read_report(room):
    report.write([room / "run"], room / "report.html")


def start_in(name):
    return lambda room: next(train.run(run_config(), room / name if name else ""))


# ---- the table: what is wrong -> (damage, use, the whole message; ROOM is the folder)

ST = "ROOM/model/model.safetensors: cannot be read as safetensors"
CONFIG, CONFIG_JSON = "model/config.json", "ROOM/model/config.json"
JSON_INDEX = "ROOM/model/model.safetensors.index.json"
JSONL, BAD_JSONL = "data.jsonl", "task.path = 'ROOM/data.jsonl'"
A_PIPE = "cannot be read (a pipe or a device, not a file)"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
NO_ENTRY = "ROOM/run/checkpoints: no checkpoint can be read"
OTHER_RUN = "restore one, or give another --workdir"
METRICS = "ROOM/run/metrics.jsonl"

HOSTILE_WEIGHTS = {
    "header claims 2^60 bytes": (hostile.weights("{}", length=2**60), f"{ST} (header too large); restore it"),
    "header longer than the file": (hostile.weights("{}", length=1000), f"{ST} (invalid header length); restore it"),
    "header of 100 MB": (
        also(hostile.weights("{}", length=100_000_000), cut(WEIGHTS, 100_000_100)),
        "ROOM/model/model.safetensors: has a header of 100000000 bytes, at most 16777216 are read; split the file",
    ),
    "header nested deeply": (
        hostile.weights('{"a":' + DEEP),
        f"{ST} (invalid JSON in header: recursion limit exceeded at line 1 column 132); restore it",
    ),
    "header that is a list": (
        hostile.weights("[]"),
        f"{ST} (invalid JSON in header: invalid type: sequence, expected struct HashMetadata at line 1 column 0); restore it",
    ),
    "100,000 tensors": (
        hostile.weights({f"t{i}": entry(4 * i, 4 * i + 4, (1,)) for i in range(100_000)}, bytes(400_000)),
        f"folder ROOM/model: tensor '{EMBED}' (and 19 more) is missing from the weights; restore them, or correct config.json",
    ),
    "100,000 tensors in one place": (
        hostile.weights({f"t{i}": entry(0, 4, (1,)) for i in range(100_000)}, bytes(4)),
        None,  # which of them is named depends on the library's order
    ),
    "overlapping": (
        hostile.weights({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
        f"{ST} (invalid offset for tensor `b`); restore it",
    ),
    "a gap": (hostile.weights({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)), f"{ST} (invalid offset for tensor `b`); restore it"),
    "beyond the file": (
        hostile.weights({"a": entry(0, 16)}, bytes(8)),
        f"{ST} (incomplete metadata, file not fully covered); restore it",
    ),
    "reversed": (hostile.weights({"a": entry(16, 0)}, bytes(16)), f"{ST} (invalid offset for tensor `a`); restore it"),
    "negative shape": (
        hostile.weights({"a": entry(0, 16, (-4,))}, bytes(16)),
        f"{ST} (invalid JSON in header: invalid value: integer `-4`, expected usize at line 1 column 34); restore it",
    ),
    "shape that overflows": (
        hostile.weights({"a": entry(0, 0, (2**32, 2**32))}),
        f"{ST} (overflow computing buffer size from shape and/or element type); restore it",
    ),
    "empty tensor of enormous shape": (
        hostile.tensors(lambda held: None) and also(hostile.tensors(lambda held: held.update({"x": np.zeros((2**31, 0), np.float32)}))),
        "folder ROOM/model: tensor 'x' in the weights is not used by the model of config.json; correct one of them",
    ),
    "size of another type": (
        hostile.weights({"a": entry(0, 16, (5,))}, bytes(16)),
        f"{ST} (invalid shape, data type, or offset for tensor); restore it",
    ),
    "one name twice": (
        hostile.weights(f'{{"a": {json.dumps(entry(0, 16))}, "a": {json.dumps(entry(0, 16, (2, 2)))}}}', bytes(16)),
        "ROOM/model/model.safetensors: names 'a' twice in its header; restore it",
    ),
    "unknown type": (
        hostile.weights({"a": entry(0, 16, dtype="F" * 5_000_000)}, bytes(16)),
        f"{ST} (invalid JSON in header: unknown variant `{'F' * 155}...); restore it",
    ),
    "empty file": (text(WEIGHTS, ""), f"{ST} (header too small); restore it"),
    "truncated file": (cut(WEIGHTS, 5000), f"{ST} (incomplete metadata, file not fully covered); restore it"),
    "a zip with pickles": (text(WEIGHTS, b"PK\3\4" + bytes(100)), f"{ST} (invalid header length); restore it"),
    "pickles alone": (
        rename(WEIGHTS, "model/pytorch_model.bin"),
        "folder ROOM/model: holds pytorch_model.bin, whose pickles are never read, but neither model.safetensors nor "
        "model.safetensors.index.json; convert its weights to safetensors",
    ),
    "a folder": (folder(WEIGHTS), "ROOM/model/model.safetensors: cannot be read (Is a directory); restore it"),
    "a pipe": (pipe(WEIGHTS), f"ROOM/model/model.safetensors: {A_PIPE}; restore it"),
    "a device": (link(WEIGHTS, "/dev/zero"), f"ROOM/model/model.safetensors: {A_PIPE}; restore it"),
    "a link to itself": (
        link(WEIGHTS, "model.safetensors"),
        "ROOM/model/model.safetensors: cannot be read (Too many levels of symbolic links); restore it",
    ),
    "NaN": (
        hostile.value(EMBED, np.nan),
        f"ROOM/model/model.safetensors: tensor '{EMBED}' holds NaN or an infinity; every weight must be finite: restore the file",
    ),
    "infinity": (
        hostile.value(NORM, -np.inf),
        f"ROOM/model/model.safetensors: tensor '{NORM}' holds NaN or an infinity; every weight must be finite: restore the file",
    ),
    "wrong shape": (
        hostile.tensors(lambda held: held.update({NORM: np.ones(15, np.float32)})),
        f"ROOM/model/model.safetensors: tensor '{NORM}' has shape (15,), but config.json asks for (16,); correct one of them",
    ),
    "missing tensor": (
        hostile.tensors(lambda held: held.pop(NORM)),
        f"folder ROOM/model: tensor '{NORM}' is missing from the weights; restore them, or correct config.json",
    ),
    "extra tensor": (
        hostile.tensors(lambda held: held.update({"a\nb\x1b[2J": np.ones(1, np.float32)})),
        r"folder ROOM/model: tensor 'a\nb\x1b[2J' in the weights is not used by the model of config.json; correct one of them",
    ),
    "integers": (
        hostile.tensors(lambda held: held.update({NORM: np.ones(16, np.int8)})),
        f"ROOM/model/model.safetensors: tensor '{NORM}' is of type I8; valid: F32, BF16, F16; convert it",
    ),
}
OUTSIDE = "valid: the name of a .safetensors file in this folder; restore it"
HOSTILE_INDEX = {
    "index out of the folder": (
        index({"weight_map": {"a": "../model/a.safetensors"}}),
        f"{JSON_INDEX}: weight_map gives tensor 'a' the file '../model/a.safetensors'; {OUTSIDE}",
    ),
    "index with an absolute path": (
        index({"weight_map": {"a": "/etc/x.safetensors"}}),
        f"{JSON_INDEX}: weight_map gives tensor 'a' the file '/etc/x.safetensors'; {OUTSIDE}",
    ),
    "index with a number": (
        index({"weight_map": {"a": 3, "b": "a.safetensors"}}),
        f"{JSON_INDEX}: weight_map gives tensor 'a' the file 3; {OUTSIDE}",
    ),
    "index that names a missing file": (
        index({"weight_map": {"a": "b.safetensors"}}),
        "ROOM/model/b.safetensors: cannot be read (No such file or directory); restore it",
    ),
    "index that names a tensor not in its file": (
        index({"weight_map": {"a": "a.safetensors"}}),
        f"{JSON_INDEX}: weight_map gives tensor 'a' the file 'a.safetensors', which does not hold it; restore it",
    ),
    "index with a list in it": (
        index({"weight_map": ["a"]}),
        f"{JSON_INDEX}: weight_map must be an object that gives each tensor its file; restore it",
    ),
    "index that is a list": (index([]), f"{JSON_INDEX}: must hold a JSON object, not a list; restore it"),
    "one tensor in two files": (
        lambda room: hostile.split_weights(room, both=NORM),
        f"ROOM/model/b.safetensors: tensor '{NORM}' is in a.safetensors too; remove one of them",
    ),
}
HOSTILE_CONFIG = {
    "config.json missing": (remove(CONFIG), f"{CONFIG_JSON}: is missing; give the folder of a Hugging Face model"),
    "config.json of another model": (
        fields(CONFIG, hidden_size=32, head_dim=4),
        f"ROOM/model/model.safetensors: tensor '{EMBED}' has shape (259, 16), but config.json asks for (259, 32); correct one of them",
    ),
    "config.json of another family": (
        fields(CONFIG, model_type="qwen3", architectures=["Qwen3ForCausalLM"], mlp_bias=None),
        "folder ROOM/model: tensor 'model.layers.0.self_attn.k_norm.weight' (and 3 more) is missing from the weights; restore them, or "
        "correct config.json",
    ),
    "config.json truncated": (
        cut(CONFIG, 20),
        f"{CONFIG_JSON}: cannot be read (Expecting property name enclosed in double quotes: line 2 column 19 (char 20)); restore it",
    ),
    "config.json a list": (text(CONFIG, "[1]"), f"{CONFIG_JSON}: must hold a JSON object, not a list; restore it"),
    "config.json a folder": (folder(CONFIG), f"{CONFIG_JSON}: cannot be read (Is a directory); restore it"),
    "config.json a pipe": (pipe(CONFIG), f"{CONFIG_JSON}: {A_PIPE}; restore it"),
    "config.json in UTF-16": (
        text(CONFIG, "{}".encode("utf-16")),
        f"{CONFIG_JSON}: cannot be read (it is not UTF-8 at byte 0); restore it",
    ),
    "config.json with NaN": (
        swap(CONFIG, '"rope_theta": 10000.0', '"rope_theta": NaN'),
        f"{CONFIG_JSON}: cannot be read (NaN is not a number of JSON); restore it",
    ),
    "config.json with an infinite number": (
        swap(CONFIG, '"rope_theta": 10000.0', '"rope_theta": 1e999'),
        f"{CONFIG_JSON}: cannot be read (1e999 is too large a number); restore it",
    ),
    "config.json with a long number": (
        swap(CONFIG, '"rope_theta": 10000.0', '"rope_theta": ' + "9" * 10**6),
        f"{CONFIG_JSON}: cannot be read (an integer has 1000000 digits); restore it",
    ),
    "config.json nested deeply": (text(CONFIG, DEEP), f"{CONFIG_JSON}: cannot be read (it is nested too deeply); restore it"),
    "config.json of 100 MB": (cut(CONFIG, 10**8), f"{CONFIG_JSON}: has 100000000 bytes, at most 67108864 are read; restore it"),
    "10^12 words": (
        fields(CONFIG, vocab_size=10**12),
        f"{CONFIG_JSON}: vocab_size = 1000000000000: must be at most 2147483647; correct it",
    ),
    "10^9 words": (
        fields(CONFIG, vocab_size=10**9),
        f"ROOM/model/model.safetensors: tensor '{EMBED}' has shape (259, 16), but config.json asks for (1000000000, 16); correct one of them",
    ),
    "10^9 layers": (
        fields(CONFIG, num_hidden_layers=10**9),
        f"{CONFIG_JSON}: num_hidden_layers = 1000000000: must be at most 10000; correct it",
    ),
    "10^4 layers": (
        fields(CONFIG, num_hidden_layers=10**4),
        "folder ROOM/model: config.json has num_hidden_layers = 10000, the weights have 20 tensors; correct one of them",
    ),
    "a family that is a list": (fields(CONFIG, model_type=["llama"]), f"{CONFIG_JSON}: model_type = ['llama']: must be text; correct it"),
    "code in config.json": (
        also(text("model/evil.py", "open('ran', 'w')"), fields(CONFIG, auto_map={"AutoConfig": "evil.C"})),
        f"{CONFIG_JSON}: auto_map = {{'AutoConfig': 'evil.C'}}: is not a field of llama known here and may change the numbers; remove it if "
        "it does not",
    ),
}
TOKENIZER, GENERATION = "model/tokenizer.json", "model/generation_config.json"
BAD_TOKENIZER = "tokenizer ROOM/model: cannot be loaded"
FOLDER_NEEDED = "give a folder with tokenizer.json"
AGAIN = "download the folder again"
HOSTILE_TOKENIZER = {
    "tokenizer truncated": (
        cut(TOKENIZER, 500),
        f"{BAD_TOKENIZER} (ROOM/{TOKENIZER}: cannot be read (Unterminated string starting at: line 27 column 7 (char 496))); {FOLDER_NEEDED}",
    ),
    "tokenizer nested deeply": (
        text(TOKENIZER, DEEP),
        f"{BAD_TOKENIZER} (ROOM/{TOKENIZER}: cannot be read (it is nested too deeply)); {FOLDER_NEEDED}",
    ),
    "tokenizer without content": (text(TOKENIZER, "{}"), f"{BAD_TOKENIZER} (there is no 'added_tokens'); {FOLDER_NEEDED}"),
    "tokenizer a pipe": (pipe(TOKENIZER), f"ROOM/{TOKENIZER}: {A_PIPE}; {AGAIN}"),
    "tokenizer of 100 MB": (cut(TOKENIZER, 10**8), f"ROOM/{TOKENIZER}: has 100000000 bytes, at most 67108864 are read; {AGAIN}"),
    "tokenizer with an enormous id": (
        swap(TOKENIZER, '"vocab": {', '"vocab": {"zz": 4000000000,'),
        f"tokenizer ROOM/model: has the id 4000000000, at most 4194303 is supported; {AGAIN}",
    ),
    "settings a pipe": (pipe("model/tokenizer_config.json"), f"ROOM/model/tokenizer_config.json: {A_PIPE}; {AGAIN}"),
    "stop id that is text": (
        fields(GENERATION, eos_token_id="</s>"),
        f"ROOM/{GENERATION}: eos_token_id = '</s>': must be ids of the tokenizer, from 0 to 258; correct it",
    ),
    "stop id that does not exist": (
        fields(GENERATION, eos_token_id=[257, 259]),
        f"ROOM/{GENERATION}: eos_token_id = [257, 259]: must be ids of the tokenizer, from 0 to 258; correct it",
    ),
}
HOSTILE_LINES = {
    "no file": (remove(JSONL), f"{BAD_JSONL}: cannot be read (No such file or directory); give a file of lines with `prompt`"),
    "an empty file": (text(JSONL, ""), f"{BAD_JSONL}: has no lines; give a file of lines with `prompt`"),
    "a folder for data": (folder(JSONL), f"{BAD_JSONL}: cannot be read (Is a directory); give a file of lines with `prompt`"),
    "a pipe for data": (pipe(JSONL), f"{BAD_JSONL}: {A_PIPE}; give a file of lines with `prompt`"),
    "a device for data": (link(JSONL, "/dev/zero"), f"{BAD_JSONL}: {A_PIPE}; give a file of lines with `prompt`"),
    "a broken line": (
        text(JSONL, '{"prompt": "a"}\n\n{"prompt": "a"\n'),
        f"{BAD_JSONL}, line 3: is not JSON (Expecting ',' delimiter: line 2 column 1 (char 15)); write one object per line",
    ),
    "a line nested deeply": (
        text(JSONL, DEEP),
        f"{BAD_JSONL}, line 1: is not JSON (it is nested too deeply); write one object per line",
    ),
    "an answer that is NaN": (
        text(JSONL, '{"prompt": "a", "answer": NaN}'),
        f"{BAD_JSONL}, line 1: is not JSON (NaN is not a number of JSON); write one object per line",
    ),
    "UTF-16": (
        text(JSONL, '{"prompt": "a"}'.encode("utf-16-le")),
        f"{BAD_JSONL}: holds a zero at byte 1, as UTF-16 does; convert the file to UTF-8",
    ),
    "Latin-1 in the second line": (
        text(JSONL, '{"prompt": "a"}\n{"prompt": "café"}'.encode("latin-1")),
        f"{BAD_JSONL}: is not UTF-8 at byte 31; convert the file",
    ),
    "a line of 17 MB": (
        text(JSONL, '{"prompt": "' + "a" * 17_000_000 + '"}'),
        f"{BAD_JSONL}, line 1: has more than 16777216 bytes; shorten the line",
    ),
    "a hole of 3 GB": (cut(JSONL, 3 * 2**30), f"{BAD_JSONL}, line 3: has more than 16777216 bytes; shorten the line"),
    "a hole of 1 TB": (
        cut(JSONL, 2**40),
        f"{BAD_JSONL}: has 1099511627776 bytes, at most 4294967296 are read; give a file of lines with `prompt`",
    ),
}
RESTORE_RUN = "give another --workdir, or restore the file"
LINE_REMEDY = "remove the line or restore the file"


def in_both_entries(name: str, content: str) -> hostile.Damage:
    return also(*(text(f"run/checkpoints/{step}/{name}", content) for step in (1, 2)))


def signed_info(content: str) -> hostile.Damage:
    """Another info.json whose digest is right: what is signed is not therefore true."""

    def change(room):
        for entry in (room / "run" / "checkpoints").iterdir():
            (entry / "info.json").write_text(content)
            (entry / "manifest.json").write_text(json.dumps(checkpoint._digests(entry)))

    return change


HOSTILE_RUN = {
    "config of the run truncated": (
        cut("run/config.json", 1),
        f"ROOM/run/config.json: cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); {RESTORE_RUN}",
    ),
    "config of the run nested deeply": (
        text("run/config.json", DEEP),
        f"ROOM/run/config.json: cannot be read (it is nested too deeply); {RESTORE_RUN}",
    ),
    "config of the run of another type": (
        fields("run/config.json", steps="many"),
        f"ROOM/run/config.json: is not the config of a run (steps = 'many'); {RESTORE_RUN}",
    ),
    "config of the run missing": (
        remove("run/config.json"),
        "--workdir=ROOM/run: holds metrics.jsonl but no config.json; give another folder, or restore the file",
    ),
    "metrics broken in the middle": (
        put_before("run/metrics.jsonl", '{"step": 0, "tr\n'),
        f"{METRICS}, line 1: is not JSON; {LINE_REMEDY}",
    ),
    "metrics without steps": (put_before("run/metrics.jsonl", "[1]\n"), f"{METRICS}, line 1: is no object with a `step`; {LINE_REMEDY}"),
    "metrics a folder": (folder("run/metrics.jsonl"), f"{METRICS}: cannot be read (Is a directory); restore the file"),
    "metrics a pipe": (pipe("run/metrics.jsonl"), f"{METRICS}: {A_PIPE}; restore the file"),
    "samples broken in the middle": (
        put_before("run/samples.jsonl", '{"step": 1\n'),
        f"ROOM/run/samples.jsonl, line 1: is not JSON; {LINE_REMEDY}",
    ),
    "checkpoints a file": (
        also(remove("run/checkpoints"), text("run/checkpoints", "x")),
        "ROOM/run/checkpoints: is not a folder; give another --workdir, or restore it",
    ),
    "checkpoints of another model": (
        fields("run/model/config.json", hidden_size=32, head_dim=4),
        f"{NO_ENTRY} (2: params/embed has shape (259, 16), the model asks for (259, 32); 1: params/embed has shape (259, 16), the model asks "
        f"for (259, 32)); {OTHER_RUN}",
    ),
    "checkpoints of a shorter model": (
        fields("run/model/config.json", num_hidden_layers=2),
        f"{NO_ENTRY} (2: params/layers/1/attention/k is missing; 1: params/layers/1/attention/k is missing); {OTHER_RUN}",
    ),
    "manifests empty": (
        in_both_entries("manifest.json", "{}"),
        f"{NO_ENTRY} (2: manifest.json does not list info.json; 1: manifest.json does not list info.json); {OTHER_RUN}",
    ),
    "manifests nested deeply": (
        in_both_entries("manifest.json", DEEP),
        f"{NO_ENTRY} (2: it is nested too deeply; 1: it is nested too deeply); {OTHER_RUN}",
    ),
    "checkpoints damaged": (
        in_both_entries("state/_METADATA", "{}"),
        f"{NO_ENTRY} (2: state/_METADATA is damaged; 1: state/_METADATA is damaged); {OTHER_RUN}",
    ),
    "information of another kind": (
        signed_info('{"teacher_hash": "", "data_hash": "", "tokens_total": "x"}'),
        "ROOM/run/checkpoints/2: info.json has tokens_total = 'x'; restore it, or give another --workdir",
    ),
    "a checkpoint under another name": (
        rename("run/checkpoints/2", "run/checkpoints/77"),
        "ROOM/run/checkpoints/77: holds the state after 2 updates; rename it back",
    ),
}
BAD_RECIPE = "recipe 'ROOM/recipe.py': ROOM/recipe.py cannot be loaded"
OTHERS = {
    "fewer rows than ids": (
        also(fields(CONFIG, vocab_size=258), hostile.tensors(lambda held: held.update({EMBED: held[EMBED][:258].copy()}))),
        train_student,
        "student.path: the model has 258 vocabulary rows, its tokenizer 259 ids; give a model and tokenizer that belong together",
    ),
    "tokenizer of another model": (
        also(swap(TOKENIZER, '"a": 97', '"a": 98'), swap(TOKENIZER, '"b": 98', '"b": 97')),
        open_teacher,
        "teacher.path: its tokenizer gives token 'a' the id 98, the student's gives 97; distillation by token ids needs one tokenizer: "
        "choose a teacher of the student's family",
    ),
    "workdir a file": (
        text("new", ""),
        start_in("new"),
        "--workdir=ROOM/new: cannot be created (File exists); give a folder that can be written",
    ),
    "workdir empty": (nothing, start_in(""), "--workdir='' is no folder; give the folder of the run"),
    "workdir with a model in it": (
        lambda room: shutil.copytree(room / "model", room / "new" / "model"),
        start_in("new"),
        "--workdir=ROOM/new: holds model but no config.json; give another folder, or restore the file",
    ),
    "recipe that raises": (
        text("recipe.py", "raise KeyError('a\\nb')"),
        recipe,
        rf"{BAD_RECIPE} (KeyError: 'a\nb'); correct the file",
    ),
    "recipe that exits": (text("recipe.py", "raise SystemExit(0)"), recipe, f"{BAD_RECIPE} (SystemExit: 0); correct the file"),
    "recipe without a config": (
        text("recipe.py", "def get_config(arg):\n  return {}"),
        recipe,
        "config is a dict, it must be the ConfigDict of opd_jax.config.default(); correct get_config",
    ),
    "recipe absent": (nothing, recipe, "recipe 'ROOM/recipe.py': there is no file ROOM/recipe.py; give the path of a config file"),
    "report of a damaged run": (
        text("run/config.json", "{"),
        read_report,
        "ROOM/run/config.json: cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); restore the file, "
        "or give another --workdir",
    ),
    "path too long": (
        nothing,
        lambda room: model_io.open_model("x" * 5000),
        "model '"
        + "x" * 1193
        + " ... "
        + "x" * 708
        + "': is not a folder; give a Hugging Face folder or a repository id such as owner/name",
    ),
    "path with a NUL": (
        nothing,
        lambda room: tasks.make("jsonl", path="a\0b", level=3, train_size=0, eval_size=1, seed=0),
        r"task.path = 'a\x00b': cannot be read (embedded null byte); give a file of lines with `prompt`",
    ),
}
CASES = {
    **{f"weights: {name}": (damage, open_model, message) for name, (damage, message) in (HOSTILE_WEIGHTS | HOSTILE_INDEX).items()},
    **{name: (damage, open_model, message) for name, (damage, message) in (HOSTILE_CONFIG | HOSTILE_TOKENIZER).items()},
    **{f"data: {name}": (damage, read_task, message) for name, (damage, message) in HOSTILE_LINES.items()},
    **{f"run: {name}": (damage, resume, message) for name, (damage, message) in HOSTILE_RUN.items()},
    **OTHERS,
}


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
