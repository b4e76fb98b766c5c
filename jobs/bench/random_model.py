"""Checkpoints with the sizes of a real model and random weights: a step costs the same with any numbers."""

from __future__ import annotations

import json
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from engine.checkpoints import DEFAULT_MODEL, load_tokenizer

# As their config.json has them. `tiny` is for trying the benchmark out where there is no accelerator.
SHAPES: dict[str, dict[str, int]] = {
    "Llama-3.1-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
    },
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "max_position_embeddings": 8192,
    },
}
_POOL = 1 << 24


def write_checkpoint(folder: Path, shape: str) -> Path:
    """A Llama of that shape in bfloat16 under `folder`, with the embedded model's tokenizer.

    One that is whole is left as it is.
    """
    place = folder / shape
    if (place / "config.json").exists():  # written last
        return place
    place.mkdir(parents=True, exist_ok=True)
    sizes = SHAPES[shape]
    pool = np.random.default_rng(0).standard_normal(_POOL, np.float32)
    d_model, inner, dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    heads, kv_heads = sizes["num_attention_heads"] * dim, sizes["num_key_value_heads"] * dim
    places = count(7919, 7919)

    @cache
    def scaled(columns: int) -> np.ndarray:
        """The pool, of a size that keeps the stream's."""
        return (pool * columns**-0.5).astype(jnp.bfloat16)

    def matrix(rows: int, columns: int) -> np.ndarray:
        """Numbers of the pool, from another place each time."""
        return np.resize(np.roll(scaled(columns), next(places)), (rows, columns))

    def norm() -> np.ndarray:
        return np.ones(d_model, jnp.bfloat16)

    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, str(place / name), metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for layer in range(sizes["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        save(
            f"layer-{layer}.safetensors",
            {
                f"{at}self_attn.q_proj.weight": matrix(heads, d_model),
                f"{at}self_attn.k_proj.weight": matrix(kv_heads, d_model),
                f"{at}self_attn.v_proj.weight": matrix(kv_heads, d_model),
                f"{at}self_attn.o_proj.weight": matrix(d_model, heads),
                f"{at}mlp.gate_proj.weight": matrix(inner, d_model),
                f"{at}mlp.up_proj.weight": matrix(inner, d_model),
                f"{at}mlp.down_proj.weight": matrix(d_model, inner),
                f"{at}input_layernorm.weight": norm(),
                f"{at}post_attention_layernorm.weight": norm(),
            },
        )
    save(
        "rest.safetensors",
        {
            "model.embed_tokens.weight": matrix(sizes["vocab_size"], d_model),
            "model.norm.weight": norm(),
            "lm_head.weight": matrix(sizes["vocab_size"], d_model),
        },
    )
    total = sum((place / name).stat().st_size for name in set(index.values()))
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    load_tokenizer(DEFAULT_MODEL).save_pretrained(str(place))
    config: dict[str, Any] = sizes | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (place / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return place
