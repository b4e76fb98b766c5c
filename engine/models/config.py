"""What a model is, read from its checkpoint and frozen: sizes, switches, special token ids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from engine.errors import ModelError

ARCHITECTURES = ("llama", "mixtral")
"""The architectures that are implemented: Llama, and the same with experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for a context longer than the one trained on first.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3` divides the
    low frequencies by `factor`, keeps the high ones and interpolates between (Llama 3.1 release).
    `factors` divides frequency i by `factors[i]`, as a GGUF file's `rope_freqs` tensor tells it.
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3", "factors"):
            raise ModelError(f"rope scaling {self.kind!r} is not implemented: we have linear, llama3")
        values = (self.factor, self.low_freq_factor, self.high_freq_factor, *self.factors)
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ModelError(
                f"rope scaling {self.kind}: every factor must be a positive number, got {values}"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ModelError(
                f"rope scaling llama3: high_freq_factor ({self.high_freq_factor}) must be above "
                f"low_freq_factor ({self.low_freq_factor})"
            )
        if self.kind == "llama3" and self.original_max_position_embeddings < 1:
            raise ModelError("rope scaling llama3: original_max_position_embeddings must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a Llama-architecture model. Hashable, so it may be a static argument of a jit."""

    architecture: str = "llama"
    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    """0: an MLP in each layer; else `intermediate_size` is an expert's."""
    experts_per_token: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise unknown_architecture(self.architecture)
        for name in (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(f"model config: {name} must be a positive whole number, got {value!r}")
        if (self.architecture == "mixtral") != (self.num_experts > 0) or not (
            0 <= self.experts_per_token <= self.num_experts
            and (self.experts_per_token > 0) == (self.num_experts > 0)
        ):
            raise ModelError(
                f"model config: {self.architecture} with {self.num_experts} experts, "
                f"{self.experts_per_token} a token, is not a model"
            )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"model config: num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ModelError(
                f"model config: head_dim must be even for rotary embeddings, got {self.head_dim}"
            )
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise ModelError(f"model config: rope_theta must be a positive number, got {self.rope_theta}")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps >= 0):
            raise ModelError(f"model config: rms_norm_eps must not be negative, got {self.rms_norm_eps}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "factors" and len(scaling.factors) != self.head_dim // 2:
            raise ModelError(
                f"model config: {len(scaling.factors)} rope factors for a head_dim of {self.head_dim}; "
                f"there must be {self.head_dim // 2}"
            )
        for token_id in (*self.eos_token_ids, *(() if self.bos_token_id is None else (self.bos_token_id,))):
            if not 0 <= token_id < self.vocab_size:
                raise ModelError(
                    f"model config: special token id {token_id} is not below vocab_size {self.vocab_size}"
                )


def attention_scale(config: ModelConfig) -> float:
    """What a query-key product is multiplied by: queries are given to `attend` unscaled."""
    return config.head_dim**-0.5


def unknown_architecture(name: object) -> ModelError:
    """The error for a model we cannot run."""
    return ModelError(f"architecture {name!r} is not implemented: we have {', '.join(ARCHITECTURES)}")
