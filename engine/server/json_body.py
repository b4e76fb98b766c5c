"""Bodies are read strictly: UTF-8, finite numbers, no lone surrogates (limits.py bounds their nesting).

What passes here can be written back as JSON and UTF-8, so nothing of it can fail an answer later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from engine.server.errors import bad_request


class StrictRequest(Request):
    """A request whose `json` refuses with a 400 what `parse_json` refuses."""

    async def json(self) -> Any:
        return parse_json(await self.body())


class StrictRoute(APIRoute):
    """A route whose body is read by `StrictRequest`: `APIRouter(route_class=StrictRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


def parse_json(body: bytes) -> Any:
    """The value of a JSON text. Raises ApiError (400)."""
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: byte {error.start}", code="invalid_json") from error
    except RecursionError as error:
        raise bad_request("the body nests arrays and objects too deeply", code="invalid_json") from error
    except ValueError as error:  # also an integer of thousands of digits
        raise bad_request(f"the body is not JSON: {error}", code="invalid_json") from error
    if "\\u" in text:  # most bodies have no escape that could be one
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            message = "the body has a lone surrogate, which no UTF-8 can hold"
            raise bad_request(message, code="invalid_json") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
