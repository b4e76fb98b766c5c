"""`python -m jobs.bench host`: what the host spends on a step, beside a device that costs nothing.

Real requests, scheduler, prefix cache, batch builder, results and texts; the device's tokens are those of a
text, cut out before the clock starts. What is left is the time a fast device would be kept waiting, or, where
the host works while the device does, the shortest step the host can keep up with. Texts are made between
steps, by who reads the outputs; they are counted in the whole too.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, cast

import jax
import numpy as np

from engine.backends import Backends
from engine.batch import BatchBuilder
from engine.buckets import choose_bucket, declare_buckets
from engine.checkpoints import DEFAULT_MODEL, LoadedModel, load_config, load_tokenizer
from engine.collector import spare_long_lived_objects
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import TidemillError
from engine.group_costs import group_costs
from engine.in_flight import InFlight, step_results
from engine.models.config import ModelConfig
from engine.outputs import RequestOutput
from engine.plan import StepPlan, StepResults
from engine.sampler import StepOutputs
from engine.sampling_params import SamplingParams
from jobs.bench.workloads import real_token_ids

NUM_SEQS, STEP_TOKENS, MAX_MODEL_LEN = 256, 1024, 1024
WINDOW = 100  # steps that are timed together
TEMPLATE_LEN, MIN_OWN, MAX_OWN, MIN_NEW, MAX_NEW = 250, 16, 64, 64, 128
PARTS = ("add", "schedule", "batch", "results", "update", "outputs", "text")


class Stopwatch:
    """Seconds of this thread's CPU by part; a part inside another is taken out of the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def watch(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its time counted."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            inside = sum(self.seconds.values())
            started = time.thread_time()
            result = call(*args, **kwargs)
            taken = time.thread_time() - started
            self.seconds[part] += taken - (sum(self.seconds.values()) - inside)
            return result

        return watched


class FreeDevice:
    """Stands in for a StepRunner: builds each step's inputs and calls a compiled step that computes nothing;
    its tokens are there at once."""

    num_compiled = num_loaded = 0
    compile_seconds = 0.0
    device_name = "none"

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        max_model_len: int,
        num_pages: int,
        text_ids: Sequence[int],
    ):
        self.num_pages = num_pages
        self.num_computed_tokens = self.num_padded_tokens = 0
        self.buckets = declare_buckets(
            config.min_token_pad,
            config.max_num_batched_tokens,
            config.max_num_seqs,
            min_input_pad=config.min_input_pad,
        )
        device = jax.devices("cpu")[0]
        self.batch = BatchBuilder(
            buckets=self.buckets,
            vocab_size=model.vocab_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            page_size=config.page_size,
            device=device,
            group_costs=group_costs(Backends.choose(config, "cpu").device_keys(device)),
        )
        step = jax.jit(lambda arrays: arrays.drawn, keep_unused=True)
        self._steps = {
            bucket: step.lower(self.batch.idle_arrays(bucket)).compile() for bucket in self.buckets
        }
        # Each row goes through a part of the text: tokens drawn evenly from the vocabulary are not what a
        # model draws.
        text = np.array(text_ids, np.int32)
        starts = np.random.default_rng(0).integers(len(text) - 64, size=config.max_num_seqs)
        drawn = [text[starts + step] for step in range(64)]
        # As the next step reads them, and as the host does.
        self._on_device = [_outputs(jax.device_put(token_ids)) for token_ids in drawn]
        self._on_host = [_outputs(token_ids) for token_ids in drawn]
        self._num_steps = self._num_collected = 0

    def make_pages(self) -> None:
        """It has none."""

    def drop_pages(self) -> None:
        """It has none."""

    def dispatch(self, plan: StepPlan, before: InFlight | None) -> InFlight:
        plan, branches = self.batch.arrange(plan)
        num_tokens = plan.num_tokens
        bucket = choose_bucket(self.buckets, num_tokens, plan.num_logits)
        arrays, draws = self.batch.build(plan, branches, bucket, before)
        self._steps[bucket](arrays)
        self.num_computed_tokens += num_tokens
        self.num_padded_tokens += bucket.num_tokens - num_tokens
        outputs = self._on_device[self._num_steps % len(self._on_device)]
        self._num_steps += 1
        return InFlight(plan, outputs, draws, time.monotonic())

    def collect(self, step: InFlight) -> StepResults:
        outputs = self._on_host[self._num_collected % len(self._on_host)]
        self._num_collected += 1
        return step_results(step, outputs)


def _outputs(token_ids: np.ndarray | jax.Array) -> StepOutputs:
    empty = np.zeros((len(token_ids), 1), np.float32)
    return StepOutputs(*cast("Any", (token_ids, empty[:, 0], empty.astype(np.int32), empty)))


def make_engine(source: str, config: EngineConfig, num_pages: int) -> tuple[Engine, FreeDevice]:
    """An engine whose every part is real but the device; no weights are read."""
    model = load_config(source)
    loaded = LoadedModel(cast("Any", None), model, load_tokenizer(source), "", source, source)
    text_ids = real_token_ids(loaded.tokenizer)
    device = FreeDevice(model, config, config.model_len(model.max_position_embeddings), num_pages, text_ids)
    return Engine(loaded, config, runner=cast("Any", device)), device


class Crowd:
    """Requests of one template, each with a part and a length of its own; made before the clock starts."""

    def __init__(self, text_ids: Sequence[int], seed: int, count: int):
        pick = random.Random(seed)

        def cut(length: int) -> tuple[int, ...]:
            start = pick.randrange(len(text_ids) - length)
            return tuple(text_ids[start : start + length])

        lengths = {
            length: SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
            for length in range(MIN_NEW, MAX_NEW + 1)
        }
        template = cut(TEMPLATE_LEN)
        self.requests = [
            (template + cut(pick.randint(MIN_OWN, MAX_OWN)), lengths[pick.randint(MIN_NEW, MAX_NEW)])
            for _ in range(count)
        ]
        self._num_added = 0

    def add_to(self, engine: Engine, count: int) -> None:
        for _ in range(count):
            prompt, sampling = self.requests[self._num_added]
            engine.add_request(f"r{self._num_added}", prompt, sampling=sampling)
            self._num_added += 1


def read_texts(outputs: Sequence[RequestOutput]) -> int:
    """Have the texts made, as whoever is given the outputs does; their characters."""
    return sum(len(sample.text) for output in outputs for sample in output.outputs)


def run(source: str = DEFAULT_MODEL, num_steps: int = 1000, async_scheduling: bool = True) -> dict[str, Any]:
    """Measure full steps; returns milliseconds a step (the median of windows of steps, and the least and the
    most), by part in CPU time, and tokens a second in the median window."""
    config = EngineConfig(
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        async_scheduling=async_scheduling,
    )
    engine, device = make_engine(source, config, num_pages=4096)
    text_ids = real_token_ids(engine.tokenizer)
    num_steps_before = 2 * MAX_NEW  # past the first waves, requests begin and end at any step
    crowd = Crowd(text_ids, 0, 2 * NUM_SEQS + (num_steps_before + 2 * num_steps) * NUM_SEQS // MIN_NEW)
    crowd.add_to(engine, 2 * NUM_SEQS)
    for _ in range(num_steps_before):
        read_texts(engine.step())
        crowd.add_to(engine, 2 * NUM_SEQS - engine.num_unfinished)
    spare_long_lived_objects()
    before = engine.stats()
    windows: list[float] = []  # milliseconds a step
    for done in range(0, num_steps, WINDOW):
        num_timed = min(WINDOW, num_steps - done)
        started = time.perf_counter()
        for _ in range(num_timed):
            outputs = engine.step()
            crowd.add_to(engine, 2 * NUM_SEQS - engine.num_unfinished)
            read_texts(outputs)
        windows.append(1000 * (time.perf_counter() - started) / num_timed)
    after = engine.stats()
    # The parts are measured in steps of their own: the watch takes a fiftieth of a step itself.
    watch = Stopwatch()
    scheduler: Any = engine._scheduler
    scheduler.schedule = watch.watch("schedule", scheduler.schedule)
    scheduler.advance = watch.watch("update", scheduler.advance)
    scheduler.update = watch.watch("update", scheduler.update)
    device.dispatch = watch.watch("batch", device.dispatch)  # type: ignore[method-assign]
    device.collect = watch.watch("results", device.collect)  # type: ignore[method-assign]
    step = watch.watch("outputs", engine.step)  # what is left of a step
    add = watch.watch("add", crowd.add_to)
    read = watch.watch("text", read_texts)
    cpu_started = time.thread_time()
    for _ in range(num_steps):
        outputs = step()
        add(engine, 2 * NUM_SEQS - engine.num_unfinished)
        read(outputs)
    cpu_seconds = time.thread_time() - cpu_started
    tokens_per_step = (after.num_generated_tokens - before.num_generated_tokens) / num_steps
    ms_per_step = median(windows)
    return {
        "num_steps": num_steps,
        "mean_sequences": sum(after.batch_occupancy) / len(after.batch_occupancy),
        "tokens_per_step": tokens_per_step,
        "ms_per_step": ms_per_step,
        "ms_per_step_range": (min(windows), max(windows)),
        "tokens_per_second": 1000 * tokens_per_step / ms_per_step,
        "cpu_ms_per_step": 1000 * cpu_seconds / num_steps,
        "cpu_ms_by_part": {part: 1000 * taken / num_steps for part, taken in watch.seconds.items()},
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m jobs.bench host", description=__doc__)
    made.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer and sizes are used")
    made.add_argument("--steps", type=int, default=1000)
    made.add_argument("--no-overlap", action="store_true", help="engine.async_scheduling=false")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        found = run(options.model, options.steps, not options.no_overlap)
    except TidemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    least, most = found["ms_per_step_range"]
    print(
        f"{found['ms_per_step']:.3f} ms of host work a step (windows of {WINDOW} steps: {least:.3f} to "
        f"{most:.3f}) at {found['mean_sequences']:.0f} sequences, "
        f"{found['tokens_per_second']:,.0f} tokens/s through all of it; "
        f"{found['cpu_ms_per_step']:.3f} ms of the CPU's time"
    )
    for part, taken in found["cpu_ms_by_part"].items():
        print(f"  {part:9} {taken:.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
