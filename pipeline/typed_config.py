"""Turn a composed mapping (text, numbers, lists from YAML and the command line) into frozen dataclasses.

Strict on purpose: an unknown key, a wrong type or a value outside its range is a ConfigError on one line that
says where, what was found, what is accepted and the nearest valid name. Nothing is guessed or rounded.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from engine.errors import ConfigError, RequestError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance of dataclass `cls` from `values`; keys left out take the dataclass's defaults.

    `where` is the dotted path of `values` in the configuration, for messages. Raises ConfigError.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    for key in values:
        if key not in fields:
            raise unknown_key(dotted(where, key), [dotted(where, name) for name in fields])
    missing = [
        dotted(where, name)
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is missing: give it on the command line, {missing[0]}=…")
    arguments = {key: convert(value, hints[key], dotted(where, key)) for key, value in values.items()}
    try:
        return cls(**arguments)
    except (ConfigError, RequestError) as error:  # sampling values come from requests too
        raise ConfigError(prefixed(where, str(error))) from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or ConfigError naming `where`."""
    try:
        return _convert(value, hint, where)
    except _Mismatch:
        raise ConfigError(f"{where}={_shown(value)}: expected {describe(hint)}, got {_kind(value)}") from None


class _Mismatch(Exception):
    """A value is not of the hinted type; the caller knows the whole hint and writes the message."""


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if hint is None or hint is type(None):
        return _only(value is None, value)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{where}={_shown(value)}: {did_you_mean(str(value), [str(a) for a in arguments])}")
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # built by a caller in Python
            return value
        return build(hint, _only(isinstance(value, Mapping), value), where)  # type: ignore[type-var]
    if origin in (list, tuple, Sequence, Iterable) or hint in (list, tuple):
        return _convert_sequence(value, origin or hint, arguments, where)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        _only(isinstance(value, Mapping), value)
        key_hint, item_hint = arguments or (Any, Any)
        return {
            _convert(key, key_hint, where): _convert(item, item_hint, f"{where}.{key}")
            for key, item in value.items()
        }
    if hint is float:
        return float(_only(isinstance(value, int | float) and not isinstance(value, bool), value))
    if hint is int:
        return _only(isinstance(value, int) and not isinstance(value, bool), value)
    if isinstance(hint, type):
        return _only(isinstance(value, hint), value)
    raise TypeError(f"{where}: settings cannot be of type {hint!r}")


def _convert_union(value: Any, alternatives: tuple[Any, ...], where: str) -> Any:
    for alternative in alternatives:
        try:
            return _convert(value, alternative, where)
        except _Mismatch:
            continue
    raise _Mismatch


def _convert_sequence(value: Any, origin: Any, arguments: tuple[Any, ...], where: str) -> Any:
    _only(isinstance(value, list | tuple), value)
    fixed = origin is tuple and arguments and Ellipsis not in arguments
    if fixed:
        _only(len(value) == len(arguments), value)
    item_hints = arguments if fixed else (arguments[0] if arguments else Any,) * len(value)
    pairs = enumerate(zip(value, item_hints, strict=True))
    items = [_convert(item, item_hint, f"{where}[{i}]") for i, (item, item_hint) in pairs]
    return items if origin is list else tuple(items)


def _only(accepted: bool, value: Any) -> Any:
    if not accepted:
        raise _Mismatch
    return value


def known_keys(cls: type, where: str = "") -> list[str]:
    """Every dotted key that `cls` accepts, sections included."""
    hints = typing.get_type_hints(cls)
    keys = []
    for field in dataclasses.fields(typing.cast(Any, cls)):
        key = dotted(where, field.name)
        keys.append(key)
        if dataclasses.is_dataclass(hints[field.name]):
            keys.extend(known_keys(typing.cast(type, hints[field.name]), key))
    return keys


def unknown_key(key: str, known: Sequence[str]) -> ConfigError:
    """The error for a key that no dataclass has, naming the nearest one."""
    return ConfigError(f"unknown configuration key {key!r}: {did_you_mean(key, known)}")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`did you mean 'x'?` when something is near, and the whole list otherwise."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?" + (f" (one of {', '.join(known)})" if len(known) <= 6 else "")
    return f"choose one of {', '.join(known)}"


def dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def prefixed(where: str, message: str) -> str:
    """`message` with its section in front, unless it already names it."""
    return message if not where or message.startswith(where) else f"{where}: {message}"


def describe(hint: Any) -> str:
    """A type annotation in words: `an integer or null`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    if origin in (list, tuple, Sequence, Iterable) or hint in (list, tuple):
        return "a list" + (f" of {describe(arguments[0])} each" if arguments else "")
    return "a mapping"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    is_plain = type(value) in (bool, int, float, str, type(None))
    return describe(type(value)) if is_plain else type(value).__name__


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
