"""What exists when an engine is made is not walked again; what comes later is still collected."""

from __future__ import annotations

import gc
import weakref

import pytest

from engine.collector import spare_long_lived_objects


class Node:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def collector():
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("collector")
def test_old_objects_are_spared_and_new_ones_are_collected():
    dead = weakref.ref(Node())
    spare_long_lived_objects()
    assert dead() is None, "what was garbage already is not kept"
    assert gc.get_freeze_count() > 10_000
    later = weakref.ref(Node())
    nodes = [Node() for _ in range(200_000)]
    assert later() is None, "garbage is still found by itself"
    assert len(nodes) == 200_000
