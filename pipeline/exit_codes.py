"""What the exit code of a job says. The one place; `--help` and the README are tested against it."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `python -m pipeline.run` and of what starts it; `meaning` is what the help text shows."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    DONE = 0, "all done"
    BAD_CONFIG = 2, "bad configuration or environment; nothing was started"
    TOO_MANY_REJECTS = 3, "finished with rejects over max_reject_fraction; everything generated is kept"
    DAMAGED = 4, "mode=verify found something missing or damaged; mode=repair makes it again"
    NOT_PUBLISHED = 5, "jobs.publish: the run differs from the last published one by more than the limits"
    RETRY_LATER = 75, "a passing fault, or work left that another process holds: start the same command again"
    STOPPED_AT_ONCE = 130, "a second Ctrl-C; committed chunks are kept, the same command resumes"
    DRAINED = (
        143,
        "stopped by SIGTERM, Ctrl-C or a preemption notice after committing what was complete; the same "
        "command resumes",
    )


def help_lines() -> list[str]:
    """One `<code>  <meaning>` line for each exit code."""
    return [f"{code.value:>3}  {code.meaning}" for code in ExitCode]
