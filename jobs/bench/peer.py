"""A competitor's process: started and timed, given workloads, and its memory read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from engine.errors import ConfigError
from jobs.bench.competitors import REPOSITORY, Launch
from jobs.bench.measurement import Measurement
from jobs.bench.processes import peak_memory_bytes, proportional_memory_bytes
from jobs.bench.workloads import Workload

_CLOSE_SECONDS = 20


class PeerProcess:
    """The process of a `Launch`, with the model loaded; `start_seconds` is from its start to being ready.

    It has a process group of its own, so that the processes it starts are ended with it. Raises ConfigError,
    with the end of what it said, when it cannot start or dies.
    """

    def __init__(self, name: str, launch: Launch):
        self.name = name
        self._plan: dict[str, Any] = {}
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as long as the process)
        started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                [str(launch.python), "-m", launch.module],
                cwd=REPOSITORY,
                env=os.environ | launch.variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise ConfigError(f"cannot start {launch.python} for {name}: {error.strerror}") from error
        try:
            self.about: str = self._ask({"do": "load"} | launch.settings)["about"]
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started

    @property
    def pid(self) -> int:
        return self._process.pid

    def prepare(self, workload: Workload, plan: dict[str, Any] | None) -> dict[str, Any]:
        """Warm it up on a workload like those to come, under `plan` or after finding the best one."""
        if plan is None:
            self._plan = self._ask({"do": "prepare"} | _job(workload))["plan"]
        else:
            self._ask({"do": "run", "plan": plan} | _job(workload))
            self._plan = plan
        return self._plan

    def run(self, workload: Workload) -> Measurement:
        done = self._ask({"do": "run", "plan": self._plan} | _job(workload))
        token_ids = tuple(tuple(ids) for ids in done["token_ids"])
        memory = {
            "peak_memory_bytes": peak_memory_bytes(self.pid),
            "proportional_memory_bytes": proportional_memory_bytes(self.pid),
        }
        return Measurement(self.name, done["seconds"], token_ids, done["details"] | memory)

    def close(self) -> None:
        """End it and every process it started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ConfigError(self._why_dead())
        return json.loads(answer)

    def _why_dead(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        said = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        # An error's last line comes before what other processes and exit handlers still say.
        errors = [line for line in said if "Error: " in line]
        last = (errors or said or ["it said nothing"])[-1]
        return f"the peer {self.name} ended with status {code}: {last}"


def _job(workload: Workload) -> dict[str, Any]:
    requests = list(zip(workload.prompts, workload.max_tokens, strict=True))
    return {"requests": requests, "sampling": asdict(workload.sampling)}
