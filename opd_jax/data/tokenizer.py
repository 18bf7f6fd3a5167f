"""Tokenizers: Hugging Face folders, and a byte tokenizer that is itself one. Text in, ids out, and back."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from opd_jax import files
from opd_jax.models import hf
from opd_jax.types import UserError

# Text on which two tokenizers that are called the same are most likely to differ.
PROBES = (
    "The quick brown fox, 3.14159 + 27 = 1234567890!",
    "  leading spaces\ttabs\n\nnewlines  ",
    "naïve café, Straße, 東京, Ελληνικά, 🙂",
    "def f(x):\n    return x**2  # <think> </think> <|im_start|> <|im_end|> <|endoftext|> </s>",
)

_REMEDY = "download the folder again"
# What transformers reads of a folder; a pipe, a device or an enormous file in their places is refused before.
_READ = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "processor_config.json"),
)
_MAX_VOCABULARY = 2**22  # an embedding has a row for each id up to the highest
# Before a chat template: its function of the clock, without one.
_NO_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no UTF-8
UTF8_TOKENS = 4  # a character has at most so many bytes, and a token at least one


class Tokenizer:
    """One fast Hugging Face tokenizer with what a rollout needs to know: stop ids, padding, and whether prompts begin with bos."""

    def __init__(self, fast: Any, *, eos_ids: Iterable[int], adds_bos: bool):
        self._fast = fast
        self.bos_id: int | None = fast.bos_token_id
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        self.pad_id: int = fast.pad_token_id if fast.pad_token_id is not None else (self.eos_ids[0] if self.eos_ids else 0)
        self.adds_bos = adds_bos

    @functools.cached_property
    def vocab_size(self) -> int:
        """The highest id plus one; models may have more rows, as padding."""
        return max(self._fast.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text in the middle of a sequence: no special tokens, and no space that some tokenizers put before a first word."""
        before = self._encode("\n") if self._adds_space else []
        ids = self._encode("\n" + text) if self._adds_space else self._encode(text)
        return ids[len(before) :]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text at the beginning of a sequence: with bos where this tokenizer begins sequences with it."""
        return ([self.bos_id] if self.adds_bos else []) + self._encode(text)

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat template, in which every special token is spelled out."""
        return self._encode(text)

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the tokenizer's own chat template (of several, the one named default)."""
        template = self._fast.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def render_chat(self, messages: list[dict[str, str]], template: str, **variables) -> str:
        """The text of a conversation up to where the assistant's answer begins. transformers renders it in Jinja's sandbox.

        A template that asks for the date gets 26 Jul 2024, the one that Llama 3's has without a clock: prompts must not change overnight.
        """
        return self._fast.apply_chat_template(
            messages, chat_template=_NO_CLOCK + template, tokenize=False, add_generation_prompt=True, **variables
        )

    def special_tokens(self) -> list[str]:
        """Every token that is not made by splitting text: the special ones and those added to the vocabulary."""
        return sorted({*self._fast.all_special_tokens, *self._fast.get_added_vocab()})

    def _encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False)

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether "a" after a line break is other tokens than "a" alone, as with SentencePiece's dummy prefix."""
        line = self._encode("\n")
        after = self._encode("\na")
        return after[: len(line)] == line and after[len(line) :] != self._encode("a")

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens; bytes that are no UTF-8 become replacement characters."""
        return self._fast.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self, ids: Iterable[int], *, before: Iterable[int] = ()) -> list[str]:
        """What each token adds to the text of the tokens ahead of it, `before` among them; joined, the pieces are that text.

        A character that several tokens make stands at the one that completes it, the others are empty. Special tokens stand by their names.
        """
        before = list(before)
        ids = before + list(ids)
        pieces = [""] * len(ids)
        start, read = 0, len(before)  # pieces of ids[:read] are settled; those from `start` on are decoded again, as context
        for end in range(read + 1, len(ids) + 1):
            if ids[end - 1] in self.special_ids:
                if read < end - 1:
                    pieces[end - 2] = self._added(ids[start:read], ids[read : end - 1])
                pieces[end - 1] = self._name(ids[end - 1])
                start, read = end - 1, end
                continue
            added = self._added(ids[start:read], ids[read:end])
            if not added.endswith(REPLACEMENT):
                pieces[end - 1] = added
                start, read = read, end
            elif end - read == UTF8_TOKENS:  # the oldest token is not the beginning of a character after all
                pieces[read] = self._added(ids[start:read], ids[read : read + 1])
                read += 1
        if read < len(ids):
            pieces[-1] = self._added(ids[start:read], ids[read:])
        return pieces[len(before) :]

    def _added(self, context: list[int], ids: list[int]) -> str:
        return self._whole(context + ids)[len(self._whole(context)) :]

    def _whole(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str:
        """A token by itself, in the middle of a text; one that is not whole characters stands as the bytes it holds, <0xE6>."""
        if token in self.special_ids:
            return self._name(token)
        text = self._added(self._middle, [token])
        if REPLACEMENT not in text:
            return text
        name = self._name(token)
        bytes_of = {character: byte for byte, character in enumerate(_byte_characters())}
        if all(character in bytes_of for character in name) and not name.startswith("<0x"):
            return "".join(f"<0x{bytes_of[character]:02X}>" for character in name)
        return name

    @functools.cached_property
    def _middle(self) -> list[int]:
        return self._encode("a")[-1:]

    def _name(self, token: int) -> str:
        return self._fast.convert_ids_to_tokens(token) or f"<{token}>"

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text: what `decode` leaves out, and those that stop a completion."""
        added = self._fast.added_tokens_decoder
        return frozenset({*self.eos_ids, *self._fast.all_special_ids, *(i for i, token in added.items() if token.special)})

    def vocabulary(self) -> dict[str, int]:
        return self._fast.get_vocab()

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the files that `load`, and transformers, read back to the same tokenizer and stop ids."""
        folder = pathlib.Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._save(folder)
        except Exception as error:  # tokenizers raises plain Exceptions where the disk is full
            raise UserError(f"folder {folder}: the tokenizer cannot be written ({files.reason(error)}); give another one") from None

    def _save(self, folder: pathlib.Path) -> None:
        self._fast.save_pretrained(folder)
        settings = folder / "tokenizer_config.json"
        fields = json.loads(settings.read_text(encoding="utf-8")) | {"add_bos_token": self.adds_bos}
        settings.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else (list(self.eos_ids) or None)
        ids = {"bos_token_id": self.bos_id, "eos_token_id": eos, "pad_token_id": self.pad_id}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")

    def stopping_at(self, ids: Iterable[int]) -> "Tokenizer":
        """The same tokenizer with other stop ids."""
        return Tokenizer(self._fast, eos_ids=ids, adds_bos=self.adds_bos)

    def fingerprint(self) -> str:
        """Hex digest of the vocabulary, the special ids and the encodings of PROBES."""
        facts = [sorted(self.vocabulary().items()), self.eos_ids, self.bos_id, self.adds_bos, [self.encode(text) for text in PROBES]]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def load(path_or_repo: str) -> Tokenizer:
    """The tokenizer "byte", of a Hugging Face folder, or of a hub id. Raises UserError. Code in the folder is never run."""
    if path_or_repo == "byte":
        return byte()
    import transformers

    folder = hf.local_folder(path_or_repo)
    settings = {name: _settings(folder / name) for name in ("tokenizer_config.json", "generation_config.json", "config.json")}
    for path in (folder / name for name in _READ if os.path.lexists(folder / name)):
        files.check_regular(path, where=str(path), remedy=_REMEDY, limit=files.MAX_JSON_BYTES)
    try:
        # AutoTokenizer would take the class that config.json's model_type suggests, whose rules go before those of tokenizer.json.
        if (folder / "tokenizer.json").is_file():
            fast = transformers.PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        elif _is_bare_gpt2(folder):
            fast = transformers.GPT2TokenizerFast.from_pretrained(folder)
        else:
            fast = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        begins = fast.encode("a", add_special_tokens=True)[:1] == [fast.bos_token_id]
        size = max(fast.get_vocab().values()) + 1
    except Exception as error:  # transformers and tokenizers raise many types for a folder they cannot read
        raise UserError(f"tokenizer {path_or_repo}: cannot be loaded ({_why(folder, error)}); give a folder with tokenizer.json") from None
    if size > _MAX_VOCABULARY:
        raise UserError(f"tokenizer {path_or_repo}: has the id {size - 1}, at most {_MAX_VOCABULARY - 1} is supported; {_REMEDY}")
    said = settings["tokenizer_config.json"].get("add_bos_token")
    adds_bos = fast.bos_token_id is not None and bool(begins if said is None else said)
    stops = [i for name in ("generation_config.json", "config.json") for i in _stop_ids(folder / name, settings[name], size)]
    return Tokenizer(fast, eos_ids=stops + [i for i in [fast.eos_token_id] if i is not None], adds_bos=adds_bos)


def _is_bare_gpt2(folder: pathlib.Path) -> bool:
    """Whether a folder holds nothing but GPT-2's two files, which name no tokenizer class."""
    others = ("tokenizer.json", "tokenizer_config.json", "config.json")
    return all((folder / name).is_file() for name in ("vocab.json", "merges.txt")) and not any((folder / name).exists() for name in others)


def _why(folder: pathlib.Path, error: Exception) -> str:
    """The file that is no JSON, if there is one: the libraries do not say which file they stumble over."""
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
        try:
            _settings(folder / name)
        except UserError as broken:
            return str(broken).removesuffix(f"; {_REMEDY}")
    return files.reason(error)


def _stop_ids(path: pathlib.Path, settings: dict[str, Any], size: int) -> list[int]:
    """The ids that end a completion, according to one file. Raises UserError for what is no id of the tokenizer."""
    value = settings.get("eos_token_id")
    found = value if isinstance(value, list) else [] if value is None else [value]
    for i in found:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < size:
            raise UserError(f"{path}: eos_token_id = {files.shown(value)}: must be ids of the tokenizer, from 0 to {size - 1}; correct it")
    return found


def _settings(path: pathlib.Path) -> dict[str, Any]:
    return files.read_json(path, remedy=_REMEDY) if os.path.lexists(path) else {}


@functools.cache
def byte() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; <bos> 256, <eos> 257, <pad> 258, also where a text spells them. Saved as a tokenizer.json."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    core = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(_byte_characters())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    return Tokenizer(fast, eos_ids=[fast.eos_token_id], adds_bos=False)


def _byte_characters() -> list[str]:
    """The printable character by which byte-level tokenizers write each byte: itself, or one from 256 on for those that do not print."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(i) if i in printable else chr(next(others)) for i in range(256)]


def check_compatible(student: Tokenizer, teacher: Tokenizer, *, same_prompts: bool = True, texts: Iterable[str] = ()) -> None:
    """Refuses a teacher for whom ids mean something else than for the student. Raises UserError.

    Compared are every id of the student's vocabulary, the ids of PROBES, of its special tokens within text and of `texts`, how prompts
    begin (`same_prompts`), and the stop ids. The teacher may know more ids; sizes of padded vocabularies are not compared.
    """
    _check_vocabulary(student.vocabulary(), teacher.vocabulary())
    specials = "".join(f"x{token}x {token} x" for token in student.special_tokens())
    for text in (*PROBES, specials, *texts):
        a, b = student.encode(text), teacher.encode(text)
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise UserError(
                f"teacher.path: its tokenizer splits {text[:40]!r} differently from token {at} ({b[at : at + 3]}, not {a[at : at + 3]}), "
                "choose a teacher of the student's family"
            )
    if same_prompts and student.encode_prompt("a") != teacher.encode_prompt("a"):
        raise UserError(
            f"teacher.path: its prompts begin with {teacher.encode_prompt('a')[:2]}, the student's with {student.encode_prompt('a')[:2]}; "
            "make add_bos_token agree in tokenizer_config.json"
        )
    if set(student.eos_ids) != set(teacher.eos_ids):
        raise UserError(
            f"teacher.path: its stop ids {sorted(teacher.eos_ids)} are not the student's {sorted(student.eos_ids)}, so the student "
            "would not stop where the teacher does; set rollout.stop=union to stop at any of them, or make eos_token_id agree in "
            "generation_config.json"
        )


def _check_vocabulary(ours: dict[str, int], theirs: dict[str, int]) -> None:
    """Every token of the student has the same id at the teacher, and every id up to the student's last is the same token."""
    token_of = {index: token for token, index in theirs.items()}
    for token, index in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token, index) != index:
            raise UserError(
                f"teacher.path: its tokenizer gives token {token!r} the id {theirs[token]}, the student's gives {index}; "
                "distillation by token ids needs one tokenizer: choose a teacher of the student's family"
            )
        if token_of.get(index) != token:
            known = f"is {token_of[index]!r} to" if index in token_of else "is unknown to"
            raise UserError(
                f"teacher.path: the student's token {token!r} (id {index}) {known} the teacher's tokenizer; "
                "distillation by token ids needs one tokenizer: choose a teacher of the student's family"
            )
