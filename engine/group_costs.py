"""What it costs to read a shared prefix once for a group of rows, and by each row alone, on this device.

The constants are kept in `group_costs.json`, most of them measured by `python -m jobs.bench groups`:

    {"default": {COSTS}, "devices": {KEY: {COSTS}}}

where COSTS are `token`, `query` and `group` (see `GroupCosts`) and `source`, which says how they were found;
measured ones have the `command`, the `date` and the `machine` as well. A device has several keys, a narrower
one before a wider one (`device_keys`); one that has no entry takes the default.

The choice changes time only: a grouped result is the plain one. Plain Python, no JAX.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

COSTS_FILE = Path(__file__).with_name("group_costs.json")

_NUMBERS = ("token", "query", "group")
_SOURCES = ("measured", "estimate")


@dataclass(frozen=True, slots=True)
class GroupCosts:
    """What attention costs on one kind of device, in microseconds of one layer.

    A group pays when what its rows no longer read is more than what the extra pass costs.
    """

    token: float
    """For a row to read the keys and values of one more token of a prefix by itself; 0: groups never pay."""
    query: float
    """To put a query's running softmax aside after the shared pages and take it up again."""
    group: float
    """To set up one more pass."""

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"GroupCosts.{name} is {value!r}: give microseconds, 0 or more")

    def saving(self, num_rows: int, num_queries: int, num_tokens: int) -> float:
        """What reading `num_tokens` once for `num_rows` rows saves; negative when it costs more."""
        return (num_rows - 1) * num_tokens * self.token - num_queries * self.query - self.group


def device_keys(platform: str, device_kind: str, backend: str, isa: str | None) -> tuple[str, ...]:
    """The names under which constants for a device are looked for, the narrowest first.

    Args:
        platform, device_kind: as JAX names the device.
        backend: of attention, as `kernels.paged_attention.available_backends()` names it.
        isa: the native kernels' instruction set; None without them.
    """
    if platform != "cpu":
        return f"{platform} {backend} {device_kind}", f"{platform} {backend}"
    if backend == "cpu":
        return (f"cpu native {isa}",)
    return (f"cpu {backend}",)


def group_costs(keys: tuple[str, ...], path: Path = COSTS_FILE) -> GroupCosts | None:
    """The constants kept for a device with these keys, else the default; None where groups never pay.

    Raises ConfigError, naming the file and the entry, when the file is not what it must be.
    """
    default, devices = read_costs(path)
    costs = next((devices[key] for key in keys if key in devices), default)
    return costs if costs.token > 0 else None


def read_costs(path: Path = COSTS_FILE) -> tuple[GroupCosts, dict[str, GroupCosts]]:
    """The default and the constants by device; every entry is checked. Raises ConfigError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); reinstall tidemill") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(content, dict) or set(content) != {"default", "devices"}:
        raise ConfigError(f'{path}: it must hold "default" and "devices" and nothing else; {_REMEDY}')
    if not isinstance(content["devices"], dict):
        raise ConfigError(f'{path}: "devices" must be entries by name; {_REMEDY}')
    devices = {key: _entry(entry, f"{path}: {key!r}") for key, entry in content["devices"].items()}
    return _entry(content["default"], f"{path}: 'default'"), devices


_REMEDY = "mend it, or measure again with `python -m jobs.bench groups`"


def _entry(entry: Any, place: str) -> GroupCosts:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{place} is not an entry with {', '.join(_NUMBERS)} and source; {_REMEDY}")
    source = str(entry.get("source")).partition(":")[0]
    if source not in _SOURCES:
        raise ConfigError(f"{place}: source is {entry.get('source')!r}: begin it with measured or estimate:")
    wanted = {*_NUMBERS, "source"} | ({"command", "date", "machine"} if source == "measured" else set())
    if set(entry) != wanted:
        wrong = ", ".join(sorted(set(entry) ^ wanted))
        raise ConfigError(f"{place} has keys too many or too few ({wrong}); {_REMEDY}")
    try:
        return GroupCosts(**{name: entry[name] for name in _NUMBERS})
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
