"""What the tests of structured output ask for, and whether it was followed."""

from __future__ import annotations

import json
import re
from typing import Any

from engine.engine import Engine
from engine.outputs import CompletionOutput, RequestOutput
from engine.sampling_params import SamplingParams
from jobs.bench.schema_checks import violation
from tests.engine.engines import tiny_engine

PROMPT = "in the beginning"
POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": -9, "maximum": 9},
        "kind": {"enum": ["a", "b", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{1,3}$"}, "maxItems": 2},
    },
    "required": ["x", "kind"],
    "additionalProperties": False,
}
LIST = 'start: "[" (item ("," item)*)? "]"\nitem: NUMBER | start\nNUMBER: /[1-9][0-9]{0,2}/'
SPECS: dict[str, dict[str, Any]] = {
    "json": {"json": POINT},
    "recursive": {
        "json": {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"n": {"type": "null"}, "next": {"$ref": "#/$defs/node"}},
                    "required": ["n"],
                    "additionalProperties": False,
                }
            },
        }
    },
    "date": {"json": {"type": "string", "format": "date"}},
    "regex": {"regex": "(the|an)? ?answer: [0-9]{2,4}(é|🎉)?"},
    "choice": {"choice": ["yes", "no", "yes and no", 'quote " and \\ and\nline', "ünï"]},
    "grammar": {"grammar": LIST},
    "json_object": {"json_object": True},
}
PLAIN = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def engine() -> Engine:
    return tiny_engine()


def follows(text: str, spec: dict[str, Any]) -> bool:
    """By what is not llguidance."""
    if "json" in spec:
        return violation(text, spec["json"]) is None
    if "regex" in spec:
        return re.fullmatch(spec["regex"], text) is not None
    if "choice" in spec:
        return text in spec["choice"]
    if "grammar" in spec:
        return re.fullmatch(r"[\[\],0-9]*", text) is not None and isinstance(json.loads(text), list)
    return isinstance(json.loads(text), dict)


def ended(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    return [sample for output in outputs for sample in output.outputs if sample.finish_reason == "stop"]


def sampled(spec: dict[str, Any] | None, **values: Any) -> SamplingParams:
    values = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "structured": spec} | values
    return SamplingParams.from_dict(values)
