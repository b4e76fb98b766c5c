"""Results of rows as the request cache keeps them (pipeline/request_cache.py): keys, and JSON either way."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from engine.duplicates import shared_sampling
from engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from pipeline.fingerprint import canonical_json
from pipeline.rows import Prompt

KEY_CHARS = 32
COMPLETE = ("stop", "length")
"""How a sample ends that has all its tokens."""


def row_key(prompt: Prompt) -> str:
    """What a row asks for: its tokens, the sampling in effect, and its id where its draws descend from it.

    128 bits as hexadecimal digits. The run's seed and the model are in the name of the family.
    """
    shared = shared_sampling(prompt.sampling)
    asked = {
        "sampling": asdict(shared or prompt.sampling),
        "row_id": None if shared is not None else prompt.row_id.encode("utf-8", "surrogatepass").hex(),
    }
    head = hashlib.sha256(canonical_json(asked)).digest()
    tokens = np.asarray(prompt.token_ids, "<u4").tobytes()
    return hashlib.sha256(head + tokens).hexdigest()[:KEY_CHARS]


def to_json(output: RequestOutput) -> dict[str, Any] | None:
    """A result as JSON values; None where it is not complete, and so not to be kept."""
    if not output.finished or any(sample.finish_reason not in COMPLETE for sample in output.outputs):
        return None
    return {
        "num_prompt_tokens": len(output.prompt_token_ids),
        "samples": [_sample_json(sample) for sample in output.outputs],
        "prompt_logprobs": _logprobs_json(output.prompt_logprobs),
    }


def from_json(value: Mapping[str, Any], prompt: Prompt, request_id: str) -> RequestOutput:
    """The result for a row that asked for it. Raises ValueError, KeyError or TypeError for what is none."""
    samples = tuple(_sample(index, each) for index, each in enumerate(value["samples"]))
    if len(samples) != prompt.sampling.n or value["num_prompt_tokens"] != len(prompt.token_ids):
        raise ValueError("it is of another prompt")
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=prompt.token_ids,
        outputs=samples,
        finished=True,
        metrics=RequestMetrics(time.monotonic(), None, None, None),
        prompt_logprobs=_logprobs(value["prompt_logprobs"]),
    )


def _sample_json(sample: CompletionOutput) -> dict[str, Any]:
    return {
        "token_ids": sample.token_ids,
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "cumulative_logprob": sample.cumulative_logprob,
        "logprobs": _logprobs_json(sample.logprobs),
    }


def _sample(index: int, value: Mapping[str, Any]) -> CompletionOutput:
    token_ids, text, logprobs = tuple(value["token_ids"]), value["text"], _logprobs(value["logprobs"])
    if not isinstance(text, str) or any(type(token) is not int for token in token_ids):
        raise ValueError("its text or tokens are none")
    if value["finish_reason"] not in COMPLETE:
        raise ValueError("it is not complete")
    return CompletionOutput(
        index=index,
        token_ids=token_ids,
        finish_reason=value["finish_reason"],
        text=text,
        stop_reason=value["stop_reason"],
        cumulative_logprob=value["cumulative_logprob"],
        logprobs=None if logprobs is None else tuple(each for each in logprobs if each is not None),
    )


def _logprobs_json(entries: Sequence[TokenLogprob | None] | None) -> list[Any] | None:
    # A float is spelt so that reading it back gives the same one.
    if entries is None:
        return None
    return [entry and [entry.token_id, entry.logprob, entry.top] for entry in entries]


def _logprobs(value: Sequence[Any] | None) -> tuple[TokenLogprob | None, ...] | None:
    if value is None:
        return None
    return tuple(
        None if each is None else TokenLogprob(each[0], each[1], tuple((token, at) for token, at in each[2]))
        for each in value
    )


def encode(rows: Mapping[str, Any]) -> bytes:
    """An object of results by key. Raises ValueError for a number that JSON has not."""
    return json.dumps({"format": 1, "rows": rows}, separators=(",", ":"), allow_nan=False).encode()


def decode(data: bytes, name: str) -> dict[str, Any]:
    """What `encode` was given, if `name` is the hash of it. Raises ValueError, KeyError or TypeError."""
    if hashlib.sha256(data).hexdigest() != name:
        raise ValueError("its content is not what it was created with")
    value = json.loads(data)
    if value["format"] != 1:
        raise ValueError(f"its format is {value['format']}, and 1 is known")
    return dict(value["rows"])
