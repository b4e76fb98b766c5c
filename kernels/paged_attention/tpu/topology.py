"""Compiling for a TPU on a machine that has none: libtpu holds the whole compiler.

The environment has to be prepared before libtpu is first loaded, so call `prepare` early, in a process of
its own where the compiler is to write down what it did.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh


@dataclass(frozen=True, slots=True)
class Topology:
    """A slice of one chip kind, as libtpu names it. `options`: one device a chip that has two cores."""

    name: str
    accelerator: str
    options: dict[str, Any] = field(default_factory=dict)


_TWO_CORES = {"chip_config_name": "megacore"}
TOPOLOGIES = {
    "v4": Topology("v4:2x2x1", "v4-8", _TWO_CORES),
    "v5e": Topology("v5e:2x2", "v5litepod-4"),
    "v5p": Topology("v5p:2x2x1", "v5p-8", _TWO_CORES),
    "v6e": Topology("v6e:2x2", "v6e-4"),
    "tpu7x": Topology("tpu7x:2x2x1", "tpu7x-8"),
}


def is_installed() -> bool:
    """libtpu can be imported (`pip install 'tidemill[tpu-compile]'`)."""
    return importlib.util.find_spec("libtpu") is not None


def prepare(chip: str, dump_folder: Path | None = None) -> None:
    """Tell libtpu not to look for a TPU host; and where to write the compiler's schedules, if anywhere."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = TOPOLOGIES[chip].accelerator
    if dump_folder is not None:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={dump_folder} --xla_jf_dump_hlo_text=true --xla_jf_dump_llo_text=true "
            f"--xla_jf_emit_annotations=true --xla_mosaic_dump_to={dump_folder}/mosaic"
        )


def slice_devices(chip: str, axes: Sequence[int] = (1,)) -> list[Any]:
    """The devices of a slice with so many chips along each axis; one chip is a larger slice's first.

    Raises what libtpu raises when it does not know the slice.
    """
    topology = TOPOLOGIES[chip]
    name = topology.name if math.prod(axes) == 1 else f"{chip}:{'x'.join(map(str, axes))}"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **topology.options).devices
    return list(devices[:1] if math.prod(axes) == 1 else devices)


def one_device_mesh(chip: str) -> Mesh:
    """A mesh of one device of a chip."""
    return Mesh(np.array(slice_devices(chip)), ("device",))
