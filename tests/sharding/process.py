"""One of several processes that run one engine.

    python -m tests.sharding.process MODEL ADDRESS COUNT ID DIMS FILE

The first writes the tokens of `REQUESTS` to the file, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.sharding.meshes import DRAWN, GREEDY, OPTIONS, tokens

REQUESTS = (GREEDY, DRAWN, GREEDY.replace(logit_bias={9: 2.0}, presence_penalty=0.5))


def main(source: str, address: str, count: str, index: str, dims: str, path: str) -> None:
    from engine.engine import Engine

    engine = Engine.from_pretrained(
        source,
        sharding_axis_dims=tuple(json.loads(dims)),
        coordinator_address=address,
        num_processes=int(count),
        process_id=int(index),
        **OPTIONS,
    )
    if not engine.leads:
        engine.follow()
        return
    Path(path).write_text(json.dumps([tokens(engine, sampling) for sampling in REQUESTS]))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
