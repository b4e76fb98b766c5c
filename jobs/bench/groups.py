"""`python -m jobs.bench groups`: when attention should read a shared prefix once, on this device.

Times the engine's attention, with groups and without, for groups of several sizes behind prefixes of several
lengths, and fits the constants of the model that chooses (`engine/group_costs.py`). Prints each point, what
the fitted constants choose there and what a wrong choice costs; then the entry to keep.

As in a decode step, every sequence has one query, and the layers follow one another, each with pages of its
own: what a layer reads has left the small caches since the step before.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.backends import Backends
from engine.config import EngineConfig
from engine.errors import TidemillError
from engine.group_costs import GroupCosts, read_costs
from jobs.bench.arguments import at_least, positive
from jobs.bench.machine import cpu_name
from kernels.paged_attention import AttentionOptions, Groups, PageLayout, Pages, Rows, attend, page_layout

GROUP_SIZES, PREFIX_PAGES = (2, 4, 16, 64), (1, 4, 16, 64)
MAX_ROWS = 64
# Longer prefixes outgrow the caches, so that a token costs more; no choice is near there: they only check.
FITTED_TOKENS = 1024
OWN_TOKENS = 40  # of each sequence behind the prefix
POOL_BYTES, MAX_LAYERS = 1 << 30, 30
COMMAND = "python -m jobs.bench groups"

Clock = Callable[[], float]


class Heads(NamedTuple):
    """The sizes of attention; the default model's unless told otherwise."""

    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64


class Point(NamedTuple):
    """A step of `num_groups` groups of `num_rows` rows behind `num_tokens` tokens each: us of one layer.

    `noise` is the share by which the best of the odd and of the even tries differ.
    """

    num_rows: int
    num_tokens: int
    num_groups: int
    plain: float
    grouped: float
    noise: float = 0.0

    @property
    def saving(self) -> float:
        """By one group."""
        return (self.plain - self.grouped) / self.num_groups

    def is_chosen(self, costs: GroupCosts) -> bool:
        return costs.saving(self.num_rows, self.num_rows, self.num_tokens) > 0

    def loss(self, costs: GroupCosts) -> float:
        """What the choice takes beyond the faster alternative, as a share of that."""
        chosen = self.grouped if self.is_chosen(costs) else self.plain
        best = min(self.plain, self.grouped)
        return chosen / best - 1


class Case:
    """The attention of one step: `num_rows` rows a group, as many groups as MAX_ROWS holds."""

    def __init__(self, backend: str, heads: Heads, page_size: int, num_rows: int, prefix_pages: int):
        self.num_groups = max(1, MAX_ROWS // num_rows)
        count = self.num_groups * num_rows
        own_pages = -(-OWN_TOKENS // page_size)
        num_shared = self.num_groups * prefix_pages
        num_pages = num_shared + count * own_pages
        layout = page_layout(backend, heads.num_kv_heads, heads.head_dim, page_size, "float32")
        self._num_layers = max(2, min(MAX_LAYERS, POOL_BYTES // (num_pages * layout.page_bytes)))
        pick = np.random.default_rng(0)
        ids = pick.permutation(num_pages).astype(np.int32)
        shared = ids[:num_shared].reshape(self.num_groups, prefix_pages).repeat(num_rows, 0)
        table = np.concatenate([shared, ids[num_shared:].reshape(count, own_pages)], 1)
        kv_len = np.full(count, prefix_pages * page_size + OWN_TOKENS, np.int32)
        self._rows = Rows(*map(jnp.asarray, (np.arange(count + 1, dtype=np.int32), kv_len, table)))
        first = np.arange(self.num_groups, dtype=np.int32) * num_rows
        groups = np.zeros((4, count), np.int32)
        groups[:, : self.num_groups] = (
            first, first + num_rows, np.zeros_like(first), np.full_like(first, prefix_pages)
        )  # fmt: skip
        self._groups = {True: Groups(*map(jnp.asarray, groups)), False: Groups.none(count)}
        self._q, self._k, self._v = (
            jnp.asarray(pick.standard_normal((count, num, heads.head_dim)), jnp.float32)
            for num in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        )
        some = pick.standard_normal(64 * layout.page_bytes // 8).astype(np.float32)
        empty = jax.eval_shape(lambda: layout.empty(self._num_layers * num_pages))
        self._pages = jax.tree.map(lambda x: jnp.asarray(np.resize(some, x.shape)), empty)
        options = AttentionOptions(scale=heads.head_dim**-0.5)
        self._step = jax.jit(
            partial(_layers, options=options, layout=layout, num_layers=self._num_layers), donate_argnums=3
        )

    def run(self, grouped: bool) -> jax.Array:
        """What the last layer gives, [rows, N, H]; waits for it."""
        out, self._pages = self._step(
            self._q, self._k, self._v, self._pages, self._rows, self._groups[grouped]
        )
        return jax.block_until_ready(out)

    def microseconds(self, grouped: bool, clock: Clock) -> float:
        """Of one layer, in one run of them all."""
        started = clock()
        self.run(grouped)
        return 1e6 * (clock() - started) / self._num_layers


def _layers(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    rows: Rows,
    groups: Groups,
    *,
    options: AttentionOptions,
    layout: PageLayout,
    num_layers: int,
) -> tuple[jax.Array, Pages]:
    """Attention of one layer after the other over one pool of pages, as in the engine's step."""
    num_pages = pages.keys.shape[0] // num_layers

    def layer(index: jax.Array, carried: tuple[jax.Array, Pages]) -> tuple[jax.Array, Pages]:
        queries, pages = carried
        here = rows._replace(page_table=rows.page_table + index * num_pages)
        out, pages = attend(queries, k, v, pages, here, groups, options, layout)
        return q + out, pages  # so that no layer can be left out

    return jax.lax.fori_loop(0, num_layers, layer, (q, pages))


def measure(
    backend: str, heads: Heads, page_size: int, tries: int, clock: Clock = time.perf_counter
) -> list[Point]:
    """A point for each size of group and length of prefix, the two alternatives in turn, the best of each."""
    points = []
    for num_rows, prefix_pages in product(GROUP_SIZES, PREFIX_PAGES):
        case = Case(backend, heads, page_size, num_rows, prefix_pages)
        for grouped in (True, False):
            case.run(grouped)  # compiles
        taken = np.array(
            [(case.microseconds(False, clock), case.microseconds(True, clock)) for _ in range(tries)]
        )
        plain, grouped = taken.min(0).tolist()
        odd, even = taken[::2].min(0), taken[1::2].min(0)
        noise = float((np.abs(odd - even) / np.minimum(odd, even)).max())
        points.append(Point(num_rows, prefix_pages * page_size, case.num_groups, plain, grouped, noise))
    return points


def fit(points: Sequence[Point]) -> GroupCosts:
    """The constants, none negative, nearest to the measured savings of prefixes up to FITTED_TOKENS; all 0
    when groups save nothing.

    What counts is a saving's share of the step's time: near the crossing it is small, and must not drown in
    the large ones.
    """
    points = [point for point in points if point.num_tokens <= FITTED_TOKENS]
    weights = np.array([point.num_groups / point.plain for point in points])
    savings = np.array([point.saving for point in points])
    terms = np.array([[(p.num_rows - 1) * p.num_tokens, -p.num_rows, -1.0] for p in points])
    best, least = np.zeros(3), float(((weights * savings) ** 2).sum())
    for count in (1, 2, 3):
        for used in map(list, combinations(range(3), count)):
            left = weights[:, None] * terms[:, used]
            found, *_ = np.linalg.lstsq(left, weights * savings, rcond=None)
            error = float(((left @ found - weights * savings) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[used] = found
    return GroupCosts(*(float(f"{value:.3g}") for value in best))


def table(points: Sequence[Point], costs: GroupCosts) -> str:
    lines = ["group  prefix  plain us  grouped us  saved   chosen    loss  noise"]
    lines += [
        f"{point.num_rows:5}  {point.num_tokens:6}  {point.plain:8.1f}  {point.grouped:10.1f}  "
        f"{1 - point.grouped / point.plain:5.0%}   {'grouped' if point.is_chosen(costs) else 'plain':7}  "
        f"{point.loss(costs):6.1%}  {point.noise:5.1%}"
        for point in points
    ]
    return "\n".join(lines)


def entry(costs: GroupCosts, heads: Heads, page_size: int, arguments: Sequence[str]) -> dict[str, object]:
    """What the file of constants keeps of a measurement."""
    isa = os.environ.get("TIDEMILL_CPU_ISA")
    forced = [] if isa is None else [f"TIDEMILL_CPU_ISA={isa}"]
    num_heads, num_kv_heads, head_dim = heads
    return {
        "token": costs.token,
        "query": costs.query,
        "group": costs.group,
        "source": f"measured: float32, {num_heads} query and {num_kv_heads} KV heads of {head_dim}, "
        f"pages of {page_size}",
        "command": shlex.join([*forced, *COMMAND.split(), *arguments]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores ({jax.devices()[0].device_kind})",
    }


def keep(path: Path, key: str, made: dict[str, object]) -> None:
    """Put an entry into the file of constants, in place of the one with its key."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["devices"] = dict(sorted((content["devices"] | {key: made}).items()))
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    made.add_argument("--attention-backend", choices=["auto", "cpu", "xla"], default="auto")
    for name, value in Heads()._asdict().items():
        made.add_argument(f"--{name.replace('_', '-')}", type=positive, default=value)
    made.add_argument("--page-size", type=positive, default=EngineConfig().page_size)
    made.add_argument("--tries", type=at_least(2), default=20, help="of each alternative at each point")
    made.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's CPU time: for one core of a machine that does other work too",
    )
    made.add_argument("--keep", type=Path, metavar="FILE", help="put the entry into this file of constants")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = jax.devices()[0]
    heads = Heads(options.num_heads, options.num_kv_heads, options.head_dim)
    try:
        config = EngineConfig(attention_backend=options.attention_backend, page_size=options.page_size)
        backends = Backends.choose(config, device.platform)
        if options.keep is not None:
            read_costs(options.keep)
        clock = time.process_time if options.cpu_time else time.perf_counter
        points = measure(backends.attention, heads, options.page_size, options.tries, clock)
    except TidemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    costs = fit(points)
    key = backends.device_keys(device)[0]
    made = entry(costs, heads, options.page_size, arguments or [])
    print(table(points, costs))
    print(json.dumps({key: made}, indent=1))
    if options.keep is not None:
        keep(options.keep, key, made)
        print(f"kept in {options.keep}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
