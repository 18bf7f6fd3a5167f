"""Question-answer pairs as a tensorflow-datasets builder, in ArrayRecord files, which needs no TensorFlow. Imported where it is used."""

import contextlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds

from opd_jax import files
from opd_jax.types import UserError

Rows = Mapping[str, Sequence[tuple[str, str]]]  # split -> (question, answer)


class Gsm8k(tfds.core.GeneratorBasedBuilder):
    """Grade-school word problems with worked solutions (Cobbe et al. 2021), or a user's own in that form."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing lies beside this file for tfds to find; its search needs importlib_resources, which it does not install

    def __init__(self, *, rows: Rows, **settings):
        self._rows = rows
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"question": text, "answer": text}), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(rows) for split, rows in self._rows.items()}

    def _generate_examples(self, rows):
        for index, (question, answer) in enumerate(rows):
            yield index, {"question": question, "answer": answer}


def open_prepared(rows: Rows, digest: str, cache_dir: str | os.PathLike) -> dict[str, Sequence]:
    """{split: random-access source of {"question", "answer"}}, prepared below `cache_dir` on first use, under the digest of the rows.

    What is half written has another name; of two processes that prepare at once, the first to finish is used. Raises UserError.
    """
    folder = pathlib.Path(cache_dir) / "gsm8k" / digest
    try:
        if not folder.is_dir():
            _prepare(rows, folder)
        builder = tfds.builder_from_directory(_version_folder(folder))
        sources = {split: builder.as_data_source(split=split) for split in rows}
        whole = all(_agree(sources[split], rows[split]) for split in rows)
    except Exception as error:  # tfds, ArrayRecord and the file system raise many types
        raise UserError(f"cache_dir = {str(cache_dir)!r}: {folder} cannot be used ({files.reason(error)}); remove it") from None
    if not whole:
        raise UserError(f"cache_dir = {str(cache_dir)!r}: {folder} is damaged; remove it, it is made again")
    return sources


def _agree(source: Sequence, rows: Sequence[tuple[str, str]]) -> bool:
    """The length, and the rows at both ends: files that were cut off or mixed up are noticed at the start."""
    ends = (0, len(rows) - 1) if len(source) == len(rows) else ()
    found = [(source[i]["question"].decode(), source[i]["answer"].decode()) for i in ends]
    return found == [tuple(rows[i]) for i in (0, len(rows) - 1)]


def _prepare(rows: Rows, folder: pathlib.Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix="tmp_", dir=folder.parent))
    try:
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of a download, which there is not
            Gsm8k(rows=rows, data_dir=temporary, file_format="array_record").download_and_prepare()
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _version_folder(folder: pathlib.Path) -> pathlib.Path:
    return next(folder.glob("*/1.0.0"))
