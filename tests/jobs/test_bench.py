"""The baseline: its workloads are what they say, its arithmetic is right, and it runs from end to end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from jobs.bench import growth
from jobs.bench.__main__ import parser
from jobs.bench.growth import step_cost
from jobs.bench.machine import Machine
from jobs.bench.measurement import percentiles
from jobs.bench.own import run
from jobs.bench.processes import OthersMeter
from jobs.bench.work import flops, matrix_params
from jobs.bench.workloads import SHAPES, Workload, make_workload
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


def test_w1b_and_w2b_are_of_the_same_kind_with_other_sizes():
    for name in ("W1", "W2"):
        standard, other = SHAPES[name], SHAPES[f"{name}b"]
        assert (other.prefix_len > 0) == (standard.prefix_len > 0)
        assert other.rows != standard.rows
        assert other.own_lens != standard.own_lens
        assert other.output_lens != standard.output_lens
    assert SHAPES["W1b"].prefix_len != SHAPES["W1"].prefix_len


def test_w3_is_512_sampled_requests_behind_three_templates():
    turn = ((1, 2), (3, 4))
    workload = make_workload("W3", TOKEN_IDS, seed=0, turn=turn)
    assert len(workload.prompts) == 512
    assert len({prompt[:700] for prompt in workload.prompts}) == 3
    assert len(set(workload.prompts)) == 512 - 51, "every tenth is an exact duplicate"
    assert all(prompt[:2] == (1, 2) and prompt[-2:] == (3, 4) for prompt in workload.prompts)
    assert max(map(len, workload.prompts)) <= 1500 + 96 + 4
    sampling = workload.sampling
    assert (sampling.n, sampling.temperature, sampling.ignore_eos) == (2, 0.8, False)
    assert not workload.is_fixed
    assert workload.num_output_tokens == 512 * 2 * 64, "at most"


@pytest.mark.parametrize("name", ["W1", "W2", "W1b", "W2b", "W3"])
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


def test_percentiles():
    assert percentiles([float(i) for i in range(100)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 99.0}
    assert percentiles([]) == {}


def test_work_of_others_is_seen_and_our_own_is_not():
    def spin(seconds: float) -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    ours, everyones = OthersMeter(os.getpid()), OthersMeter()
    spin(0.5)
    assert everyones.cores() - ours.cores() > 0.2


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


def test_growth_on_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    machine = Machine("a CPU", 2, 100.0, 20.0, "cpu", 0.0, ())
    monkeypatch.setattr(growth, "measure_machine", lambda: machine)  # takes seconds, and is run elsewhere
    model = make_tiny_checkpoint(tmp_path, max_position_embeddings=1024)
    options = ["growth", "--model", model, "--max-rows", "1024", "--repeats", "1", "--context-rows", "2"]
    options += ["--max-num-seqs", "16", "--max-num-batched-tokens", "64"]
    data = growth.run(parser().parse_args(options), contexts=(64, 256))
    assert json.loads(json.dumps(data)) == data
    assert [entry["rows"] for entry in data["rows"]] == [256, 1024]
    assert data["rows"][0]["times_the_first"] == 1
    assert [entry["context"] for entry in data["contexts"]] == [64, 256]
    assert data["contexts"][1]["bytes_times_the_first"] > 1
    assert "1024 rows of 8 + 2 tokens" in capsys.readouterr().out


def test_the_cost_of_a_step_grows_with_attention_alone(tiny_checkpoint: str):
    from engine.checkpoints import load_config

    config = load_config(tiny_checkpoint)
    near, far = step_cost(config, 4, 100), step_cost(config, 4, 300)
    per_token = config.num_layers * config.head_dim
    assert far["step_flops"] - near["step_flops"] == 4 * 200 * 4 * config.num_heads * per_token
    assert far["step_bytes"] - near["step_bytes"] == 4 * 200 * 2 * 4 * config.num_kv_heads * per_token
    one = step_cost(config, 1, 100)
    assert near["step_flops"] == 4 * one["step_flops"]
    assert near["step_bytes"] < 4 * one["step_bytes"], "weights are read once for all"


def test_the_profile_takes_the_devices_part_out_of_a_step(tiny_checkpoint: str):
    from engine.engine import Engine
    from jobs.bench.step_profile import engine_steps

    engine = Engine.from_pretrained(
        tiny_checkpoint, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, async_scheduling=False
    )
    whole, device = engine_steps(engine, [[5 + row, 6, 7, 8] for row in range(4)], 8, (4, 4))
    assert 0 < device < whole
    engine.check_integrity()


def test_every_command_is_there(capsys: pytest.CaptureFixture[str]):
    for name in ("compare", "growth", "host", "streams", "profile", "groups"):
        assert parser().parse_args([name]).command == name
    assert parser().parse_args([]).command is None


def test_a_wrong_option_value_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["--repeats", "0"])
    assert "0 is not 1 or more" in capsys.readouterr().err
