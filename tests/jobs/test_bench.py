"""The baseline: its workloads are what they say, its arithmetic is right, and it runs from end to end."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from engine.errors import ConfigError
from jobs.bench.__main__ import parser, run
from jobs.bench.machine import OthersMeter
from jobs.bench.measurement import Measurement, agreement, percentiles
from jobs.bench.peer import PeerProcess
from jobs.bench.peers.transformers import Plan, Request, batches
from jobs.bench.report import ratio_summary
from jobs.bench.work import flops, matrix_params
from jobs.bench.workloads import Workload, make_workload
from tests.tiny_model import make_tiny_checkpoint

TOKEN_IDS = list(range(50_000))


def test_w1_is_256_requests_behind_one_prefix():
    workload = make_workload("W1", TOKEN_IDS, seed=0)
    assert len(workload.prompts) == 256
    assert {prompt[:256] for prompt in workload.prompts} == {workload.prompts[0][:256]}
    assert {len(prompt) - 256 for prompt in workload.prompts} == set(range(16, 65))
    assert workload.max_tokens == (64,) * 256
    assert workload.shared_len == 256


def test_w2_is_128_unrelated_prompts():
    workload = make_workload("W2", TOKEN_IDS, seed=0)
    lengths = [len(prompt) for prompt in workload.prompts]
    assert len(lengths) == 128
    assert 64 <= min(lengths) < 100
    assert 480 < max(lengths) <= 512
    assert 16 <= min(workload.max_tokens) < 25
    assert 120 < max(workload.max_tokens) <= 128
    assert len({prompt[:8] for prompt in workload.prompts}) > 120, "they do not begin alike"


@pytest.mark.parametrize("name", ["W1", "W2"])
def test_a_seed_is_a_workload(name: str):
    assert make_workload(name, TOKEN_IDS, seed=3) == make_workload(name, TOKEN_IDS, seed=3)
    other = make_workload(name, TOKEN_IDS, seed=4)
    assert other.prompts[0][:64] != make_workload(name, TOKEN_IDS, seed=3).prompts[0][:64]
    whole, quick = (make_workload(name, TOKEN_IDS, seed=3, quick=quick) for quick in (False, True))
    assert quick.prompts == whole.prompts[: len(whole.prompts) // 8]


def test_flops_equal_a_count_made_token_by_token(tiny_checkpoint: str):
    from engine.checkpoints import load_config

    config = load_config(tiny_checkpoint)
    workload = Workload("W1", ((1, 2, 3, 4), (1, 2, 5)), (3, 1), shared_len=2)
    num_layers, query = config.num_layers, config.num_heads * config.head_dim

    def token(position: int) -> int:
        return 2 * matrix_params(config) + num_layers * 4 * query * (position + 1)

    head = 2 * config.d_model * config.vocab_size
    expected = sum(token(p) for p in (0, 1))  # the prefix, once
    expected += sum(token(p) for p in (2, 3, 4, 5)) + 3 * head  # two tokens of its own, two of three fed back
    expected += token(2) + head
    assert flops(config, workload) == expected


def test_matrix_params_are_the_weights_on_disk(tiny_checkpoint: str):
    from safetensors.numpy import load_file

    from engine.checkpoints import load_config

    tensors = load_file(Path(tiny_checkpoint) / "model.safetensors")
    in_layers = sum(value.size for name, value in tensors.items() if ".layers." in name and value.ndim == 2)
    assert matrix_params(load_config(tiny_checkpoint)) == in_layers


def test_agreement_counts_up_to_the_first_difference():
    ours = Measurement("a", 1.0, ((1, 2, 3, 4), (5, 6)))
    theirs = Measurement("b", 1.0, ((1, 2, 9, 4), (5, 6)))
    assert agreement(ours, ours) == {"requests_equal": 1.0, "tokens_agreed": 1.0}
    assert agreement(ours, theirs) == {"requests_equal": 0.5, "tokens_agreed": 4 / 6}


def test_percentiles_and_ratios():
    assert percentiles([float(i) for i in range(100)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 99.0}
    assert percentiles([]) == {}
    assert ratio_summary([3.0, 1.0, 2.0, 4.0]) == {"median": 2.5, "min": 1.0, "max": 4.0}


def test_work_of_others_is_seen_and_our_own_is_not():
    def spin(seconds: float) -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    ours, everyones = OthersMeter(os.getpid()), OthersMeter()
    spin(0.5)
    assert everyones.cores() - ours.cores() > 0.2


@pytest.mark.parametrize("sort_by", ["prompt", "output"])
def test_a_peers_batches_hold_each_request_once(sort_by: str):
    workload = make_workload("W2", TOKEN_IDS, seed=0)
    pairs = zip(workload.prompts, workload.max_tokens, strict=True)
    requests = [Request(i, prompt, num) for i, (prompt, num) in enumerate(pairs)]
    found = list(batches(requests, Plan(48, sort_by, "dynamic")))
    assert [len(batch) for batch in found] == [48, 48, 32]
    assert sorted(request.index for batch in found for request in batch) == list(range(128))


def test_a_peer_that_is_not_installed_says_so():
    with pytest.raises(ConfigError, match=r"ended with status 1: ModuleNotFoundError.*tidemill\[parity\]"):
        PeerProcess("transformers", sys.executable, str(Path(__file__).parent), num_threads=1)


def test_the_whole_of_it_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = make_tiny_checkpoint(tmp_path, max_position_embeddings=1024)
    data = run(parser().parse_args(["--quick", "--model", model, "--max-num-seqs", "16"]))
    printed = capsys.readouterr().out
    assert json.loads(json.dumps(data)) == data
    assert set(data["workloads"]) == {"W1", "W2"}
    (w1,) = data["workloads"]["W1"]["repeats"]
    assert w1["num_output_tokens"] == 32 * 64
    assert w1["tidemill"]["prefix_hit"] > 0.5, "the shared prefix is computed once"
    assert w1["tidemill"]["num_steps"] > 0
    assert w1["tidemill"]["step_ms"]["p50"] > 0
    assert data["machine"]["matrix_gflops"] > 0
    for name in ("W1", "W2"):
        assert f"\n{name}  " in printed


def test_a_wrong_option_value_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["--repeats", "0"])
    assert "0 is not 1 or more" in capsys.readouterr().err
