"""Rows that a drain cuts short go on where they were, to the same bytes; what is not theirs is not used."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.drawn import DrawnTokens
from engine.engine import Engine
from engine.outputs import TokenLogprob
from engine.sampling_params import SamplingParams
from pipeline.exit_codes import ExitCode
from pipeline.partials import PartialRow, Partials, from_bytes, prompt_hash, to_bytes
from pipeline.rows import Prompt
from pipeline.run import run_job
from pipeline.run_state import RunState
from pipeline.settings import Settings
from pipeline.signals import StopRequest
from pipeline.storage import open_storage
from pipeline.verify import Verifier
from tests.engine.engines import tiny_engine, varied_model
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import final_bytes, job_settings, run_fake, write_shards

MAX_TOKENS = 40
NUM_ROWS = 22


class ShortDrain(StopRequest):
    """Leaves time for a step and for saving, and none for finishing anything; by a clock of its own."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(10.0, clock=lambda: self._now)

    def before_step(self, is_last: bool) -> None:
        if is_last:
            self.ask("SIGTERM")
            self._now += 9.9
        elif self.is_asked:
            self._now += 0.09


class StoppedEngine(FakeEngine):
    """Asks for a drain at a step."""

    def __init__(self, stop: ShortDrain, at_step: int, **options: Any):
        super().__init__(**options)
        self._stop = stop
        self._at_step = at_step

    def step(self) -> list[Any]:
        self._stop.before_step(self._num_steps == self._at_step)
        return super().step()


def settings_of(shards: Path, output: Path | str, **overrides: Any) -> Settings:
    options = {"sampling__max_tokens": MAX_TOKENS, "sampling__temperature": 1.0, "output__chunk_rows": 5}
    return job_settings(shards, output, **(options | overrides))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "in", num_shards=2, rows_per_shard=NUM_ROWS // 2)


def run_to_step(settings: Settings, at_step: int) -> tuple[ExitCode, FakeEngine]:
    stop = ShortDrain()
    engine = StoppedEngine(stop, at_step, max_num_seqs=4)
    return run_fake(settings, lambda *_: engine, stop), engine


def partial_paths(output: Path | str) -> list[str]:
    storage = open_storage(str(output))
    folders = [f"_state/{run}/partials" for run in storage.list("_state")]
    shards = [f"{folder}/{shard}" for folder in folders for shard in storage.list(folder)]
    return [f"{shard}/{name}" for shard in shards for name in storage.list(shard)]


@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize(
    "sampling", [{"sampling__n": 1}, {"sampling__n": 3, "sampling__logprobs": 1}, {"sampling__seed": 3}]
)
def test_rows_cut_short_again_and_again_are_drawn_once(
    place: str, sampling: dict[str, Any], shards: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    undisturbed = FakeEngine(max_num_seqs=4)
    code = run_fake(settings_of(shards, tmp_path / "undisturbed", **sampling), lambda *_: undisturbed)
    assert code is ExitCode.DONE
    output = str(tmp_path / "out")
    if place == "s3":
        output = f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    settings = settings_of(shards, output, **sampling)
    num_generated = num_given = num_stops = 0
    for at_step in (7, 11, 30, 16, 1000):
        code, engine = run_to_step(settings, at_step)
        num_generated += engine.stats().num_generated_tokens
        num_given += engine.num_given
        if code is ExitCode.DONE:
            break
        num_stops += 1
        assert partial_paths(output)
    assert code is ExitCode.DONE
    assert num_stops >= 3
    assert num_given > 100, "tokens that were not drawn again"
    assert final_bytes(output) == final_bytes(tmp_path / "undisturbed")
    # Of a row that had ended, a token is drawn again; of one that runs, what its last step drew is dropped.
    samples = settings.sampling.n
    most = undisturbed.stats().num_generated_tokens + num_stops * samples * 30
    assert undisturbed.stats().num_generated_tokens <= num_generated <= most
    assert partial_paths(output) == [], "nothing of them is left when their shards are finished"
    assert Verifier(open_storage(output), tmp_path).run().findings == []


def stopped_once(shards: Path, output: Path) -> Settings:
    settings = settings_of(shards, output)
    code, _ = run_to_step(settings, 12)
    assert code is ExitCode.DRAINED
    assert partial_paths(output)
    return settings


def foreign_run(data: bytes) -> bytes:
    head, _, body = data.partition(b"\n")
    return json.dumps(json.loads(head) | {"fingerprint": "another"}).encode() + b"\n" + body


def foreign_shard(data: bytes) -> bytes:
    head, _, body = data.partition(b"\n")
    return json.dumps(json.loads(head) | {"shard": 7}).encode() + b"\n" + body


def changed(data: bytes, **fields: Any) -> bytes:
    head = json.loads(data.partition(b"\n")[0])
    rows = from_bytes(data, head["fingerprint"], head["shard"])
    rows = [dataclasses.replace(row, **fields) for row in rows]
    return to_bytes(head["fingerprint"], head["shard"], rows)


LONG = (DrawnTokens((97,) * MAX_TOKENS),)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-3] + b"9]}",
        lambda data: data[: len(data) // 2],
        lambda data: b"[]",
        lambda data: b"\xff\n\xfe",
        foreign_run,
        foreign_shard,
        lambda data: changed(data, row_id="nobody"),
        lambda data: changed(data, prompt="another"),
        lambda data: changed(data, samples=LONG),
        lambda data: changed(data, samples=(DrawnTokens((97,)), DrawnTokens((98,)))),
    ],
)
def test_what_is_damaged_or_anothers_is_passed_over(
    spoil: Callable[[bytes], bytes], shards: Path, tmp_path: Path
) -> None:
    assert run_fake(settings_of(shards, tmp_path / "undisturbed")) is ExitCode.DONE
    settings = stopped_once(shards, tmp_path / "out")
    for path in partial_paths(tmp_path / "out"):
        file = tmp_path / "out" / path
        file.write_bytes(spoil(file.read_bytes()))
    engine = FakeEngine(max_num_seqs=4)
    assert run_fake(settings, lambda *_: engine) is ExitCode.DONE
    assert engine.num_given == 0
    assert final_bytes(tmp_path / "out") == final_bytes(tmp_path / "undisturbed")


def test_of_several_records_the_one_that_came_furthest_is_gone_on_from(tmp_path: Path) -> None:
    state = RunState(open_storage(str(tmp_path)), "run")
    rows = [PartialRow("a", "p", (DrawnTokens((1,) * length),)) for length in (3, 9, 5)]
    for number, row in enumerate(rows):
        path = state.path("partials", "00004", f"00002-attempt{number}.json")
        state.storage.create(path, to_bytes("run", 4, [row]))
    partials = Partials(state, 4)
    assert partials.of_chunk(2) == {"a": rows[1]}
    assert partials.of_chunk(3) == {}
    assert len(partials.paths) == 3


def test_rows_that_ask_for_log_probabilities_of_their_prompt_are_not_saved() -> None:
    prompt = Prompt("a", 0, 0, (1, 2), None, SamplingParams(prompt_logprobs=1), {}, False)
    assert PartialRow.of(prompt, [DrawnTokens((5, 6))]) is None
    plain = dataclasses.replace(prompt, sampling=SamplingParams())
    assert PartialRow.of(plain, [DrawnTokens(())]) is None, "nothing to go on from"
    row = PartialRow.of(plain, [DrawnTokens((5, 6))])
    assert row is not None
    assert row.fits(plain)
    assert row.prompt == prompt_hash(plain) != prompt_hash(dataclasses.replace(plain, token_ids=(1, 3)))


LOGPROBS = st.floats(allow_nan=False, width=32)


@given(st.lists(st.tuples(st.integers(0, 300), LOGPROBS, LOGPROBS), max_size=5), st.text(max_size=5))
def test_what_is_read_back_is_what_was_saved(entries: list[tuple[int, float, float]], row_id: str) -> None:
    tokens = tuple(token for token, _, _ in entries)
    logprobs = tuple(TokenLogprob(token, one, ((token, one), (7, other))) for token, one, other in entries)
    row = PartialRow(row_id, "hash", (DrawnTokens(tokens, logprobs), DrawnTokens(tokens)))
    assert from_bytes(to_bytes("run", 3, [row]), "run", 3) == [row]


# With a model: stop strings, draws, log-probabilities.


class StoppedModel:
    """The engine with the tiny model, that asks for a drain at a step."""

    def __init__(self, engine: Engine, stop: ShortDrain, at_step: int):
        self._engine = engine
        self._stop = stop
        self._at_step = at_step
        self.num_steps = 0
        self.num_given = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add_request(self, *args: Any, **options: Any) -> None:
        self.num_given += sum(len(each.token_ids) for each in options["drawn"] or ())
        self._engine.add_request(*args, **options)

    def step(self) -> list[Any]:
        self.num_steps += 1
        self._stop.before_step(self.num_steps == self._at_step)
        return self._engine.step()


def run_model(settings: Settings, at_step: int = 1_000_000) -> tuple[ExitCode, int]:
    stop = ShortDrain()
    engines: list[StoppedModel] = []

    def make_engine(*_: Any) -> StoppedModel:
        engines.append(StoppedModel(tiny_engine(), stop, at_step))
        return engines[-1]

    code = run_job(settings, load_model=lambda _: varied_model(), make_engine=make_engine, stop=stop)
    return code, sum(engine.num_given for engine in engines)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "n": 3, "logprobs": 1},
        {"temperature": 1.0, "n": 2, "stop": ["e", "in", "t ", "an"], "min_tokens": 12},
        {"temperature": 1.0, "seed": 5, "presence_penalty": 0.5, "stop": ["answer", "0", "ing"]},
    ],
)
def test_a_model_goes_on_with_the_same_bytes(sampling: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": f"in the beginning {i % 5} was {i}"} for i in range(20)]
    write_jsonl(tmp_path / "in" / "a.jsonl", lines(rows))
    options = {
        "sampling__max_tokens": 40,
        "output__chunk_rows": 6,
        "output__include_token_ids": True,
        "engine__max_num_seqs": 8,
        "engine__max_model_len": 128,
    } | {f"sampling__{name}": value for name, value in sampling.items()}
    assert run_model(job_settings(tmp_path / "in", tmp_path / "alone", **options))[0] is ExitCode.DONE
    settings = job_settings(tmp_path / "in", tmp_path / "out", **options)
    num_given, num_stops = 0, 0
    for at_step in (9, 21, 33, 14, 1_000_000):
        code, given_now = run_model(settings, at_step)
        num_given += given_now
        num_stops += code is ExitCode.DRAINED
        if code is ExitCode.DONE:
            break
    assert code is ExitCode.DONE
    assert num_stops >= 2
    assert num_given > 50
    assert final_bytes(tmp_path / "out") == final_bytes(tmp_path / "alone")
