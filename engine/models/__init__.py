"""Models in Flax NNX. They take `attend` as an argument and know nothing of pages."""

from engine.models.config import ARCHITECTURES, ModelConfig, RopeScaling, attention_scale
from engine.models.dense import dense_forward
from engine.models.llama import Attend, Llama, abstract_llama

__all__ = [
    "ARCHITECTURES",
    "Attend",
    "Llama",
    "ModelConfig",
    "RopeScaling",
    "abstract_llama",
    "attention_scale",
    "dense_forward",
]
