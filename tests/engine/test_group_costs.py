"""The constants that decide between grouped and plain attention: one set a device, and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.group_costs import COSTS_FILE, GroupCosts, device_keys, group_costs, read_costs
from engine.prefix_groups import Branch, find_groups
from kernels.cpu import isa_name, native_library
from tests.engine.engines import tiny_engine

DEFAULT, KEPT = read_costs()
PAGE_SIZE = 64


def is_grouped(costs: GroupCosts | None, num_rows: int, num_pages: int) -> bool:
    """Whether rows of one query each, behind one prefix, become a group."""
    ends = np.arange(1, num_rows + 1, dtype=np.int32)
    return bool(find_groups([Branch(0, num_rows, num_pages, None)], ends, PAGE_SIZE, costs))


@pytest.mark.parametrize("name", ["default", *KEPT])
@given(num_rows=st.integers(2, 64), num_pages=st.integers(1, 64))
def test_the_cheaper_alternative_is_chosen(name: str, num_rows: int, num_pages: int):
    costs = DEFAULT if name == "default" else KEPT[name]
    num_tokens = num_pages * PAGE_SIZE
    plain = num_rows * num_tokens * costs.token
    grouped = num_tokens * costs.token + num_rows * costs.query + costs.group
    assert is_grouped(costs, num_rows, num_pages) == (grouped < plain)


@pytest.mark.parametrize("num_rows", [2, 3, 7, 64])
def test_the_choice_changes_at_the_crossing(num_rows: int):
    # 10 us are saved by each row but the first and for each page.
    costs = GroupCosts(token=10 / PAGE_SIZE, query=0.0, group=10.0 * (num_rows - 1) * 5)
    assert [is_grouped(costs, num_rows, num_pages) for num_pages in (4, 5, 6)] == [False, False, True]
    assert not is_grouped(GroupCosts(10 / PAGE_SIZE, 0.1, costs.group - 0.1), num_rows, 5)
    assert is_grouped(GroupCosts(10 / PAGE_SIZE, 0.0, costs.group - 0.1), num_rows, 5)


def test_a_device_takes_the_narrowest_of_its_entries_and_an_unknown_one_the_default(tmp_path: Path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(content(devices={"gpu xla": entry(2.0), "gpu xla H9": entry(3.0)})))
    assert group_costs(device_keys("gpu", "H9", "xla", None), path) == GroupCosts(3.0, 1.0, 1.0)
    assert group_costs(device_keys("gpu", "H8", "xla", None), path) == GroupCosts(2.0, 1.0, 1.0)
    for unknown in (
        device_keys("tpu", "H9", "xla", None),
        device_keys("cpu", "cpu", "cpu", "avx1024"),
        device_keys("cpu", "cpu", "xla", "avx512"),
    ):
        assert group_costs(unknown, path) == GroupCosts(1.0, 1.0, 1.0)
    assert group_costs(device_keys("npu", "x", "xla", None)) == DEFAULT
    assert DEFAULT.token > 0


def test_where_groups_never_pay_none_are_looked_for(tmp_path: Path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(content(devices={"cpu xla": entry(0.0)})))
    assert group_costs(device_keys("cpu", "cpu", "xla", None), path) is None


def test_the_engine_runs_with_the_constants_of_its_device():
    engine = tiny_engine()
    backend = engine._runner.backends.attention
    keys = device_keys("cpu", jax.devices()[0].device_kind, backend, isa_name())
    assert engine._runner._batch._group_costs == group_costs(keys)
    if native_library() is not None:
        assert keys == (f"cpu native {isa_name()}",)
        assert keys[0] in KEPT, "every instruction set of the native kernels has constants"


def test_every_instruction_set_has_measured_constants():
    sets = json.loads(COSTS_FILE.read_text())["devices"]
    for isa in ("amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "baseline"):
        assert sets[f"cpu native {isa}"]["source"].startswith("measured: ")
    assert sets["cpu xla"]["source"].startswith("measured: ")
    for name, kept in sets.items():
        if not name.startswith("cpu"):
            assert kept["source"].startswith("estimate: "), "none was at hand; say what measured it"


def entry(token: Any, **changes: Any) -> dict[str, Any]:
    return {"token": token, "query": 1.0, "group": 1.0, "source": "estimate: for a test"} | changes


def content(**changes: Any) -> dict[str, Any]:
    return {"default": entry(1.0), "devices": {}} | changes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'must hold "default" and "devices"'),
        (json.dumps({"devices": {}}), 'must hold "default" and "devices"'),
        (json.dumps(content(more=1)), "and nothing else"),
        (json.dumps(content(devices=[])), '"devices" must be entries by name'),
        (json.dumps(content(default=5)), "'default' is not an entry with token, query, group"),
        (json.dumps(content(devices={"cpu xla": entry(-1.0)})), "'cpu xla': GroupCosts.token is -1.0"),
        (json.dumps(content(devices={"cpu xla": entry("1")})), "'cpu xla': GroupCosts.token is '1'"),
        (json.dumps(content(devices={"cpu xla": entry(True)})), "'cpu xla': GroupCosts.token is True"),
        (json.dumps(content(devices={"x": entry(float("nan"))})), "'x': GroupCosts.token is nan"),
        (json.dumps(content(devices={"x": entry(float("inf"))})), "'x': GroupCosts.token is inf"),
        (
            json.dumps(content(devices={"x": entry(1.0, querry=1)})),
            r"'x' has keys too many or too few \(querry",
        ),
        (json.dumps(content(devices={"x": entry(1.0, source="measured: a")})), r"\(command, date, machine\)"),
        (json.dumps(content(devices={"x": entry(1.0, source="guess")})), "'x': source is 'guess'"),
    ],
)
def test_a_file_that_is_not_what_it_must_be_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        group_costs(("cpu xla",), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_costs(tmp_path / "absent.json")


@pytest.mark.parametrize("field", ["token", "query", "group"])
def test_costs_are_not_negative(field: str):
    for value in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match=field):
            GroupCosts(**({"token": 1.0, "query": 1.0, "group": 1.0} | {field: value}))
