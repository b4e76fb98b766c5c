"""`python -m jobs.bench`: how fast the engine is on this machine, by itself and beside its peers.

Without a command it measures this engine on W1 and W2. `compare` sets it against its peers, `growth` shows
what a row costs as there are more, and a token as its context grows, `host` measures the host's part of a
step, `streams` what streaming costs it, `profile` where the device's part of it goes, `groups` when reading a
shared prefix once pays, `gpu` how near an accelerator's limits a large model's steps come, `speculation` what
guessed tokens save, `scaling` what workers on one run cost each other, `schemas` what share of many kinds of
JSON schemas outputs follow.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from pathlib import Path

from engine.errors import TidemillError
from jobs.bench import compare, growth, own, scaling

# These read their own arguments.
PROGRAMS = {
    "host": "jobs.bench.host",
    "streams": "jobs.bench.streams",
    "profile": "jobs.bench.step_profile",
    "groups": "jobs.bench.groups",
    "gpu": "jobs.bench.gpu",
    "schemas": "jobs.bench.schemas",
    "speculation": "jobs.bench.speculation",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m jobs.bench", description=__doc__)
    own.add_arguments(made)
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    commands = made.add_subparsers(dest="command", metavar="COMMAND")
    compare.add_arguments(commands.add_parser("compare", help="beside peers", description=compare.__doc__))
    growth.add_arguments(commands.add_parser("growth", help="cost as it grows", description=growth.__doc__))
    several = commands.add_parser("scaling", help="many workers on one run", description=scaling.__doc__)
    scaling.add_arguments(several)
    for name, what in (
        ("host", "the host's part of a step"),
        ("streams", "what streams cost a step"),
        ("profile", "where a step's time goes"),
        ("groups", "when reading a shared prefix once pays"),
        ("gpu", "a large model's steps beside an accelerator's limits, and beside transformers"),
        ("schemas", "what share of JSON schemas is followed"),
        ("speculation", "what guessed tokens save or cost"),
    ):
        commands.add_parser(name, help=what, add_help=False)
    return made


def main() -> int:
    arguments = sys.argv[1:]
    # Ending by a signal unwinds, so that no peer's process is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if arguments and arguments[0] in PROGRAMS:
            return importlib.import_module(PROGRAMS[arguments[0]]).main(arguments[1:])
        options = parser().parse_args(arguments)
        if options.command == "compare":
            comparison = compare.run(options)
            print(comparison.table, end="")
            print(f"written to {options.out}")
            return 0
        measure = {"growth": growth.run, "scaling": scaling.run}.get(options.command, own.run)
        data = measure(options)
    except TidemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=1) + "\n")
        print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
