"""`python -m jobs.bench schemas`: what share of many kinds of JSON schemas is followed, and what that costs.

Each schema is asked for once, with a seed. An output is valid, or was cut by its length, or its schema was
refused with a reason; an output that ended by itself and does not follow its schema is INVALID, and there
must be none. Then the host's part is measured alone: the seconds of a compile, and of a mask at each token
of the outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.checkpoints import DEFAULT_MODEL
from engine.engine import Engine
from engine.errors import RequestError, TidemillError
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.structured.grammars import GrammarState
from engine.structured.spec import StructuredOutput
from engine.token_masks import token_mask
from jobs.bench.arguments import positive
from jobs.bench.machine import cpu_name
from jobs.bench.measurement import percentiles
from jobs.bench.schema_cases import SchemaCase, make_cases
from jobs.bench.schema_checks import violation

PROMPT = "Here is a short JSON value that follows the schema:\n"
# Added to the logits of tokens that end a string, an object or a list: a small model seldom thinks of ending.
CLOSING, CLOSING_BIAS = ('"', "}", "]", '"}', '"]', '",', "}}"), 3.0
RESULTS = ("valid", "length", "refused", "error", "INVALID")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case. why: of a refusal, an error or an invalid output."""

    name: str
    kind: str
    result: str
    why: str = ""
    text: str = ""
    token_ids: tuple[int, ...] = ()


def run_cases(engine: Engine, cases: Sequence[SchemaCase], max_tokens: int) -> list[Outcome]:
    """Ask for each schema's output and judge it, in the order of the cases."""
    found: dict[str, Outcome] = {}
    of_name = {case.name: case for case in cases}
    bias = _closing_bias(engine.tokenizer)
    for number, case in enumerate(cases):
        try:
            sampling = SamplingParams.from_dict(
                {
                    "max_tokens": max_tokens,
                    "temperature": 0.8,
                    "seed": number,
                    "logit_bias": bias,
                    "structured": {"json": case.schema},
                }
            )
            engine.add_request(case.name, prompt=PROMPT, sampling=sampling)
        except RequestError as error:
            found[case.name] = Outcome(case.name, case.kind, "refused", str(error))
    while engine.has_unfinished:
        for output in engine.step():
            found[output.request_id] = _judged(of_name[output.request_id], output.outputs[0])
    return [found[case.name] for case in cases]


def _closing_bias(tokenizer: Any) -> dict[int, float]:
    """Of the closing texts that are one token."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in CLOSING]
    return {each[0]: CLOSING_BIAS for each in ids if len(each) == 1}


def _judged(case: SchemaCase, sample: Any) -> Outcome:
    why = ""
    if sample.finish_reason == "stop":
        why = violation(sample.text, case.schema) or ""
        result = "INVALID" if why else "valid"
    else:
        result = sample.finish_reason
        why = str(sample.stop_reason or "")
    return Outcome(case.name, case.kind, result, why, sample.text, sample.token_ids)


def host_seconds(
    engine: Engine, cases: Sequence[SchemaCase], outcomes: Sequence[Outcome]
) -> dict[str, dict[str, float]]:
    """Percentiles of the seconds of a compile, and of a mask, over the cases that ran."""
    compiles: list[float] = []
    masks: list[float] = []
    for case, outcome in zip(cases, outcomes, strict=True):
        if outcome.result == "refused":
            continue
        asked = StructuredOutput.of({"json": case.schema})
        started = time.perf_counter()
        compiled = engine.grammars.compile(asked)
        compiles.append(time.perf_counter() - started)
        masks += _mask_seconds(engine, compiled.begin(), outcome.token_ids)
    return {"compile": percentiles(compiles), "mask": percentiles(masks) | {"mean": statistics.fmean(masks)}}


def _mask_seconds(engine: Engine, grammar: GrammarState, tokens: Sequence[int]) -> list[float]:
    model, taken = engine.model_config, []
    request = Request(
        request_id="host",
        prompt_token_ids=(0,),
        sampling=SamplingParams(max_tokens=2**20),
        key=(0, 0),
        max_total_len=2**20,
        eos_token_ids=frozenset(model.eos_token_ids),
        grammar=grammar,
    )
    for token in tokens:
        started = time.perf_counter()
        token_mask(request, model.vocab_size)
        taken.append(time.perf_counter() - started)
        request.output_token_ids.append(token)
    return taken


def counts(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """By kind, and over all: how many ended in which of RESULTS."""
    by_kind: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        by_kind.setdefault(outcome.kind, Counter())[outcome.result] += 1
    by_kind["all"] = Counter(outcome.result for outcome in outcomes)
    return {kind: {result: counted[result] for result in RESULTS} for kind, counted in by_kind.items()}


def table(found: Mapping[str, Mapping[str, int]]) -> str:
    """The counts as Markdown."""
    lines = [f"| schema | {' | '.join(RESULTS)} |", f"| --- |{' ---: |' * len(RESULTS)}"]
    lines += [
        f"| {kind} | {' | '.join(str(counted[result]) for result in RESULTS)} |"
        for kind, counted in found.items()
    ]
    return "\n".join(lines)


def _report(options: argparse.Namespace, data: Mapping[str, Any]) -> str:
    compiles, masks = data["seconds"]["compile"], data["seconds"]["mask"]
    refusals = Counter(each["why"] for each in data["outcomes"] if each["result"] == "refused")
    where = f"{data['model']}, llguidance {data['llguidance']}, {data['cpu']}, load average {data['load']}"
    return "\n".join(
        (
            f"# {options.number} JSON schemas",
            "",
            f"`{data['command']}`, {data['date']}, {where}.",
            "",
            "*valid*: ended by itself, right by `jsonschema`; *length*: cut by `max_tokens`; *refused*, for "
            "the reasons below; *error*: dear to follow; *INVALID*: ended by itself, and not right.",
            "",
            table(data["counts"]),
            "",
            "A compile, its trial in another process included: "
            f"{compiles['p50'] * 1e3:.1f} ms in the middle, {compiles['max'] * 1e3:.0f} ms at most. A mask: "
            f"{masks['p50'] * 1e6:.0f} microseconds in the middle, {masks['p99'] * 1e6:.0f} at the 99th "
            f"percentile, {masks['max'] * 1e6:.0f} at most.",
            "",
            "What refusals said:",
            "",
            *(f"- {number}: {why}" for why, number in refusals.most_common()),
            "",
        )
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m jobs.bench schemas", description=__doc__)
    made.add_argument("--model", default=DEFAULT_MODEL, help="what model.source takes")
    made.add_argument("--number", type=positive, default=500, help="schemas")
    made.add_argument("--seed", type=int, default=0, help="of the schemas")
    made.add_argument("--max-tokens", type=positive, default=192)
    made.add_argument("--max-num-seqs", type=positive, default=64)
    made.add_argument("--out", type=Path, metavar="NAME", help="write NAME.json and NAME.md")
    return made


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    cases = make_cases(options.number, options.seed)
    engine = Engine.from_pretrained(
        options.model, max_model_len=256 + options.max_tokens, max_num_seqs=options.max_num_seqs
    )
    outcomes = run_cases(engine, cases, options.max_tokens)
    data = {
        "command": " ".join(["python -m jobs.bench schemas", *arguments]),
        "date": time.strftime("%d %B %Y").lstrip("0"),
        "model": options.model,
        "llguidance": version("llguidance"),
        "cpu": cpu_name(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "counts": counts(outcomes),
        "seconds": host_seconds(engine, cases, outcomes),
        "outcomes": [
            {name: value for name, value in asdict(outcome).items() if name != "token_ids"}
            for outcome in outcomes
        ],
    }
    print(table(data["counts"]))
    for outcome in outcomes:
        if outcome.result in ("INVALID", "error"):
            print(f"{outcome.name}: {outcome.result}: {outcome.why}: {outcome.text!r}", file=sys.stderr)
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        options.out.with_suffix(".md").write_text(_report(options, data))
    if data["counts"]["all"]["INVALID"]:
        raise TidemillError("outputs do not follow their schemas")
    return 0
