"""Hints: what rows to come share is pinned while they come and no longer; lengths follow what finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from engine.sampling_params import SamplingParams
from pipeline.exit_codes import ExitCode
from pipeline.hints import MARGIN, MIN_FINISHED, OutputLengths, Template, Templates, WantedPrefixes
from pipeline.planned_reading import PlacedRow
from pipeline.prefix_hashes import SeenPrefixes
from pipeline.prefix_plan import WindowPlanner
from pipeline.row_order import MIN_TEMPLATE_ROWS
from pipeline.rows import Prompt
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import job_settings, run_fake


def placed_rows(prompts: Sequence[Sequence[int]], shard: int = 0) -> list[PlacedRow]:
    planner = WindowPlanner(shard, 0, SeenPrefixes(2**12))
    sampling = SamplingParams(max_tokens=4)
    rows = [
        Prompt(f"{shard}-{i}", shard, i, tuple(tokens), f"text {tokens[0]}", sampling, {}, False)
        for i, tokens in enumerate(prompts)
    ]
    for row in rows:
        planner.add(row)
    window = planner.plan()
    positions = window.positions(0, len(rows))
    return [PlacedRow(rows[position], place, window) for place, position in enumerate(positions)]


def pinned(engine: FakeEngine) -> set[tuple[int, ...]]:
    return {tokens for tokens, count in engine.pinned.items() if count}


units = st.sampled_from([[i] * 8 for i in range(2)])
prompts = st.lists(
    st.lists(units, min_size=1, max_size=6).map(lambda parts: [token for unit in parts for token in unit]),
    min_size=1,
    max_size=20,
)


@given(prompts, st.integers(0, 5))
def test_what_a_row_and_those_after_it_share_is_pinned_when_it_is_taken(
    all_tokens: list[list[int]], slack: int
):
    engine = FakeEngine()
    wanted = WantedPrefixes(engine, slack, max_kept_tokens=40)
    rows = placed_rows(all_tokens)
    for placed in rows:
        wanted.take(placed)
        assert isinstance(placed.row, Prompt)
        group = placed.window.group(placed.place)
        covered = max((len(p) for p in pinned(engine) if placed.row.token_ids[: len(p)] == p), default=0)
        # All of it, but for a rest that is too short to be worth a pin of its own.
        assert covered >= (group.prefix_len if group else 0) - 15
    wanted.release_all()
    assert not pinned(engine)


def test_a_prefix_is_released_when_no_row_is_left_that_needs_it():
    engine = FakeEngine()
    wanted = WantedPrefixes(engine, slack=2, max_kept_tokens=100)
    a, b = (1,) * 16, (2,) * 16
    rows = placed_rows([[*a, 3], [*a, 4], [*b, 5], [*b, 6], [7] * 4, [8] * 3, [9] * 2])
    seen = []
    for placed in rows:
        wanted.take(placed)
        seen.append(pinned(engine))
    # Two rows later than the last that needs it: that one may wait in the engine till then.
    assert seen == [{a}, {a}, {a, b}, {a, b}, {b}, {b}, set()]


def test_a_template_stays_pinned_until_a_window_passes_without_it():
    engine = FakeEngine()
    wanted = WantedPrefixes(engine, slack=0, max_kept_tokens=32)
    template = (1,) * 16
    with_it = [[*template, i] for i in range(MIN_TEMPLATE_ROWS)]
    held = []
    for shard, window in enumerate([with_it, with_it, [[5]], [[6]]]):
        for placed in placed_rows(window, shard):
            wanted.take(placed)
        held.append(engine.pinned[template])
    assert held[:2] == [1, 2]
    assert held[2] == 1
    assert held[3] == 0
    none_kept = WantedPrefixes(engine, slack=0, max_kept_tokens=15)
    for placed in [*placed_rows(with_it), *placed_rows([[5], [6]], shard=1)]:
        none_kept.take(placed)
    assert not pinned(engine)


def test_a_template_is_known_by_its_tokens_in_every_window():
    template = [1] * 16
    first = placed_rows([[*template, i] for i in range(MIN_TEMPLATE_ROWS)])
    second = placed_rows([[*template, 50 + i] for i in range(2 * MIN_TEMPLATE_ROWS)] + [[9] * 30], shard=1)
    templates = Templates()
    found = {templates.of(placed) for placed in first}
    assert {templates.of(placed) for placed in second} == found | {None}
    (only,) = found
    assert only is not None
    assert (only.num_tokens, only.text) == (16, "text 1")


def test_expected_lengths_follow_the_template_and_stay_within_what_is_allowed():
    lengths = OutputLengths()
    short, long, new = Template("a", 16, ""), Template("b", 16, ""), Template("c", 16, "")
    assert lengths.expected(short, 100) is None
    for _ in range(MIN_FINISHED):
        lengths.add(short, 10)
    assert lengths.expected(short, 100) == 10
    assert lengths.expected(short, 7) == 7
    for i in range(MIN_FINISHED):
        lengths.add(long, 80 if i % 2 else 100)
    assert lengths.expected(short, 500) == 10
    assert lengths.expected(long, 500) == 90 + MARGIN * 10
    assert lengths.expected(long, 50) == 50
    overall = lengths.expected(new, 500)
    assert overall == lengths.expected(None, 500)
    assert overall is not None
    assert 10 < overall < 500


def test_a_run_pins_its_template_tells_lengths_and_leaves_nothing_pinned(tmp_path: Path):
    beginning = "the beginning that all of the rows have in common: "
    rows = [{"id": str(i), "prompt": f"{beginning}{i}"} for i in range(30)]
    write_jsonl(tmp_path / "in" / "a.jsonl", lines(rows))
    engine = FakeEngine(max_num_seqs=4)
    settings = job_settings(tmp_path / "in", tmp_path / "out", sampling__max_tokens=6)
    assert run_fake(settings, lambda *_: engine) == ExitCode.DONE
    assert engine.pinned
    assert not pinned(engine)
    assert engine.expected.keys() < {f"0:{i}" for i in range(30)}, "known once some rows have finished"
    assert len(engine.expected) >= 10
