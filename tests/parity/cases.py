"""What is compared: sixteen chats on the real model, and a tiny random checkpoint for every config switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny_model import make_tiny_checkpoint

DATA = Path(__file__).parent.parent / "data"
TINY_FILE = DATA / "parity_tiny.npz"
REAL_FILE = DATA / "parity_smollm2.npz"

NUM_NEW_TOKENS = 64
NUM_TOP = 64
"""How many of the largest logits are stored at each prompt position, and how many at fixed random ids."""

MAX_LOGIT_ERROR = 1e-3
NEAR_TIE = 1e-3
"""Where the top two logits are closer than this, another greedy token is no error, and is counted."""

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

TINY_CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no_grouping": {"num_key_value_heads": 4},
    "one_kv_head": {"num_key_value_heads": 1},
    "wide_heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24},
    "untied": {"tie_word_embeddings": False},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "all_biases_untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "rope_linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_llama3": {"rope_scaling": _LLAMA3, "rope_theta": 500000.0},
    "rope_parameters_linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e4}},
    "rope_parameters_llama3": {"rope_parameters": _LLAMA3 | {"rope_theta": 1e5}, "num_key_value_heads": 1},
    "large_epsilon": {"rms_norm_eps": 0.1, "rope_theta": 1e6},
}
"""Overrides of config.json, each with its own seed (its place in the list)."""


def make_case(name: str, folder: Path) -> str:
    """The checkpoint of a case."""
    return make_tiny_checkpoint(folder, seed=list(TINY_CASES).index(name), **TINY_CASES[name])


def tiny_token_ids() -> np.ndarray:
    """48 tokens, longer than the original context of the llama3 cases."""
    return np.random.default_rng(7).integers(0, 290, 48).astype(np.int32)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


CHATS: list[list[dict[str, str]]] = [
    [_user("What is the capital of France?")],
    [_user("Write a Python function that returns the n-th Fibonacci number, with a docstring.")],
    [_user("Translate 'good morning, my friend' into Spanish, French and German.")],
    [_user("Compute 17 * 23 + 1048576 / 4096, showing every step.")],
    [
        {"role": "system", "content": "You answer in exactly one word."},
        _user("Which planet is known as the red planet?"),
    ],
    [
        _user("My name is Ada."),
        {"role": "assistant", "content": "Hello Ada! How can I help you today?"},
        _user("What is my name, and how many letters does it have?"),
    ],
    [_user("Résumé: où est né l'écrivain Émile Zola ? Réponds en français, s'il te plaît.")],
    [_user("请用一句话介绍北京。")],
    [_user("Explain what this emoji means: \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f680\U0001f389")],
    [_user("def f(x):\n    return x  **  2\n\n\n# What does `f(3)` return?\t(Answer with a number.)")],
    [_user('Convert to JSON: name=Bob; age=42; langs=[en, de]. Return only {"name": ...}.')],
    [_user("a")],
    [_user("Summarise in two sentences: " + "The tide rises and falls; the mill turns. " * 12)],
    [
        {"role": "system", "content": ""},
        _user("List the first ten prime numbers, separated by commas."),
    ],
    [_user("Write a haiku about autumn rain.\r\n\r\nThen explain the 5-7-5 rule in 2024.")],
    [_user("Is 0.1 + 0.2 == 0.3 in IEEE-754 floating point? Why (not)?   Answer:   ")],
]
