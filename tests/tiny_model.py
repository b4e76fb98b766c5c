"""A tiny random Llama checkpoint in the Hugging Face layout, made without torch and in milliseconds.

The tokenizer is byte-level: every text round-trips exactly. Weights depend on the seed alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
"""Ids 0 to 3. `<|im_start|>` is BOS and `<|im_end|>` EOS and padding, as in SmolLM2."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_WORDS = ("the", "and", "ing", "er", "in", "on", "re", "ion", "is", "an", "answer")


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE with the 256 bytes and a few dozen merges: about 300 tokens."""
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in (*_WORDS, *("Ġ" + word for word in _WORDS)):
        left = word[0]
        for right in word[1:]:
            if left + right not in vocab:
                merges.append((left, right))
                vocab[left + right] = len(vocab)
            left += right
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def make_tiny_checkpoint(folder: str | Path, seed: int = 0, **config: Any) -> str:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json; return the folder.

    `config` overrides keys of config.json by their Hugging Face names (`num_attention_heads=8`,
    `tie_word_embeddings=False`, `attention_bias=True`, `rope_scaling={...}`, ...).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_tokenizer_config(), indent=1))
    values = tiny_config(vocab_size=tokenizer.get_vocab_size()) | config
    (folder / "config.json").write_text(json.dumps(values, indent=1))
    save_file(tiny_weights(values, seed), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return str(folder)


def tiny_config(vocab_size: int) -> dict[str, Any]:
    """The default config.json: 2 layers, 4 query heads over 2 key/value heads of 16."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float32",
    }


def tiny_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 weights by their Hugging Face names, large enough that argmax is not a near tie."""
    rng = np.random.default_rng(seed)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["head_dim"]
    d_model, inner = config["hidden_size"], config["intermediate_size"]

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.normal(0.0, scale, shape).astype(np.float32)

    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], d_model, scale=1.0)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (heads * head_dim, d_model, config["attention_bias"]),
            "self_attn.k_proj": (kv_heads * head_dim, d_model, config["attention_bias"]),
            "self_attn.v_proj": (kv_heads * head_dim, d_model, config["attention_bias"]),
            "self_attn.o_proj": (d_model, heads * head_dim, config["attention_bias"]),
        }
        if config["model_type"] == "mixtral":
            shapes["block_sparse_moe.gate"] = (config["num_local_experts"], d_model, False)
            for index in range(config["num_local_experts"]):
                for name, sizes in {
                    "w1": (inner, d_model),
                    "w2": (d_model, inner),
                    "w3": (inner, d_model),
                }.items():
                    shapes[f"block_sparse_moe.experts.{index}.{name}"] = (*sizes, False)
        else:
            shapes["mlp.gate_proj"] = (inner, d_model, config["mlp_bias"])
            shapes["mlp.up_proj"] = (inner, d_model, config["mlp_bias"])
            shapes["mlp.down_proj"] = (d_model, inner, config["mlp_bias"])
        for name, (out_dim, in_dim, has_bias) in shapes.items():
            weights[f"{prefix}{name}.weight"] = normal(out_dim, in_dim, scale=1.5 * in_dim**-0.5)
            if has_bias:
                weights[f"{prefix}{name}.bias"] = normal(out_dim, scale=0.3)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = 1.0 + normal(d_model, scale=0.1)
    weights["model.norm.weight"] = 1.0 + normal(d_model, scale=0.1)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(config["vocab_size"], d_model, scale=2 * d_model**-0.5)
    return weights


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
