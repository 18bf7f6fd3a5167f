"""Wrong and hostile model folders: what is wrong -> (damage, the whole message of who opens the folder; ROOM is what it lies in)."""

import json

import hostile
import numpy as np
from hostile import WEIGHTS, also, cut, entry, fields, folder, index, link, pipe, remove, rename, swap, text

DEEP = "[" * 200_000
FILE = "ROOM/model/model.safetensors"
ST = f"{FILE}: cannot be read as safetensors"
CONFIG, CONFIG_JSON = "model/config.json", "ROOM/model/config.json"
JSON_INDEX = "ROOM/model/model.safetensors.index.json"
A_PIPE = "cannot be read (a pipe or a device, not a file)"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"

HOSTILE_WEIGHTS = {
    "header claims 2^60 bytes": (hostile.weights("{}", length=2**60), f"{ST} (header too large); restore it"),
    "header longer than the file": (hostile.weights("{}", length=1000), f"{ST} (invalid header length); restore it"),
    "header of 100 MB": (
        also(hostile.weights("{}", length=100_000_000), cut(WEIGHTS, 100_000_100)),
        f"{FILE}: has a header of 100000000 bytes, at most 16777216 are read; split the file",
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
        f"{ST} (invalid JSON in header: invalid value: integer `-4`, expected usize at line 1 column 63); restore it",
    ),
    "shape that overflows": (
        hostile.weights({"a": entry(0, 0, (2**32, 2**32))}),
        f"{ST} (overflow computing buffer size from shape and/or element type); restore it",
    ),
    "empty tensor of enormous shape": (
        hostile.tensors(lambda held: held.update({"x": np.zeros((2**31, 0), np.float32)})),
        "folder ROOM/model: tensor 'x' in the weights is not used by the model of config.json; correct one of them",
    ),
    "size of another type": (
        hostile.weights({"a": entry(0, 16, (5,))}, bytes(16)),
        f"{ST} (invalid shape, data type, or offset for tensor); restore it",
    ),
    "one name twice": (
        hostile.weights(f'{{"a": {json.dumps(entry(0, 16))}, "a": {json.dumps(entry(0, 16, (2, 2)))}}}', bytes(16)),
        f"{FILE}: names 'a' twice in its header; restore it",
    ),
    "unknown type": (
        hostile.weights({"a": entry(0, 16, dtype="F" * 5_000_000)}, bytes(16)),
        f"{ST} (invalid JSON in header: unknown variant `{'F' * 125}...); restore it",
    ),
    "empty file": (text(WEIGHTS, ""), f"{ST} (header too small); restore it"),
    "truncated file": (cut(WEIGHTS, 5000), f"{ST} (incomplete metadata, file not fully covered); restore it"),
    "a zip with pickles": (text(WEIGHTS, b"PK\3\4" + bytes(100)), f"{ST} (invalid header length); restore it"),
    "pickles alone": (
        rename(WEIGHTS, "model/pytorch_model.bin"),
        "folder ROOM/model: holds pytorch_model.bin, whose pickles are never read, but neither model.safetensors nor "
        "model.safetensors.index.json; convert its weights to safetensors",
    ),
    "a folder": (folder(WEIGHTS), f"{FILE}: cannot be read (Is a directory); restore it"),
    "a pipe": (pipe(WEIGHTS), f"{FILE}: {A_PIPE}; restore it"),
    "a device": (link(WEIGHTS, "/dev/zero"), f"{FILE}: {A_PIPE}; restore it"),
    "a link to itself": (
        link(WEIGHTS, "model.safetensors"),
        f"{FILE}: cannot be read (Too many levels of symbolic links); restore it",
    ),
    "NaN": (
        hostile.value(EMBED, np.nan),
        f"{FILE}: tensor '{EMBED}' holds NaN or an infinity; every weight must be finite: restore the file",
    ),
    "infinity": (
        hostile.value(NORM, -np.inf),
        f"{FILE}: tensor '{NORM}' holds NaN or an infinity; every weight must be finite: restore the file",
    ),
    "wrong shape": (
        hostile.tensors(lambda held: held.update({NORM: np.ones(15, np.float32)})),
        f"{FILE}: tensor '{NORM}' has shape (15,), but config.json asks for (16,); correct one of them",
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
        f"{FILE}: tensor '{NORM}' is of type I8; valid: F32, BF16, F16; convert it",
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
        f"{FILE}: tensor '{EMBED}' has shape (259, 16), but config.json asks for (259, 32); correct one of them",
    ),
    "config.json of another family": (
        fields(CONFIG, model_type="qwen3", architectures=["Qwen3ForCausalLM"], mlp_bias=None),
        "folder ROOM/model: tensor 'model.layers.0.self_attn.k_norm.weight' (and 3 more) is missing from the weights; restore them, or "
        "correct config.json",
    ),
    "config.json truncated": (
        cut(CONFIG, 20),
        f"{CONFIG_JSON}: cannot be read (Expecting value: line 2 column 19 (char 20)); restore it",
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
        f"{FILE}: tensor '{EMBED}' has shape (259, 16), but config.json asks for (1000000000, 16); correct one of them",
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
        f"{CONFIG_JSON}: auto_map = {{'AutoConfig': 'evil.C'}}: is not a field of llama known here and may change the numbers; remove it "
        "if it does not",
    ),
}
TOKENIZER, GENERATION = "model/tokenizer.json", "model/generation_config.json"
BAD_TOKENIZER = "tokenizer ROOM/model: cannot be loaded"
FOLDER_NEEDED = "give a folder with tokenizer.json"
UNTERMINATED = "Unterminated string starting at: line 27 column 7 (char 496)"
AGAIN = "download the folder again"
HOSTILE_TOKENIZER = {
    "tokenizer truncated": (
        cut(TOKENIZER, 500),
        f"{BAD_TOKENIZER} (ROOM/{TOKENIZER}: cannot be read ({UNTERMINATED})); {FOLDER_NEEDED}",
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
