"""The least time a step can take on a slice: what it multiplies, what it reads, what it sends.

Williams, Waterman & Patterson 2009, "Roofline". Counted are the products, attention, the weights, keys and
values; not what stays on the chip, nor what prefix groups save. A real step takes longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.chips import Slice
from engine.mesh import EXPERT_AXIS, TENSOR_AXIS, WEIGHTS_AXIS
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

    @property
    def num_wanted(self) -> int:
        """Tokens whose logits are wanted."""
        return min(self.num_logits, self.num_tokens)


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
    """One device's part in each step of a model that the devices of a mesh share, each axis in its way."""

    topology: Slice
    model: ModelConfig
    """The whole model."""
    share: ModelConfig
    """One device's heads, inner units and rows of the vocabulary; all experts."""
    mesh: Mapping[str, int]
    """Devices along each of `engine.mesh.AXES`."""
    weight_bytes: int
    """What a device reads of its own weights once a step, experts left out."""
    expert_bytes: int
    """Its experts' matrices, all of them."""
    kv_token_bytes: float
    """Keys and values of one token, on one device."""
    dtype: str
    """Of activations."""

    def step(self, load: StepLoad) -> StepTime:
        sent = self.bytes_sent(load)
        return StepTime(
            self.flops(load) / self.topology.flops(self.dtype),
            self.bytes_moved(load) / self.topology.memory_rate,
            sent / self.topology.exchange_rate if sent else 0.0,
        )

    def flops(self, load: StepLoad) -> float:
        """Two operations for each weight and token; attention's two products over what a sequence holds. What
        follows the last layer's attention is computed of the tokens whose logits are wanted. The experts that
        tokens choose are spread evenly over those who have them.
        """
        share = self.share
        heads, kv_heads = share.num_heads * share.head_dim, share.num_kv_heads * share.head_dim
        mlp = 3.0 * share.intermediate_size
        if share.num_experts:
            mlp = mlp * share.experts_per_token / self.mesh[EXPERT_AXIS] + share.num_experts
        before = share.d_model * (heads + 2 * kv_heads) + 2 * heads * load.context
        rest = share.d_model * (heads + mlp)
        head = share.d_model * share.vocab_size
        whole = load.num_tokens * (share.num_layers * before + (share.num_layers - 1) * rest)
        return 2.0 * (whole + load.num_wanted * rest + load.num_logits * head)

    def bytes_moved(self, load: StepLoad) -> float:
        """Weights, gathered whole; each sequence's keys and values read, and those of new tokens written.

        Of experts those that a step of so many tokens is expected to choose, if all are as likely.
        """
        weights = float(self.weight_bytes)
        if self.expert_bytes:
            is_left_out = 1 - self.share.experts_per_token / self.share.num_experts
            weights += self.expert_bytes * (1 - is_left_out**load.num_tokens)
        weights *= self.mesh[WEIGHTS_AXIS]
        return weights + self.kv_token_bytes * (load.num_sequences * load.context + load.num_tokens)

    def bytes_sent(self, load: StepLoad) -> float:
        """By each device. Over `tp`: sums after the embedding, each attention and each MLP (of experts over
        `ep` too), those of the last layer for wanted tokens alone, as rings make them (every part goes round
        twice), and its part of the logits in f32, since each device draws for its part of the rows. Over
        `fsdp`: its part of the weights, to all others.
        """
        itemsize = 4 if self.dtype == "float32" else 2
        num_tensor, layers = self.mesh[TENSOR_AXIS], self.model.num_layers
        over_tensor = 2 * _others(num_tensor)
        over_mlp = 2 * _others(num_tensor * self.mesh[EXPERT_AXIS])
        row = self.model.d_model * itemsize
        sums = (layers * over_tensor + (layers - 1) * over_mlp) * load.num_tokens * row
        sums += (over_tensor + over_mlp) * load.num_wanted * row
        logits = _others(num_tensor) * load.num_logits * self.share.vocab_size * 4
        gathered = (self.mesh[WEIGHTS_AXIS] - 1) * (self.weight_bytes + self.expert_bytes)
        return sums + logits + gathered


def _others(count: int) -> float:
    """Of `count` equal parts all but one's own."""
    return (count - 1) / count
