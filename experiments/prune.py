"""Makes a student out of a teacher by dropping layers; writes a Hugging Face folder with the teacher's tokenizer.

python experiments/prune.py --teacher=DIR --keep=0,1,3,4 --out=DIR
"""

import pathlib
import shutil

import _checkout  # noqa: F401
from absl import flags

from opd_jax import cli
from opd_jax.models import hf, prune
from opd_jax.types import UserError

TEACHER = flags.DEFINE_string("teacher", None, "Hugging Face folder or hub id.")
KEEP = flags.DEFINE_list("keep", None, "Layers to keep, counted from 0, rising.")
OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist, or be empty.")
flags.mark_flags_as_required(["teacher", "keep", "out"])

# What belongs to a tokenizer and to generation; copied as it is.
COMPANIONS = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt
chat_template.jinja chat_template.json generation_config.json"""


def main(argv: list[str]) -> None:
    out = pathlib.Path(OUT.value)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: exists and is not an empty folder; give another one")
    try:
        keep = tuple(int(layer) for layer in KEEP.value)
    except ValueError:
        raise UserError(f"--keep={','.join(KEEP.value)}: must be layer numbers with commas between them, such as 0,1,3") from None
    source = hf.local_folder(TEACHER.value)
    params, teacher_config = hf.load(source)
    params, config = prune.keep_layers(params, teacher_config, keep)
    hf.save(out, params, config)
    try:
        for name in COMPANIONS.split():
            if (source / name).is_file():
                shutil.copyfile(source / name, out / name)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); give another folder") from None
    print(f"wrote {out}: layers {','.join(KEEP.value)} of {teacher_config.num_layers}")


if __name__ == "__main__":
    cli.run(main)
