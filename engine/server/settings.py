"""What a server allows its clients. Values only; each is checked where it says, before anything is queued."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS

TEMPLATE_VARIABLES = ("enable_thinking", "thinking", "reasoning_effort", "date_string")
"""Names that chat templates are known to read and that switch nothing but the form of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Limits of a server. Over one is refused at once: 400, or 413 and 429 where HTTP has a code for it.

    Raises ConfigError naming the option, its value and what it may be.
    """

    require_api_key: bool = True
    """Every route wants a key; without, keys that are given are still counted."""
    open_to_all: bool = False
    """Without `require_api_key`, listen on other addresses than the loopback too."""
    api_key_in_query: bool = False
    """Also take `?api_key=`: off, because URLs end up in logs."""

    max_n: int = 128
    """Most completions of a prompt (`n`, `best_of`)."""
    max_prompts: int = 128
    """Most prompts of one call of `/v1/completions`."""
    max_logprobs: int = 20
    """Most alternatives a token (`logprobs`, `top_logprobs`)."""
    max_stop: int = 16
    """Most stop strings."""
    max_logit_bias: int = 300
    """Most token ids with a bias."""
    max_tokens: int | None = None
    """Most new tokens a request may ask for; None: what the model's length leaves."""
    max_messages: int = 4096
    """Most messages of a chat, those of earlier responses included."""
    max_tools: int = 128
    max_schema_bytes: int = 65_536
    """Of a JSON schema, regular expression, grammar or list of choices, as it came."""
    most_urgent_priority: int = 0
    """The lowest `priority` that a client may ask for; lower runs sooner."""
    template_variables: tuple[str, ...] = TEMPLATE_VARIABLES
    """The names that `chat_template_kwargs` may give a chat template; any other is refused."""

    max_waiting: int = 1024
    """Unfinished requests of a model, running ones included; past it the answer is 429."""
    request_timeout_s: float = 600.0
    """Most seconds from a request's arrival to its last token."""
    drain_seconds: float = 30.0
    """At the end: how long what is running may go on, before it is aborted."""
    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 32 << 10
    header_timeout_s: float = 10.0
    """Most seconds until a request's headers are there."""
    body_timeout_s: float = 30.0
    """Most seconds until a request's body is there."""
    send_timeout_s: float = 60.0
    """Most seconds that a client may take nothing of what is sent to it."""
    max_connections: int = 1024
    """Most open connections."""
    max_concurrent_per_key: int = 256
    """Most unfinished calls of one key, or of one address where no key is wanted."""

    max_stored_responses: int = 1024
    """Answers of `/v1/responses` kept for `previous_response_id`; the least recently used go first."""
    max_stored_bytes: int = 64 << 20
    """Bytes of those answers and their conversations together."""
    tool_parser: str | None = "auto"
    """A name of `engine.parsers.TOOL_PARSERS`, "auto" (by the model's template), or None: calls stay text."""
    reasoning_parser: str | None = "auto"
    """The same of `REASONING_PARSERS`; None: reasoning stays in the content."""

    @classmethod
    def of(cls, **options: Any) -> ServerSettings:
        """Settings from options by name. Raises ConfigError for one that does not exist."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
                raise ConfigError(f"server.{name} does not exist: the nearest name is {near[0]!r}")
        return cls(**options)

    def __post_init__(self) -> None:
        highest: dict[str, int] = {
            "max_n": MAX_N,
            "max_logprobs": MAX_LOGPROBS,
            "max_stop": MAX_STOP_STRINGS,
            "max_logit_bias": MAX_LOGIT_BIAS,
        }
        lowest = {"max_logprobs": 0, "max_logit_bias": 0, "max_stored_responses": 0, "max_stored_bytes": 0}
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if field.type == "float":
                _check(name, value, (int, float), 0.0, 1e9)
            elif field.type == "bool":
                _check(name, value, (bool,), False, True)
            elif field.type == "int | None" and value is None:
                continue
            elif field.type in ("int", "int | None"):
                low = -(2**31) if name == "most_urgent_priority" else lowest.get(name, 1)
                _check(name, value, (int,), low, highest.get(name, 1 << 40))


def _check(name: str, value: object, kinds: tuple[type, ...], low: float, high: float) -> None:
    is_kind = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not is_kind or not low <= value <= high:  # type: ignore[operator]
        what = "true or false" if bool in kinds else f"a number from {low:g} to {high:g}"
        raise ConfigError(f"server.{name}={value!r}: give {what}")
