"""The OpenAPI document is what the server does: schemathesis tries what it allows, and what it does not."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from engine.async_engine import AsyncEngine
from engine.server.app import create_app
from engine.server.serving import BackgroundServer
from tests.server.conftest import MODEL, OPEN

NUM_EXAMPLES = int(os.environ.get("TIDEMILL_FUZZ_EXAMPLES", "12"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


POSTS = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/tokenize": None,
    "/detokenize": None,
}
"""And the field that bounds how long an answer takes."""
OTHERS = [
    "GET /v1/responses/{response_id}",
    "DELETE /v1/responses/{response_id}",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "GET /v1/tools",
    "GET /health",
    "GET /metrics",
]
CASES = [
    *(("POST", path, mode) for path in POSTS for mode in GenerationMode),
    *((*name.split(), GenerationMode.POSITIVE) for name in OTHERS),
]


@pytest.fixture(scope="module")
def api(server: BackgroundServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_no_request_is_answered_otherwise_than_documented(
    api: Any, method: str, path: str, mode: GenerationMode
):
    operation = api[path][method]
    statuses: Counter[int] = Counter()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_EXAMPLES,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    def holds(case: schemathesis.Case) -> None:
        body = case.body
        if isinstance(body, dict) and mode is GenerationMode.POSITIVE:
            body["model"] = MODEL  # a random name would end every case at once
            if POSTS[path] is not None:
                body[POSTS[path]] = 2
        response = case.call()
        case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] += 1

    holds()
    assert statuses.total() > 0
    if mode is GenerationMode.NEGATIVE:
        assert not set(statuses) - {400, 404, 405, 415}, statuses


def test_the_document_names_every_route_and_the_form_of_its_errors(engine: AsyncEngine):
    document = create_app({MODEL: engine}, settings=OPEN).openapi()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/tools",
        "/tokenize",
        "/detokenize",
        "/health",
        "/metrics",
    }
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            error = operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"]
            assert error.endswith("/ErrorAnswer"), (path, method)
            assert "422" not in operation["responses"]


def test_models_tokens_and_health(client: Any, server: Any, engine: AsyncEngine):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    health = httpx.get(f"{server.url}/health")
    well = {"status": "ok", "models": {MODEL: True}, "num_running": 0, "num_waiting": 0}
    assert (health.status_code, health.json()) == (200, well)
    assert httpx.get(f"{server.url}/v1/tools").json()["data"][0]["model"] == MODEL
    assert httpx.get(f"{server.url}/metrics").status_code == 404  # this server has no monitoring
    text = "the answer, é and 漢"
    told = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert told["tokens"] == engine.engine.tokenizer(text)["input_ids"]
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == 2048
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": told["tokens"]}).json()
    assert back == {"prompt": text}
    chat: Any = {"messages": [{"role": "user", "content": "Hi"}]}
    tokens = httpx.post(f"{server.url}/tokenize", json=chat).json()["tokens"]
    assert engine.engine.tokenizer.decode(tokens).startswith("<|im_start|>user\nHi")
    usage = client.chat.completions.create(model=MODEL, max_tokens=1, **chat).usage
    assert usage is not None
    assert usage.prompt_tokens == len(tokens)
    for body in ({}, {"prompt": "x", **chat}):
        assert httpx.post(f"{server.url}/tokenize", json=body).status_code == 400
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [9999]}).status_code == 400
