"""Connecting to Ray: with a token, on the loopback, and with an error of one line when it cannot be."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from engine.errors import ConfigError, MissingExtraError, RetryLater
from jobs.ray.settings import LOCAL, RaySettings


def import_ray(is_local: bool) -> ModuleType:
    """Ray, told to demand a token unless the environment says otherwise, and to keep to the loopback when
    a cluster is to be started here. Raises MissingExtraError.
    """
    # Ray reads these when it is imported and when its processes start.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a job reports to nobody
    if is_local:
        # Ray's way to say that a node has the address 127.0.0.1, as it always does on macOS and Windows: an
        # address that it is given is turned into the one that others reach the machine by.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "python -m jobs.ray") from error
    return ray


@contextmanager
def connected(settings: RaySettings) -> Iterator[ModuleType]:
    """Ray, connected while the block runs; a cluster that is started for it ends with it.

    Raises MissingExtraError, ConfigError when the cluster refuses, RetryLater when it does not answer.
    """
    is_local = settings.address == LOCAL
    ray = import_ray(is_local)
    if os.environ["RAY_AUTH_MODE"] != "token":
        print(
            f"tidemill: warning: RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}: whoever reaches the cluster's "
            "ports can run programs on it",
            file=sys.stderr,
            flush=True,
        )
    options = {"include_dashboard": False} if is_local else {}
    try:
        ray.init(settings.address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise RetryLater(
            f"ray.address={settings.address}: no cluster answers there ({_first_line(error)}); start one "
            "(ray start --head), or leave ray.address out to have one started here"
        ) from error
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"ray.address={settings.address}: {_first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
