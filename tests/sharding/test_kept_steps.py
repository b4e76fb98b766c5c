"""Steps of a mesh that were kept are read back, not compiled, and compute the same."""

from __future__ import annotations

from pathlib import Path

from tests.sharding.meshes import GREEDY, new_engine, tokens

DIMS = (2, 1, 1, 2, 1)


def test_a_second_start_compiles_nothing(tmp_path: Path):
    kept = str(tmp_path / "steps")
    first = new_engine(DIMS, compiled_steps_path=kept)
    assert first.stats().num_compiled > 0
    second = new_engine(DIMS, compiled_steps_path=kept)
    assert (second.stats().num_compiled, second.stats().num_loaded) == (0, first.stats().num_compiled)
    assert tokens(second, GREEDY) == tokens(first, GREEDY)


def test_another_mesh_finds_nothing_of_it(tmp_path: Path):
    kept = str(tmp_path / "steps")
    new_engine(DIMS, compiled_steps_path=kept)
    assert new_engine((1, 1, 1, 4, 1), compiled_steps_path=kept).stats().num_loaded == 0
