"""Errors as OpenAI writes them: `{"error": {"message", "type", "param", "code"}}`, with their HTTP status.

400  the request cannot run; `param` names the field
401  no key, or a wrong one             403  a key that may not do this
404  no such model, response or path    413  the body is too large
429  more is waiting than the server takes: come back after Retry-After
503  the engine failed or the server is ending         504  the request took longer than it may
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from engine.errors import EngineClosed, MissingExtraError, Overloaded, RequestError

log = logging.getLogger("tidemill.server")

CLIENT_GONE = 499
"""Nobody reads this status: it is for the log, and nginx's for the same thing."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What every error answer holds."""

    error: ErrorDetail


ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be served; the error says why."},
    "5XX": {"model": ErrorAnswer, "description": "The server cannot serve it now."},
}
"""For the OpenAPI document of each route."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """An error with all that OpenAI's body says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers) if headers else None)
        self.param = param
        self.code = code
        self.type = type or _type_of(status)

    @property
    def body(self) -> dict[str, Any]:
        return error_body(str(self.detail), self.type, self.param, self.code)


class ClientGone(Exception):
    """The client closed its connection before its answer was ready."""


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status_code, headers=error.headers)


def api_error(error: Exception) -> ApiError:
    """The answer to any exception of an endpoint, also in the midst of a stream."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error)
    if isinstance(error, StarletteHTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestError):
        return _of_request_error(error)
    if isinstance(error, MissingExtraError):
        return bad_request(f"this server cannot do that: {error}", code="not_supported")
    if isinstance(error, Overloaded):
        after = {"Retry-After": str(error.retry_after_s)}
        return ApiError(429, str(error), code="overloaded", headers=after)
    if isinstance(error, EngineClosed):
        return ApiError(503, str(error), code="engine_closed")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says how", code="internal_error")


def install_errors(app: FastAPI) -> None:
    """Answer every exception of the app in OpenAI's form."""

    async def answer(request: Request, error: Exception) -> Response:
        return error_response(api_error(error))

    async def nobody(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    kinds = (RequestValidationError, StarletteHTTPException, RequestError, MissingExtraError, Overloaded)
    for kind in (*kinds, EngineClosed):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(Exception, answer)
    app.add_exception_handler(ClientGone, nobody)


def _type_of(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


_PARAMS = {
    "prompt_too_long": ("messages", "context_length_exceeded"),
    "request_too_large": ("max_tokens", "context_length_exceeded"),
}


def _of_request_error(error: RequestError) -> ApiError:
    param, code = _PARAMS.get(error.reason, (error.param, error.reason))
    return bad_request(str(error).removeprefix("sampling."), param, code)


def _of_validation(error: RequestValidationError) -> ApiError:
    """What is wrong with a body: an unknown field before all others, else what is wrong deepest inside, which
    of a value's alternatives is in the one that it fits best."""
    errors = error.errors()
    unknown = [each for each in errors if each["type"] == "extra_forbidden"]
    first = max(unknown or errors, key=lambda each: len(_place(each, error.body)))
    param = ".".join(map(str, _place(first, error.body))) or None
    if first["type"] == "json_invalid":
        return bad_request("the body is not JSON: " + str(first["ctx"]["error"]), code="invalid_json")
    if unknown:
        return bad_request(f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    return bad_request(f"Invalid value for {param or 'the body'}: {first['msg']}", param, "invalid_value")


def _place(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where in the body it is. What validation adds to say which alternative it tried is left out."""
    place: list[str | int] = []
    value = body
    for part in error["loc"][1:]:
        if part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int):
            place.append(part)
            value = value[part]
    if error["type"] == "missing" and len(error["loc"]) > 1:
        place.append(error["loc"][-1])
    return place


def nearest(name: str, known: Sequence[str]) -> str:
    """`, the nearest is 'x'` where one is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; the nearest is {near[0]!r}" if near else ""
