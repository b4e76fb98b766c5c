"""JAX's persistent compilation cache: where it is, and what of a compilation it could not serve."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

_REQUESTS = "/jax/compilation_cache/compile_requests_use_cache"
_HITS = "/jax/compilation_cache/cache_hits"


@dataclass(slots=True)
class CompileCount:
    """Executables asked for, and those of them read back from the cache."""

    num_requests: int = 0
    num_hits: int = 0

    @property
    def num_compiled(self) -> int:
        return self.num_requests - self.num_hits


def use_compilation_cache(folder: str | None) -> Path:
    """Keep compiled steps in `folder` (None: the one JAX was told of, or `~/.cache/tidemill/compiled`).

    The folder holds code that is run on the next start, so it is private to its owner.
    """
    told: str | None = jax.config.values["jax_compilation_cache_dir"]
    path = Path(folder or told or Path.home() / ".cache" / "tidemill" / "compiled").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    if folder or not told:
        os.chmod(path, 0o700)
    if str(path) != told:
        jax.config.update("jax_compilation_cache_dir", str(path))
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()  # JAX opens its cache once and would keep the folder it had
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


@contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compile afresh inside the block."""
    from jax.experimental.compilation_cache import compilation_cache

    was = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX decides once whether it uses its cache
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()


@contextmanager
def counting_compiles() -> Iterator[CompileCount]:
    """Count what is compiled inside the block."""
    count = CompileCount()

    def listen(event: str, **_: object) -> None:
        count.num_requests += event == _REQUESTS
        count.num_hits += event == _HITS

    jax.monitoring.register_event_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_listener(listen)
