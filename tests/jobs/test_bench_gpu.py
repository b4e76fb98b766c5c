"""The benchmark for accelerators runs from end to end, on a CPU with a tiny shape."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints import load, load_config
from engine.models.abstract import num_parameters
from jobs.bench.gpu import Figure, as_table, main
from jobs.bench.random_model import write_checkpoint

TINY = ["--shape", "tiny", "--batch", "4", "--context", "40", "--prefill", "64"]


def test_a_random_model_has_the_sizes_of_its_shape_and_is_the_same_each_time(tmp_path: Path):
    folder = write_checkpoint(tmp_path, "tiny")
    config = load_config(str(folder))
    # Embeddings, head and a norm; in two layers queries, keys, values, output, three of the MLP, two norms.
    layer = (4 + 2 * 2) * 16 * 64 + 64 * 64 + 3 * 128 * 64 + 2 * 64
    assert num_parameters(config) == 2 * 49_152 * 64 + 2 * layer + 64
    assert load(str(folder), dtype="bfloat16").config == config
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "config.json").unlink()  # as if its writing had been cut short
    write_checkpoint(tmp_path, "tiny")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_steps_are_set_beside_limits_of_the_same_run(tmp_path: Path, capsys: Any):
    path = tmp_path / "gpu.json"
    assert main([*TINY, "--folder", str(tmp_path), "--workloads", "", "--json", str(path)]) == 0
    copies, products, decode, prefill = json.loads(path.read_text())["figures"]
    assert copies["value"] > 0 < products["value"]
    for step in (decode, prefill):
        assert step["limit"] > 0
        assert step["share"] == pytest.approx(step["limit"] / step["value"])
    shown = capsys.readouterr().out
    assert "| decode step, 4 sequences at 40 tokens and more |" in shown
    assert "native CPU kernels" in shown or "XLA's own code" in shown


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="the peer would run")
def test_a_peer_that_cannot_run_leaves_the_table_whole_and_says_why(tmp_path: Path, capsys: Any):
    assert main([*TINY, "--folder", str(tmp_path), "--workloads", "W2"]) == 0
    own, peer = [line for line in capsys.readouterr().out.splitlines() if ", output |" in line]
    assert own.startswith("| W2, output |")
    assert "tokens/s" in own
    assert peer.startswith("| transformers, output | not run |")
    assert "No module named 'torch'" in peer


def test_what_was_not_run_is_said():
    assert "| W1, output | not run |  |  | no torch |" in as_table(
        [Figure("W1, output", None, "", note="no torch")]
    )
