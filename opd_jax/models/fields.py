"""The fields of a config.json with typed access."""

from typing import Any

from opd_jax.types import UserError


class Fields:
    """A config.json whose errors name the file, the field and its value.

    A field that is null counts as missing, but for those read by `optional_*` and `token*`: there null is a value, "none".
    """

    def __init__(self, fields: dict[str, Any], where: str):
        self.fields, self.where = fields, where

    def refuse(self, name: str, remedy: str) -> UserError:
        value = repr(self.fields.get(name))
        return UserError(f"{self.where}: {name} = {value if len(value) < 100 else value[:100] + '...'}: {remedy}")

    def _get(self, name: str, default: Any, kinds: type | tuple[type, ...], what: str, valid) -> Any:
        value = self.fields.get(name)
        value = default if value is None else value
        if isinstance(value, bool) != (kinds is bool) or not isinstance(value, kinds) or not valid(value):
            raise self.refuse(name, f"must be {what}; correct the file")
        return value

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        return self._get(name, default, int, f"an integer of at least {least}", lambda value: value >= least)

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._get(name, default, (int, float), "a positive number", lambda value: 0 < value < float("inf")))

    def boolean(self, name: str, default: bool) -> bool:
        return self._get(name, default, bool, "true or false", lambda value: True)

    def optional_integer(self, name: str, default: int | None) -> int | None:
        return None if self.fields.get(name, default) is None else self.integer(name, default)

    def optional_number(self, name: str, default: float | None) -> float | None:
        return None if self.fields.get(name, default) is None else self.number(name, default)

    def token(self, name: str, default: int | None = None) -> int | None:
        if self.fields.get(name, default) is None:
            return None
        return self._get(name, default, int, "a token id or null", lambda value: True)

    def tokens(self, name: str, default: int | None = None) -> tuple[int, ...]:
        value = self.fields.get(name, default)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise self.refuse(name, "must be a token id, a list of them or null; correct the file")
        return tuple(values)
