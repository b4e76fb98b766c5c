"""What the commands of jobs/ have in common: an expected error is one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from engine.errors import RetryLater, TidemillError
from pipeline.exit_codes import ExitCode


def exit_code_of(run: Callable[[], ExitCode]) -> ExitCode:
    """What `run` returns, or what its error comes to, which is printed."""
    try:
        return run()
    except TidemillError as error:
        return say(error)
    except KeyboardInterrupt:  # before a job's own handling began: nothing is there to drain
        return ExitCode.STOPPED_AT_ONCE


def say(error: TidemillError) -> ExitCode:
    """Print an error; its exit code."""
    print("tidemill: error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    return ExitCode.RETRY_LATER if isinstance(error, RetryLater) else ExitCode.BAD_CONFIG
