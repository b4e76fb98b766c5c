"""Files and batches of a real server, as the official client sees them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai.types.chat import ChatCompletion

from engine.server.auth import install_auth
from engine.server.batches.routes import batch_routes
from engine.server.errors import install_errors
from engine.server.keys import KeyRing
from engine.server.serving import BackgroundServer
from engine.server.settings import ServerSettings
from jobs.batches.pipeline_batches import PipelineBatches
from jobs.batches.running import BatchModel
from pipeline.spool import open_spool
from pipeline.storage import open_storage
from pipeline.verify import Verifier
from tests.jobs.batch_server import CHAT, MODEL, create, ended, lines_of, server_of
from tests.pipeline.batch_lines import chat_line, completion_line

MAX_FILE_BYTES = 100_000
NUM_KILLS = 3 if os.environ.get("TIDEMILL_CHAOS") else 1


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batches")


@pytest.fixture(scope="module")
def server(model: BatchModel, root: Path) -> Iterator[BackgroundServer]:
    with server_of(root, model, max_file_bytes=MAX_FILE_BYTES) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


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
        body = ChatCompletion.model_validate(answer["response"]["body"])
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
    found = ChatCompletion.model_validate(answer["response"]["body"]).choices[0].model_dump()
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
        chat_line("too long", "word " * 600),
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


def test_texts_in_a_batch_are_held_to_their_form(client: openai.OpenAI, model: BatchModel) -> None:
    tokenizer = model.engine.engine.tokenizer
    blank = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isspace()]
    tight = {
        "max_tokens": 100,
        "logit_bias": dict.fromkeys(map(str, blank), -100),
    }  # JSON may be full of spaces
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    lines = [
        chat_line("schema", response_format=response_format, **tight),
        chat_line("tool", tools=[tool], tool_choice="required", parallel_tool_calls=False, **tight),
        chat_line("impossible", response_format={"type": "json_object", "json_schema": {}}),
    ]
    batch = ended(client, create(client, lines_of(*lines)).id)
    answers = {
        line["custom_id"]: line["response"]["body"] for line in content_of(client, batch.output_file_id)
    }
    said = answers["schema"]["choices"][0]["message"]["content"]
    assert isinstance(json.loads(said)["ok"], bool)
    [call] = answers["tool"]["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert isinstance(json.loads(call["function"]["arguments"])["ok"], bool)
    assert [line["custom_id"] for line in content_of(client, batch.error_file_id)] == ["impossible"]


def test_a_key_sees_its_own_alone(model: BatchModel, server: BackgroundServer, tmp_path: Path) -> None:
    keys = KeyRing()
    mine, others = (keys.generate_api_key(label) for label in ("mine", "others"))
    backend = PipelineBatches(tmp_path, {MODEL: model})
    app = FastAPI()
    install_errors(app)
    app.include_router(batch_routes(backend))
    install_auth(app, keys, ServerSettings())
    with BackgroundServer(app, ServerSettings(drain_seconds=1)) as closed:
        url = f"{closed.url}/v1"
        assert httpx.get(f"{url}/files").status_code == 401
        with openai.OpenAI(base_url=url, api_key=mine, max_retries=0) as client:
            batch = ended(client, create(client, lines_of(chat_line("a"))).id)
            assert batch.status == "completed"
        with openai.OpenAI(base_url=url, api_key=others, max_retries=0) as client:
            assert client.files.list().data == []
            assert client.batches.list().data == []
            for call in (
                lambda: client.batches.retrieve(batch.id),
                lambda: client.batches.cancel(batch.id),
                lambda: client.files.content(batch.output_file_id),
                lambda: client.files.delete(batch.input_file_id),
            ):
                with pytest.raises(openai.NotFoundError):
                    call()
