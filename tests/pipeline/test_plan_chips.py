"""`mode=plan` for chips that are not here: whole commands on folders that hold nothing but a config.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from engine.chips import CHIPS, find_slice
from engine.config import EngineConfig
from engine.device_plan import plan_device
from engine.errors import ConfigError
from engine.platforms import profile_of, select_platform
from pipeline.compose import groups
from pipeline.device_estimate import Work, estimate, planned_steps, running_sequences
from pipeline.run import main
from tests.engine.model_shapes import config_folder, model_config
from tests.pipeline.input_helpers import lines, write_jsonl

BF16 = EngineConfig(
    dtype="bfloat16", max_num_seqs=256, max_num_batched_tokens=2048, hbm_utilization=0.9, min_token_pad=128
)


def plan_of(name: str, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """(exit code, the plan as JSON) of a command in this process."""
    write_jsonl(tmp_path / "in.jsonl", lines([{"prompt": "a"}]))
    path = tmp_path / "plan.json"
    code = main(
        [
            "mode=plan",
            f"model.source={config_folder(name, tmp_path / 'model')}",
            f"input.path={tmp_path / 'in.jsonl'}",
            f"plan.json={path}",
            "plan.compile=none",
            *arguments,
        ]
    )
    return code, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("name", "arguments", "chips"),
    [
        ("Llama-3.1-8B", ["conf=tpu_v4", "plan.topology=v4-8"], 4),
        ("Llama-3.3-70B", ["conf=tpu_v4", "plan.topology=v4-32", "engine.weight_dtype=int8"], 16),
        ("Llama-3.3-70B", ["conf=tpu_v6e", "plan.topology=v6e-8", "engine.weight_dtype=int8"], 8),
        ("SmolLM2-135M", ["conf=tpu_v5e"], 1),
    ],
)
def test_a_config_alone_can_be_planned(
    name: str, arguments: list[str], chips: int, tmp_path: Path, capsys: Any
) -> None:
    """tests/engine/test_device_plan.py works the numbers out by hand; here is that a command gives them."""
    code, found = plan_of(name, tmp_path, *arguments)
    assert code == 0
    assert found["rows_read"] is False
    device = found["device"]
    assert (device["chips"], device["fits"], device["temporaries_are"]) == (chips, True, "estimated")
    assert device["not_compiled"] == "plan.compile=none"
    sizes = device["bytes_per_device"]
    assert device["pages"] == (sizes["budget"] - sizes["weights"] - sizes["temporaries"]) // sizes["page"]
    assert device["steps"][-1]["tokens"] >= 2048
    shown = capsys.readouterr().out
    assert "rows were not read, because the model comes without a tokenizer" in shown
    assert "an estimate by formula" in shown
    assert f"{device['pages']:,} of 64 tokens" in shown


def test_a_model_too_large_ends_with_what_would_fit(tmp_path: Path, capsys: Any) -> None:
    code, found = plan_of("Llama-3.3-70B", tmp_path, "conf=tpu_v5e", "plan.topology=v5e-8")
    assert code == 2
    assert found["device"]["fits"] is False
    changes = [each["change"] for each in found["device"]["would_fit"]]
    assert changes == ["engine.weight_dtype=int8", "plan.topology=v5e-16"] or changes == [
        "engine.weight_dtype=int4", "plan.topology=v5e-16"
    ]  # fmt: skip
    shown = capsys.readouterr()
    assert "DOES NOT FIT" in shown.out
    assert "the model does not fit on v5e-8" in shown.err
    assert all(change in shown.err for change in changes)


def test_a_plan_counts_the_rows_and_what_they_cost(tiny_checkpoint: str, tmp_path: Path, capsys: Any) -> None:
    write_jsonl(tmp_path / "in.jsonl", lines([{"prompt": f"the answer is {i}"} for i in range(40)]))
    command = [
        "mode=plan",
        "conf=tpu_v5e",
        f"model.source={tiny_checkpoint}",
        f"input.path={tmp_path / 'in.jsonl'}",
        "plan.compile=none",
        "plan.price_per_chip_hour=1.2",
        "sampling.max_tokens=16",
        "plan.json=-",
    ]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["rows_read"], found["max_generated_tokens"]) == (40, True, 640)
    guess = found["device"]["estimate"]
    assert guess["running"] == 40
    assert guess["num_steps"] == 16, "all prompts fit beside the first decodes"
    assert guess["cost"] == pytest.approx(guess["seconds"] / 3600 * 1.2)
    assert main([*command, "plan.roofline_share=0.5"]) == 0
    slower = json.loads(capsys.readouterr().out)["device"]["estimate"]
    assert slower["seconds"] == pytest.approx(2 * guess["seconds"])


def test_hours_by_hand(tmp_path: Path) -> None:
    plan = plan_device(model_config("Llama-3.1-8B", tmp_path), BF16, find_slice("v4-8"), 8192, 500_000_000)
    work = Work(
        num_sequences=100_000,
        num_prompt_tokens=100_000 * 900,
        num_shared_tokens=100_000 * 700,
        num_generated_tokens=100_000 * 200,
    )
    running, context = running_sequences(plan, work)
    assert (running, context) == (256, 1000.0), "769,024 tokens fit, 256 sequences of 1,100 need 281,600"
    found = estimate(plan, work, roofline_share=1.0, price_per_chip_hour=3.0)
    # 20 million tokens, 256 a step; 20 million prompt tokens ride along, 256 a step: steps of 512 tokens.
    assert found.num_steps == 20_000_000 // 256
    step = next(each for each in planned_steps(plan, work) if each.bucket.num_tokens == 512)
    assert found.seconds == pytest.approx(78_125 * step.time.seconds)
    assert found.chip_hours == pytest.approx(found.seconds / 3600 * 4)
    assert found.cost == pytest.approx(found.chip_hours * 3)


def test_replicas_share_the_work(tmp_path: Path) -> None:
    """Two replicas of two chips: each has half of the sequences, and its own pages and steps."""
    model = model_config("Llama-3.1-8B", tmp_path)
    config = replace(BF16, sharding_axis_dims=(2, 1, 1, -1, 1))
    plan = plan_device(model, config, find_slice("v4-8"), 8192, 500_000_000)
    work = Work(num_sequences=300, num_prompt_tokens=0, num_shared_tokens=0, num_generated_tokens=60_000)
    found = estimate(plan, work, roofline_share=1.0, price_per_chip_hour=None)
    assert found.running == 150
    assert found.num_steps == 200, "both replicas decode in each step"
    assert found.chip_hours == pytest.approx(found.seconds / 3600 * 4)
    whole = plan_device(model, BF16, find_slice("v4-8"), 8192, 500_000_000)
    assert running_sequences(whole, work)[0] == 256


def test_what_replicas_have_together_is_reported(tmp_path: Path, capsys: Any) -> None:
    dims = "engine.sharding_axis_dims=[2,1,1,-1,1]"
    code, found = plan_of("Llama-3.1-8B", tmp_path, "conf=tpu_v4", "plan.topology=v4-8", dims)
    assert code == 0
    device = found["device"]
    assert (device["replicas"], device["mesh"]["dp"], device["mesh"]["tp"]) == (2, 2, 2)
    assert device["concurrent_tokens"] == 2 * device["pages"] * 64
    shown = capsys.readouterr().out
    assert "on 4 devices: dp=2 tp=2" in shown
    assert "in each of 2 replicas" in shown


def test_prefill_that_finds_no_room_beside_decodes_has_steps_of_its_own(tmp_path: Path) -> None:
    plan = plan_device(model_config("SmolLM2-135M", tmp_path), BF16, find_slice("v5e-1"), 8192, 500_000_000)
    work = Work(
        num_sequences=256, num_prompt_tokens=256 * 4096, num_shared_tokens=0, num_generated_tokens=256
    )
    found = estimate(plan, work, roofline_share=1.0, price_per_chip_hour=None)
    decodes = -(-256 // found.running)
    rest = 256 * 4096 - decodes * (2048 - found.running)
    assert found.num_steps == decodes + -(-rest // 2048)
    assert found.cost is None


def test_fewer_sequences_run_where_pages_are_short(tmp_path: Path) -> None:
    plan = plan_device(model_config("Llama-3.1-8B", tmp_path), BF16, find_slice("v4-8"), 131_072, 500_000_000)
    assert running_sequences(plan, None) == (769_024 // 131_072, 65_536.0)


def test_a_topology_of_another_chip_than_the_profiles_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["conf=tpu_v4", "plan.topology=v6e-8", "mode=plan", "input.path=x"]) == 2
    assert "choose conf=tpu_v6e, or another topology" in capsys.readouterr().err


def test_every_chip_has_a_profile_and_every_profile_of_a_chip_its_topology() -> None:
    assert {profile_of(chip) for chip in CHIPS} | {"cpu", "gpu"} == set(groups()["conf"])


@pytest.mark.parametrize("conf", [option for option in groups()["conf"] if option != "cpu"])
def test_a_profile_whose_device_is_absent_is_refused_and_names_what_jax_runs_on(
    conf: str, tmp_path: Path, capsys: Any
) -> None:
    assert main([f"conf={conf}", "input.path=none", f"output.path={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert f"engine.platform={conf[:3]} was asked for and this machine has no {conf[:3].upper()}" in error
    assert "JAX runs on 1 x cpu 'cpu'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("conf", ["tpu_v4", "gpu_h100"])
def test_where_jax_may_choose_it_is_asked_what_it_finds(conf: str, tmp_path: Path) -> None:
    """A process of its own, with nothing said to JAX beforehand, on a machine without any accelerator."""
    command = [
        sys.executable,
        "-m",
        "pipeline.run",
        f"conf={conf}",
        "input.path=none",
        f"output.path={tmp_path}/out",
    ]
    told = ("JAX_PLATFORMS", "TPU_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(told)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    [said] = done.stderr.splitlines()
    assert "JAX found 1 x cpu 'cpu'" in said, "and libtpu, which is there to compile with, says nothing"


def test_another_chip_than_the_profiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        platform, device_kind = "tpu", "TPU v6 lite"

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()] * 8)
    assert select_platform("tpu", "v6e") == "tpu"
    assert select_platform("tpu") == "tpu"
    with pytest.raises(
        ConfigError, match=r"engine\.chip=v4 .* JAX found 8 x tpu 'TPU v6 lite': choose conf=tpu_v6e"
    ):
        select_platform("tpu", "v4")
