"""Constants are fitted to what was measured, and kept where the engine finds them."""

from __future__ import annotations

import json
import shutil
import time
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest

from engine.backends import Backends
from engine.config import EngineConfig
from engine.group_costs import COSTS_FILE, GroupCosts, group_costs, read_costs
from jobs.bench import groups
from jobs.bench.groups import Case, Heads, Point, fit, table
from kernels.paged_attention import available_backends

SMALL = Heads(num_heads=4, num_kv_heads=2, head_dim=16)


def points_of(costs: GroupCosts) -> list[Point]:
    """What a device with these constants would be measured to take."""
    points = []
    for num_rows, num_tokens in product((2, 4, 16, 64), (64, 256, 1024, 4096)):
        num_groups = 64 // num_rows
        saving = costs.saving(num_rows, num_rows, num_tokens)
        points.append(Point(num_rows, num_tokens, num_groups, 9000.0, 9000.0 - num_groups * saving))
    return points


@pytest.mark.parametrize(
    "costs",
    [
        GroupCosts(0.02, 0.3, 2.0),
        GroupCosts(0.03, 0.0, 40.0),
        GroupCosts(0.01, 1.5, 0.0),
        GroupCosts(0, 0, 0),
    ],
)
def test_the_fit_finds_the_constants_that_made_the_points(costs: GroupCosts):
    found = fit(points_of(costs))
    assert (found.token, found.query, found.group) == pytest.approx(
        (costs.token, costs.query, costs.group), rel=0.01, abs=1e-9
    )


def test_long_prefixes_do_not_move_the_fit():
    costs = GroupCosts(0.02, 0.3, 2.0)
    points = [
        point._replace(grouped=1.0) if point.num_tokens > groups.FITTED_TOKENS else point
        for point in points_of(costs)
    ]
    assert fit(points) == fit(points_of(costs))


def test_where_groups_only_cost_they_never_pay():
    costs = fit([point._replace(grouped=2 * point.plain) for point in points_of(GroupCosts(0.02, 0.3, 2.0))])
    assert costs.token == 0
    assert not any(point.is_chosen(costs) for point in points_of(costs))


def test_a_wrong_choice_is_shown_with_what_it_takes():
    right, wrong = Point(2, 64, 1, 100.0, 80.0), Point(2, 64, 1, 100.0, 125.0)
    costs = GroupCosts(1.0, 0.0, 0.0)
    assert right.loss(costs) == 0
    assert wrong.loss(costs) == 0.25
    assert "25.0%" in table([right, wrong], costs).splitlines()[2]


@pytest.mark.parametrize("backend", available_backends())
def test_what_is_timed_is_the_same_attention_with_and_without_groups(
    backend: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(groups, "MAX_ROWS", 8)
    monkeypatch.setattr(groups, "MAX_LAYERS", 2)
    case = Case(backend, SMALL, 64, num_rows=4, prefix_pages=2)
    assert case.num_groups == 2
    outs = [case.run(grouped) for grouped in (True, False)]
    assert np.isfinite(outs[0]).all()
    assert np.array_equal(outs[0], outs[1])
    assert case.microseconds(True, time.perf_counter) > 0


def test_what_was_measured_is_what_the_engine_runs_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(groups, "GROUP_SIZES", (2, 4))
    monkeypatch.setattr(groups, "PREFIX_PAGES", (1, 2))
    monkeypatch.setattr(groups, "MAX_ROWS", 4)
    monkeypatch.setattr(groups, "MAX_LAYERS", 2)
    path = tmp_path / "costs.json"
    shutil.copy(COSTS_FILE, path)
    before = json.loads(path.read_text())
    assert groups.main(["--head-dim", "16", "--tries", "2", "--keep", str(path)]) == 0
    [key] = Backends.choose(EngineConfig(), "cpu").device_keys(jax.devices()[0])
    after = json.loads(path.read_text())
    made = after["devices"].pop(key)
    before["devices"].pop(key, None)
    assert after == before, "the other entries are as they were"
    assert made["command"] == f"python -m jobs.bench groups --head-dim 16 --tries 2 --keep {path}"
    assert "KV heads of 16" in made["source"]
    costs = GroupCosts(made["token"], made["query"], made["group"])
    assert read_costs(path)[1][key] == costs
    assert group_costs((key,), path) == (costs if costs.token else None)
    shown = capsys.readouterr().out
    assert len(shown.partition("{")[0].splitlines()) == 1 + 4
    assert json.dumps(made, indent=1).splitlines()[1] in shown


def test_a_damaged_file_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "costs.json"
    path.write_text("{")
    assert groups.main(["--keep", str(path)]) == 2
    assert f"error: {path} is not JSON" in capsys.readouterr().err
    assert path.read_text() == "{"
