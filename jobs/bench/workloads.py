"""What is run: token ids cut from real text, the same for every engine and every machine with this Python.

W1   256 requests that share a 256-token prefix, with 16 to 64 tokens of their own and 64 new tokens.
W2   128 unrelated prompts of 64 to 512 tokens, 16 to 128 new tokens.
W3   512 requests behind three templates of 700 to 1,500 tokens, every tenth an exact duplicate of another,
     two samples each at temperature 0.8, up to 64 new tokens.
W1b and W2b are of the same kind as W1 and W2 with other sizes, so that nothing is tuned to those.

W1 and W2 are greedy and ignore end-of-sequence, so the amount of work is known beforehand. W3 honours it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.bench.peers.serving import Sampling
from jobs.demo.docstrings import docstrings

QUICK_SHARE = 8
GREEDY = Sampling(n=1, temperature=0.0, ignore_eos=True, seed=0)

# Of W3: its templates, what a request adds to its template, and how many are duplicates.
NUM_TEMPLATES, TEMPLATE_LENS, OWN_LENS = 3, (700, 1500), (16, 96)
TEMPLATE_ROWS, NUM_DUPLICATES, TEMPLATE_MAX_TOKENS = 512, 51, 64


@dataclass(frozen=True, slots=True)
class Workload:
    """`prompts[i]` is continued by `max_tokens[i]` tokens; all begin with `shared_len` equal ones.

    By fewer where `sampling` honours end-of-sequence; each prompt gives `sampling.n` samples.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: tuple[int, ...]
    shared_len: int
    sampling: Sampling = GREEDY

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated in all, at most."""
        return self.sampling.n * sum(self.max_tokens)

    @property
    def is_fixed(self) -> bool:
        """Whether every engine does the same work and has one right answer."""
        return self.sampling.ignore_eos and self.sampling.temperature == 0

    @property
    def max_len(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return max(len(prompt) + num for prompt, num in zip(self.prompts, self.max_tokens, strict=True))

    def part(self, num: int) -> Workload:
        """Its first `num` requests."""
        return replace(self, prompts=self.prompts[:num], max_tokens=self.max_tokens[:num])


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a greedy workload; lengths are drawn evenly from the least to the most."""

    rows: int
    prefix_len: int
    own_lens: tuple[int, int]
    output_lens: tuple[int, int]


SHAPES = {
    "W1": Shape(rows=256, prefix_len=256, own_lens=(16, 64), output_lens=(64, 64)),
    "W2": Shape(rows=128, prefix_len=0, own_lens=(64, 512), output_lens=(16, 128)),
    "W1b": Shape(rows=200, prefix_len=450, own_lens=(8, 120), output_lens=(24, 96)),
    "W2b": Shape(rows=160, prefix_len=0, own_lens=(32, 400), output_lens=(8, 80)),
}
WORKLOADS = (*SHAPES, "W3")


def real_text() -> str:
    """Docstrings of the standard library, some 100,000 tokens of them."""
    return "\n\n".join(f"{entry.name}\n{entry.text}" for entry in docstrings(min_chars=40, max_chars=20_000))


def real_token_ids(tokenizer: Any) -> list[int]:
    """Its tokens."""
    return tokenizer(real_text(), add_special_tokens=False, verbose=False)["input_ids"]


Cut = Callable[[int], tuple[int, ...]]


def make_workload(
    name: str,
    token_ids: Sequence[int],
    seed: int,
    quick: bool = False,
    *,
    shape: Shape | None = None,
    turn: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Workload:
    """The workload of that name, cut at random places from `token_ids`; `quick` keeps an eighth of it.

    Another seed gives other ids with the same distribution of lengths, so a second run finds nothing of the
    first in a prefix cache. `shape` replaces the sizes of a greedy workload. `turn` is what W3 puts before
    and after each prompt: the marks of a chat, where the model has them, without which it seldom ends.
    """
    pick = random.Random(f"{name}/{seed}")

    def cut(length: int) -> tuple[int, ...]:
        start = pick.randrange(len(token_ids) - length)
        return tuple(token_ids[start : start + length])

    if name == "W3":
        workload = _templates(pick, cut, seed, turn)
    else:
        workload = _greedy(name, shape or SHAPES[name], pick, cut)
    return workload.part(max(1, len(workload.prompts) // QUICK_SHARE)) if quick else workload


def _greedy(name: str, shape: Shape, pick: random.Random, cut: Cut) -> Workload:
    prefix = cut(shape.prefix_len) if shape.prefix_len else ()
    prompts = tuple(prefix + cut(pick.randint(*shape.own_lens)) for _ in range(shape.rows))
    max_tokens = tuple(pick.randint(*shape.output_lens) for _ in prompts)
    return Workload(name, prompts, max_tokens, shared_len=shape.prefix_len)


def _templates(
    pick: random.Random, cut: Cut, seed: int, turn: tuple[Sequence[int], Sequence[int]]
) -> Workload:
    before, after = map(tuple, turn)
    templates = [before + cut(pick.randint(*TEMPLATE_LENS)) for _ in range(NUM_TEMPLATES)]
    prompts = [
        pick.choice(templates) + cut(pick.randint(*OWN_LENS)) + after
        for _ in range(TEMPLATE_ROWS - NUM_DUPLICATES)
    ]
    prompts += pick.sample(prompts, NUM_DUPLICATES)
    pick.shuffle(prompts)
    sampling = Sampling(n=2, temperature=0.8, ignore_eos=False, seed=seed)
    return Workload("W3", tuple(prompts), (TEMPLATE_MAX_TOKENS,) * len(prompts), 0, sampling)
