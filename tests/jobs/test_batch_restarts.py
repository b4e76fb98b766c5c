"""Batches of a server that is closed or killed, and what tenants have to themselves."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.errors import ConfigError
from engine.server.batches.backend import Batch, NotFound, Refused
from jobs.batches.pipeline_batches import PipelineBatches
from jobs.batches.running import BatchModel
from tests.jobs.batch_server import CHAT, MODEL, NOW, create, lines_of, wait_for
from tests.pipeline.batch_lines import chat_line

NUM_KILLS = 3 if os.environ.get("TIDEMILL_CHAOS") else 1


def queue_batch(
    backend: PipelineBatches, lines: list[Any], tenant: str | None = None, **options: Any
) -> Batch:
    file = backend.create_file(tenant, "in.jsonl", io.BytesIO(lines_of(*lines)))
    wanted: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h", "metadata": None} | options
    return backend.create_batch(tenant, input_file_id=file.id, **wanted)


def files_of(backend: PipelineBatches, batch: Batch) -> list[bytes]:
    batch = backend.batch(batch.tenant, batch.id)
    assert batch.status == "completed", batch.errors
    ids = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id is not None]
    return [b"".join(backend.content(batch.tenant, file_id)) for file_id in ids]


LONG = [chat_line(f"r{i}", f"say {i % 7}", max_tokens=40, ignore_eos=True, temperature=1) for i in range(40)]
LONG[5] = chat_line("r5", stream=True)


@pytest.fixture(scope="module")
def undisturbed(model: BatchModel, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What a server makes of LONG that nothing befalls, at the time NOW."""
    root = tmp_path_factory.mktemp("undisturbed")
    with closing(PipelineBatches(root, {MODEL: model}, clock=lambda: NOW)) as backend:
        backend.start()
        batch = queue_batch(backend, LONG)
        wait_for(lambda: backend.batch(None, batch.id).is_finished)
        return files_of(backend, batch)


def test_a_server_that_is_closed_goes_on_when_it_is_started_again(
    model: BatchModel, undisturbed: list[bytes], tmp_path: Path
) -> None:
    with closing(PipelineBatches(tmp_path, {MODEL: model}, clock=lambda: NOW)) as backend:
        backend.start()
        batch = queue_batch(backend, LONG)
        wait_for(lambda: backend.batch(None, batch.id).counts.completed > 0)
    with closing(PipelineBatches(tmp_path, {MODEL: model}, clock=lambda: NOW)) as backend:
        begun = backend.batch(None, batch.id)
        assert begun.status == "in_progress"
        assert begun.counts.completed > 0
        backend.start()
        wait_for(lambda: backend.batch(None, batch.id).is_finished)
        assert files_of(backend, batch) == undisturbed


def test_a_server_that_is_killed_goes_on_when_it_is_started_again(
    batch_checkpoint: str, repository: Path, model: BatchModel, undisturbed: list[bytes], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.jobs.batch_server", batch_checkpoint, str(tmp_path)]
    command.append(str(repository / ".cache" / "jax"))
    batch_id, done = "", 0
    for _ in range(NUM_KILLS):
        with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                url = process.stdout.readline().strip()
                assert url, "the server did not start"
                with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                    batch_id = batch_id or create(client, lines_of(*LONG)).id
                    wait_for(lambda before=done: num_completed(client, batch_id) > before)  # noqa: B023
                    done = num_completed(client, batch_id)
            finally:
                process.kill()
    with closing(PipelineBatches(tmp_path, {MODEL: model}, clock=lambda: NOW)) as backend:
        begun = backend.batch(None, batch_id)
        assert begun.status == "in_progress"
        assert begun.counts.completed >= done
        backend.start()
        wait_for(lambda: backend.batch(None, batch_id).is_finished)
        assert files_of(backend, begun) == undisturbed


def num_completed(client: openai.OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed


def test_files_and_batches_are_their_tenants(model: BatchModel, tmp_path: Path) -> None:
    used: list[tuple[str, int, int]] = []
    record: Any = lambda *each: used.append(each)  # noqa: E731
    with closing(PipelineBatches(tmp_path, {MODEL: model}, record_usage=record)) as backend:
        backend.start()
        batch = queue_batch(backend, [chat_line("a", temperature=0)], tenant="mine")
        for tenant in ("other", None):
            assert backend.files(tenant) == []
            assert backend.batches(tenant) == []
            with pytest.raises(NotFound):
                backend.batch(tenant, batch.id)
            with pytest.raises(NotFound):
                backend.cancel(tenant, batch.id)
            with pytest.raises(NotFound):
                backend.content(tenant, batch.input_file_id)
            with pytest.raises(NotFound):
                backend.create_batch(
                    tenant,
                    input_file_id=batch.input_file_id,
                    endpoint=CHAT,
                    completion_window="24h",
                    metadata=None,
                )
        wait_for(lambda: backend.batch("mine", batch.id).is_finished)
        output = backend.batch("mine", batch.id).output_file_id
        assert output is not None
        with pytest.raises(NotFound):
            backend.content("other", output)
        [line] = files_of(backend, batch)
    usage = json.loads(line)["response"]["body"]["usage"]
    assert used == [("mine", usage["prompt_tokens"], usage["completion_tokens"])]


def test_a_tenant_has_so_many_bytes_and_batches(model: BatchModel, tmp_path: Path) -> None:
    content = lines_of(chat_line("a"))
    limits: dict[str, Any] = {"max_stored_bytes": len(content) + 10, "max_unfinished": 1}
    with closing(PipelineBatches(tmp_path, {MODEL: model}, **limits)) as backend:  # not started: nothing ends
        first = queue_batch(backend, [chat_line("a")], tenant="mine")
        with pytest.raises(Refused, match="over 10 bytes"):
            backend.create_file("mine", "in.jsonl", io.BytesIO(content))
        with pytest.raises(Refused, match="unfinished"):
            backend.create_batch(
                "mine",
                input_file_id=first.input_file_id,
                endpoint=CHAT,
                completion_window="24h",
                metadata=None,
            )
        assert queue_batch(backend, [chat_line("a")], tenant="other").status == "validating"


def test_a_folder_has_one_server(model: BatchModel, tmp_path: Path) -> None:
    first = PipelineBatches(tmp_path, {MODEL: model})
    with closing(first), pytest.raises(ConfigError, match="another server"):
        PipelineBatches(tmp_path, {MODEL: model})
    with pytest.raises(ConfigError, match="local folder"):
        PipelineBatches("s3://bucket/folder", {MODEL: model})
