"""One of several processes that run one engine: `python -m tests.sharding.process ADDRESS COUNT ID DIMS`.

The first prints the tokens of the greedy and of the drawn requests, as JSON.
"""

from __future__ import annotations

import json
import sys

from tests.sharding.meshes import DRAWN, GREEDY, OPTIONS, tokens


def main(source: str, address: str, count: str, index: str, dims: str) -> None:
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
    biased = GREEDY.replace(logit_bias={9: 2.0}, presence_penalty=0.5)
    print(json.dumps([tokens(engine, sampling) for sampling in (GREEDY, DRAWN, biased)]))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
