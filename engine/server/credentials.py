"""The API key of a request: read once at the door and taken out of it, so that nothing behind can log or
pass it on."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from engine.server.refusals import Refusal, Scope

QUERY_NAME = b"api_key"
_KEY_HEADERS = (b"authorization", b"x-api-key")


class BadCredentials(Exception):
    """What was given is no key, or more than one; `refusal` says so without repeating it."""

    def __init__(self, message: str):
        super().__init__(message)
        self.refusal = unauthorized(message, "invalid_api_key")


def unauthorized(message: str, code: str) -> Refusal:
    return Refusal(401, message, "authentication_error", code, {"www-authenticate": "Bearer"})


def take_key(scope: Scope, *, in_query: bool) -> bytes | None:
    """The key that a request gives, None without one; it is removed from the scope's headers and query.

    Looked for in `Authorization: Bearer`, `X-API-Key` and, if `in_query`, the query's `api_key`. The scope
    is changed in place, because the server that made it logs it. Raises BadCredentials.
    """
    headers = [(name.lower(), value) for name, value in scope["headers"]]
    scope["headers"] = [(name, value) for name, value in headers if name not in _KEY_HEADERS]
    queried = _take_from_query(scope)
    given = [_of_authorization(value) for name, value in headers if name == b"authorization"]
    given += [value.strip() for name, value in headers if name == b"x-api-key"]
    if in_query:
        given += queried
    elif queried and not given:
        raise BadCredentials(
            "API keys in the URL are switched off, because URLs are logged: send Authorization: Bearer, and "
            "rotate the key that was sent"
        )
    if len(set(given)) > 1:
        raise BadCredentials("the request gives several API keys: send one")
    return given[0] if given else None


def _of_authorization(value: bytes) -> bytes:
    scheme, _, key = value.strip().partition(b" ")
    if scheme.lower() != b"bearer" or not key.strip():
        raise BadCredentials("the Authorization header must be: Bearer, a space, and an API key")
    return key.strip()


def _take_from_query(scope: Scope) -> list[bytes]:
    query: bytes = scope.get("query_string", b"")
    if b"=" not in query:
        return []
    given, kept = [], []
    for pair in query.split(b"&"):
        name, _, value = pair.partition(b"=")
        if unquote_to_bytes(name.replace(b"+", b" ")).strip().lower() == QUERY_NAME:
            given.append(unquote_to_bytes(value.replace(b"+", b" ")).strip())
        else:
            kept.append(pair)
    scope["query_string"] = b"&".join(kept)
    return given
