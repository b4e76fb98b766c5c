"""The config.json of real models, with their real sizes and without a weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.checkpoints.huggingface import hugging_face_config
from engine.models.config import ModelConfig

_LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": _LLAMA_3
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
    },
    "Llama-3.3-70B": _LLAMA_3
    | {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def config_folder(name: str, folder: Path) -> Path:
    """A folder with nothing but the model's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_type": "llama", "hidden_act": "silu"} | CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def model_config(name: str, folder: Path) -> ModelConfig:
    return hugging_face_config(config_folder(name, folder))
