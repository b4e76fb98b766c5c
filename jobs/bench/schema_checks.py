"""Whether a text follows a JSON schema, as `jsonschema` says, which knows nothing of how the text was made.

Formats are checked by functions of the standard library, so by none of the patterns that made the text.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import uuid
from decimal import Decimal, InvalidOperation, localcontext
from typing import Any
from urllib.parse import urlsplit

from engine.errors import MissingExtraError

_DURATION = re.compile(r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
# Digits of a product or quotient of decimals: more than any number that fits in an output has.
_DIGITS = 1000


def violation(text: str, schema: dict[str, Any]) -> str | None:
    """Why a text does not follow a schema, on one line; None when it does.

    Raises MissingExtraError without jsonschema.
    """
    try:
        from jsonschema import Draft202012Validator, FormatChecker
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise MissingExtraError("jsonschema", "test", "checking outputs against their schemas") from error
    try:
        value = json.loads(text, parse_float=_number, parse_constant=_refuse)
    except ValueError as error:
        return f"not JSON: {error}"
    # Decimals, so that 0.3 is a multiple of 0.1.
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    checker = FormatChecker(formats=())
    for name, check in _FORMATS.items():
        checker.checks(name, raises=ValueError)(check)
    made = validator_for(exact, Draft202012Validator)
    with localcontext(prec=_DIGITS):
        error = next(iter(made(exact, format_checker=checker).iter_errors(value)), None)
    return None if error is None else " ".join(error.message.split())[:300]


def _number(digits: str) -> Decimal | float:
    """Exactly, but for an exponent that no decimal has."""
    try:
        return Decimal(digits)
    except InvalidOperation:
        return float(digits)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _date(value: str) -> bool:
    return len(value) == 10 and bool(datetime.date.fromisoformat(value))


def _time(value: str) -> bool:
    return _date_time(f"2000-01-01T{value}")


def _date_time(value: str) -> bool:
    moment = datetime.datetime.fromisoformat(value)
    return value[10:11] == "T" and moment.tzinfo is not None


def _hostname(value: str) -> bool:
    return len(value) <= 253 and all(_LABEL.fullmatch(label) for label in value.split("."))


def _email(value: str) -> bool:
    local, at, domain = value.rpartition("@")
    return bool(local and at and domain) and " " not in value


def _uri(value: str) -> bool:
    parts = urlsplit(value)
    return bool(parts.scheme) and value.isascii() and not set(value) & set(' <>"{}|\\^`')


def _uuid(value: str) -> bool:
    return str(uuid.UUID(value)) == value.lower()


_FORMATS: dict[str, Any] = {
    name: lambda value, check=check: not isinstance(value, str) or check(value)
    for name, check in {
        "date": _date,
        "time": _time,
        "date-time": _date_time,
        "duration": lambda value: _DURATION.fullmatch(value) is not None,
        "email": _email,
        "hostname": _hostname,
        "ipv4": lambda value: bool(ipaddress.IPv4Address(value)),
        "ipv6": lambda value: bool(ipaddress.IPv6Address(value)),
        "uuid": _uuid,
        "uri": _uri,
    }.items()
}
