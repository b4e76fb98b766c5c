"""What an engine needs before it can be made: a platform, the other processes, a runner of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.checkpoints import LoadedModel, load
from engine.compilation import use_compilation_cache
from engine.config import EngineConfig
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
