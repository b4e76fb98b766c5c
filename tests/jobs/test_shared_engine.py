"""An engine shared with a server's clients, as a batch's worker sees it."""

from __future__ import annotations

import threading
import time

from engine.async_engine import AsyncEngine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from jobs.batches.shared_engine import SharedEngine
from pipeline.open_work import Refusal
from tests.engine.costless import costless_engine

ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def test_rows_begin_without_waiting_for_the_engines_step_and_a_refused_one_is_a_result():
    engine, _ = costless_engine(num_pages=40, max_num_seqs=16)
    too_long = [5] * 100_000
    with AsyncEngine(engine, max_waiting=6) as front:
        shared = SharedEngine(front)
        is_stepping, goes_on = threading.Event(), threading.Event()

        def long_step() -> None:
            is_stepping.set()
            goes_on.wait(timeout=30)

        front.run_on_step_thread(long_step)
        assert is_stepping.wait(timeout=30)
        for index, prompt in enumerate([[9] * 5, too_long, *([index] * 5 for index in range(6))]):
            shared.add_request(
                f"0:{index}",
                prompt,
                sampling=ONE,
                identity=f"row-{index}",
                expected_output_len=None,
                drawn=None,
            )
        assert shared.num_unfinished == 8
        goes_on.set()
        results: dict[str, RequestOutput | Refusal] = {}
        until = time.monotonic() + 20
        while shared.has_unfinished and time.monotonic() < until:
            results |= {result.request_id: result for result in shared.step()}
        # Whoever has ended, the refused one too, has given its place among the waiting back.
        while front.num_unfinished and time.monotonic() < until:
            time.sleep(0.01)
        assert front.num_unfinished == 0
    refused = {name for name, result in results.items() if isinstance(result, Refusal)}
    assert refused == {"0:1"}
    assert "max_model_len" in str(results["0:1"].error)  # type: ignore[union-attr]
    assert len(results) == 8
    assert max(engine.stats().batch_occupancy or (0,)) >= 5, "rows that came together run together"
