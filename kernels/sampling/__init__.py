"""Drawing one token a row from logits. Axes: `L` rows of logits, `V` vocabulary."""

from kernels.sampling.api import available_backends, draw
from kernels.sampling.layout import Draws

__all__ = ["Draws", "available_backends", "draw"]
