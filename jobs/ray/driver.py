"""The driver: starts the workers, shows how far they are, says how it ended. It holds no state of the run.

It may die at any time: Ray ends its workers, and the same command again goes on from the ledger.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from jobs.ray.cluster import connected
from jobs.ray.settings import RaySettings
from jobs.ray.worker import RayWorker, WorkerEnd
from pipeline.exit_codes import ExitCode
from pipeline.ledger import Ledger
from pipeline.live_run import LiveRun
from pipeline.progress import Progress
from pipeline.run import LoadModel, MakeEngine, load_model, make_engine, open_output
from pipeline.settings import Settings
from pipeline.shard_order import WorkerSettings
from pipeline.signals import HandleSignals, StopRequest
from pipeline.storage import open_storage
from pipeline.summary import summary_lines

POLL_SECONDS = 1.0
# A look at the ledger is some requests to the store.
LOOK_SECONDS = 10.0
# Workers drain within their own `drain_seconds`; the answer has some way to go.
ANSWER_SECONDS = 5.0

# A worker that ends with one of these says why.
ERRORS = (ExitCode.BAD_CONFIG, ExitCode.RETRY_LATER)
FINISHED = {ExitCode.DONE, ExitCode.TOO_MANY_REJECTS}


@dataclass(slots=True)
class _Member:
    """A worker of the crew: its actor, and the answer of `work` that is to come."""

    actor: Any
    answer: Any


class Crew:
    """The workers of a run. Ray restarts those that die, and calls `work` again on them."""

    def __init__(self, ray: ModuleType, settings: Settings, cluster: RaySettings, **parts: Any):
        self._ray = ray
        self.ended: list[WorkerEnd] = []
        remote = ray.remote(RayWorker).options(
            max_restarts=cluster.max_restarts,
            max_task_retries=-1,
            max_concurrency=2,  # `work`, and what is asked meanwhile
            **cluster.placement(settings),
        )
        self._members = []
        for index in range(cluster.num_workers):
            place = WorkerSettings(index=index, count=cluster.num_workers)
            own = settings.monitoring.of_worker(place.index)
            actor = remote.remote(replace(settings, worker=place, progress="off", monitoring=own), **parts)
            self._members.append(_Member(actor, actor.work.remote()))

    @property
    def num_working(self) -> int:
        return len(self._members)

    def wait(self, seconds: float) -> None:
        """Take the answers that come within so many seconds, and let go of what those workers held."""
        answers = [member.answer for member in self._members]
        # All that are there, not only the first.
        self._ray.wait(answers, num_returns=1, timeout=seconds)
        done, _ = self._ray.wait(answers, num_returns=len(answers), timeout=0)
        for member in [member for member in self._members if member.answer in done]:
            self._members.remove(member)
            self.ended.append(self._end_of(member))
            self._ray.kill(member.actor)

    def _end_of(self, member: _Member) -> WorkerEnd:
        try:
            return self._ray.get(member.answer)
        except self._ray.exceptions.RayActorError as error:
            return WorkerEnd(ExitCode.RETRY_LATER, f"a worker died once too often: {error}")

    def run(self) -> tuple[str, str] | None:
        """Where the run is and which, as soon as a worker knows."""
        asked = [member.actor.run.remote() for member in self._members]
        if not asked:
            return None
        answered, _ = self._ray.wait(asked, num_returns=len(asked), timeout=POLL_SECONDS)
        for answer in answered:
            try:
                found = self._ray.get(answer)
            except self._ray.exceptions.RayActorError:
                continue
            if found is not None:
                return found
        return None

    def drain(self, cause: str) -> None:
        """Ask all to end; to be repeated, for one that is restarted meanwhile was never asked."""
        for member in self._members:
            member.actor.drain.remote(cause)


def run_on_ray(
    settings: Settings,
    cluster: RaySettings,
    *,
    load_model: LoadModel = load_model,
    make_engine: MakeEngine = make_engine,
    open_ledger: Callable[..., Ledger] = Ledger.open,
    stop: StopRequest | None = None,
) -> ExitCode:
    """Run the job with `cluster.num_workers` workers, or go on with it; prints one summary.

    The callables are those of `run_job`, called in the workers; `stop` asks for a drain. Raises TidemillError
    for what the user must see to before anything is started.
    """
    started = time.monotonic()
    open_output(settings.output).check()
    with connected(cluster) as ray:
        stop = stop or StopRequest(settings.drain_seconds + ANSWER_SECONDS)
        stop.begin_work()
        # After Ray, which sets handlers of its own.
        with HandleSignals(stop):
            parts = {"load_model": load_model, "make_engine": make_engine, "open_ledger": open_ledger}
            crew = Crew(ray, settings, cluster, **parts, folder=os.getcwd())
            live = _watch(crew, settings, cluster, stop)
            return _conclude(crew, live, settings, stop, time.monotonic() - started)


def _watch(crew: Crew, settings: Settings, cluster: RaySettings, stop: StopRequest) -> LiveRun | None:
    """Until every worker has ended; what there is to see of the run then, if it was ever begun."""
    live: LiveRun | None = None
    progress: Progress | None = None
    looked = time.monotonic()
    while crew.num_working:
        crew.wait(POLL_SECONDS)
        if stop.is_asked:
            crew.drain(stop.cause or "the driver")
        if live is None:
            live = _find(crew)
            if live is not None:
                print(f"{cluster.num_workers} workers on {live.storage.url}", file=sys.stderr, flush=True)
                style, every = settings.progress, settings.progress_line_seconds
                progress = Progress(style, live.standing(), line_seconds=every)
        elif time.monotonic() - looked >= min(LOOK_SECONDS, settings.progress_line_seconds):
            live.look()
            looked = time.monotonic()
            if progress is not None:
                progress.update(live.standing())
    if live is not None:
        live.look()
    if progress is not None:
        progress.close()
    return live


def _find(crew: Crew) -> LiveRun | None:
    found = crew.run()
    return None if found is None else LiveRun.open(open_storage(found[0]), found[1])


def _conclude(
    crew: Crew, live: LiveRun | None, settings: Settings, stop: StopRequest, seconds: float
) -> ExitCode:
    code = exit_code(crew.ended, stop.is_asked)
    if live is None:  # refused before it was begun, or done so soon that nobody was asked
        said = [end.message for end in crew.ended if end.code is code and code not in ERRORS]
        print(*said[:1], sep="", end="", flush=True)
    else:
        rows = f"{live.overall.rows_in:,} of {live.plan.num_rows:,} rows are committed"
        headline = {
            ExitCode.DONE: f"Done: {live.plan.num_rows:,} rows in {live.plan.num_shards} shards.",
            ExitCode.TOO_MANY_REJECTS: (
                f"{live.overall.rows_rejected:,} of {live.plan.num_rows:,} rows were rejected, over "
                f"max_reject_fraction={settings.max_reject_fraction:g}; see {live.storage.url}/rejects."
            ),
        }.get(code, f"{code.meaning}; {rows}.")
        print(headline, *summary_lines(live.outcome(seconds)), sep="\n", flush=True)
    for message in errors(crew.ended):
        print("tidemill: error:", message, file=sys.stderr, flush=True)
    return code


def errors(ended: Sequence[WorkerEnd]) -> list[str]:
    """What went wrong in workers, each thing once; of what passes nothing where the run was finished."""
    codes = {end.code for end in ended}
    shown = {ExitCode.BAD_CONFIG} if codes & FINISHED else set(ERRORS)
    said = (end.message.strip() for end in ended if end.code in shown)
    return list(dict.fromkeys(said))


def exit_code(ended: Sequence[WorkerEnd], is_stopped: bool) -> ExitCode:
    """Of the run, from its workers': one that saw the run finished knows best, whatever befell the others."""
    codes = {end.code for end in ended}
    for code in (ExitCode.TOO_MANY_REJECTS, ExitCode.DONE, ExitCode.BAD_CONFIG):
        if code in codes:
            return code
    return ExitCode.DRAINED if is_stopped and ExitCode.DRAINED in codes else ExitCode.RETRY_LATER
