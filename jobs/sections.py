"""Settings of a command beside the job's own: `ray.num_workers=4` among `input.path=… output.path=…`.

They are no part of the job's configuration, so that the same overrides mean the same run under every command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from engine.errors import ConfigError
from pipeline.typed_config import build

T = TypeVar("T")


def take_section(arguments: Sequence[str], section: str, cls: type[T]) -> tuple[T, list[str]]:
    """The `section.key=value` among `arguments` as an instance of dataclass `cls`, and the other arguments.

    Values are written as on the job's command line. Raises ConfigError for what cannot be read, an unknown
    key, a wrong type or a value out of range.
    """
    values: dict[str, Any] = {}
    rest: list[str] = []
    for argument in arguments:
        key, has_value, _ = argument.partition("=")
        if not key.startswith(f"{section}."):
            rest.append(argument)
            continue
        if not has_value:
            raise ConfigError(f"{argument!r} is not an override: write {key}=value")
        try:
            read = OverridesParser.create().parse_override(argument).value()
        except HydraException as error:
            raise ConfigError(f"cannot read {argument!r}: quote values with special characters") from error
        values[key.removeprefix(f"{section}.")] = read
    return build(cls, values, section), rest


def section_help(section: str, cls: type) -> str:
    """A line for each key with its default; what they mean is in the dataclass's docstring."""
    lines = [" ".join((cls.__doc__ or "").split()), ""]
    for field in dataclasses.fields(cast(Any, cls)):
        default = field.default if field.default is not dataclasses.MISSING else "required"
        shown = "null" if default is None else default
        lines.append(f"  {section}.{field.name}={shown}")
    return "\n".join(lines)
