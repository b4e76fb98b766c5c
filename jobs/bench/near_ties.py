"""How far an engine's greedy tokens agree with the reference's, and whether a difference is a near tie.

Greedy decoding has one right answer but where the two largest logits are so close that the order of a sum
decides. After a first difference a sequence goes its own way, so only the first one of a row is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# As the parity tests have it: sums in another order move a logit by less.
NEAR_TIE = 1e-3
# Differences judged of one engine on one workload; each costs a forward pass.
MAX_JUDGED = 64
_PAD = 128

Logits = Callable[[Sequence[int]], np.ndarray]
"""Token ids of a sequence -> f32[V], the float32 logits of the token after it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference of a row: after `context` an engine drew `drawn`, the reference `expected`."""

    context: tuple[int, ...]
    drawn: int
    expected: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the rows compared: how many are equal, and what share of tokens lies before first differences.

    `gaps` are, of the first `MAX_JUDGED` differences, the logits between the largest and the less likely of
    the two tokens: those below `NEAR_TIE` are `num_near_ties`.
    """

    num_rows: int
    num_equal: int
    num_tokens: int
    num_agreed: int
    gaps: tuple[float, ...] = ()

    @property
    def num_near_ties(self) -> int:
        return sum(gap < NEAR_TIE for gap in self.gaps)

    @property
    def num_differences(self) -> int:
        return self.num_rows - self.num_equal

    @property
    def is_right(self) -> bool:
        """Whether every difference was judged, and is a near tie."""
        return self.num_near_ties == self.num_differences


def compare_tokens(
    prompts: Sequence[Sequence[int]], drawn: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]
) -> tuple[Agreement, list[Difference]]:
    """Rows that both have, from the first on; `expected` is the reference's."""
    differences: list[Difference] = []
    num_rows = num_tokens = num_agreed = 0
    for prompt, ours, theirs in zip(prompts, drawn, expected, strict=False):
        num_rows += 1
        num_tokens += len(theirs)
        pairs = enumerate(zip(ours, theirs, strict=True))
        at = next((at for at, (a, b) in pairs if a != b), None)
        if at is None:
            num_agreed += len(theirs)
        else:
            num_agreed += at
            differences.append(Difference((*prompt, *theirs[:at]), ours[at], theirs[at]))
    return Agreement(num_rows, num_rows - len(differences), num_tokens, num_agreed), differences


def judge(agreement: Agreement, differences: Sequence[Difference], logits: Logits) -> Agreement:
    """The agreement with the gaps of its differences."""
    gaps = []
    for difference in differences[:MAX_JUDGED]:
        found = logits(difference.context)
        gaps.append(float(found.max() - min(found[difference.drawn], found[difference.expected])))
    return Agreement(
        agreement.num_rows, agreement.num_equal, agreement.num_tokens, agreement.num_agreed, tuple(gaps)
    )


def together(parts: Sequence[Agreement]) -> Agreement:
    """Of several repeats in one."""
    return Agreement(
        sum(part.num_rows for part in parts),
        sum(part.num_equal for part in parts),
        sum(part.num_tokens for part in parts),
        sum(part.num_agreed for part in parts),
        tuple(gap for part in parts for gap in part.gaps),
    )


def dense_logits(source: str) -> Logits:
    """Float32 logits by plain attention over whole sequences: the tests' oracle."""
    from engine.checkpoints import load
    from engine.models.dense import dense_forward

    model = load(source).model

    def logits(context: Sequence[int]) -> np.ndarray:
        padded = np.zeros(-(-len(context) // _PAD) * _PAD, np.int32)  # few lengths, so few compilations
        padded[: len(context)] = context
        return np.asarray(dense_forward(model, padded)[len(context) - 1])

    return logits
