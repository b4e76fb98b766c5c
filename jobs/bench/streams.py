"""`python -m jobs.bench streams`: what 256 streams cost the thread that steps the engine.

The same requests run through an `AsyncEngine` twice, their outputs given whole and streamed, beside a device
whose steps take a given time and no CPU. Two numbers count: the step thread's own CPU time a step, and the
time from step to step, which also shows whether the other threads keep the interpreter from it.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from engine.async_engine import AsyncEngine
from engine.checkpoints import DEFAULT_MODEL
from engine.collector import spare_long_lived_objects
from engine.config import EngineConfig
from engine.errors import TidemillError
from engine.in_flight import InFlight
from engine.outputs import RequestOutput
from jobs.bench.host import MAX_MODEL_LEN, MIN_NEW, NUM_SEQS, STEP_TOKENS, Crowd, make_engine
from jobs.bench.workloads import real_token_ids

NUM_STEPS_BEFORE = 256


def run(source: str, num_steps: int, device_ms: float, interval_ms: int, stream: bool) -> dict[str, Any]:
    """Milliseconds a step, of the clock and of the step thread's CPU, and the outputs given in that time."""
    config = EngineConfig(
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        stream_interval_ms=interval_ms,
    )
    engine, device = make_engine(source, config, num_pages=4096)
    outputs = _Count()
    device.collect = marks = _Marks(device.collect, device_ms / 1000, num_steps, outputs)  # type: ignore[method-assign]
    text_ids = real_token_ids(engine.tokenizer)
    count = 2 * NUM_SEQS + (NUM_STEPS_BEFORE + num_steps) * NUM_SEQS // MIN_NEW
    crowd = Crowd(text_ids, 0, count)
    with AsyncEngine(engine) as front:
        front.pause()
        for prompt, sampling in crowd.requests:
            front.submit(prompt, sampling, stream=stream, on_output=outputs.take)
        spare_long_lived_objects()
        front.resume()
        while not marks.last.wait(1.0):
            if not front.healthy:
                raise front.run_on_step_thread(int).exception() or AssertionError("it runs and does not")
        front.pause()  # what is left is ended without being run
    return marks.per_step()


class _Marks:
    """`collect` of a device that takes `seconds` for a step, one step after the other. What has been used is
    noted after NUM_STEPS_BEFORE steps, and `num_steps` later."""

    def __init__(self, collect: Callable[[InFlight], Any], seconds: float, num_steps: int, outputs: _Count):
        self._collect = collect
        self._seconds = seconds
        self._num_steps = num_steps
        self._outputs = outputs
        self._free_at = 0.0
        self._count = 0
        self._noted: list[tuple[float, float, float, int]] = []
        self.last = threading.Event()

    def __call__(self, step: InFlight) -> Any:
        self._count += 1
        if self._count in (NUM_STEPS_BEFORE, NUM_STEPS_BEFORE + self._num_steps):
            seconds = time.perf_counter(), time.thread_time(), self._outputs.cpu_seconds
            self._noted.append((*seconds, self._outputs.count))
            if len(self._noted) == 2:
                self.last.set()
        self._free_at = max(self._free_at, step.dispatched_at) + self._seconds
        time.sleep(max(0.0, self._free_at - time.monotonic()))
        return self._collect(step)

    def per_step(self) -> dict[str, Any]:
        whole, own, text, outputs = (
            (after - before) / self._num_steps for before, after in zip(*self._noted, strict=True)
        )
        return {
            "num_steps": self._num_steps,
            "ms_per_step": 1000 * whole,
            "step_thread_cpu_ms_per_step": 1000 * own,
            "text_thread_cpu_ms_per_step": 1000 * text,
            "outputs_per_step": outputs,
        }


class _Count:
    """A receiver that looks at nothing."""

    def __init__(self) -> None:
        self.count = 0
        self.cpu_seconds = 0.0
        """Of the text thread, which calls this."""

    def take(self, output: RequestOutput) -> None:
        self.count += 1
        self.cpu_seconds = time.thread_time()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m jobs.bench streams", description=__doc__)
    made.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer and sizes are used")
    made.add_argument("--steps", type=int, default=500)
    made.add_argument("--device-ms", type=float, default=10.0, help="how long the device takes for a step")
    made.add_argument("--interval-ms", type=int, default=20, help="engine.stream_interval_ms")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        for name, stream in (("whole", False), ("streamed", True)):
            found = run(options.model, options.steps, options.device_ms, options.interval_ms, stream)
            print(
                f"{name:9} {found['ms_per_step']:.3f} ms a step, "
                f"{found['step_thread_cpu_ms_per_step']:.3f} ms of it the step thread's CPU; "
                f"{found['text_thread_cpu_ms_per_step']:.3f} ms of CPU in the text thread for "
                f"{found['outputs_per_step']:.1f} outputs a step"
            )
    except TidemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
