"""The least time a step can take on a slice: what it multiplies, what it reads, what it sends.

Williams, Waterman & Patterson 2009, "Roofline". Counted are the products, attention, the weights, keys and
values; not what stays on the chip, nor what prefix groups save. A real step takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.chips import Slice
from engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class StepLoad:
    """One step: tokens computed, rows of logits, and the sequences they are of.

    `context` is how many tokens a sequence holds, on average.
    """

    num_tokens: int
    num_logits: int
    num_sequences: int
    context: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of each kind of work."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """Products overlap with reading; the next product waits for the sum that goes over the links."""
        return max(self.compute, self.memory) + self.interconnect

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """One device's part in each step of a model that `num_sharing` devices share."""

    topology: Slice
    model: ModelConfig
    """The whole model."""
    share: ModelConfig
    """What one device has of it."""
    num_sharing: int
    weight_bytes: int
    """Of the share, read once a step."""
    kv_token_bytes: float
    """Keys and values of one token, in the share."""
    dtype: str
    """Of activations."""

    def step(self, load: StepLoad) -> StepTime:
        return StepTime(
            self.flops(load) / self.topology.flops(self.dtype),
            self.bytes_moved(load) / self.topology.memory_rate,
            self.bytes_sent(load) / self.topology.exchange_rate if self.num_sharing > 1 else 0.0,
        )

    def flops(self, load: StepLoad) -> float:
        """Two operations for each weight and token; attention's two products over what a sequence holds."""
        share = self.share
        heads, kv_heads = share.num_heads * share.head_dim, share.num_kv_heads * share.head_dim
        products = share.d_model * (2 * heads + 2 * kv_heads + 3 * share.intermediate_size)
        attention = 2 * heads * load.context
        head = share.d_model * share.vocab_size
        return 2.0 * (load.num_tokens * share.num_layers * (products + attention) + load.num_logits * head)

    def bytes_moved(self, load: StepLoad) -> float:
        """Weights; each sequence's keys and values read, and those of new tokens written."""
        return self.weight_bytes + self.kv_token_bytes * (load.num_sequences * load.context + load.num_tokens)

    def bytes_sent(self, load: StepLoad) -> float:
        """By each device: sums over the devices after the embedding, each attention and each MLP, as rings
        make them (every part goes round twice), and its part of the logits in f32, since each device draws
        for its part of the rows.
        """
        itemsize = 4 if self.dtype == "float32" else 2
        others = (self.num_sharing - 1) / self.num_sharing
        sums = (2 * self.model.num_layers + 1) * load.num_tokens * self.model.d_model * itemsize
        logits = load.num_logits * self.share.vocab_size * 4
        return others * (2 * sums + logits)
