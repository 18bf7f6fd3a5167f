"""What a model reads before a completion: the task's prompt as it is, or inside a chat template. Student and teacher have one each."""

import dataclasses
import hashlib
import json
import pathlib

from opd_jax import config as config_lib
from opd_jax import files
from opd_jax.config import ConfigError
from opd_jax.data import tokenizer as tokenizer_lib
from opd_jax.data.tokenizer import Tokenizer

PLAIN, CHAT, AS_STUDENT = "none", "chat", "student"
MAX_TEMPLATE_BYTES = 2**20
_PROBE = "What is 17 + 25?"


@dataclasses.dataclass(frozen=True)
class Reader:
    """How one model reads prompts. Where prompts are encoded it stands in for the tokenizer."""

    tokenizer: Tokenizer
    template: str | None = None  # Jinja text of a chat template; None: the prompt as it is
    system: str = ""
    variables: tuple[tuple[str, bool], ...] = ()  # what the template is given beside the messages

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    def render(self, prompt: str) -> str:
        """The text that the model reads. Raises ConfigError for a template that cannot be rendered."""
        if self.template is None:
            return prompt
        messages = [{"role": "system", "content": self.system}] if self.system else []
        try:
            return self.tokenizer.render_chat([*messages, {"role": "user", "content": prompt}], self.template, **dict(self.variables))
        except Exception as error:  # a template is a program, and may raise what it likes
            raise ConfigError(
                f"the chat template cannot be rendered ({files.reason(error)}); correct it, or give another template"
            ) from None

    @property
    def digest(self) -> str:
        """Of everything that turns a prompt into ids."""
        facts = [self.tokenizer.fingerprint(), self.template, self.system, self.variables]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of the prompt. A template spells its special tokens itself, so none is put before it."""
        return self.tokenizer.encode_prompt(prompt) if self.template is None else self.tokenizer.encode_rendered(self.render(prompt))


def make_readers(settings: config_lib.Context, student: Tokenizer, teacher: Tokenizer | None) -> tuple[Reader, Reader | None]:
    """(the student's, the teacher's); None for a teacher that reads the student's prompts, ids and all.

    Raises UserError for a template that cannot be used, and for a teacher whose ids are not the student's.
    """
    own = make_reader(settings.student, student, "context.student")
    if teacher is None:
        return own, None
    if settings.teacher.template == AS_STUDENT:
        check_compatible(own, dataclasses.replace(own, tokenizer=teacher))
        return own, None
    theirs = make_reader(settings.teacher, teacher, "context.teacher")
    check_compatible(own, theirs)
    return own, theirs


def make_reader(settings: config_lib.Reader, tokenizer: Tokenizer, field: str) -> Reader:
    """The reader of one block of a config. Raises ConfigError for a template that is missing, or that ignores what it is told."""
    template = _template(settings.template, tokenizer, field)
    if settings.thinking and "enable_thinking" not in (template or ""):
        raise ConfigError(
            f"config field {field}.thinking = {settings.thinking!r}: the template of {field}.template = {settings.template!r} has no "
            "switch enable_thinking; leave the field empty"
        )
    variables = (("enable_thinking", settings.thinking == "on"),) if settings.thinking else ()
    reader = Reader(tokenizer, template, settings.system, variables)
    try:
        rendered = reader.render(_PROBE)
    except ConfigError as error:
        raise ConfigError(f"config field {field}.template = {settings.template!r}: {error}") from None
    if _PROBE not in rendered:
        raise ConfigError(
            f"config field {field}.template = {settings.template!r}: the prompt is not in what it renders; correct the template"
        )
    if settings.system and settings.system not in rendered:
        raise ConfigError(
            f"config field {field}.system = {settings.system[:40]!r}: the chat template leaves it out; put it into the task's prompts"
        )
    return reader


def _template(name: str, tokenizer: Tokenizer, field: str) -> str | None:
    if name == PLAIN:
        return None
    if name == CHAT:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"config field {field}.template = 'chat': the model's tokenizer has no chat template; give a file with one, or 'none'"
            )
        return tokenizer.chat_template
    return read_template(
        name, where=f"config field {field}.template = {name!r}", remedy="give 'none', 'chat' or a UTF-8 file with a Jinja chat template"
    )


def read_template(path: str, *, where: str, remedy: str) -> str:
    """The text of a file with a Jinja template. Raises UserError."""
    files.check_regular(path, where=where, remedy=remedy, limit=MAX_TEMPLATE_BYTES)
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read ({files.reason(error)}); {remedy}") from None


def check_compatible(student: Reader, teacher: Reader) -> None:
    """Refuses a teacher for whom the ids of prompts, templates or completions mean something else than for the student."""
    prompt = "\n".join(tokenizer_lib.PROBES)
    rendered = [reader.render(prompt) for reader in (student, teacher) if reader.template is not None]
    tokenizer_lib.check_compatible(
        student.tokenizer, teacher.tokenizer, same_prompts=student.template is None and teacher.template is None, texts=rendered
    )
