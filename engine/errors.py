"""Errors a user can act on. Every message is one line: what is wrong, where, and what to do."""

from __future__ import annotations


class TidemillError(Exception):
    """Base of all errors raised on purpose; printed without a traceback."""


class ConfigError(TidemillError):
    """The configuration or the environment cannot work as given (exit code 2)."""


class ModelError(ConfigError):
    """A model file is missing, damaged, or of an architecture that is not implemented."""


class InputError(ConfigError):
    """The input as a whole cannot be read (a single bad row is a reject, not an error)."""


class OutputError(ConfigError):
    """The output cannot be written, or belongs to another configuration."""


class MissingExtraError(ConfigError):
    """An optional package is needed and absent."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'tidemill[{extra}]'")
        self.package = package
        self.extra = extra


class RequestError(TidemillError):
    """One request cannot run; the others are unaffected.

    `reason` is a short code (`bad_sampling`, `prompt_too_long`, ...) used as the reject reason of its row;
    `param` names the field of an API request that is wrong, where it is one.
    """

    def __init__(self, reason: str, message: str, param: str | None = None):
        super().__init__(message)
        self.reason = reason
        self.param = param


class Overloaded(TidemillError):
    """An engine that others share has as many unfinished requests as it may: this one was not taken.

    `retry_after_s` is when one will probably have ended, in whole seconds, at least 1.
    """

    def __init__(self, max_waiting: int, retry_after_s: int):
        super().__init__(
            f"the engine has {max_waiting} unfinished requests, as many as it may have (max_waiting): "
            f"try again in {retry_after_s} s"
        )
        self.retry_after_s = retry_after_s


class EngineClosed(TidemillError):
    """The engine takes no requests any more: it was closed, or its device failed."""


class RetryLater(TidemillError):
    """A passing fault (disk full, lost credential, unknown outcome): start again later (exit code 75)."""


class RetraceError(TidemillError):
    """A compiled step was asked for a shape that was not declared and compiled ahead of time."""
