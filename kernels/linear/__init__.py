"""The matrix product of the model, with weights packed once for the backend that multiplies them."""

from kernels.linear.api import available_backends, gated_linear, linear, weight_rows
from kernels.linear.layout import PackedWeight, PackedWeights
from kernels.linear.packing import WEIGHT_FORMATS, pack_weights
from kernels.linear.shapes import abstract_weights

__all__ = [
    "WEIGHT_FORMATS",
    "PackedWeight",
    "PackedWeights",
    "abstract_weights",
    "available_backends",
    "gated_linear",
    "linear",
    "pack_weights",
    "weight_rows",
]
