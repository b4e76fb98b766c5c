"""`python -m jobs.serve`: an OpenAI-compatible server of one model or several, on this machine's loopback.

    python -m jobs.serve                                                    the embedded model
    python -m jobs.serve conf=gpu model.source=… engine.max_model_len=8192  any other; options as of a job
    python -m jobs.serve 'serve.models={small: /models/a, large: /models/b}'

It prints a curl line to try it with. SIGTERM and Ctrl-C end it gracefully.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.server import require_server_packages
from engine.server.settings import ServerSettings
from jobs.api_keys import KEY_VARIABLE, open_keys, told_once
from jobs.command import end_by_signals, exit_code_of
from jobs.sections import section_help, take_section
from pipeline.compose import compose
from pipeline.exit_codes import ExitCode
from pipeline.settings import KNOWN_KEYS, ModelSettings
from pipeline.typed_config import build, unknown_key

_TAKEN = ("model", "engine", "conf")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """host, port: where to listen; port 0 is any free one. name: what requests call the model; null is its
    source's last part, and "default" names a single model always. models: several, by name, in the place of
    model.source. keys_path: a file that keeps API keys and what they used; null keeps them in memory.
    batches_path: a local folder for /v1/files and /v1/batches; null is without. metrics: /metrics and
    /dashboard. traces: a span a request, sent where the OTEL_* variables say (extra `otel`).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    models: dict[str, str] | None = None
    keys_path: str | None = None
    batches_path: str | None = None
    metrics: bool = True
    traces: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"serve.port={self.port}: must be from 0 to 65535")
        if self.models is not None and not self.models:
            raise ConfigError("serve.models={}: name at least one model, or leave it out")
        if self.models is not None and self.name is not None:
            raise ConfigError("serve.name and serve.models: give one of them")


@dataclass(frozen=True, slots=True)
class Serving:
    """All that a start is told."""

    serve: ServeSettings
    server: ServerSettings
    model: ModelSettings
    engine: EngineConfig

    @property
    def sources(self) -> dict[str, str]:
        """The model files by the names that requests use."""
        if self.serve.models is not None:
            return dict(self.serve.models)
        return {self.serve.name or self.model.source.rstrip("/").rpartition("/")[2]: self.model.source}


def read_arguments(arguments: Sequence[str]) -> Serving | None:
    """None when Hydra has answered (`--cfg job`, ...). Raises ConfigError."""
    serve, rest = take_section(arguments, "serve", ServeSettings)
    server, rest = take_section(rest, "server", ServerSettings)
    for argument in rest:
        key = argument.lstrip("+~").partition("=")[0]
        if "=" in argument and key.partition(".")[0] not in _TAKEN:
            known = ["model.source", "engine.max_model_len", "conf", "serve.port", "server.require_api_key"]
            raise unknown_key(key, known)
    config = compose(rest, KNOWN_KEYS)
    if config is None:
        return None
    model = build(ModelSettings, config["model"], "model")
    return Serving(serve, server, model, build(EngineConfig, config["engine"], "engine"))


def run_server(serving: Serving, *, on_ready: Callable[[str], None] | None = None) -> ExitCode:
    """Load the models and serve until a signal. Raises TidemillError for what the user must see to."""
    require_server_packages()
    from engine.server.serving import bound_socket, serve
    from jobs.batches.store import BatchStore

    # What can be refused is, before anything slow is loaded.
    bound_socket(serving.serve.host, serving.serve.port, serving.server).close()
    if serving.serve.batches_path is not None:
        BatchStore(serving.serve.batches_path).close()
    keys, secret = open_keys(
        serving.serve.keys_path, required=serving.server.require_api_key, command="python -m jobs.serve"
    )
    providers = _trace_providers(serving)
    loaded = {name: _load(serving, source) for name, source in serving.sources.items()}
    engines = {name: engine for name, (engine, _) in loaded.items()}
    followers = [engine for engine in engines.values() if not engine.leads]
    for engine in followers:  # another process of the same engine takes the requests
        engine.follow()
    if followers:
        return ExitCode.DONE
    fingerprints = {name: fingerprint for name, (_, fingerprint) in loaded.items()}
    with ExitStack() as closing:
        closing.callback(keys.close)
        for name, engine in engines.items():
            closing.callback(engine.close)
            if name in providers:
                closing.callback(_traced(engine, providers[name]).close)
        app = _app(serving, engines, fingerprints, keys)
        told = on_ready or (lambda url: _tell(serving, url, secret))
        serve(app, serving.server, host=serving.serve.host, port=serving.serve.port, on_ready=told)
    return ExitCode.DONE


def _app(serving: Serving, engines: Mapping[str, Any], fingerprints: Mapping[str, str], keys: Any) -> Any:
    from engine.async_engine import AsyncEngine
    from engine.server.app import create_app

    settings = serving.server
    models = {name: AsyncEngine(engine, max_waiting=settings.max_waiting) for name, engine in engines.items()}
    return create_app(
        models,
        settings=settings,
        keys=keys,
        batches=_batches(serving, models, fingerprints, keys),
        metrics=_metrics(engines) if serving.serve.metrics else None,
    )


def _trace_providers(serving: Serving) -> dict[str, Any]:
    """What sends the spans of each model's requests. Raises ConfigError, MissingExtraError."""
    if not serving.serve.traces:
        return {}
    from engine.monitoring.tracing import provider_from_environment

    return {name: provider_from_environment() for name in serving.sources}


def _traced(engine: Any, provider: Any) -> Any:
    """The monitoring that makes spans until it is closed."""
    from engine.monitoring.monitor import Monitoring

    monitoring = Monitoring()
    monitoring.trace(engine, provider)
    return monitoring


def _batches(
    serving: Serving, models: Mapping[str, Any], fingerprints: Mapping[str, str], keys: Any
) -> Any | None:
    """What runs `/v1/batches`, on the same engines; the app starts and closes it."""
    if serving.serve.batches_path is None:
        return None
    from jobs.batches.pipeline_batches import PipelineBatches
    from jobs.batches.running import BatchModel

    served = {name: BatchModel(engine=models[name], fingerprint=fingerprints[name]) for name in models}
    return PipelineBatches(serving.serve.batches_path, served, record_usage=keys.record_usage)


def _load(serving: Serving, source: str) -> tuple[Any, str]:
    """The engine, and the fingerprint of its model."""
    from engine.collector import spare_long_lived_objects
    from engine.engine import Engine
    from engine.start import load_for

    loaded = load_for(serving.engine, source, serving.model.revision)
    engine = Engine(loaded, serving.engine, takes_weights=True)
    spare_long_lived_objects()
    return engine, loaded.fingerprint


def _metrics(engines: Mapping[str, Any]) -> Any:
    from engine.monitoring import Metrics

    metrics = Metrics()
    for name, engine in engines.items():
        metrics.watch(engine, name)
    return metrics


def _tell(serving: Serving, url: str, secret: str | None) -> None:
    """Where it is, the key if one was made, and a line to try it with."""
    key = secret or (f"${KEY_VARIABLE}" if serving.server.require_api_key else None)
    print(f"Serving {', '.join(serving.sources)} on {url}/v1", flush=True)
    if secret is not None:
        print(told_once(secret, serving.serve.keys_path))
    print("Try it:", curl_line(url, next(iter(serving.sources)), key), flush=True)


def curl_line(url: str, model: str, key: str | None) -> str:
    """A command that streams an answer."""
    messages = [{"role": "user", "content": "Say hello."}]
    body = {"model": model, "messages": messages, "temperature": 0, "stream": True}
    authorization = f' -H "Authorization: Bearer {key}"' if key else ""
    return (
        f"curl -N {url}/v1/chat/completions{authorization} -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; every expected error is one line and an exit code."""
    return exit_code_of(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> ExitCode:
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        print(section_help("serve", ServeSettings))
        print("\n" + section_help("server", ServerSettings))
        return ExitCode.DONE
    serving = read_arguments(arguments)
    if serving is None:
        return ExitCode.DONE
    end_by_signals()
    return run_server(serving)


if __name__ == "__main__":
    sys.exit(main())
