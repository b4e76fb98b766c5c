"""What an engine needs before it can be made: a platform, the other processes, a runner of steps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.checkpoints import LoadedModel, check_vocabulary, load, load_tokenizer
from engine.compilation import use_compilation_cache
from engine.config import DTYPES, EngineConfig
from engine.errors import ConfigError
from engine.options import Options
from engine.platforms import join_processes, make_mesh, select_platform

if TYPE_CHECKING:
    from engine.lockstep import Lockstep
    from engine.runner import StepRunner


def load_for(config: EngineConfig, source: str, revision: str | None = None) -> LoadedModel:
    """Load a model for an engine of this config; on a mesh the engine itself reads the weights."""
    join_processes(config)
    select_platform(config.platform, config.chip)
    defers = make_mesh(config.sharding_axis_dims) is not None
    return load(source, revision=revision, dtype=config.dtype, defers_weights=defers)


def model_for(
    model: LoadedModel | str, tokenizer: Any, revision: str | None, told: Options, *, is_whole: bool
) -> tuple[LoadedModel, EngineConfig]:
    """The model of an engine, loaded, with the tokenizer that it is to have, and the engine's configuration.

    is_whole: the configuration was given as a whole; else a loaded model's dtype is taken where none is asked
        for.
    """
    config = told.config
    if isinstance(model, str):
        loaded = load_for(config, model, revision)
    elif isinstance(model, LoadedModel):
        if revision is not None:
            raise ConfigError("revision is of a hub id, and the model is loaded already: leave it out")
        loaded = model
        if not is_whole and "dtype" not in told.names and str(model.model.embed.dtype) in DTYPES:
            config = replace(config, dtype=str(model.model.embed.dtype))
    else:
        raise ConfigError(
            f"model is a {type(model).__name__}: give what engine.checkpoints.load returns, or a model's "
            "name, path or URL"
        )
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is not None:
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ConfigError(
                f"tokenizer is a {type(tokenizer).__name__}: give a fast tokenizer of transformers, or a path"
            )
        check_vocabulary("tokenizer", tokenizer, loaded.config)
        loaded = replace(loaded, tokenizer=tokenizer)
    return loaded, config


def make_runner(
    loaded: LoadedModel,
    config: EngineConfig,
    max_model_len: int,
    *,
    takes_weights: bool,
    lockstep: Lockstep | None,
) -> tuple[StepRunner, Lockstep | None]:
    """The runner, and the connections to the processes that run its steps too, `lockstep` if given."""
    join_processes(config)
    select_platform(config.platform, config.chip)
    use_compilation_cache(config.compilation_cache_dir)
    # After the platform is chosen, so that importing this module starts no backend.
    from engine.runner import StepRunner

    if config.coordinator_address is not None:
        from engine.lockstep import connect, facts_of

        lockstep = lockstep or connect(config)
        if lockstep is not None:
            lockstep.begin(facts_of(config, loaded.fingerprint))
    weights = loaded.stored or loaded.model
    runner = StepRunner(weights, loaded.config, config, max_model_len, takes_weights=takes_weights)
    if lockstep is not None and lockstep.leads:
        runner.lead(lockstep)
    return runner, lockstep
