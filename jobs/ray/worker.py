"""The process of one worker: the pipeline's own, run inside a Ray actor.

All that workers know of each other is in the output's ledger, as without Ray. What Ray adds is where they
run, and that a dead one is started again.
"""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

from engine.errors import RetryLater, TidemillError
from pipeline.exit_codes import ExitCode
from pipeline.ledger import Ledger
from pipeline.run import LoadModel, MakeEngine, run_job
from pipeline.settings import Settings
from pipeline.signals import StopRequest


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """How a worker ended. `message` is what it would have said to a user: an error, or its summary."""

    code: ExitCode
    message: str


class RayWorker:
    """Made an actor by the driver. `work` takes as long as the run; the other methods answer meanwhile, from
    a second thread.
    """

    def __init__(
        self,
        settings: Settings,
        load_model: LoadModel,
        make_engine: MakeEngine,
        open_ledger: Callable[..., Ledger] = Ledger.open,
        folder: str = "",
    ):
        """`folder` is what relative paths start from, where this machine has it: the driver's."""
        if os.path.isdir(folder):
            os.chdir(folder)
        self._settings = settings
        self._load_model = load_model
        self._make_engine = make_engine
        self._open = open_ledger
        self._stop = StopRequest(settings.drain_seconds)
        self._run: tuple[str, str] | None = None

    def work(self) -> WorkerEnd:
        """Run the job until nothing is left of it; called again, by Ray, when the process died meanwhile."""
        said = io.StringIO()
        try:
            with redirect_stdout(said):  # the driver says once what each of them would
                code = run_job(
                    self._settings,
                    load_model=self._load_model,
                    make_engine=self._make_engine,
                    open_ledger=self._open_ledger,
                    stop=self._stop,
                )
            return WorkerEnd(code, said.getvalue())
        except RetryLater as error:
            return WorkerEnd(ExitCode.RETRY_LATER, str(error))
        except TidemillError as error:
            return WorkerEnd(ExitCode.BAD_CONFIG, str(error))
        except Exception:  # a fault of the program: as text, for not every exception survives pickling
            return WorkerEnd(ExitCode.BAD_CONFIG, traceback.format_exc())

    def _open_ledger(self, *arguments: Any, **options: Any) -> Ledger:
        ledger = self._open(*arguments, **options)
        self._run = (ledger.storage.url, ledger.fingerprint)
        return ledger

    def run(self) -> tuple[str, str] | None:
        """The output (of a fork, its folder) and the fingerprint of the run; None before it is begun."""
        return self._run

    def drain(self, cause: str) -> None:
        """Commit what is complete, and end."""
        self._stop.ask(cause)
