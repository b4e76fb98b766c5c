"""Files and batches of a real server, as the official client sees them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.async_engine import AsyncEngine
from engine.errors import ConfigError
from engine.server.batches.backend import Batch, NotFound, Refused
from engine.server.serving import BackgroundServer
from jobs.batches.pipeline_batches import PipelineBatches
from jobs.batches.running import BatchModel
from pipeline.spool import open_spool
from pipeline.storage import open_storage
from pipeline.verify import Verifier
from tests.jobs.batch_server import MODEL, NOW, load_engine, server_of
from tests.pipeline.batch_lines import chat_line, completion_line

CHAT = "/v1/chat/completions"
MAX_FILE_BYTES = 100_000
NUM_KILLS = 3 if os.environ.get("TIDEMILL_CHAOS") else 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: str) -> BatchModel:
    engine, fingerprint = load_engine(tiny_checkpoint)
    return BatchModel(engine=AsyncEngine(engine), fingerprint=fingerprint)


@pytest.fixture(scope="module")
def server(model: BatchModel, root: Path) -> Iterator[BackgroundServer]:
    with server_of(root, model, max_file_bytes=MAX_FILE_BYTES) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def lines_of(*lines: Any) -> bytes:
    return b"".join((line if isinstance(line, str) else json.dumps(line)).encode() + b"\n" for line in lines)


def create(client: openai.OpenAI, content: bytes, endpoint: Any = CHAT, **options: Any) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    window: Any = options.pop("completion_window", "24h")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window=window, **options
    )


def ended(client: openai.OpenAI, batch_id: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        time.sleep(0.05)
    raise AssertionError(f"the batch is still {batch.status}")


def content_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_is_run_to_its_files(client: openai.OpenAI, root: Path) -> None:
    lines = [chat_line(f"r{i}", f"say {i}", temperature=0) for i in range(9)]
    lines[4]["body"]["stream"] = True
    batch = create(client, lines_of(*lines), metadata={"run": "nightly"})
    assert batch.status == "validating"
    batch = ended(client, batch.id)
    assert batch.status == "completed"
    assert batch.metadata == {"run": "nightly"}
    assert batch.request_counts is not None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (9, 8, 1)
    assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at <= batch.expires_at
    answers = content_of(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"r{i}" for i in range(9) if i != 4]
    for answer in answers:
        body = openai.types.chat.ChatCompletion.model_validate(answer["response"]["body"])
        assert body.created == batch.created_at
        assert body.usage is not None
        assert body.usage.completion_tokens >= 1
    [error] = content_of(client, batch.error_file_id)
    assert error["custom_id"] == "r4"
    assert error["response"]["status_code"] == 400
    with open_spool(None) as spool:
        run = open_storage(str(root / "batches" / batch.id / "run"))
        assert Verifier(run, spool).run().findings == []


def test_its_answers_are_those_of_the_endpoint(client: openai.OpenAI) -> None:
    asked = completion_line("a", "once upon a time", temperature=0, max_tokens=8)
    batch = ended(client, create(client, lines_of(asked), "/v1/completions").id)
    [answer] = content_of(client, batch.output_file_id)
    direct = client.completions.create(model=MODEL, prompt="once upon a time", temperature=0, max_tokens=8)
    assert answer["response"]["body"]["choices"][0]["text"] == direct.choices[0].text
    assert answer["response"]["body"]["choices"][0]["finish_reason"] == direct.choices[0].finish_reason


def test_a_chat_in_a_batch_is_the_chat_of_the_endpoint(client: openai.OpenAI) -> None:
    asked = {"messages": [{"role": "user", "content": "who is it"}], "temperature": 0, "max_tokens": 8}
    batch = ended(client, create(client, lines_of(chat_line("a", **asked, logprobs=True, top_logprobs=2))).id)
    [answer] = content_of(client, batch.output_file_id)
    direct = client.chat.completions.create(model=MODEL, logprobs=True, top_logprobs=2, **asked)  # type: ignore[call-overload]
    wanted = direct.choices[0].model_dump()
    found = (
        openai.types.chat.ChatCompletion.model_validate(answer["response"]["body"]).choices[0].model_dump()
    )
    assert found["message"]["content"] == wanted["message"]["content"]
    assert found["logprobs"]["content"] == wanted["logprobs"]["content"]


FAULTS = {
    "empty file": (b"", "empty_file"),
    "blank lines": (b"\n\n", "empty_file"),
    "malformed line": (lines_of(chat_line("a"), '{"custom_id": '), "invalid_json_line"),
    "missing custom_id": (
        lines_of({"method": "POST", "url": CHAT, "body": {}}),
        "missing_required_parameter",
    ),
    "duplicate custom_id": (lines_of(chat_line("a"), chat_line("a")), "duplicate_custom_id"),
    "wrong model": (lines_of(chat_line("a", model="gpt-9")), "model_not_found"),
    "bad url": (lines_of(chat_line("a", url="/v1/wrong")), "invalid_url"),
    "chats and completions mixed": (lines_of(chat_line("a"), completion_line("b")), "invalid_url"),
    "method": (lines_of(chat_line("a") | {"method": "GET"}), "invalid_method"),
    "body": (lines_of(chat_line("a") | {"body": "hello"}), "invalid_request"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_is_wrong_fails_its_batch(client: openai.OpenAI, name: str) -> None:
    content, code = FAULTS[name]
    batch = ended(client, create(client, content).id)
    assert batch.status == "failed"
    assert batch.output_file_id is None
    [fault] = batch.errors.data
    assert fault.code == code, fault.message


def test_what_is_wrong_with_a_body_is_its_lines_error(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    lines = [
        chat_line("stream", stream=True),
        chat_line("too long", "word " * 400),
        chat_line("tool", tools=[tool], tool_choice={"type": "function", "function": {"name": "g"}}),
        chat_line("unknown", temprature=1),
    ]
    batch = ended(client, create(client, lines_of(*lines)).id)
    assert batch.status == "completed"
    assert batch.output_file_id is None
    errors = {
        line["custom_id"]: line["response"]["body"]["error"]
        for line in content_of(client, batch.error_file_id)
    }
    assert [errors[line["custom_id"]]["code"] for line in lines] == [
        "not_supported",
        "prompt_too_long",
        "bad_request",
        "unknown_field",
    ]


def test_files_are_listed_read_and_deleted(client: openai.OpenAI) -> None:
    content = lines_of(chat_line("a"))
    file = client.files.create(file=("mine.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (len(content), "mine.jsonl", "batch")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == content
    assert file.id in [each.id for each in client.files.list(purpose="batch")]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    with pytest.raises(openai.BadRequestError):
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def test_a_batch_outlives_its_input_file(client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("in.jsonl", lines_of(*(chat_line(f"{i}") for i in range(20)))), purpose="batch"
    )
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    client.files.delete(file.id)
    assert ended(client, batch.id).status == "completed"


def test_lists_come_in_pages(client: openai.OpenAI) -> None:
    ids = [create(client, b"").id for _ in range(3)]
    listed = [batch.id for batch in client.batches.list(limit=1)]  # the client asks for page after page
    assert set(ids) <= set(listed)
    assert len(set(listed)) == len(listed)
    page = client.batches.list(limit=2)
    assert len(page.data) == 2
    assert page.has_more
    following = client.batches.list(limit=2, after=page.data[-1].id)
    assert following.data[0].id == listed[2]
    with pytest.raises(openai.BadRequestError):
        client.batches.list(after="batch_none")


def test_a_cancelled_batch_keeps_what_is_finished(client: openai.OpenAI) -> None:
    lines = [chat_line(f"r{i}", f"say {i}", max_tokens=100, ignore_eos=True) for i in range(64)]
    batch = create(client, lines_of(*lines))
    deadline = time.monotonic() + 60
    while client.batches.retrieve(batch.id).request_counts.completed == 0:  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(client, batch.id)
    assert batch.status == "cancelled"
    assert batch.cancelling_at <= batch.cancelled_at
    done = [line["custom_id"] for line in content_of(client, batch.output_file_id)]
    left = content_of(client, batch.error_file_id)
    assert 0 < len(done) < 64
    assert sorted([*done, *(line["custom_id"] for line in left)]) == sorted(
        line["custom_id"] for line in lines
    )
    assert {line["error"]["code"] for line in left} == {"batch_cancelled"}
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (64, len(done), len(left))
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


def test_a_batch_ends_with_its_window(client: openai.OpenAI) -> None:
    lines = [chat_line(f"r{i}", max_tokens=200, ignore_eos=True) for i in range(200)]
    batch = ended(client, create(client, lines_of(*lines), completion_window="1s").id)
    assert batch.status == "expired"
    assert batch.expired_at >= batch.expires_at
    assert {line["error"]["code"] for line in content_of(client, batch.error_file_id)} == {"batch_expired"}


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "900h"}, "completion_window"),
        ({"input_file_id": "file-none"}, "file_id"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(
    server: BackgroundServer, client: openai.OpenAI, changed: Any, param: str
) -> None:
    file = client.files.create(file=("in.jsonl", lines_of(chat_line("a"))), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | changed
    answer = httpx.post(f"{server.url}/v1/batches", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def upload(server: BackgroundServer, files: Any, data: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/files", files=files, data=data)


def test_bad_uploads_are_refused(server: BackgroundServer) -> None:
    good = {"file": ("in.jsonl", b"{}")}
    assert upload(server, good, {"purpose": "fine-tune"}).status_code == 400
    assert upload(server, good, {}).status_code == 400
    assert upload(server, good, {"purpose": "batch", "extra": "1"}).json()["error"]["param"] == "extra"
    assert upload(server, {"other": ("in.jsonl", b"{}")}, {"purpose": "batch"}).status_code == 400
    assert httpx.post(f"{server.url}/v1/files", json={"purpose": "batch"}).status_code == 400
    named = upload(server, {"file": ("../../etc/passwd", b"{}")}, {"purpose": "batch"})
    assert named.json()["filename"] == "passwd"
    torn = b'--b\r\nContent-Disposition: form-data; name="file"\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert httpx.post(f"{server.url}/v1/files", content=torn, headers=headers).status_code == 400
    headers = {"Content-Type": "multipart/form-data"}
    assert httpx.post(f"{server.url}/v1/files", content=torn, headers=headers).status_code == 400


def test_a_file_that_is_too_large_leaves_nothing(server: BackgroundServer, root: Path) -> None:
    before = sorted(path.name for path in (root / "files").iterdir())
    for size in (MAX_FILE_BYTES + 1, 10 * MAX_FILE_BYTES):
        answer = upload(server, {"file": ("in.jsonl", b"x" * size)}, {"purpose": "batch"})
        assert answer.status_code == 413, size
    assert sorted(path.name for path in (root / "files").iterdir()) == before


@pytest.mark.parametrize(
    "path", ["files/file-none", "files/file-none/content", "batches/batch_none", "files/..%2Fx"]
)
def test_what_is_not_there_is_not_found(server: BackgroundServer, path: str) -> None:
    answer = httpx.get(f"{server.url}/v1/{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


# -- the backend by itself: restarts, tenants ----------------------------------------------------------


def queue_batch(
    backend: PipelineBatches, lines: list[Any], tenant: str | None = None, **options: Any
) -> Batch:
    file = backend.create_file(tenant, "in.jsonl", io.BytesIO(lines_of(*lines)))
    wanted: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h", "metadata": None} | options
    return backend.create_batch(tenant, input_file_id=file.id, **wanted)


def wait_for(has_come: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not has_come():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.01)


def files_of(backend: PipelineBatches, batch: Batch) -> list[bytes]:
    batch = backend.batch(batch.tenant, batch.id)
    assert batch.status == "completed", batch.errors
    ids = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id is not None]
    return [b"".join(backend.content(batch.tenant, file_id)) for file_id in ids]


LONG = [chat_line(f"r{i}", f"say {i % 7}", max_tokens=40, ignore_eos=True, temperature=1) for i in range(40)]
LONG[5] = chat_line("r5", stream=True)


@pytest.fixture(scope="module")
def undisturbed(
    server: BackgroundServer, model: BatchModel, tmp_path_factory: pytest.TempPathFactory
) -> list[bytes]:
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
    tiny_checkpoint: str, repository: Path, model: BatchModel, undisturbed: list[bytes], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.jobs.batch_server", tiny_checkpoint, str(tmp_path)]
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
    limits = {"max_stored_bytes": len(content) + 10, "max_unfinished": 1}
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
