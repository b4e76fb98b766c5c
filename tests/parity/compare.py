"""Our side of the comparison: teacher-forced, so that one dense pass checks a prompt and its continuation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.models import Llama, dense_forward
from tests.parity.cases import MAX_LOGIT_ERROR, NEAR_TIE


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers computed for one prompt of P tokens.

    `ids` and `values` [P, J] are some logits at every prompt position; `output_ids` [N] the greedy
    continuation and `gaps` [N] how far apart the top two logits were at each of its tokens.
    """

    prompt_ids: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    output_ids: np.ndarray
    gaps: np.ndarray


@dataclass(frozen=True, slots=True)
class Difference:
    """How far we are from a reference; `near_ties` counts other tokens where the top two were close."""

    max_error: float
    wrong_tokens: int
    near_ties: int

    @property
    def is_parity(self) -> bool:
        return self.max_error < MAX_LOGIT_ERROR and self.wrong_tokens == 0


def compare(model: Llama, reference: Reference) -> Difference:
    """Run our model over prompt and continuation, padded on the right.

    Each greedy token is checked given transformers' tokens before it, which is the same as generating them
    for as long as they agree.
    """
    num_prompt, num_output = len(reference.prompt_ids), len(reference.output_ids)
    tokens = np.zeros(padded_length(reference), np.int32)
    tokens[:num_prompt] = reference.prompt_ids
    tokens[num_prompt : num_prompt + num_output] = reference.output_ids
    logits = np.asarray(dense_forward(model, tokens))
    found = np.take_along_axis(logits[:num_prompt], reference.ids.astype(np.int64), axis=1)
    chosen = logits[num_prompt - 1 : num_prompt - 1 + num_output].argmax(axis=1)
    differs, close = chosen != reference.output_ids, reference.gaps < NEAR_TIE
    return Difference(
        max_error=float(np.abs(found - reference.values).max()),
        wrong_tokens=int((differs & ~close).sum()),
        near_ties=int((differs & close).sum()),
    )


def padded_length(reference: Reference, multiple: int = 64) -> int:
    """A length that holds the prompt with its continuation; few different ones, so few compilations."""
    return -(-(len(reference.prompt_ids) + len(reference.output_ids)) // multiple) * multiple


def save_references(path: str, references: list[Reference]) -> None:
    """Store references compactly in one .npz."""
    arrays = {}
    for index, reference in enumerate(references):
        arrays[f"{index}.prompt_ids"] = reference.prompt_ids.astype(np.uint16)
        arrays[f"{index}.ids"] = reference.ids.astype(np.uint16)
        arrays[f"{index}.values"] = reference.values.astype(np.float32)
        arrays[f"{index}.output_ids"] = reference.output_ids.astype(np.uint16)
        arrays[f"{index}.gaps"] = reference.gaps.astype(np.float32)
    np.savez_compressed(path, **arrays)


def load_references(path: str) -> list[Reference]:
    """Read what `save_references` wrote."""
    with np.load(path) as arrays:
        count = sum(name.endswith(".prompt_ids") for name in arrays.files)
        return [
            Reference(
                prompt_ids=arrays[f"{i}.prompt_ids"].astype(np.int32),
                ids=arrays[f"{i}.ids"].astype(np.int32),
                values=arrays[f"{i}.values"],
                output_ids=arrays[f"{i}.output_ids"].astype(np.int32),
                gaps=arrays[f"{i}.gaps"],
            )
            for i in range(count)
        ]
