"""The same model in the form each peer reads, written once and found again.

A GGUF file becomes a Hugging Face folder in float32 (what its blocks decode to, so nothing is lost), or a
GGUF file of another precision. They lie under the folder of the peers' environments, by the model's
fingerprint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

from engine.checkpoints import load_tokenizer, model_fingerprint
from engine.checkpoints.gguf_file import read_gguf_header
from engine.checkpoints.gguf_model import GgufWeights, gguf_config
from engine.checkpoints.source import ModelFiles, find_model
from engine.errors import ModelError
from engine.models.config import ModelConfig
from engine.models.llama import weight_plan

_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}


def hugging_face_folder(source: str, folder: Path) -> Path:
    """`source` as config.json, model.safetensors (float32) and tokenizer files in a folder below `folder`.

    A model that is a Hugging Face folder already is given back as it is. Raises ModelError for one that has
    no such form.
    """
    files = find_model(source)
    if not files.is_gguf:
        return files.path

    def write(target: Path) -> None:
        target.mkdir()
        header = read_gguf_header(files.path)
        config, weights = gguf_config(header), GgufWeights(header)
        tensors: dict[str, np.ndarray] = {}
        for parts in (entry.parts for entry in weight_plan(config)):
            for part in parts:
                if part.name in weights.shapes():
                    tensors[part.name] = np.empty(part.shape, np.float32)
                    weights.read_into(part, tensors[part.name])
                else:
                    tensors[part.name] = np.zeros(part.shape, np.float32)
        save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
        load_tokenizer(source).save_pretrained(str(target))
        (target / "config.json").write_text(json.dumps(hugging_face_config(config), indent=1) + "\n")

    return _once(_place(source, files, folder) / "huggingface", write)


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Llama, by Hugging Face's names. Raises ModelError for a rope it has no name for."""
    rope: dict[str, Any] | None = None
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        rope = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling is not None and scaling.kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        rope = {"rope_type": "llama3"} | {name: getattr(scaling, name) for name in names}
    elif scaling is not None:
        raise ModelError(
            f"rope scaling {scaling.kind!r} has no form in a Hugging Face config; compare another model"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": "float32",
    }


def gguf_file(source: str, kind: GGMLQuantizationType, folder: Path) -> Path:
    """`source`, a GGUF model, with its matrices as `kind` (F32, F16, Q8_0), in a file below `folder`.

    Vectors stay float32, as llama.cpp's own quantiser keeps them. Raises ModelError where the source is not
    a GGUF file.
    """
    files = find_model(source)
    if not files.is_gguf:
        raise ModelError(f"{source}: this peer reads GGUF files only; give a .gguf model or leave it out")

    def write(target: Path) -> None:
        reader = GGUFReader(files.path)
        writer = GGUFWriter(target, read_gguf_header(files.path).require("general.architecture", str))
        for field in reader.fields.values():
            if field.name == "general.file_type":
                writer.add_file_type(_FILE_TYPES[kind])
            elif field.types and not field.name.startswith("GGUF.") and field.name != "general.architecture":
                is_array = field.types[0] is GGUFValueType.ARRAY
                inner = field.types[-1] if is_array else None
                writer.add_key_value(field.name, field.contents(), field.types[0], inner)
        for tensor in reader.tensors:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            if values.ndim == 2 and kind is not GGMLQuantizationType.F32:
                writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(tensor.name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return _once(_place(source, files, folder) / f"model-{kind.name.lower()}.gguf", write)


def _place(source: str, files: ModelFiles, folder: Path) -> Path:
    return folder / f"{Path(files.name).name}-{model_fingerprint(source).rpartition(':')[2][:12]}"


def _once(target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, written under another name first, so that what is there is whole."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        try:
            write(partial)
            partial.rename(target)
        finally:
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)
    return target
