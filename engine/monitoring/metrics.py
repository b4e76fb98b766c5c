"""All that is measured in this process: its engines, and what else there is to say."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.errors import ConfigError
from engine.monitoring.definitions import (
    DEVICE_MEMORY_LIMIT,
    DEVICE_MEMORY_USED,
    ENGINE_METRICS,
    Definition,
    Sample,
)
from engine.monitoring.engine_watch import EngineWatch
from engine.monitoring.history import History

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Source(Protocol):
    """Something else that is measured, such as a batch job. Asked from any thread."""

    @property
    def definitions(self) -> tuple[Definition, ...]: ...

    def samples(self) -> Iterable[Sample]: ...

    def facts(self) -> Mapping[str, str]:
        """What people should read of it on the console and the dashboard: a name and a short text each."""
        ...


class Metrics:
    """Watch engines, and read what they did: as samples, as Prometheus' text, or as a history to plot.

    Counting needs no package; `registry` needs prometheus-client (the extra `monitoring`).
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._watches: dict[str, EngineWatch] = {}
        self._sources: list[Source] = []
        self._history: History | None = None

    def watch(self, engine: Any, name: str | None = None) -> EngineWatch:
        """Begin to count what an engine does.

        name: the label `engine` of its metrics (default: the engine's `model_name`).

        Raises:
            ConfigError: another engine is watched under this name.
        """
        name = name or str(engine.model_name)
        with self._lock:
            if name in self._watches:
                raise ConfigError(
                    f"two monitored engines are called {name!r}: give each an esurge_name of its own"
                )
            watch = self._watches[name] = EngineWatch(engine, name)
        engine.add_observer(watch)
        return watch

    def unwatch(self, engine: Any) -> None:
        """Stop counting; what was counted is gone. Nothing is to be done for one that is not watched."""
        with self._lock:
            watches = [each for each in self._watches.values() if each.engine is engine]
            for watch in watches:
                del self._watches[watch.name]
        for watch in watches:
            engine.remove_observer(watch)

    def add_source(self, source: Source) -> None:
        """Report what this source has to say too."""
        with self._lock:
            self._sources.append(source)

    def remove_source(self, source: Source) -> None:
        with self._lock:
            self._sources.remove(source)

    @property
    def watches(self) -> list[EngineWatch]:
        with self._lock:
            return list(self._watches.values())

    @property
    def sources(self) -> list[Source]:
        with self._lock:
            return list(self._sources)

    @property
    def definitions(self) -> tuple[Definition, ...]:
        """Of all that `samples` may give, and of what prometheus-client says of the process."""
        return (*ENGINE_METRICS, *(each for source in self.sources for each in source.definitions))

    def samples(self) -> Iterator[Sample]:
        """Every value, as of now."""
        for watch in self.watches:
            yield from watch.samples()
        for source in self.sources:
            yield from source.samples()
        if self.watches:  # then JAX has been started, which is not for a look to do
            yield from device_memory()

    def facts(self) -> dict[str, str]:
        """Those of all sources."""
        return {name: text for source in self.sources for name, text in source.facts().items()}

    @cached_property
    def registry(self) -> CollectorRegistry:
        """A registry of its own, for prometheus-client. Raises MissingExtraError without that package."""
        from engine.monitoring.exposition import make_registry

        return make_registry(self)

    def remember(self) -> History:
        """The history of the last minutes, begun at the first call."""
        with self._lock:
            if self._history is None:
                self._history = History(self)
            return self._history


def device_memory() -> Iterator[Sample]:
    """What the devices of this process say of their memory."""
    import jax

    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        for definition, key in ((DEVICE_MEMORY_USED, "bytes_in_use"), (DEVICE_MEMORY_LIMIT, "bytes_limit")):
            if key in stats:
                yield Sample(definition, (str(device),), stats[key])


def resident_bytes() -> int | None:
    """This process's resident memory; None where the system does not say it as Linux does."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
