"""What is run: token ids cut from real text, the same for every engine and every machine with this Python.

W1  256 requests that share a 256-token prefix, with 16 to 64 tokens of their own and 64 new tokens.
W2  128 unrelated prompts of 64 to 512 tokens, 16 to 128 new tokens.

Both are greedy and ignore end-of-sequence, so the amount of work is known beforehand.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jobs.demo.docstrings import docstrings

QUICK_SHARE = 8


@dataclass(frozen=True, slots=True)
class Workload:
    """`prompts[i]` is continued by exactly `max_tokens[i]` tokens; all begin with `shared_len` equal ones."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: tuple[int, ...]
    shared_len: int

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.max_tokens)

    @property
    def max_len(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return max(len(prompt) + num for prompt, num in zip(self.prompts, self.max_tokens, strict=True))

    def part(self, num: int) -> Workload:
        """Its first `num` requests."""
        return Workload(self.name, self.prompts[:num], self.max_tokens[:num], self.shared_len)


def real_text() -> str:
    """Docstrings of the standard library, some 100,000 tokens of them."""
    return "\n\n".join(f"{entry.name}\n{entry.text}" for entry in docstrings(min_chars=40, max_chars=20_000))


def _shared_prefix(pick: random.Random, cut: Callable[[int], tuple[int, ...]]) -> Workload:
    prefix = cut(256)
    prompts = tuple(prefix + cut(pick.randint(16, 64)) for _ in range(256))
    return Workload("W1", prompts, (64,) * 256, shared_len=256)


def _unrelated(pick: random.Random, cut: Callable[[int], tuple[int, ...]]) -> Workload:
    prompts = tuple(cut(pick.randint(64, 512)) for _ in range(128))
    return Workload("W2", prompts, tuple(pick.randint(16, 128) for _ in prompts), shared_len=0)


WORKLOADS = {"W1": _shared_prefix, "W2": _unrelated}


def make_workload(name: str, token_ids: Sequence[int], seed: int, quick: bool = False) -> Workload:
    """The workload of that name, cut at random places from `token_ids`; `quick` keeps an eighth of it.

    Another seed gives other ids with the same distribution of lengths, so a second run finds nothing of the
    first in a prefix cache.
    """
    pick = random.Random(f"{name}/{seed}")

    def cut(length: int) -> tuple[int, ...]:
        start = pick.randrange(len(token_ids) - length)
        return tuple(token_ids[start : start + length])

    workload = WORKLOADS[name](pick, cut)
    return workload.part(len(workload.prompts) // QUICK_SHARE) if quick else workload
