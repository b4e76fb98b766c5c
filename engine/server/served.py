"""The models of a server by name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.async_engine import AsyncEngine
from engine.errors import ConfigError
from engine.parsers import check_parser_names, choose_parsers
from engine.server.errors import ApiError
from engine.server.settings import ServerSettings

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model: its engine, and how its answers are read."""

    name: str
    engine: AsyncEngine
    created: int
    """Unix seconds."""
    tool_parser: str | None
    reasoning_parser: str | None

    @property
    def tokenizer(self) -> Any:
        return self.engine.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        return self.engine.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.engine.model_config.vocab_size

    @property
    def chat_template(self) -> str | None:
        template = getattr(self.tokenizer, "chat_template", None)
        return template if isinstance(template, str) else None


class ServedModels:
    """All of them. Raises ConfigError for none, or for parsers that do not exist."""

    def __init__(self, engines: Mapping[str, AsyncEngine], settings: ServerSettings):
        if not engines:
            raise ConfigError("a server needs at least one model")
        self._models = {name: _served(name, engine, settings) for name, engine in engines.items()}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def close(self) -> None:
        """Close all engines: what is unfinished is aborted, and nothing new is taken."""
        for model in self:
            model.engine.close()

    def find(self, name: str, param: str | None = "model") -> ServedModel:
        """The model that a client names. Raises ApiError (404) naming those there are."""
        if name in self._models:
            return self._models[name]
        if name == DEFAULT and len(self._models) == 1:
            return next(iter(self._models.values()))
        known = ", ".join(self._models)
        message = f"The model {name[:100]!r} does not exist: choose one of {known}"
        raise ApiError(404, message, param=param, code="model_not_found", type="invalid_request_error")


def _served(name: str, engine: AsyncEngine, settings: ServerSettings) -> ServedModel:
    inner = engine.engine
    template = getattr(inner.tokenizer, "chat_template", None)
    by_template = choose_parsers(
        template if isinstance(template, str) else None, inner.model_config.architecture
    )
    # The server's word counts before the engine's options, and both before the template.
    tool = _first_said(settings.tool_parser, inner.options.tool_parser, by_template[0])
    reasoning = _first_said(settings.reasoning_parser, inner.options.reasoning_parser, by_template[1])
    check_parser_names(tool, reasoning)
    return ServedModel(name, engine, int(time.time()), tool, reasoning)


def _first_said(of_server: str | None, of_engine: str | None, by_template: str | None) -> str | None:
    if of_server != "auto":
        return of_server
    return by_template if of_engine in (None, "auto") else of_engine
