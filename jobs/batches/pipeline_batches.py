"""The server's batches, run one after the other by a thread of the server, on the engines that its clients
use.

One machine has one model loaded, so batches share the engine with the clients instead of loading it again:
their rows wait behind the clients' requests (`jobs/batches/shared_engine.py`). The state of everything is on
disk (`jobs/batches/store.py`), and a batch's work is in the ledger of its run: a server that was killed goes
on with the last committed chunk when it is started again, to the same bytes.
"""

from __future__ import annotations

import logging
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import EngineClosed, RetryLater, TidemillError
from engine.openai_requests import ENDPOINTS
from engine.server.batches.backend import Batch, BatchFault, Refused, StoredFile
from jobs.batches.running import (
    BatchModel,
    counts_so_far,
    make_stop,
    run_batch,
    tokens_used,
    write_outputs,
)
from jobs.batches.store import MAX_FILE_BYTES, BatchStore, output_file_id
from jobs.batches.validation import check_input
from pipeline.signals import StopRequest

log = logging.getLogger("tidemill.batches")

MAX_UNFINISHED = 100
"""Of a tenant."""
MAX_STORED_BYTES = 20 * 2**30
"""Of a tenant's files together."""
MAX_WINDOW_S = 7 * 24 * 3600
RETRY_SECONDS = 5.0
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([hms])")
_UNIT_SECONDS = {"h": 3600, "m": 60, "s": 1}


class PipelineBatches:
    """A `BatchBackend`. Raises ConfigError where the folder cannot be used.

    Args:
        root: a local folder; what it holds of an earlier server is gone on with.
        models: by the names that bodies use.
        record_usage: told at a batch's end whose it was, and its tokens of prompts and of completions.
        clock: Unix seconds.
    """

    def __init__(
        self,
        root: str | Path,
        models: Mapping[str, BatchModel],
        *,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_stored_bytes: int = MAX_STORED_BYTES,
        max_unfinished: int = MAX_UNFINISHED,
        record_usage: Callable[[str, int, int], None] | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self._store = BatchStore(root, max_file_bytes=max_file_bytes)
        self._models = dict(models)
        self._max_stored_bytes = max_stored_bytes
        self._max_unfinished = max_unfinished
        self._record_usage = record_usage
        self._clock = clock
        self._changed = threading.Condition()
        self._is_closing = False
        self._running: tuple[str, StopRequest] | None = None
        self._thread: threading.Thread | None = None

    @property
    def max_file_bytes(self) -> int:
        return self._store.max_file_bytes

    def start(self) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tidemill-batches", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop the batch that runs, after what it can commit in a few seconds, and let go of the folder."""
        with self._changed:
            self._is_closing = True
            if self._running is not None:
                self._running[1].ask("shutdown")
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._store.close()

    # -- files -------------------------------------------------------------------------------------

    def create_file(self, tenant: str | None, filename: str, content: BinaryIO) -> StoredFile:
        held = sum(file.num_bytes for file in self._store.files(tenant))
        room = self._max_stored_bytes - held
        if room <= 0:
            raise Refused(
                "your files take all the space there is for them; delete some", "file", "storage_full"
            )
        most = min(self.max_file_bytes, room)
        return self._store.add_file(tenant, filename, content, "batch", self._now(), max_bytes=most)

    def file(self, tenant: str | None, file_id: str) -> StoredFile:
        return self._store.file(tenant, file_id)

    def files(self, tenant: str | None) -> list[StoredFile]:
        return self._store.files(tenant)

    def content(self, tenant: str | None, file_id: str) -> Iterator[bytes]:
        return self._store.content(tenant, file_id)

    def delete_file(self, tenant: str | None, file_id: str) -> None:
        self._store.delete_file(tenant, file_id)

    # -- batches -----------------------------------------------------------------------------------

    def create_batch(
        self,
        tenant: str | None,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        metadata: Mapping[str, str] | None,
    ) -> Batch:
        file = self._store.file(tenant, input_file_id)
        if file.purpose != "batch":
            raise Refused("the file was not uploaded for a batch", "input_file_id", "invalid_purpose")
        if endpoint not in ENDPOINTS:
            raise Refused(f"batches are run for {', '.join(ENDPOINTS)}", "endpoint", "invalid_endpoint")
        seconds = _window_seconds(completion_window)
        now = self._now()
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            tenant=tenant,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            created_at=now,
            expires_at=now + seconds,
            metadata=dict(metadata) if metadata is not None else None,
        )
        with self._changed:
            if sum(each.tenant == tenant for each in self._store.unfinished()) >= self._max_unfinished:
                message = f"{self._max_unfinished} of your batches are unfinished, as many as may be"
                raise Refused(message, None, "too_many_batches")
            self._store.add_batch(batch)
            self._changed.notify_all()
        return batch

    def batch(self, tenant: str | None, batch_id: str) -> Batch:
        return self._counted(self._store.batch(tenant, batch_id))

    def batches(self, tenant: str | None) -> list[Batch]:
        return [self._counted(batch) for batch in self._store.batches(tenant)]

    def cancel(self, tenant: str | None, batch_id: str) -> Batch:
        with self._changed:
            batch = self._store.batch(tenant, batch_id)
            if batch.is_finished or batch.status == "finalizing":
                raise Refused(
                    f"the batch is {batch.status}: it cannot be cancelled", "batch_id", "batch_ended"
                )
            if batch.status != "cancelling":
                batch = self._put(batch, status="cancelling", cancelling_at=self._now())
            if self._running is not None and self._running[0] == batch_id:
                self._running[1].ask("a cancellation")
            self._changed.notify_all()
        return self._counted(batch)

    # -- the thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._is_closing and not self._store.unfinished():
                    self._changed.wait()
                if self._is_closing:
                    return
                # What is cancelled need not wait for its turn.
                batch = min(self._store.unfinished(), key=lambda each: each.status != "cancelling")
                stop = make_stop()
                self._running = (batch.id, stop)
            try:
                self._advance(batch, stop)
            except (RetryLater, EngineClosed) as error:  # a passing fault: the batch waits for a better time
                log.warning("batch %s waits: %s", batch.id, error)
                with self._changed:
                    self._running = None
                    self._changed.wait_for(lambda: self._is_closing, RETRY_SECONDS)
            except (TidemillError, OSError) as error:
                log.error("batch %s failed: %s", batch.id, error)
                self._fail(batch.id, [BatchFault(code="server_error", message=str(error))])
            except Exception as error:
                log.exception("batch %s failed", batch.id)
                message = f"the server failed on this batch ({type(error).__name__}); its log says how"
                self._fail(batch.id, [BatchFault(code="server_error", message=message)])
            finally:
                with self._changed:
                    self._running = None

    def _advance(self, batch: Batch, stop: StopRequest) -> None:
        """Take a batch as far as it goes: to its end, or until the server is closed."""
        if batch.status == "validating":
            checked = check_input(self._input(batch), batch.endpoint, self._models)
            if checked.faults:
                self._fail(batch.id, list(checked.faults))
                return
            counts = replace(batch.counts, total=checked.num_requests)
            self._change(
                batch.id,
                "validating",
                status="in_progress",
                model=checked.model,
                counts=counts,
                in_progress_at=self._now(),
            )
        batch = self._current(batch)
        if batch.status == "in_progress":
            self._run(batch, stop)
        batch = self._current(batch)
        if batch.status in ("finalizing", "cancelling"):
            self._finish(batch)

    def _run(self, batch: Batch, stop: StopRequest) -> None:
        model = self._models.get(batch.model or "")
        if model is None:
            message = f"the model {batch.model!r} is not served any more"
            self._fail(batch.id, [BatchFault(code="model_not_found", message=message)])
            return
        timer = threading.Timer(max(0.0, batch.expires_at - self._clock()), stop.ask, ["its expiry"])
        timer.daemon = True
        timer.start()
        try:
            is_done = run_batch(batch, self._store.folder(batch.id), model, stop)
        finally:
            timer.cancel()
        if is_done or (self._clock() >= batch.expires_at and not self._is_closing):
            self._change(batch.id, "in_progress", status="finalizing", finalizing_at=self._now())

    def _finish(self, batch: Batch) -> None:
        """Make the files of what is committed, and say how the batch ended."""
        folder = self._store.folder(batch.id)
        is_cancelled = batch.status == "cancelling"
        ended_as = "cancelled" if is_cancelled else "completed"
        if not is_cancelled and not (folder / "run" / "manifest.json").exists():
            ended_as = "expired"
        with tempfile.TemporaryFile(dir=folder) as output, tempfile.TemporaryFile(dir=folder) as errors:
            counts = write_outputs(folder, output, errors, ended_as)
            kept = {
                "output_file_id": self._keep(batch, "output", output) if counts.completed else None,
                "error_file_id": self._keep(batch, "error", errors) if counts.failed else None,
            }
        times = {f"{ended_as}_at": self._now()}
        with self._changed:
            self._put(self._current(batch), status=ended_as, counts=counts, **kept, **times)
        if self._record_usage is not None and batch.tenant is not None:
            self._record_usage(batch.tenant, *tokens_used(folder))

    def _keep(self, batch: Batch, kind: str, content: BinaryIO) -> str:
        content.seek(0)
        file_id = output_file_id(batch.id, kind)
        name = f"{batch.id}_{kind}.jsonl"
        self._store.add_file(batch.tenant, name, content, "batch_output", self._now(), file_id=file_id)
        return file_id

    def _fail(self, batch_id: str, faults: list[BatchFault]) -> None:
        with self._changed:
            batch = next((each for each in self._store.unfinished() if each.id == batch_id), None)
            if batch is not None:
                self._put(batch, status="failed", errors=tuple(faults), failed_at=self._now())

    def _change(self, batch_id: str, before: str, **values: Any) -> None:
        """Unless it was cancelled since."""
        with self._changed:
            batch = next(each for each in self._store.unfinished() if each.id == batch_id)
            if batch.status == before:
                self._put(batch, **values)
            elif "counts" in values:  # cancelled before it began: how much there was is known now
                self._put(batch, counts=values["counts"], model=values["model"])

    def _put(self, batch: Batch, **values: Any) -> Batch:
        batch = replace(batch, **values)
        self._store.put_batch(batch)
        return batch

    def _current(self, batch: Batch) -> Batch:
        return self._store.batch(batch.tenant, batch.id)

    def _counted(self, batch: Batch) -> Batch:
        """With the counts of what is committed by now."""
        if batch.status not in ("in_progress", "finalizing", "cancelling"):
            return batch
        return replace(batch, counts=counts_so_far(self._store.folder(batch.id), batch.counts.total))

    def _input(self, batch: Batch) -> Path:
        return self._store.folder(batch.id) / "input.jsonl"

    def _now(self) -> int:
        return int(self._clock())


def _window_seconds(window: str) -> int:
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _UNIT_SECONDS[found[2]] if found else 0
    if not 1 <= seconds <= MAX_WINDOW_S:
        raise Refused(
            "give 24h, or hours, minutes or seconds up to 168h", "completion_window", "invalid_window"
        )
    return seconds
