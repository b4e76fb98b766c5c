"""How many chips each axis of the mesh gets, and what cannot be asked for."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.mesh import AXES, mesh_shape
from engine.platforms import make_mesh


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7))
def test_the_rest_goes_to_the_axis_that_asks_for_it(dp: int, fsdp: int, rest: int):
    assert mesh_shape((dp, fsdp, 1, -1, 1), dp * fsdp * rest) == (dp, fsdp, 1, rest, 1)
    assert mesh_shape((-1, fsdp, 1, dp, 1), dp * fsdp * rest) == (rest, fsdp, 1, dp, 1)


@given(st.lists(st.integers(1, 4), min_size=5, max_size=5), st.integers(1, 40))
def test_sizes_are_taken_as_they_are_or_refused_with_the_numbers(dims: list[int], num_devices: int):
    if math.prod(dims) > num_devices:
        with pytest.raises(
            ConfigError, match=f"needs {math.prod(dims)} devices, and there are {num_devices}"
        ):
            mesh_shape(dims, num_devices)
    elif dims[4] > 1:
        with pytest.raises(ConfigError, match=r"sp is \d, and splitting a sequence"):
            mesh_shape(dims, num_devices)
    else:
        assert mesh_shape(dims, num_devices) == tuple(dims)


def test_what_is_left_must_divide():
    with pytest.raises(ConfigError, match="8 devices are not a multiple of 3, so -1 has no size"):
        mesh_shape((3, 1, 1, -1, 1), 8)


def test_one_device_needs_no_mesh():
    assert EngineConfig().sharding_axis_dims == (1, 1, 1, -1, 1)
    assert make_mesh(EngineConfig().sharding_axis_dims) is None


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((1, 1, 1, 1), f"give {len(AXES)} whole numbers"),
        ((1, 1, 0, 1, 1), "each 1 or more, or -1"),
        ((1, 1, True, 1, 1), "each 1 or more, or -1"),
        ((1, 1, 1.0, 1, 1), "each 1 or more, or -1"),
        ("11111", "give 5 whole numbers"),
        ((1, -1, 1, -1, 1), "only one of them can be -1"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(dims, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(sharding_axis_dims=dims)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2}, "go with an engine.coordinator_address"),
        ({"coordinator_address": "auto", "process_id": 0}, "go with an engine.coordinator_address"),
        ({"coordinator_address": "host:123"}, "with engine.num_processes and engine.process_id"),
        ({"coordinator_address": "host", "num_processes": 2, "process_id": 0}, "give host:port"),
        ({"coordinator_address": "host:1", "num_processes": 2, "process_id": 2}, "from 0 to 1"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)
