"""What the routes of files and batches need of whoever keeps and runs them, and the forms of their answers.

Everything belongs to the tenant (the id of an API key, or None where keys are not wanted) that made it; to
others it does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, Literal, Protocol

FilePurpose = Literal["batch", "batch_output"]
BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
UNFINISHED: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")


class NotFound(LookupError):
    """The tenant has no file or batch of this id; `kind` is "file" or "batch"."""

    def __init__(self, kind: str, missing_id: str):
        super().__init__(f"No such {kind}: {missing_id[:80]!r}")
        self.kind = kind


class Refused(ValueError):
    """What was asked for cannot be done; `param` names the field that is wrong, `code` is for programs."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file that was uploaded, or that a batch made. `num_bytes` long; `created_at` in Unix seconds."""

    id: str
    tenant: str | None
    filename: str
    purpose: FilePurpose
    num_bytes: int
    created_at: int

    def to_openai(self) -> dict[str, Any]:
        """As the API shows it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFault:
    """Why a batch failed as a whole. `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCounts:
    total: int = 0
    completed: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as it stands. Times in Unix seconds; None for what has not come."""

    id: str
    tenant: str | None
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: BatchStatus = "validating"
    model: str | None = None
    metadata: Mapping[str, str] | None = None
    errors: Sequence[BatchFault] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    counts: RequestCounts = field(default_factory=RequestCounts)

    @property
    def is_finished(self) -> bool:
        return self.status not in UNFINISHED

    def to_openai(self) -> dict[str, Any]:
        """As the API shows it."""
        shown = {name: value for name, value in asdict(self).items() if name not in ("tenant", "counts")}
        errors = [asdict(fault) for fault in self.errors]
        shown["errors"] = {"object": "list", "data": errors} if errors else None
        shown["request_counts"] = asdict(self.counts)
        return {"id": shown.pop("id"), "object": "batch"} | shown


class BatchBackend(Protocol):
    """Keeps files and runs batches. Safe from any thread; calls may wait for a disk."""

    @property
    def max_file_bytes(self) -> int:
        """The most that one upload may have."""
        ...

    def start(self) -> None:
        """Go on with what an earlier server left unfinished, and take batches."""
        ...

    def close(self) -> None:
        """Stop running. What is unfinished is kept, for the next start."""
        ...

    def create_file(self, tenant: str | None, filename: str, content: BinaryIO) -> StoredFile:
        """Keep what was uploaded for batches. Raises Refused for what is too large."""
        ...

    def file(self, tenant: str | None, file_id: str) -> StoredFile:
        """Raises NotFound."""
        ...

    def files(self, tenant: str | None) -> list[StoredFile]:
        """All of the tenant's, the newest first."""
        ...

    def content(self, tenant: str | None, file_id: str) -> Iterator[bytes]:
        """The file's bytes, piece by piece. Raises NotFound, before the first."""
        ...

    def delete_file(self, tenant: str | None, file_id: str) -> None:
        """Raises NotFound. A batch that was made of the file goes on."""
        ...

    def create_batch(
        self,
        tenant: str | None,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        metadata: Mapping[str, str] | None,
    ) -> Batch:
        """Queue a batch. Raises NotFound for the file, Refused for what is not run."""
        ...

    def batch(self, tenant: str | None, batch_id: str) -> Batch:
        """Raises NotFound."""
        ...

    def batches(self, tenant: str | None) -> list[Batch]:
        """All of the tenant's, the newest first."""
        ...

    def cancel(self, tenant: str | None, batch_id: str) -> Batch:
        """Ask a batch to stop; what is finished is kept. Raises NotFound, Refused for one that has ended."""
        ...
