"""What `python -m jobs.ray` is told beside the job itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.errors import ConfigError
from pipeline.settings import Settings

LOCAL = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    """num_workers: processes that share the run, each with an engine and accelerators of its own. address: of
    the cluster's head (host:port), auto for the cluster that this machine belongs to, local to start one
    here, bound to the loopback. cpus_per_worker, gpus_per_worker, tpus_per_worker: what Ray sets aside for
    each; null is one GPU or TPU chip where engine.platform says gpu or tpu, and none otherwise. resources:
    other resources for each, by the names that the cluster gave them. max_restarts: how often Ray starts a
    worker anew after it or its machine died; -1 is without end.
    """

    num_workers: int = 1
    address: str = LOCAL
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    tpus_per_worker: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    max_restarts: int = 100

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"ray.num_workers={self.num_workers}: must be at least 1")
        if self.max_restarts < -1:
            raise ConfigError(f"ray.max_restarts={self.max_restarts}: must be -1 (without end) or more")
        if self.address.startswith("ray://"):
            raise ConfigError(
                f"ray.address={self.address}: Ray's client protocol is not supported; give host:port of the "
                "head, or submit this command to the cluster (ray job submit -- python -m jobs.ray …)"
            )
        for name in ("cpus_per_worker", "gpus_per_worker", "tpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"ray.{name}={value:g}: must not be negative")
        others = (self.gpus_per_worker, self.tpus_per_worker, self.resources)
        if self.cpus_per_worker == 0 and not any(others):
            raise ConfigError("ray.cpus_per_worker=0 leaves nothing to place workers by: set another one")

    def placement(self, settings: Settings) -> dict[str, object]:
        """Options of an actor: what Ray sets aside for it."""
        platform = settings.engine.platform
        gpus = float(platform == "gpu") if self.gpus_per_worker is None else self.gpus_per_worker
        tpus = float(platform == "tpu") if self.tpus_per_worker is None else self.tpus_per_worker
        resources = dict(self.resources) | ({"TPU": tpus} if tpus else {})
        return {"num_cpus": self.cpus_per_worker, "num_gpus": gpus, "resources": resources}
