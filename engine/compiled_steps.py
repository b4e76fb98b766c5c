"""Compiled steps kept under a path, so that a worker starts without compiling: on a disk, or behind any
fsspec URL that a preempted worker's successor can read too.

    <path>/<name>-<key>.step      one line of JSON (facts, hash, length), then what JAX serialised

The key is the hash of the facts: everything that the machine code depends on. A step whose facts are others
has another name, so what is there is either right or not found; a file that is damaged, or does not say of
itself what its name says, is compiled again and replaced.

Reading a step runs what is in it (it is a pickle, and machine code). So a folder that anybody else could
write to is refused, and a store, of which that cannot be seen, is used only with the user's word for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from engine.checkpoints.remote import without_secrets
from engine.compilation import without_compilation_cache
from engine.step_files import StepFiles, open_step_files

FORMAT = 1
_LOG = logging.getLogger(__name__)
# What a damaged, foreign or outdated pickle and XLA's own loader raise.
_UNREADABLE = (
    jax.errors.JaxRuntimeError,
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ImportError,
    EOFError,
    IndexError,
)
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TIDEMILL_CPU_ISA")
_OPTIONS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
)


class CompiledSteps:
    """The saved steps for one set of devices.

    `path` is a local folder (made if it is not there, for its owner alone) or an fsspec URL; None keeps
    nothing. Raises ConfigError when the path cannot be trusted or used.
    """

    def __init__(self, path: str | None, devices: Sequence[Any], *, is_trusted: bool = False):
        self._devices = list(devices)
        self._files: StepFiles | None = None if path is None else open_step_files(path, is_trusted)
        self._where = "" if path is None else without_secrets(path)
        self.num_loaded = self.num_compiled = 0

    def compile(
        self,
        name: str,
        lower: Callable[[], Any],
        arguments: tuple[Any, ...],
        outputs: Any,
        facts: Mapping[str, Any],
    ) -> Any:
        """The compiled function, loaded if it is there, else compiled and saved.

        Args:
            name: what the function is, for the file's name.
            lower: traces and lowers it: `jitted.lower(...)`.
            arguments: those it is called with, static ones left out: arrays or their shapes.
            outputs: any tree of the outputs' structure.
            facts: all else that the code depends on: static arguments, options. Plain JSON values.
        """
        if self._files is None:
            return lower().compile()
        facts = machine_facts(self._devices) | {"arguments": _described(arguments)} | dict(facts)
        file = f"{name}-{hashlib.sha256(_json(facts)).hexdigest()[:32]}.step"
        compiled = self._load(file, facts, arguments, outputs)
        if compiled is None:
            # On a CPU, what came from JAX's own cache lacks functions once it is serialised again, and says
            # so only when it runs.
            with without_compilation_cache():
                compiled = lower().compile()
            self.num_compiled += 1
            self._files.write(file, _encoded(facts, serialize(compiled)[0]))
        return compiled

    def _load(self, file: str, facts: Mapping[str, Any], arguments: tuple[Any, ...], outputs: Any) -> Any:
        assert self._files is not None
        data = self._files.read(file)
        if data is None:
            return None
        try:
            payload = _decoded(data, facts)
            structure = jax.tree.structure((arguments, {})), jax.tree.structure(outputs)
            loaded = deserialize_and_load(
                payload, *structure, backend=self._devices[0].client, execution_devices=self._devices
            )
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())[:300]
            _LOG.warning("%s/%s is not usable (%s): compiled again", self._where, file, reason)
            return None
        self.num_loaded += 1
        return loaded


def _encoded(facts: Mapping[str, Any], payload: bytes) -> bytes:
    header = {"format": FORMAT, "sha256": _sha256(payload), "size": len(payload), "facts": facts}
    return _json(header) + b"\n" + payload


def _decoded(data: bytes, facts: Mapping[str, Any]) -> bytes:
    """What was serialised. Raises ValueError unless it is whole, and was saved under exactly these facts."""
    line, _, payload = data.partition(b"\n")
    header = json.loads(line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"its first line is not that of a saved step of format {FORMAT}")
    if len(payload) != header["size"] or _sha256(payload) != header["sha256"]:
        raise ValueError("its content is damaged: length or hash are not those it was saved with")
    saved = header["facts"]
    if _json(saved) != _json(facts):
        names = sorted(name for name in {*saved, *facts} if saved.get(name) != facts.get(name))
        raise ValueError(f"it was saved for something else: {', '.join(names)} differ")
    return payload


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _described(arguments: tuple[Any, ...]) -> list[str]:
    """Place, dtype and shape of every array, and how it is spread over devices."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        sharding = getattr(getattr(leaf, "sharding", None), "spec", None)
        found.append(f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)} {sharding or ''}".strip())
    return found


def machine_facts(devices: Sequence[Any]) -> dict[str, Any]:
    """What code compiled for these devices depends on, besides the function: chips, versions, our sources."""
    client = devices[0].client
    facts: dict[str, Any] = {
        "platform": client.platform,
        "platform_version": client.platform_version,
        "devices": [[each.device_kind, each.id, getattr(each, "coords", None)] for each in devices],
        "processes": [jax.process_index(), jax.process_count()],
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu", "flax")},
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "options": {name: jax.config.values[name] for name in _OPTIONS},
        "sources": sources_hash(),
    }
    if client.platform == "cpu":
        facts["cpu"] = _cpu_features()
    # As they are when read back: JSON knows no tuples.
    return json.loads(_json(facts))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def sources_hash() -> str:
    """Of every file of `engine` and `kernels` that a step can come from, the native library included."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("engine", "kernels"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".so"):
                digest.update(f"{path.relative_to(root)} {_sha256(path.read_bytes())}\n".encode())
    return digest.hexdigest()


@cache
def _cpu_features() -> str:
    """Of what this CPU can do: XLA compiles for exactly that."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return _sha256("\n".join(sorted(features)).encode())
