"""Steps that were saved are run instead of compiled, if they are ours, whole, and for this very machine."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.compiled_steps import CompiledSteps, machine_facts
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from tests.engine.engines import tiny_engine, tokens_of, varied_model

START = """
import sys
from engine.engine import Engine
from engine.sampling_params import SamplingParams
engine = Engine.from_pretrained(sys.argv[1], compilation_cache_dir=sys.argv[2],
                                compiled_steps_path=sys.argv[3], max_num_seqs=4, page_size=16,
                                max_num_batched_tokens=32, max_model_len=64, kv_cache_bytes=1 << 20)
stats = engine.stats()
[output] = engine.generate([[1, 5, 9]], SamplingParams(temperature=0.0, max_tokens=8))
print(stats.num_compiled, stats.num_loaded, *output.outputs[0].token_ids)
"""


def start(checkpoint: str, cache: Path, saved: Path) -> tuple[int, int, list[str]]:
    """(compiled, loaded, tokens) of a new process."""
    command = [sys.executable, "-c", START, checkpoint, str(cache), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    compiled, loaded, *tokens = done.stdout.split()
    return int(compiled), int(loaded), tokens


def test_a_worker_that_starts_elsewhere_compiles_nothing(tiny_checkpoint: str, tmp_path: Path) -> None:
    """Another process with an empty compilation cache of its own, as on another machine of the same kind."""
    saved = tmp_path / "steps"
    compiled, loaded, tokens = start(tiny_checkpoint, tmp_path / "first", saved)
    assert (compiled, loaded) == (3, 0), "two steps and the copies of pages"
    assert stat.S_IMODE(saved.stat().st_mode) == 0o700, "compiled code is run as it is found"
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in saved.iterdir())
    assert len(list(saved.iterdir())) == 3
    assert start(tiny_checkpoint, tmp_path / "second", saved) == (0, 3, tokens)


def engine_with(path: Path | str, **options: Any) -> Engine:
    base = EngineConfig(
        max_num_seqs=8,
        max_num_batched_tokens=32,
        min_token_pad=32,
        max_model_len=128,
        page_size=16,
        kv_cache_bytes=1 << 20,
    )
    return Engine(varied_model(), replace(base, compiled_steps_path=str(path), **options))


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_loaded_steps_make_the_same_tokens(backend: str, tmp_path: Path) -> None:
    sampling = SamplingParams(temperature=0.8, max_tokens=12, seed=3)
    prompts = [[1, 7, 30], [2, 9]]
    options = {"attention_backend": backend, "linear_backend": backend}
    for wanted in (0, 2):
        engine = engine_with(tmp_path / "steps", **options)
        assert engine.stats().num_loaded == wanted
        assert tokens_of(engine.generate(prompts, sampling)) == tokens_of(
            tiny_engine(**options).generate(prompts, sampling)
        )


@pytest.mark.parametrize(("change", "shared"), [({"page_size": 32}, 0), ({"weight_dtype": "int8"}, 1)])
def test_other_shapes_and_options_are_other_steps(
    change: dict[str, Any], shared: int, tmp_path: Path
) -> None:
    """How weights are stored makes no difference to the copying of pages."""
    engine_with(tmp_path)
    assert engine_with(tmp_path, **change).stats().num_loaded == shared
    assert engine_with(tmp_path).stats().num_loaded == 2
    assert engine_with(tmp_path, **change).stats().num_loaded == 2


# -- the files themselves, with a small function ---------------------------------------------------


def double(path: Path | str, facts: dict[str, Any] | None = None, **options: Any) -> CompiledSteps:
    """Compile or load x -> 2 x under `path`, and see that it is right."""
    saved = CompiledSteps(str(path), jax.devices()[:1], **options)
    x = np.arange(4, dtype=np.float32)
    compiled = saved.compile(
        "double", lambda: jax.jit(lambda x: x * jnp.float32(2)).lower(x), (x,), 0, facts or {}
    )
    assert np.array_equal(compiled(x), 2 * x)
    return saved


def only_file(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


def test_a_first_start_saves_and_a_second_loads(tmp_path: Path) -> None:
    assert double(tmp_path).num_loaded == 0
    assert double(tmp_path).num_loaded == 1
    assert double(tmp_path, {"scale": 3}).num_loaded == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_without_a_path_nothing_is_kept() -> None:
    saved = CompiledSteps(None, jax.devices()[:1])
    x = np.ones(2, np.float32)
    assert saved.compile("f", lambda: jax.jit(lambda x: -x).lower(x), (x,), 0, {})(x)[0] == -1


@pytest.mark.parametrize("place", [0, 5, -1])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_compiled_again_and_replaced(
    damage: str, place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    double(tmp_path)
    file = only_file(tmp_path)
    whole = file.read_bytes()
    at = place % len(whole)
    file.write_bytes(whole[:at] if damage == "cut" else whole[:at] + b"\xff" + whole[at + 1 :])
    with caplog.at_level(logging.WARNING):
        assert double(tmp_path).num_loaded == 0
    assert file.name in caplog.text
    assert "compiled again" in caplog.text
    assert double(tmp_path).num_loaded == 1, "and the next start finds it whole"


def test_a_step_under_another_steps_name_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    double(tmp_path, {"scale": 2})
    right = only_file(tmp_path)
    double(tmp_path, {"scale": 3})
    [other] = set(tmp_path.iterdir()) - {right}
    other.write_bytes(right.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert double(tmp_path, {"scale": 3}).num_loaded == 0
    assert "saved for something else: scale differ" in caplog.text


def test_what_is_whole_but_not_to_be_loaded_is_compiled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a change of JAX that kept its version."""
    import hashlib

    double(tmp_path)
    file = only_file(tmp_path)
    header = json.loads(file.read_bytes().partition(b"\n")[0])
    payload = b"not a pickle"
    header |= {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    file.write_bytes(json.dumps(header).encode() + b"\n" + payload)
    with caplog.at_level(logging.WARNING):
        assert double(tmp_path).num_loaded == 0
    assert "compiled again" in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(
        ConfigError, match=rf"{folder}: .* others may write here \(mode {mode:o}\): chmod go-w"
    ):
        double(folder)
    with pytest.raises(ConfigError, match="others may write here"):
        double(f"file://{folder}")
    assert not list(folder.iterdir())


def test_a_folder_inside_one_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    """Whoever may write above it can put another folder in its place."""
    (tmp_path / "open" / "steps").mkdir(parents=True)
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match=r"open: .* others may write here"):
        double(tmp_path / "open" / "steps")
    (tmp_path / "open").chmod(0o1777)  # as the system's temporary folder: nobody can move what is not his
    assert double(tmp_path / "open" / "steps").num_loaded == 0


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    target = tmp_path / "shared"
    target.mkdir()
    target.chmod(0o777)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ConfigError, match=r"shared: .* others may write here"):
        double(tmp_path / "link")


def test_a_file_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    double(tmp_path)
    only_file(tmp_path).chmod(0o666)
    with pytest.raises(ConfigError, match=r"double-.*\.step: .* others may write here"):
        double(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(ConfigError, match=r"belongs to another user \(id 12345\)"):
        double(folder)


def test_a_store_is_used_only_with_the_users_word(tmp_path: Path) -> None:
    url = f"memory://steps-{uuid.uuid4().hex}"
    with pytest.raises(ConfigError, match=r"who may write to a store .* engine\.compiled_steps_trusted=true"):
        double(url)
    assert double(url, is_trusted=True).num_loaded == 0
    assert double(url, is_trusted=True).num_loaded == 1


def test_a_store_that_cannot_be_written_costs_time_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with caplog.at_level(logging.WARNING):
        assert double(f"memory://steps-{uuid.uuid4().hex}", is_trusted=True).num_loaded == 0
    assert "could not be saved (PermissionError)" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"), [("XLA_FLAGS", "--xla_dump_hlo_as_text"), ("LIBTPU_INIT_ARGS", "x")]
)
def test_what_changes_the_code_changes_the_key(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = jax.devices()[:1]
    before = machine_facts(devices)
    assert before == machine_facts(devices)
    monkeypatch.setenv(name, value)
    assert machine_facts(devices) != before
    assert {"jax", "jaxlib", "libtpu"} <= set(before["versions"])
