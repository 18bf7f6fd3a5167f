"""Grade-school word problems (GSM8K, Cobbe et al. 2021) or a user's own in that form: the final number is compared exactly.

`task.path` is a folder with train.jsonl and test.jsonl (`question`, and `answer` that ends in "#### number"), a folder laid out as the
hub has it (main/*.parquet), or a dataset's id on the Hugging Face hub; empty: openai/gsm8k. "train" is trained on, the first
`task.eval_size` problems of "test" are held out. Worked solutions are learnt without the calculator's notes `<<48/2=24>>`, which are no
part of the reasoning.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence

from opd_jax import files
from opd_jax.data.tasks import Example, Lazy, Verdict, answers
from opd_jax.data.tasks.lines import read as read_lines
from opd_jax.types import UserError

HUB_ID = "openai/gsm8k"
INSTRUCTION = 'Think step by step, and end with a line that has "#### " and the number alone.'
SPLITS = ("train", "test")
_NOTE = re.compile(r"<<[^<>\n]*>>")


@dataclasses.dataclass(frozen=True)
class Gsm8k:
    train: Sequence[Example]
    held_out: Sequence[Example]
    digest: str
    name = "gsm8k"
    verifiable = True

    def examples(self, split: str) -> Sequence[Example]:
        return {"train": self.train, "eval": self.held_out}[split]

    def verify(self, example: Example, text: str) -> Verdict:
        """The final number (see answers.final_number) has the value of the reference."""
        given = answers.final_number(text)
        if given is None:
            words = f'there is no number; end with a line "#### " and the answer, which is {example.answer}'
            return Verdict(0.0, words, well_formed=False)
        if answers.exact(given) == answers.exact(example.answer):
            return Verdict(1.0)
        return Verdict(0.0, f"the answer is {given[:80]}, it should be {example.answer}")

    def vote(self, text: str) -> str | None:
        """The value of the final number."""
        given = answers.final_number(text)
        value = answers.exact(given) if given is not None else None
        return None if value is None else str(value)


def _example(rows: Sequence, index: int) -> Example:
    """Made on access, from rows that stay on disk."""
    row = rows[index]
    question, answer = row["question"].decode(), row["answer"].decode()
    return Example(index, f"{question}\n{INSTRUCTION}\n", solution=_NOTE.sub("", answer), answer=reference(answer))


def reference(answer: str) -> str | None:
    """The number after the last `####`; None where there is none."""
    _, mark, after = answer.rpartition("####")
    found = answers.numbers(after) if mark else []
    return found[0] if found and answers.exact(found[0]) is not None else None


def read(path: str, *, train_size: int, eval_size: int, cache_dir: str) -> Gsm8k:
    """Reads and prepares the problems, below `cache_dir` under a digest of their text. Raises UserError."""
    from opd_jax.data.tasks import gsm8k_builder

    folder = _folder(path)
    rows = {split: _read_split(folder, split) for split in SPLITS}
    digest = hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
    held_out = {question for question, _ in rows["test"]}
    rows["train"] = [row for row in rows["train"] if row[0] not in held_out]
    if len(rows["train"]) < max(train_size, 1):
        raise UserError(f"task.path = {path!r}: has {len(rows['train'])} problems to train on; lower task.train_size = {train_size}")
    sources = gsm8k_builder.open_prepared(rows, digest, cache_dir)
    sizes = train_size or len(rows["train"]), min(eval_size, len(rows["test"]))
    train, held_out = (Lazy(size, functools.partial(_example, sources[split])) for split, size in zip(SPLITS, sizes, strict=True))
    return Gsm8k(train, held_out, digest)


def _folder(path: str) -> pathlib.Path:
    given = pathlib.Path(path or HUB_ID)
    if given.is_dir():
        return given
    if given.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path or HUB_ID):
        raise UserError(
            f"task.path = {path!r}: is not a folder; give a folder with train.jsonl and test.jsonl, or a dataset's id such as {HUB_ID}"
        )
    import huggingface_hub

    try:
        patterns = ["main/*.parquet", "train.jsonl", "test.jsonl"]
        return pathlib.Path(huggingface_hub.snapshot_download(str(given), repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many types: offline, not found, gated, broken connection
        raise UserError(
            f"task.path = {path!r}: the dataset {given} cannot be fetched from the Hugging Face hub ({files.reason(error)}); "
            "give a folder with train.jsonl and test.jsonl"
        ) from None


def _read_split(folder: pathlib.Path, split: str) -> list[tuple[str, str]]:
    """(question, answer) of each problem, with a number to verify."""
    plain, packed = folder / f"{split}.jsonl", sorted(folder.glob(f"main/{split}-*.parquet"))
    if plain.exists() or not packed:
        lines, _ = read_lines(str(plain), task="gsm8k", holds="`question` and `answer`")
        rows = [(line.where, line.required("question"), line.required("answer")) for line in lines]
    else:
        rows = [row for path in packed for row in _read_parquet(path)]
    for where, _, answer in rows:
        if reference(answer) is None:
            raise UserError(f'{where}: `answer` does not end in "#### " and a number; correct the line')
    return [(question, answer) for _, question, answer in rows]


def _read_parquet(path: pathlib.Path) -> list[tuple[str, str, str]]:
    import pyarrow.parquet

    where, remedy = f"task.path: {path}", "download it again"
    files.check_regular(path, where=where, remedy=remedy, limit=files.MAX_JSON_BYTES)
    try:
        table = pyarrow.parquet.read_table(path, columns=["question", "answer"]).to_pydict()
    except Exception as error:  # pyarrow raises many types for a file it cannot read
        raise UserError(f"{where}: cannot be read ({files.reason(error)}); {remedy}") from None
    rows = list(zip(table["question"], table["answer"], strict=True)) if len(table) == 2 else []
    if not rows or not all(isinstance(text, str) for row in rows for text in row):
        raise UserError(f"{where}: must have the columns `question` and `answer` with text; {remedy}")
    return [(f"{where}, row {number}", *row) for number, row in enumerate(rows, start=1)]
