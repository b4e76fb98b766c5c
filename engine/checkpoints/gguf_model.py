"""A GGUF file as a model: its config, and its tensors by their Hugging Face names, dequantised in slices."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from engine.checkpoints.gguf_file import GgufFile, GgufTensor
from engine.errors import ModelError
from engine.models.config import ModelConfig, RopeScaling, unknown_architecture
from engine.models.llama import WeightPart

SLICE_VALUES = 2 << 20
"""How many values are dequantised at once: 8 MiB as float32."""

_ROPE_FACTORS = "rope_freqs.weight"
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)", re.ASCII)


def gguf_config(file: GgufFile) -> ModelConfig:
    """The model's sizes and switches, from the metadata and from which tensors there are."""
    architecture = file.require("general.architecture", str)
    if architecture != "llama":
        raise ModelError(f"{file.path}: {unknown_architecture(architecture)}")
    if file.get("split.count", int, 1) > 1:
        raise ModelError(
            f"{file.path}: one part of a split GGUF; merge the parts with llama-gguf-split --merge"
        )
    if file.get("llama.expert_count", int, 0) > 0:
        raise ModelError(
            f"{file.path}: a mixture of experts is not implemented: we read it from safetensors only"
        )
    for key in ("llama.attention.sliding_window", "llama.attention.scale", "llama.logit_scale"):
        if file.metadata.get(key):
            raise ModelError(f"{file.path}: {key} is set, and attention of that kind is not implemented")
    d_model = file.require("llama.embedding_length", int)
    num_heads = _one_number(file, "llama.attention.head_count")
    num_kv_heads = _one_number(file, "llama.attention.head_count_kv", num_heads)
    if num_heads < 1:
        raise ModelError(f"{file.path}: llama.attention.head_count is {num_heads}")
    head_dim = file.get("llama.attention.key_length", int, d_model // num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if file.get(key, int, head_dim) != head_dim:
            raise ModelError(
                f"{file.path}: {key} is {file.metadata[key]}, and only the head size {head_dim} can run"
            )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(
            f"{file.path}: the tensor token_embd.weight is missing; the file is not a complete model"
        )
    names = file.tensors.keys()
    return ModelConfig(
        vocab_size=embedding.shape[0],
        d_model=d_model,
        num_layers=file.require("llama.block_count", int),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_one_number(file, "llama.feed_forward_length"),
        rms_norm_eps=file.require("llama.attention.layer_norm_rms_epsilon", float),
        rope_theta=file.get("llama.rope.freq_base", float, 10000.0),
        rope_scaling=_rope_scaling(file),
        max_position_embeddings=file.require("llama.context_length", int),
        tie_word_embeddings="output.weight" not in names,
        attention_bias=any(name.endswith(".bias") and ".attn_" in name for name in names),
        mlp_bias=any(name.endswith(".bias") and ".ffn_" in name for name in names),
        bos_token_id=file.get("tokenizer.ggml.bos_token_id", int),
        eos_token_ids=_eos_token_ids(file),
    )


def _one_number(file: GgufFile, key: str, default: int | None = None) -> int:
    """A size that newer files may give layer by layer; the layers must agree."""
    value = file.get(key, (int, list), default)
    if value is None:
        raise ModelError(f"{file.path}: metadata {key} is missing; the file is not a complete model")
    if isinstance(value, int):
        return value
    if len(set(value)) != 1 or not isinstance(value[0], int):
        raise ModelError(f"{file.path}: {key} differs from layer to layer, which is not implemented")
    return value[0]


def _eos_token_ids(file: GgufFile) -> tuple[int, ...]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = (file.get(f"tokenizer.ggml.{key}", int) for key in keys)
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _rope_scaling(file: GgufFile) -> RopeScaling | None:
    tensor = file.tensors.get(_ROPE_FACTORS)
    kind = file.get("llama.rope.scaling.type", str, "none")
    factor = file.get("llama.rope.scaling.factor", float, file.get("llama.rope.scale_linear", float))
    if kind not in ("none", "linear") or (kind == "linear" and tensor is not None):
        raise ModelError(f"{file.path}: rope scaling {kind!r} is not implemented: we have linear, llama3")
    if tensor is not None:
        if len(tensor.shape) != 1:
            raise ModelError(f"{file.path}: the tensor {_ROPE_FACTORS} has the shape {tensor.shape}")
        return RopeScaling(kind="factors", factors=tuple(_read_rows(file, tensor, 0, 1)[0].tolist()))
    if factor is not None and factor not in (0.0, 1.0) and (kind == "linear" or _is_old_linear(file)):
        return RopeScaling(kind="linear", factor=factor)
    return None


def _is_old_linear(file: GgufFile) -> bool:
    """Files from before the scaling had a type carry `scale_linear` alone."""
    return "llama.rope.scaling.type" not in file.metadata and "llama.rope.scale_linear" in file.metadata


class GgufWeights:
    """The tensors of a GGUF file."""

    def __init__(self, file: GgufFile):
        self.file = file
        self.where = str(file.path)
        self._tensors = {
            _hugging_face_name(name): tensor for name, tensor in file.tensors.items() if name != _ROPE_FACTORS
        }
        self._shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read_into(
        self,
        part: WeightPart,
        target: np.ndarray,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> None:
        tensor = self._tensors[part.name]
        first, last = rows or (0, tensor.shape[0])
        order = np.arange(tensor.shape[0])
        if part.rotary_heads is not None:
            # Rows change their places within a head: whole heads are read, and of these kept what is wanted.
            order = half_split_rows(tensor.shape[0], part.rotary_heads)
        stored = ((order >= first) & (order < last)).nonzero()[0]
        if len(tensor.shape) == 1:
            values = _read_rows(self.file, tensor, 0, 1)[0][stored]
            target[order[stored] - first] = values.astype(target.dtype)
            return
        wanted = slice(*columns) if columns else slice(None)
        step = max(1, SLICE_VALUES // tensor.shape[1])
        for start in range(0, len(stored), step):
            some = stored[start : start + step]
            values = _read_rows(self.file, tensor, int(some[0]), int(some[-1]) + 1)[some - some[0], wanted]
            target[order[some] - first] = values.astype(target.dtype)


def half_split_rows(num_rows: int, num_heads: int) -> np.ndarray:
    """For each row of a GGUF file's q or k, its row in Hugging Face's order, i64[num_rows].

    llama.cpp's converter interleaves the two halves of every head, so that a rotated pair is two
    neighbouring rows: row 2i of a head is the checkpoint's row i, row 2i + 1 its row i + head_dim/2.
    """
    rows = np.arange(num_rows).reshape(num_heads, 2, -1)
    return rows.swapaxes(1, 2).reshape(-1)


def _hugging_face_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _LAYER_NAME.fullmatch(name)
    if match is None or match[2] not in _IN_LAYER:
        return name  # Kept as it is, so that it is reported as having no place.
    return f"model.layers.{int(match[1])}.{_IN_LAYER[match[2]]}.{match[3]}"


def _read_rows(file: GgufFile, tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) as f32[stop - start, width]; a one-dimensional tensor is one row."""
    width = tensor.shape[-1]
    block_len, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    row_bytes = width // block_len * block_bytes
    count = (stop - start) * row_bytes
    try:
        raw = np.fromfile(file.path, np.uint8, count=count, offset=tensor.offset + start * row_bytes)
    except OSError as error:
        raise ModelError(f"{file.path}: cannot be read ({error.strerror})") from error
    if raw.size != count:
        raise ModelError(
            f"{file.path}: the tensor {tensor.name} ends early; the file changed while it was read"
        )
    # Scales may be infinite or NaN in a damaged file: that is data, not a reason for a warning.
    with np.errstate(all="ignore"):
        values = dequantize(raw.reshape(stop - start, row_bytes), tensor.kind)
    return np.asarray(values, np.float32).reshape(stop - start, width)
