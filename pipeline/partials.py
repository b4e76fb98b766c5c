"""Rows that a drain cut short: the tokens drawn so far are saved, and the row goes on from them later.

    partials/<shard>/<chunk>-<attempt>.json     created once: rows of a chunk that was not committed

A row's draws depend on its identity alone, so it ends with the same bytes as if nothing had happened. What is
saved only spares work: a record of another run, damaged, or of a row that is another one by now is passed
over. Rows that ask for log-probabilities of their prompt are not saved.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.drawn import DrawnTokens
from engine.outputs import TokenLogprob
from pipeline.rows import Prompt
from pipeline.run_state import RunState

logger = logging.getLogger(__name__)

PARTIALS_VERSION = 1


@dataclass(frozen=True, slots=True)
class PartialRow:
    """A row's samples as far as they were drawn; `prompt` is the hash of what it was asked."""

    row_id: str
    prompt: str
    samples: tuple[DrawnTokens, ...]

    @classmethod
    def of(cls, prompt: Prompt, samples: Sequence[DrawnTokens]) -> PartialRow | None:
        """None where there is nothing to go on from."""
        if prompt.sampling.prompt_logprobs is not None or not any(each.token_ids for each in samples):
            return None
        return cls(prompt.row_id, prompt_hash(prompt), tuple(samples))

    @property
    def num_tokens(self) -> int:
        return sum(len(sample.token_ids) for sample in self.samples)

    def fits(self, prompt: Prompt) -> bool:
        """Whether this is the beginning of what the prompt generates."""
        sampling = prompt.sampling
        return (
            self.prompt == prompt_hash(prompt)
            and len(self.samples) == sampling.n
            and all(len(sample.token_ids) < sampling.max_tokens for sample in self.samples)
        )


def prompt_hash(prompt: Prompt) -> str:
    """Of a prompt's tokens and its sampling."""
    tokens = np.asarray(prompt.token_ids, "<u4").tobytes()
    return hashlib.sha256(tokens + repr(prompt.sampling).encode()).hexdigest()


def to_bytes(fingerprint: str, shard: int, rows: Iterable[PartialRow]) -> bytes:
    """A record: a line that says what it is, and the rows."""
    body = json.dumps([_row_json(row) for row in rows], separators=(",", ":")).encode()
    head = {
        "partials_version": PARTIALS_VERSION,
        "fingerprint": fingerprint,
        "shard": shard,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    return json.dumps(head).encode() + b"\n" + body


def from_bytes(data: bytes, fingerprint: str, shard: int) -> list[PartialRow]:
    """The rows of a record. Raises ValueError when it is damaged or not of this shard of this run."""
    line, _, body = data.partition(b"\n")
    head = json.loads(line)
    expected = {
        "partials_version": PARTIALS_VERSION,
        "fingerprint": fingerprint,
        "shard": shard,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    if head != expected:
        raise ValueError("it is damaged, or of another run")
    return [_row(value) for value in json.loads(body)]


class Partials:
    """What was saved of a shard's rows; its folder is listed once, a chunk's records are read when its rows
    come.
    """

    def __init__(self, state: RunState, shard: int):
        self._state = state
        self._shard = shard
        self._names: dict[int, list[str]] = {}
        for name in state.list("partials", f"{shard:05d}"):
            chunk = name.partition("-")[0]
            if chunk.isdigit():
                self._names.setdefault(int(chunk), []).append(name)

    @property
    def paths(self) -> list[str]:
        """Of all its records."""
        return [
            self._state.path("partials", f"{self._shard:05d}", name)
            for names in self._names.values()
            for name in names
        ]

    def of_chunk(self, chunk: int) -> dict[str, PartialRow]:
        """By row id, of each the one that came furthest."""
        found: dict[str, PartialRow] = {}
        for name in self._names.get(chunk, ()):
            for row in self._read(self._state.path("partials", f"{self._shard:05d}", name)):
                known = found.get(row.row_id)
                if known is None or row.num_tokens > known.num_tokens:
                    found[row.row_id] = row
        return found

    def _read(self, path: str) -> list[PartialRow]:
        try:
            return from_bytes(self._state.read(path) or b"", self._state.fingerprint, self._shard)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s/%s is not used: %s", self._state.storage.url, path, error)
            return []


def _row_json(row: PartialRow) -> dict[str, Any]:
    return {"row_id": row.row_id, "prompt": row.prompt, "samples": [_sample_json(s) for s in row.samples]}


def _sample_json(sample: DrawnTokens) -> dict[str, Any]:
    # A float is spelt so that reading it back gives the same one.
    logprobs = None if sample.logprobs is None else [[each.logprob, each.top] for each in sample.logprobs]
    return {"tokens": sample.token_ids, "logprobs": logprobs}


def _row(value: Mapping[str, Any]) -> PartialRow:
    return PartialRow(value["row_id"], value["prompt"], tuple(_sample(each) for each in value["samples"]))


def _sample(value: Mapping[str, Any]) -> DrawnTokens:
    tokens, logprobs = tuple(value["tokens"]), value["logprobs"]
    if logprobs is None:
        return DrawnTokens(tokens)
    entries = zip(tokens, logprobs, strict=True)
    return DrawnTokens(
        tokens,
        tuple(
            TokenLogprob(token, logprob, tuple((other, value) for other, value in top))
            for token, (logprob, top) in entries
        ),
    )
