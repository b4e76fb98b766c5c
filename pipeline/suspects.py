"""Rows that kill the process: found from the last words of dead workers, run alone, then set aside.

A worker says which rows are in flight before it runs them, so the rows in flight at a death are known.
Any death looks the same (a crash, `kill -9`, a machine lost), therefore a row is blamed only on evidence
that a death from outside does not produce:

- rows in flight in both of the last two deaths are *isolated*: the worker runs each with nothing else in
  flight and says how many steps it has taken;
- a row that was alone in flight in three deaths in a row, each time after the same number of steps (or in six
  in a row after any number), is *quarantined*: it becomes a reject and the run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.claims import Heartbeat, deaths, read_claims, read_heartbeat
from pipeline.lease import Suspects
from pipeline.storage import Storage

NUM_DEATHS_AT_SAME_STEP = 3
NUM_DEATHS_AT_ANY_STEP = 6


def find_suspects(storage: Storage, state: str, shard: int) -> Suspects:
    """The suspects of a shard, from all its epochs but the latest, which is the asking worker's own or that
    of the worker that lets it a part, and from the parts whose holders died.
    """
    return judge(
        [
            None if was_released else read_heartbeat(storage, state, shard, key)
            for key, was_released in deaths(read_claims(storage, state, shard))
        ]
    )


def judge(history: Sequence[Heartbeat | None]) -> Suspects:
    """`history`: an entry per epoch, oldest first; None for one that ended by itself or never began to
    run.
    """
    quarantined = set()
    for length, same_step in ((NUM_DEATHS_AT_SAME_STEP, True), (NUM_DEATHS_AT_ANY_STEP, False)):
        for start in range(len(history) - length + 1):
            quarantined |= _culprit(history[start : start + length], same_step)
    last_two = history[-2:]
    isolate = (
        frozenset.intersection(*(beat.in_flight for beat in last_two if beat is not None))
        if len(last_two) == 2 and None not in last_two
        else frozenset()
    )
    return Suspects(isolate - quarantined, frozenset(quarantined))


def _culprit(deaths: Sequence[Heartbeat | None], same_step: bool) -> set[str]:
    found = [beat for beat in deaths if beat is not None and beat.alone_progress is not None]
    if len(found) < len(deaths) or len({beat.in_flight for beat in found}) > 1:
        return set()
    if same_step and len({beat.alone_progress for beat in found}) > 1:
        return set()
    return set(found[0].in_flight)
