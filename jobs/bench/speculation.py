"""`python -m jobs.bench speculation`: what guessed tokens save or cost (`engine.speculation`).

copies  4 sequences that are asked to repeat a text of their prompt: nearly all is there to be guessed.
W1      64 sequences of the workload of that name: drafts must not cost what they cannot save.

Each mode has an engine of its own; they take turns, in another order in each repeat, and their tokens are
compared. The prefix cache is on and every repeat has prompts of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints import DEFAULT_MODEL
from engine.engine import Engine
from engine.errors import TidemillError
from engine.sampling_params import SamplingParams
from jobs.bench.arguments import names_of, positive
from jobs.bench.machine import machine_lines, measure_machine
from jobs.bench.workloads import make_workload, real_token_ids
from jobs.demo.docstrings import docstrings

MODES = ("off", "ngram", "suffix", "auto")
COPIES, COPY_TOKENS = 16, 96
MAX_MODEL_LEN = 1024


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts, texts or token ids, that one engine completes."""

    name: str
    max_num_seqs: int
    prompts: Sequence[Any]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """One engine's pass over one work."""

    workload: str
    mode: str
    repeat: int
    seconds: float
    num_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def copies(repeat: int) -> Work:
    """Chats that ask for the words of a docstring again."""
    texts = [entry.text for entry in docstrings(min_chars=300, max_chars=450)]
    chosen = random.Random(f"copies/{repeat}").sample(texts, COPIES)
    chats = [
        [{"role": "user", "content": f"Repeat the following text word for word.\n\n{text}"}]
        for text in chosen
    ]
    return Work("copies", 4, chats, COPY_TOKENS)


def shared_prefix(engine: Engine, repeat: int, num_rows: int) -> Work:
    """W1's prompts, behind another prefix in each repeat."""
    text_ids = real_token_ids(engine.tokenizer)
    workload = make_workload("W1", text_ids, 1000 + repeat).part(num_rows)
    return Work("W1", 64, workload.prompts, workload.max_tokens[0])


def measure(engine: Engine, mode: str, work: Work, repeat: int) -> tuple[Run, list[tuple[int, ...]]]:
    """Complete it; what was measured, and the tokens."""
    sampling = SamplingParams(temperature=0.0, max_tokens=work.max_tokens, ignore_eos=work.name == "W1")
    before = engine.stats()
    started = time.perf_counter()
    outputs = engine.generate(work.prompts, sampling)
    seconds, after = time.perf_counter() - started, engine.stats()
    tokens = [output.outputs[0].token_ids for output in outputs]
    run = Run(
        workload=work.name,
        mode=mode,
        repeat=repeat,
        seconds=seconds,
        num_tokens=sum(map(len, tokens)),
        num_steps=after.num_steps - before.num_steps,
        num_drafted=after.num_drafted_tokens - before.num_drafted_tokens,
        num_accepted=after.num_accepted_tokens - before.num_accepted_tokens,
    )
    return run, tokens


def measure_all(options: argparse.Namespace) -> list[Run]:
    """Every workload in every mode; prints a line each. Raises TidemillError where tokens differ."""
    runs: list[Run] = []
    for name, num_seqs in (("copies", 4), ("W1", 64)):
        if name not in options.workloads:
            continue
        engines = {
            mode: Engine.from_pretrained(
                options.model,
                speculation=mode,
                max_draft_len=options.max_draft_len,
                max_num_seqs=num_seqs,
                max_num_batched_tokens=512,
                max_model_len=MAX_MODEL_LEN,
            )
            for mode in options.modes
        }
        for repeat in range(-1, options.repeats):  # the first one warms up
            engine = next(iter(engines.values()))
            work = copies(repeat) if name == "copies" else shared_prefix(engine, repeat, options.rows)
            turn = repeat % len(engines)
            known: list[tuple[int, ...]] | None = None
            for mode in (*options.modes[turn:], *options.modes[:turn]):
                run, tokens = measure(engines[mode], mode, work, repeat)
                if known is not None and tokens != known:
                    raise TidemillError(f"{name}, repeat {repeat}: {mode} has drawn other tokens")
                known = tokens
                if repeat >= 0:
                    runs.append(run)
                    print(line(run), flush=True)
    return runs


def line(run: Run) -> str:
    rate = f"{run.num_accepted / run.num_drafted:.0%}" if run.num_drafted else "none"
    return (
        f"{run.workload:7} {run.mode:7} {run.tokens_per_second:7.1f} tokens/s, {run.num_steps:4} steps, "
        f"{run.num_drafted:5} drafted, {rate} accepted"
    )


def ratios(runs: Sequence[Run]) -> dict[str, dict[str, list[float]]]:
    """By workload and mode, tokens a second over those without speculation in the same repeat."""
    plain = {(run.workload, run.repeat): run.tokens_per_second for run in runs if run.mode == "off"}
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        if run.mode != "off" and (run.workload, run.repeat) in plain:
            ratio = run.tokens_per_second / plain[run.workload, run.repeat]
            found.setdefault(run.workload, {}).setdefault(run.mode, []).append(ratio)
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m jobs.bench speculation", description=__doc__)
    made.add_argument("--model", default=DEFAULT_MODEL, help="what model.source takes")
    made.add_argument("--modes", type=names_of(MODES), default=MODES)
    made.add_argument("--workloads", type=names_of(("copies", "W1")), default=("copies", "W1"))
    made.add_argument("--repeats", type=positive, default=3)
    made.add_argument("--rows", type=positive, default=128, help="of W1's 256 prompts")
    made.add_argument("--max-draft-len", type=positive, default=8)
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        machine = measure_machine()
        print("\n".join(machine_lines(machine)), flush=True)
        runs = measure_all(options)
    except TidemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = ratios(runs)
    for workload, modes in found.items():
        for mode, values in modes.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"{workload:7} {mode:7} {middle:.2f} times as fast as off ({low:.2f} to {high:.2f})")
    if options.json is not None:
        measured = {
            "machine": asdict(machine) | {"busy_processes": list(machine.busy_processes)},
            "setup": {"model": options.model, "max_draft_len": options.max_draft_len, "rows": options.rows},
            "runs": [asdict(run) for run in runs],
            "times_as_fast_as_off": found,
        }
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
        print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
