"""`python -m jobs.demo OUTPUT`: make the demo's prompts again."""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.demo.shards import write_shards


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__)
    parser.add_argument(
        "output", type=Path, help="a folder, made if needed; files of the same names are replaced"
    )
    output = parser.parse_args().output
    for path in write_shards(output):
        print(f"{path} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
