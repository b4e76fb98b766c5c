"""A grammar is compiled in a process of its own first: what it takes down, or keeps busy, is that process.

llguidance counts its work and refuses most of what is too much, but not everything: a chain of some
thousand rules overflows its stack, which no handler in the same process survives.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from engine.errors import RequestError

TRIAL_SECONDS = 10.0
"""What llguidance's own limits let pass takes half a second at most."""
MEMORY_BYTES = 2 << 30
_PROGRAM = Path(__file__).with_name("trial_process.py")


class Trials:
    """One process, started when it is first needed and again after it went down. Thread-safe, one at a time.

    tokenizer: its JSON; None: single bytes, for grammars that name no tokens.
    """

    def __init__(
        self,
        limits: Mapping[str, Any],
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ):
        self._begin = {
            "tokenizer": tokenizer,
            "vocab_size": vocab_size,
            "eos_token_ids": list(eos_token_ids),
            "limits": dict(limits),
            "memory_bytes": MEMORY_BYTES,
        }
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._end: Any = None

    def error_of(self, grammar: str) -> str:
        """What llguidance says of a grammar, empty when it can be followed.

        Raises RequestError ("bad_sampling") for one that the process did not survive, or not in
        TRIAL_SECONDS.
        """
        with self._lock:
            answer = self._ask(grammar)
            if answer is None:
                self.close()
                raise RequestError(
                    "bad_sampling",
                    "sampling.structured cannot be compiled: it takes more memory, stack or time "
                    f"({TRIAL_SECONDS:.0f} s) than one may: make it smaller",
                )
            return answer

    def close(self) -> None:
        """End the process; the next grammar starts another."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _ask(self, grammar: str) -> str | None:
        """The answer; None when none came."""
        process = self._process or self._start()
        assert process.stdin is not None, "it is a pipe"
        assert process.stdout is not None, "it is a pipe"
        try:
            print(json.dumps(grammar), file=process.stdin, flush=True)
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([process.stdout], [], [], TRIAL_SECONDS)
        line = process.stdout.readline() if ready else ""
        return json.loads(line) if line.endswith("\n") else None

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._process, self._end = process, weakref.finalize(self, _stop, process)
        print(json.dumps(self._begin), file=process.stdin, flush=True)
        return process


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
