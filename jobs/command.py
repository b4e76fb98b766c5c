"""What the commands of jobs/ have in common: an expected error is one line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

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


def end_by_signals() -> None:
    """Let SIGTERM and Ctrl-C end this process with the code of a drained job, once a server has drained:
    uvicorn does so at the first signal, and raises it again when it is done."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(ExitCode.DRAINED.value)


def say(error: TidemillError) -> ExitCode:
    """Print an error; its exit code."""
    print("tidemill: error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    return ExitCode.RETRY_LATER if isinstance(error, RetryLater) else ExitCode.BAD_CONFIG
