"""The fields of a request body, taken one by one: what nobody takes is refused, so that no field is
ignored."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from engine.errors import RequestError


def refuse(reason: str, param: str, message: str) -> NoReturn:
    """Raise the RequestError of one field; the message says what to do."""
    raise RequestError(reason, f"{param}: {message}", param)


def kind_of(value: object) -> str:
    """A JSON value's type, by the name that JSON gives it."""
    if isinstance(value, bool):
        return "boolean"
    names = {str: "string", int: "number", float: "number", list: "array", type(None): "null"}
    return names.get(type(value), "object" if isinstance(value, Mapping) else type(value).__name__)


class Fields:
    """The fields of a JSON object. Nulls count as absent, as OpenAI's clients send them."""

    def __init__(self, values: object, where: str = ""):
        """`where`: the object's own place in the body, for its fields' names in messages."""
        if not isinstance(values, Mapping):
            refuse("wrong_type", where or "body", f"is a JSON {kind_of(values)}; give an object")
        self._where = where
        self._left = {str(name): value for name, value in values.items() if value is not None}
        self.known: list[str] = []

    def path(self, name: str) -> str:
        """The field's name from the body's top."""
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str, default: Any = None) -> Any:
        """The field's value, whatever it is."""
        self.known.append(name)
        return self._left.pop(name, default)

    def has(self, name: str) -> bool:
        """Whether it is given and not taken yet."""
        return name in self._left

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            refuse("wrong_type", self.path(name), f"is a JSON {kind_of(value)}; give text")
        return value

    def needed_text(self, name: str) -> str:
        value = self.text(name)
        if not value:
            refuse("missing_column", self.path(name), "is missing or empty; give text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            refuse("wrong_type", self.path(name), f"is a JSON {kind_of(value)}; give true or false")
        return value

    def one_of(self, name: str, choices: Collection[Any], default: Any = None) -> Any:
        """The value, which must be one of `choices` where it is given."""
        value = self.take(name, default)
        if value is not None and value not in choices:
            listed = ", ".join(map(repr, choices))
            refuse("not_supported", self.path(name), f"is {_shown(value)}; give {listed}, or leave it out")
        return value

    def absent(self, *names: str) -> None:
        """Refuse what OpenAI has and this engine has not."""
        for name in names:
            if self.take(name) is not None:
                refuse("not_supported", self.path(name), "is not supported; leave it out")

    def refuse_rest(self) -> None:
        """Nothing more is known: refuse what was not taken."""
        for name in self._left:
            near = difflib.get_close_matches(name, self.known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            refuse("unknown_field", self.path(name), f"is no field that is known here; {hint}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
