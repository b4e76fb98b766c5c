"""Choose JAX's platform and chips before anything is loaded, and say in one line when they are not there."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.chips import CHIPS, chip_of
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.mesh import AXES, mesh_shape

if TYPE_CHECKING:
    from jax.sharding import Mesh

PLATFORMS = ("auto", "cpu", "gpu", "tpu")

# What JAX calls each platform in `jax.config.jax_platforms`, and how a device of it reports itself.
_JAX_NAMES = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}

_REMEDY = {
    "gpu": "run on a machine with an NVIDIA GPU and pip install 'tidemill[gpu]', or choose conf=cpu",
    "tpu": "run on a TPU machine and pip install 'tidemill[tpu]', or choose conf=cpu",
    "cpu": "unset JAX_PLATFORMS",
}


def select_platform(name: str, chip: str | None = None) -> str:
    """Make JAX use `name` (`auto`, `cpu`, `gpu` or `tpu`) and return the platform it runs on.

    `auto` leaves the choice to JAX. Must come before the first array is made: JAX fixes its platform then.
    Raises ConfigError, in one line that names what JAX found, when the platform is unknown or this machine
    does not have it, or does not have the `chip` of `engine.chips.CHIPS` that is asked for.
    """
    if name not in PLATFORMS:
        raise ConfigError(f"engine.platform={name!r}: choose one of {', '.join(PLATFORMS)}")
    import jax  # late: `--cfg job` and bad configurations must not wait for it

    quieten_libtpu()
    if name == "auto":
        found = _default_platform(jax)
        _check_chip(jax, chip)
        return found
    if not _asked_for(jax):
        jax.config.update("jax_platforms", _JAX_NAMES[name])
    found = _platform_or_none(jax)
    if found != name:
        seen = _other_devices(jax) if found is None else f"JAX runs on {_describe(jax.devices())}"
        raise ConfigError(
            f"engine.platform={name} was asked for and this machine has no {name.upper()} for JAX ({seen}): "
            f"{_REMEDY[name]}"
        )
    _check_chip(jax, chip)
    return name


def quieten_libtpu() -> None:
    """Where no TPU is attached, keep libtpu from looking for the rest of a TPU host: it has been installed to
    compile with (`tpu-compile`), and says at length on stderr what it did not find. Before JAX is used.
    """
    if any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists():
        return
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v4-8",
    }.items():
        os.environ.setdefault(name, value)


def join_processes(config: EngineConfig) -> None:
    """Make this process one of those that `config` names, if it names any. Before JAX is used; once.

    Raises ConfigError where JAX cannot, with its reason.
    """
    address = config.coordinator_address
    if address is None:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    numbers = {"num_processes": config.num_processes, "process_id": config.process_id}
    try:
        jax.distributed.initialize(
            **({} if address == "auto" else {"coordinator_address": address, **numbers})
        )
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"engine.coordinator_address={address}: {text}") from error


def _check_chip(jax: Any, chip: str | None) -> None:
    """ConfigError unless JAX's devices are of this kind: another's profile would run badly, or not fit."""
    devices = jax.devices()
    if chip is None or CHIPS[chip].is_kind(devices[0].device_kind):
        return
    there = chip_of(devices[0].device_kind)
    choice = (
        "choose a profile made for that device" if there is None else f"choose conf={profile_of(there.name)}"
    )
    raise ConfigError(
        f"engine.chip={chip} was asked for and JAX found {_describe(devices)}: {choice}, or engine.chip=null "
        "to run with these settings all the same"
    )


def profile_of(chip: str) -> str:
    """The hardware profile under `conf/conf` that is made for a chip of `engine.chips.CHIPS`."""
    return f"{CHIPS[chip].platform}_{chip.removeprefix('tpu')}"


def _describe(devices: list[Any]) -> str:
    return f"{len(devices)} x {devices[0].platform} {devices[0].device_kind!r}"


def _other_devices(jax: Any) -> str:
    """What JAX finds where the platform asked for could not be started; JAX is then as it was."""
    _forget(jax)
    try:
        return f"JAX found {_describe(jax.devices())}"
    except (RuntimeError, AssertionError):  # as in `_platform_or_none`
        return "JAX found no device at all"
    finally:
        _forget(jax)


def make_mesh(dims: Sequence[int]) -> Mesh | None:
    """The mesh of this process's platform; None where it has one device, and nothing is to be split.

    Of several processes all must ask for the same, and every device must be in the mesh. Raises ConfigError
    as `mesh_shape` does.
    """
    import jax

    devices = jax.devices()
    shape = mesh_shape(dims, len(devices))
    size = math.prod(shape)
    if size == 1 and jax.process_count() == 1:
        return None
    if size != len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"engine.sharding_axis_dims={list(dims)} uses {size} of the {len(devices)} devices of "
            f"{jax.process_count()} processes: each device of each process must be used"
        )
    return mesh_of(devices, shape)


def mesh_of(devices: Sequence[Any], shape: Sequence[int]) -> Mesh:
    """The mesh of the first of these devices, with so many along each of `engine.mesh.AXES`."""
    import jax

    used = devices[: math.prod(shape)]
    return jax.make_mesh(
        tuple(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=used
    )


def _asked_for(jax: Any) -> str | None:
    """The platforms that JAX was already told to use, by JAX_PLATFORMS or by code."""
    return jax.config.jax_platforms


def _forget(jax: Any) -> None:
    """Leave JAX as it was: a notebook that asked for a TPU in vain must still be able to use its CPU."""
    from jax.extend.backend import clear_backends

    jax.config.update("jax_platforms", None)
    clear_backends()


def _default_platform(jax: Any) -> str:
    found = _platform_or_none(jax)
    if found is None:
        raise ConfigError(
            f"JAX could not start on platform {_asked_for(jax)!r}: unset JAX_PLATFORMS or install "
            "tidemill[tpu] or tidemill[gpu]"
        )
    return found


def _platform_or_none(jax: Any) -> str | None:
    """JAX's default platform, or None when the platform it was told to use cannot be started."""
    try:
        return str(jax.default_backend())
    except (RuntimeError, AssertionError):  # a backend that fails to start; CUDA asked for and no GPU visible
        return None
