"""The table of wrong and hostile input: what is wrong -> (damage, use, the whole message; ROOM is the folder of the case)."""

import json
import shutil

import hostile
from hostile import also, cut, fields, folder, link, nothing, pipe, put_before, remove, rename, swap, text
from wrong_models import A_PIPE, CONFIG, DEEP, EMBED, HOSTILE_CONFIG, HOSTILE_INDEX, HOSTILE_TOKENIZER, HOSTILE_WEIGHTS, TOKENIZER

from opd_jax import checkpoint, model_io, parallel, train
from opd_jax import config as config_lib
from opd_jax.analysis import report
from opd_jax.data import tasks
from opd_jax.pair import open_pair
from opd_jax.types import MESSAGE_LENGTH


def run_config(steps=3, **changes):
    c = config_lib.default()
    c.task.level, c.rollout.source, c.rollout.batch_size, c.rollout.max_new_tokens = 3, "dataset", 8, 4
    c.signal.divergence, c.steps, c.learner.decay_steps, c.eval.prompts, c.checkpoint.every = "nll", steps, 9, 0, 1
    c.student.init.hidden_size, c.student.init.intermediate_size, c.student.init.num_hidden_layers = 16, 16, 1
    for name, value in changes.items():
        c.update_from_flattened_dict({name.replace("__", "."): value})
    return c


# ---- what a user does with the files


def open_model(room):
    return model_io.open_model(str(room / "model"))


def open_teacher(room):
    c = config_lib.default()
    c.teacher.path, c.rollout.max_new_tokens = str(room / "model"), 4
    return open_pair(config_lib.parse(c), None, parallel.make_mesh())


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


# ---- what is wrong

JSONL, BAD_JSONL = "data.jsonl", "task.path = 'ROOM/data.jsonl'"
NO_ENTRY = "ROOM/run/checkpoints: no checkpoint can be read"
UNLISTED = "manifest.json does not list info.json"
OTHER_SHAPE = "params/embed has shape (259, 16), the model asks for (259, 32)"
OTHER_RUN = "restore one, or give another --workdir"
METRICS = "ROOM/run/metrics.jsonl"
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
NO_NAME = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
RESTORE_RUN = "give another --workdir, or restore the file"
LINE_REMEDY = "remove the line or restore the file"


def in_both_entries(name: str, content: str) -> hostile.Damage:
    return also(*(text(f"run/checkpoints/{step}/{name}", content) for step in (1, 2)))


def signed_info(content: str) -> hostile.Damage:
    """Another info.json whose digest is right: what is signed is not therefore true."""

    def change(room):
        for saved in (room / "run" / "checkpoints").iterdir():
            (saved / "info.json").write_text(content)
            (saved / "manifest.json").write_text(json.dumps(checkpoint._digests(saved)))

    return change


HOSTILE_RUN = {
    "config of the run truncated": (
        cut("run/config.json", 1),
        f"ROOM/run/config.json: cannot be read ({NO_NAME}); {RESTORE_RUN}",
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
        f"{NO_ENTRY} (2: {OTHER_SHAPE}; 1: {OTHER_SHAPE}); {OTHER_RUN}",
    ),
    "checkpoints of a shorter model": (
        fields("run/model/config.json", num_hidden_layers=2),
        f"{NO_ENTRY} (2: params/layers/1/attention/k is missing; 1: params/layers/1/attention/k is missing); {OTHER_RUN}",
    ),
    "manifests empty": (
        in_both_entries("manifest.json", "{}"),
        f"{NO_ENTRY} (2: {UNLISTED}; 1: {UNLISTED}); {OTHER_RUN}",
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
        signed_info('{"base_hash": "", "teacher_hash": "", "data_hash": "", "prompts_hash": "", "tokens_total": "x"}'),
        "ROOM/run/checkpoints/2: info.json has tokens_total = 'x'; restore it, or give another --workdir",
    ),
    "a count of another kind": (
        signed_info(
            '{"base_hash": "", "teacher_hash": "", "data_hash": "", "prompts_hash": "", "tokens_total": 1, "seconds": 1, "flops": null}'
        ),
        "ROOM/run/checkpoints/2: info.json has flops = None; restore it, or give another --workdir",
    ),
    "a checkpoint under another name": (
        rename("run/checkpoints/2", "run/checkpoints/77"),
        "ROOM/run/checkpoints/77: holds the state after 2 updates; rename it back",
    ),
}
BAD_RECIPE = "recipe 'ROOM/recipe.py': ROOM/recipe.py cannot be loaded"
OTHERS = {
    "fewer rows than ids": (
        also(folder("new"), fields(CONFIG, vocab_size=258), hostile.tensors(lambda held: held.update({EMBED: held[EMBED][:258].copy()}))),
        train_student,
        "student.path: the model has 258 vocabulary rows, its tokenizer 259 ids; give a model and tokenizer that belong together",
    ),
    "tokenizer of another model": (
        swap(TOKENIZER, '"a": 97', '"a": 259'),
        open_teacher,
        "teacher.path: its tokenizer gives token 'a' the id 259, the student's gives 97; distillation by token ids needs one tokenizer: "
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
        f"ROOM/run/config.json: cannot be read ({NO_NAME}); restore the file, or give another --workdir",
    ),
    "report of a damaged sample": (
        text("run/samples.jsonl", '{"step": 1}\n'),
        read_report,
        "ROOM/run/samples.jsonl, line 1: prompt is missing, it must be text; remove the line or restore the file",
    ),
    "path too long": (
        nothing,
        lambda room: model_io.open_model("x" * 5000),
        "model '"
        + "x" * (MESSAGE_LENGTH * 3 // 5 - 7)
        + " ... "
        + "x" * 711
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
