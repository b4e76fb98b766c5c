"""The real step of a plan compiles for chips that are not there, and fits as the plan says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.chips import find_slice
from engine.config import EngineConfig
from engine.device_plan import DevicePlan, plan_device
from engine.errors import ConfigError
from engine.topology_compile import CompiledStep, compile_steps, why_not_compiled
from kernels.paged_attention.gpu import targets as gpu
from kernels.paged_attention.tpu.topology import is_installed
from tests.engine.model_shapes import model_config

needs_libtpu = pytest.mark.skipif(
    not is_installed(), reason="libtpu is absent: install the extra tpu-compile"
)
needs_cuda = pytest.mark.skipif(gpu.missing() is not None, reason=f"{gpu.missing()}")
CONFIG = EngineConfig(
    dtype="bfloat16", max_num_seqs=64, max_num_batched_tokens=256, min_token_pad=64, hbm_utilization=0.9
)


@needs_libtpu
def test_the_one_step_of_a_small_engine_compiles_for_v5e(tmp_path: Path) -> None:
    config = replace(CONFIG, max_num_batched_tokens=64)
    plan = plan_device(model_config("SmolLM2-135M", tmp_path), config, find_slice("v5e-1"), 2048)
    [step] = compile_steps(plan, only_largest=True)
    assert (step.num_tokens, step.num_logits, step.num_pages) == (64, 64, 2 * 64)
    # What the compiler lays out is what was counted, and the step's own numbers, masks and histories.
    counted = plan.weight_bytes + step.num_pages * plan.page_bytes
    assert counted <= step.argument_bytes <= counted + 10 * 2**20
    assert step.temporary_bytes <= plan.temporary_bytes, "the formula errs on the safe side"


@needs_libtpu
@pytest.mark.slow
def test_every_step_of_smollm2_compiles_for_v5e(tmp_path: Path) -> None:
    plan = plan_device(model_config("SmolLM2-135M", tmp_path), CONFIG, find_slice("v5e-1"), 2048)
    steps = list(compile_steps(plan))
    first, rest = steps[0], steps[1:]
    assert (first.num_tokens, first.num_pages) == (256, 128), "first the largest, for few pages"
    assert [(each.num_tokens, each.num_logits) for each in rest] == [
        (64, 64), (128, 64), (192, 64), (256, 64)
    ]  # fmt: skip
    compiled = replace(plan, temporary_bytes=first.temporary_bytes, is_estimate=False)
    assert {each.num_pages for each in rest} == {compiled.num_pages}
    for each in rest:
        # What the compiler lays out is what was counted, and the step's own numbers, masks and histories.
        counted = compiled.weight_bytes + compiled.kv_bytes
        assert counted <= each.argument_bytes <= counted + 100 * 2**20
        assert each.argument_bytes + each.temporary_bytes <= compiled.topology.usable_bytes
    assert first.temporary_bytes <= plan.temporary_bytes


def check_largest_step(plan: DevicePlan) -> CompiledStep:
    """It compiles for all devices of the mesh, each of which has the weights and pages that were counted."""
    [step] = compile_steps(plan, only_largest=True)
    counted = plan.weight_bytes + step.num_pages * plan.page_bytes
    # Every chip has the inputs of all replicas, and arrays are filled up to whole registers.
    more = plan.num_replicas * 20 * 2**20 + counted // 200
    assert counted <= step.argument_bytes <= counted + more
    assert step.temporary_bytes <= plan.temporary_bytes, "the formula errs on the safe side"
    return step


@needs_libtpu
def test_a_step_of_several_chips_compiles_as_a_whole(tmp_path: Path) -> None:
    """Two replicas of four chips each, on eight of two hosts."""
    model = replace(model_config("SmolLM2-135M", tmp_path), num_layers=2)
    config = replace(CONFIG, max_num_batched_tokens=64, sharding_axis_dims=(2, 1, 1, -1, 1))
    plan = plan_device(model, config, find_slice("v5e-8"), 2048)
    assert plan.mesh == {"dp": 2, "fsdp": 1, "ep": 1, "tp": 4, "sp": 1}
    check_largest_step(plan)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "dims"),
    [
        ("SmolLM2-135M", "v6e-8", (1, 2, 1, -1, 1)),
        ("Mixtral-8x7B", "v4-8", (1, 1, -1, 1, 1)),
        ("Mixtral-8x7B", "v5p-16", (1, 2, 2, -1, 1)),
        ("Llama-3.1-8B", "tpu7x-8", (2, 1, 1, -1, 1)),
    ],
)
def test_every_axis_compiles(name: str, topology: str, dims: tuple[int, ...], tmp_path: Path) -> None:
    model = replace(model_config(name, tmp_path), num_layers=2)
    check_largest_step(
        plan_device(model, replace(CONFIG, sharding_axis_dims=dims), find_slice(topology), 2048)
    )


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "weights"),
    [("Llama-3.1-8B", "v4-8", None), ("Llama-3.3-70B", "v4-32", "int8"), ("Llama-3.3-70B", "v6e-8", "int8")],
)
def test_a_large_model_compiles_for_its_slice(
    name: str, topology: str, weights: str | None, tmp_path: Path
) -> None:
    config = replace(CONFIG, weight_dtype=weights, max_num_seqs=256, max_num_batched_tokens=2048)
    plan = plan_device(model_config(name, tmp_path), config, find_slice(topology), 8192)
    step = check_largest_step(plan)
    assert step.num_tokens == 2048
    assert plan.temporary_bytes <= step.temporary_bytes + 0.05 * plan.budget_bytes


@needs_cuda
@pytest.mark.parametrize(
    ("name", "topology", "dims", "weights"),
    [
        ("SmolLM2-135M", "h100-1", (1, 1, 1, 1, 1), None),
        ("Llama-3.3-70B", "h200-8", (1, 1, 1, -1, 1), "int8"),
        ("Mixtral-8x7B", "a100-8", (2, 1, 2, -1, 1), None),
    ],
)
def test_a_step_compiles_for_gpus(
    name: str, topology: str, dims: tuple[int, ...], weights: str | None, tmp_path: Path
) -> None:
    model = replace(model_config(name, tmp_path), num_layers=2)
    config = replace(CONFIG, weight_dtype=weights, sharding_axis_dims=dims)
    check_largest_step(plan_device(model, config, find_slice(topology), 2048))


@needs_libtpu
def test_a_step_that_the_compiler_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    """64 KV heads of 256 in pages of 512: a page is more than the chip's own memory."""
    model = model_config("SmolLM2-135M", tmp_path)
    model = replace(model, num_heads=64, num_kv_heads=64, head_dim=256, num_layers=1)
    plan = plan_device(model, replace(CONFIG, page_size=512), find_slice("v5e-1"), 1024)
    with pytest.raises(ConfigError, match=r"^v5e: attention over 64 KV heads .* take smaller pages"):
        list(compile_steps(plan, only_largest=True))


def test_what_cannot_be_compiled_here_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_config("SmolLM2-135M", tmp_path)
    monkeypatch.setattr("kernels.paged_attention.gpu.targets._find", lambda module: None)
    reason = why_not_compiled(plan_device(model, CONFIG, find_slice("h100-1"), 2048))
    assert reason == "jax-cuda12-pjrt is absent: install the extra gpu-compile"
    monkeypatch.setattr("kernels.paged_attention.tpu.topology.is_installed", lambda: False)
    reason = why_not_compiled(plan_device(model, CONFIG, find_slice("v5e-1"), 2048))
    assert reason == "libtpu is not installed: pip install 'tidemill[tpu-compile]'"
