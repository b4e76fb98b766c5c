"""A Hugging Face folder as a model: config.json, safetensors (one file or sharded), AutoTokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from engine.checkpoints.reading import one_line, read_json_object
from engine.errors import ModelError
from engine.models.config import ARCHITECTURES, ModelConfig, RopeScaling, unknown_architecture
from engine.models.llama import WeightPart

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Formats that run code when they are opened; refused by name."""

SLICE_VALUES = 4 << 20
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FLOATS = ("F64", "F32", "F16", "BF16")
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


def hugging_face_config(folder: Path) -> ModelConfig:
    """The model's sizes and switches from config.json, with the EOS ids of generation_config.json added."""
    path = folder / "config.json"
    values = read_json_object(path)
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ModelError(f"{path}: {unknown_architecture(model_type)}")
    for key in _REQUIRED:
        if values.get(key) is None:
            raise ModelError(f"{path}: {key} is missing")
    _refuse_what_is_not_computed(path, values)
    generation_path = folder / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    num_heads = _number(path, values, "num_attention_heads", int)
    if num_heads < 1:
        raise ModelError(f"{path}: num_attention_heads is {num_heads}")
    rope = _rope(path, values)
    has_experts = model_type == "mixtral"
    return ModelConfig(
        architecture=model_type,
        num_experts=_number(path, values, "num_local_experts", int, 8) if has_experts else 0,
        experts_per_token=_number(path, values, "num_experts_per_tok", int, 2) if has_experts else 0,
        vocab_size=_number(path, values, "vocab_size", int),
        d_model=_number(path, values, "hidden_size", int),
        num_layers=_number(path, values, "num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=_number(path, values, "num_key_value_heads", int, num_heads),
        head_dim=_number(
            path, values, "head_dim", int, _number(path, values, "hidden_size", int) // num_heads
        ),
        intermediate_size=_number(path, values, "intermediate_size", int),
        rms_norm_eps=_number(path, values, "rms_norm_eps", float, 1e-6),
        rope_theta=_number(
            path, rope, "rope_theta", float, _number(path, values, "rope_theta", float, 10000.0)
        ),
        rope_scaling=_rope_scaling(path, rope),
        max_position_embeddings=_number(path, values, "max_position_embeddings", int),
        tie_word_embeddings=_switch(path, values, "tie_word_embeddings"),
        attention_bias=_switch(path, values, "attention_bias"),
        mlp_bias=_switch(path, values, "mlp_bias"),
        bos_token_id=_number(path, values, "bos_token_id", int)
        if values.get("bos_token_id") is not None
        else None,
        eos_token_ids=tuple(
            dict.fromkeys((*_token_ids(path, values), *_token_ids(generation_path, generation)))
        ),
    )


def _refuse_what_is_not_computed(path: Path, values: dict[str, Any]) -> None:
    if values.get("quantization_config") is not None:
        raise ModelError(
            f"{path}: quantised safetensors are not implemented; use the unquantised model or a GGUF"
        )
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"{path}: hidden_act {activation!r} is not implemented: we have silu")
    if values.get("sliding_window") is not None and values.get("model_type") == "mixtral":
        raise ModelError(f"{path}: sliding_window is set, and attention of that kind is not implemented")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelError(f"{path}: partial_rotary_factor is not implemented")


def _number(path: Path, values: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """`values[key]` as `kind`; null counts as absent, a bool or a text as an error."""
    value = values.get(key)
    if value is None:
        return default
    kinds = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ModelError(f"{path}: {key} must be a number ({kind.__name__}), got {value!r:.80}")
    return kind(value)


def _switch(path: Path, values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ModelError(f"{path}: {key} must be true or false, got {value!r:.80}")
    return value


def _token_ids(path: Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    value = values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise ModelError(f"{path}: eos_token_id must be a token id or a list of them, got {value!r:.80}")
    return tuple(ids)


def _rope(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The rope settings: `rope_parameters` as transformers 5 writes them, `rope_scaling` as 4 did."""
    for key in ("rope_parameters", "rope_scaling"):
        settings = values.get(key)
        if settings is not None:
            if not isinstance(settings, dict):
                raise ModelError(f"{path}: {key} must be an object, got {settings!r:.80}")
            return settings
    return {}


def _rope_scaling(path: Path, rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind not in ("linear", "llama3"):
        raise ModelError(f"{path}: rope scaling {kind!r} is not implemented: we have linear, llama3")
    keys = ["factor"]
    if kind == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for key in keys:
        if rope.get(key) is None:
            raise ModelError(f"{path}: rope scaling {kind} needs {key}")
    settings = {
        key: _number(path, rope, key, int if key == "original_max_position_embeddings" else float)
        for key in keys
    }
    return RopeScaling(kind=kind, **settings)


class SafetensorsWeights:
    """The tensors of a folder's safetensors files, read a slice at a time."""

    def __init__(self, folder: Path):
        self.where = str(folder)
        self._files = _weight_files(folder)
        self._open: dict[Path, Any] = {}
        self._place: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in self._files:
            with _named(path):
                opened = self._open[path] = safe_open(str(path), framework="numpy")
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if name.endswith("rotary_emb.inv_freq"):
                        continue  # Old files store it; it follows from the config.
                    if name in self._place:
                        raise ModelError(f"{path}: the tensor {name} is also in {self._place[name].name}")
                    view = opened.get_slice(name)
                    if view.get_dtype() not in _FLOATS:
                        raise ModelError(
                            f"{path}: the tensor {name} is {view.get_dtype()}, which is not implemented: "
                            f"we have {', '.join(_FLOATS)}"
                        )
                    self._place[name] = path
                    self._shapes[name] = tuple(view.get_shape())

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in order."""
        return self._files

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read_into(
        self,
        part: WeightPart,
        target: np.ndarray,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> None:
        path = self._place[part.name]
        first = rows[0] if rows else 0
        with _named(path):
            view = self._open[path].get_slice(part.name)
            step = max(1, SLICE_VALUES // max(1, int(np.prod(target.shape[1:]))))
            for start in range(0, target.shape[0], step):
                stop = min(start + step, target.shape[0])
                here = slice(first + start, first + stop)
                read = view[here] if columns is None else view[here, columns[0] : columns[1]]
                target[start:stop] = read.astype(target.dtype)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what safetensors and the system say of a file into a ModelError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise ModelError(
            f"{path}: damaged or truncated safetensors ({one_line(error)}); fetch it again"
        ) from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({one_line(error)})") from error


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """model.safetensors, or the shards its index names, or the folder's only safetensors file."""
    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return (found[0],)
    if found:
        raise ModelError(
            f"{folder}: {len(found)} safetensors files and no {_INDEX} to say how they belong together"
        )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when opened and is refused; "
            "convert the weights to safetensors"
        )
    raise ModelError(f"{folder}: no safetensors weights; expected {_SINGLE} or {_INDEX}")


def _indexed_files(folder: Path) -> tuple[Path, ...]:
    path = folder / _INDEX
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path}: weight_map is missing or empty; fetch the file again")
    files = []
    for name in sorted({str(value) for value in weight_map.values()}):
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{path}: names the weight file {name!r:.80}, and only safetensors beside it are read"
            )
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: the weight file {name} is missing; fetch it again")
        files.append(folder / name)
    return tuple(files)


def has_tokenizer_files(folder: Path) -> bool:
    """Whether the folder has a file that a tokenizer can be made from."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def hugging_face_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer through AutoTokenizer, from its own files only; no code in it is ever run."""
    if not has_tokenizer_files(folder):
        raise ModelError(f"{folder}: no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)}")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, use_fast=True
        )
    except Exception as error:  # transformers and tokenizers raise plain Exception for a damaged file.
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({one_line(error)})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{folder}: the tokenizer has no fast version; add its tokenizer.json")
    if (folder / "tokenizer.json").is_file():
        _restore_pipeline(tokenizer, Tokenizer.from_file(str(folder / "tokenizer.json")))
    # A tokenizer.json may carry the truncation and padding of someone's training run: here a prompt is whole.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _restore_pipeline(tokenizer: Any, stored: Tokenizer) -> None:
    """Make the tokenizer split and merge as its tokenizer.json says.

    transformers 5 rebuilds the classes it knows (GPT2Tokenizer, Qwen2Tokenizer, ...) from the vocabulary
    alone, with the splitting rule of the class in the place of the file's: SmolLM2's single digits are lost,
    and ids differ from those the model was trained with.
    """
    backend = tokenizer.backend_tokenizer
    backend.model = stored.model
    backend.normalizer = stored.normalizer
    backend.pre_tokenizer = stored.pre_tokenizer
    backend.decoder = stored.decoder
