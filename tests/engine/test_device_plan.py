"""A plan's bytes, pages and least times against what is worked out here by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from engine.chips import CHIPS, find_slice
from engine.config import EngineConfig
from engine.device_plan import plan_device
from engine.errors import ConfigError
from engine.models.abstract import abstract_model, num_parameters, share_of
from engine.models.llama import Llama, abstract_llama
from engine.models.packed import pack_model
from engine.roofline import StepLoad
from kernels.linear import available_backends
from tests.engine.engines import varied_model
from tests.engine.model_shapes import CONFIGS, model_config

GIB = 2**30
BF16 = EngineConfig(
    dtype="bfloat16", max_num_seqs=256, max_num_batched_tokens=2048, hbm_utilization=0.9, min_token_pad=128
)
INT8 = replace(BF16, weight_dtype="int8")
TEMPORARIES = 500_000_000


def int8_bytes(rows: int, in_dim: int) -> int:
    """Bytes of a matrix, and a scale of four bytes for each 64 inputs of a row."""
    return rows * in_dim + rows * (in_dim // 64) * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Llama-3.1-8B", 8_030_261_248), ("Llama-3.3-70B", 70_553_706_496), ("SmolLM2-135M", 134_515_008)],
)
def test_parameters_are_those_the_models_are_known_by(name: str, expected: int, tmp_path: Path) -> None:
    assert num_parameters(model_config(name, tmp_path)) == expected


def test_llama_8b_on_v4_8(tmp_path: Path) -> None:
    plan = plan_device(model_config("Llama-3.1-8B", tmp_path), BF16, find_slice("v4-8"), 131_072, TEMPORARIES)
    # A chip of four has 8 query heads, 2 KV heads of 128, 3,584 of the MLP's 14,336, 32,064 of 128,256 words.
    qkv, out = (8 + 2 * 2) * 128 * 4096, 4096 * 8 * 128
    gate_up, down = 2 * 3584 * 4096, 4096 * 3584
    layer = 2 * (qkv + out + gate_up + down) + 2 * 4096 * 4
    table = 32_064 * 4096 * 2
    assert plan.weight_bytes == 32 * layer + 2 * table + 4096 * 4 == 4_016_062_464
    assert plan.read_bytes == plan.weight_bytes - table
    # A token's key and value of 128 side by side, two bytes each; 2 heads, 64 tokens, 32 layers.
    assert plan.page_bytes == 2 * 64 * (128 + 128) * 2 * 32 == 2 * 2**20
    assert plan.budget_bytes == int(30.75 * GIB * 0.9) == 29_715_804_979
    assert plan.num_pages == (29_715_804_979 - 4_016_062_464 - TEMPORARIES) // 2**21 == 12_016
    assert plan.num_tokens == plan.largest_context == 12_016 * 64
    assert plan.fits
    # A layer more is its weights and the 2,048 pages of one sequence of 131,072 tokens, 65,536 bytes each.
    outside = 2 * table + 4096 * 4 + TEMPORARIES
    assert plan.largest_num_layers == (29_715_804_979 - outside) // (layer + 2048 * 65_536) == 117


def test_the_least_time_of_a_step_of_llama_8b_on_v4_8(tmp_path: Path) -> None:
    plan = plan_device(model_config("Llama-3.1-8B", tmp_path), BF16, find_slice("v4-8"), 131_072, TEMPORARIES)
    time = plan.roofline().step(StepLoad(num_tokens=256, num_logits=256, num_sequences=256, context=1000))
    layer = (8 + 2 * 2) * 128 * 4096 + 4096 * 1024 + 3 * 3584 * 4096
    attention = 2 * 8 * 128 * 1000  # q.k and weights times values, 8 heads of 128 over 1,000 tokens
    operations = 2 * 256 * (32 * (layer + attention) + 4096 * 32_064)
    assert time.compute == pytest.approx(operations / 275e12)
    token = 2 * (128 + 128) * 2 * 32  # 2 heads' key and value in 32 layers
    moved = 4_016_062_464 - 32_064 * 4096 * 2 + 256 * 1000 * token + 256 * token
    assert time.memory == pytest.approx(moved / 1200e9)
    # 65 sums over 4 chips of 256 x 4,096 numbers, three quarters of each sent twice; logits to who draws.
    sent = 0.75 * (2 * 65 * 256 * 4096 * 2 + 256 * 32_064 * 4)
    assert time.interconnect == pytest.approx(sent / 100e9), "2 x 2 chips: a link of 50 GB/s along each axis"
    assert time.bound == "memory"
    assert time.seconds == max(time.compute, time.memory) + time.interconnect
    # 256 decodes at 1,000 tokens: 3.75 GB of weights and 8.4 GB of keys and values a chip.
    assert time.memory == pytest.approx(10.1e-3, rel=0.01)


@pytest.mark.parametrize(
    ("topology", "heads", "inner", "vocabulary", "budget", "rate"),
    [("v4-32", 4, 1792, 8016, 30.75, 150e9), ("v6e-8", 8, 3584, 16_032, 31.24, 200e9)],
)
def test_llama_70b_in_int8(
    topology: str, heads: int, inner: int, vocabulary: int, budget: float, rate: float, tmp_path: Path
) -> None:
    plan = plan_device(
        model_config("Llama-3.3-70B", tmp_path), INT8, find_slice(topology), 131_072, TEMPORARIES
    )
    # Eight KV heads: one a chip, and on sixteen chips each of them twice.
    layer = int8_bytes((heads + 2) * 128, 8192) + int8_bytes(8192, heads * 128)
    layer += int8_bytes(2 * inner, 8192) + int8_bytes(8192, inner) + 2 * 8192 * 4
    head, embed = int8_bytes(vocabulary, 8192), vocabulary * 8192 * 2
    assert plan.weight_bytes == 80 * layer + head + embed + 8192 * 4
    assert plan.page_bytes == 1 * 64 * (128 + 128) * 2 * 80
    free = int(budget * GIB * 0.9) - plan.weight_bytes - TEMPORARIES
    assert plan.num_pages == free // plan.page_bytes
    assert plan.fits
    time = plan.roofline().step(StepLoad(128, 128, 128, 0.0))
    others = 1 - 1 / plan.topology.num_chips
    assert time.interconnect == pytest.approx(
        others * (2 * 161 * 128 * 8192 * 2 + 128 * vocabulary * 4) / rate
    ), "2x2x4 has one link along each of three axes, 2x4 along each of two"


def test_smollm2_on_v5e_1(tmp_path: Path) -> None:
    plan = plan_device(model_config("SmolLM2-135M", tmp_path), BF16, find_slice("v5e-1"), 8192, TEMPORARIES)
    layer = (9 + 2 * 3) * 64 * 576 + 576 * 576 + 3 * 1536 * 576
    assert plan.weight_bytes == 30 * (2 * layer + 2 * 576 * 4) + 49_152 * 576 * 2 + 576 * 4
    assert plan.read_bytes == plan.weight_bytes, "the embeddings are the head, which every step reads"
    # A key and a value of 64 share the 128 lanes of a row.
    assert plan.page_bytes == 3 * 64 * 128 * 2 * 30 == 1_474_560
    assert plan.num_pages == (int(15.75 * GIB * 0.9) - plan.weight_bytes - TEMPORARIES) // 1_474_560
    time = plan.roofline().step(StepLoad(128, 128, 128, 512.0))
    assert time.interconnect == 0
    token = 3 * 128 * 2 * 30
    assert time.memory == pytest.approx((plan.weight_bytes + 128 * 512 * token + 128 * token) / 819e9)


def test_no_more_pages_than_sequences_could_use(tmp_path: Path) -> None:
    config = replace(BF16, max_num_seqs=4, max_num_batched_tokens=128)
    plan = plan_device(model_config("SmolLM2-135M", tmp_path), config, find_slice("v5e-1"), 1024)
    assert plan.num_pages == 2 * 4 * 16
    assert plan.largest_context > 1024, "there is memory for longer ones"


def test_a_byte_budget_takes_the_place_of_a_share(tmp_path: Path) -> None:
    config = replace(BF16, kv_cache_bytes=10 * 1_474_560 + 1)
    model = model_config("SmolLM2-135M", tmp_path)
    assert plan_device(model, config, find_slice("v5e-1"), 640).num_pages == 10
    assert not plan_device(model, config, find_slice("v5e-1"), 641).fits


def test_replicas_have_pages_of_their_own(tmp_path: Path) -> None:
    model = model_config("Llama-3.1-8B", tmp_path)
    halves = plan_device(model, replace(BF16, sharding_axis_dims=(2, 1, 1, -1, 1)), find_slice("v4-8"), 8192)
    assert halves.num_replicas == 2
    # Two chips share a model: half of its heads, units and words each.
    layer = 2 * ((16 + 2 * 4) * 128 * 4096 + 4096 * 16 * 128 + 3 * 7168 * 4096) + 2 * 4096 * 4
    assert halves.weight_bytes == 32 * layer + 2 * 64_128 * 4096 * 2 + 4096 * 4
    assert halves.page_bytes == 4 * 64 * (128 + 128) * 2 * 32
    load = StepLoad(num_tokens=256, num_logits=256, num_sequences=256, context=0.0)
    sent = halves.roofline().bytes_sent(load)
    assert sent == 0.5 * (2 * 65 * 256 * 4096 * 2 + 256 * 64_128 * 4), "replicas send each other nothing"


def test_weights_that_are_gathered_for_use(tmp_path: Path) -> None:
    model = model_config("Llama-3.1-8B", tmp_path)
    plan = plan_device(model, replace(BF16, sharding_axis_dims=(1, 4, 1, 1, 1)), find_slice("v4-8"), 8192)
    assert plan.num_replicas == 4
    matrices = 32 * ((32 + 2 * 8) * 128 * 4096 + 4096 * 4096 + 3 * 14_336 * 4096) + 2 * 128_256 * 4096
    norms = 65 * 4096 * 4
    assert plan.weight_bytes == 2 * matrices // 4 + norms
    assert plan.page_bytes == 8 * 64 * (128 + 128) * 2 * 32, "all heads of a replica's sequences"
    roofline, load = plan.roofline(), StepLoad(num_tokens=256, num_logits=256, num_sequences=256, context=0.0)
    assert roofline.bytes_sent(load) == 3 * plan.weight_bytes, "each chip's part goes to the three others"
    token = 8 * (128 + 128) * 2 * 32
    assert roofline.bytes_moved(load) == 4 * plan.weight_bytes + 256 * token


def test_a_mixture_spread_by_experts(tmp_path: Path) -> None:
    model = model_config("Mixtral-8x7B", tmp_path)
    assert num_parameters(model) == 46_702_792_704
    config = replace(BF16, sharding_axis_dims=(1, 1, -1, 1, 1))
    plan = plan_device(model, config, find_slice("v4-8"), 8192, TEMPORARIES)
    # Each of four chips has two experts of every layer; attention, router and words are on all of them.
    experts = 32 * 2 * 3 * 14_336 * 4096 * 2
    layer = 2 * ((32 + 2 * 8) * 128 * 4096 + 4096 * 4096 + 8 * 4096) + 2 * 4096 * 4
    table = 32_000 * 4096 * 2
    assert plan.expert_bytes == experts
    assert plan.weight_bytes == experts + 32 * layer + 2 * table + 4096 * 4
    assert plan.read_bytes == plan.weight_bytes - experts - table
    assert plan.fits
    roofline = plan.roofline()
    few = StepLoad(num_tokens=1, num_logits=1, num_sequences=1, context=0.0)
    token = 8 * (128 + 128) * 2 * 32
    assert roofline.bytes_moved(few) == pytest.approx(plan.read_bytes + experts / 4 + token), (
        "a token chooses two of eight experts, wherever they are"
    )
    many = replace(few, num_tokens=256, num_logits=256)
    assert roofline.bytes_moved(many) == pytest.approx(plan.read_bytes + experts + 256 * token)
    # Half an expert of the two that a token chose is here, on average.
    products = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336 * 2 / 4 + 8)
    assert roofline.flops(many) == pytest.approx(2 * 256 * (32 * products + 4096 * 32_000))
    # What the chips make of the experts is added up once a layer, the rest is the same on all.
    assert roofline.bytes_sent(many) == pytest.approx(2 * 0.75 * 32 * 256 * 4096 * 2)
    # Of tokens whose logits nobody wants, nothing is computed behind the last layer's attention.
    rest = products - 4096 * (4096 + 2 * 1024)
    chunk = replace(many, num_logits=1)
    left_out = roofline.flops(many) - roofline.flops(chunk)
    assert left_out == pytest.approx(2 * 255 * (rest + 4096 * 32_000))
    assert roofline.bytes_sent(chunk) == pytest.approx(2 * 0.75 * (31 * 256 + 1) * 4096 * 2)


def test_axes_that_do_not_go_with_the_chips_or_the_model_are_refused(tmp_path: Path) -> None:
    model = model_config("Llama-3.1-8B", tmp_path)
    with pytest.raises(ConfigError, match="needs 8 devices"):
        plan_device(model, replace(BF16, sharding_axis_dims=(1, 1, 1, 8, 1)), find_slice("v4-8"), 8192)
    with pytest.raises(ConfigError, match="ep is 4, and the model has 0 experts"):
        plan_device(model, replace(BF16, sharding_axis_dims=(1, 1, 4, 1, 1)), find_slice("v4-8"), 8192)


def test_a_model_too_large_says_what_would_fit(tmp_path: Path) -> None:
    plan = plan_device(model_config("Llama-3.3-70B", tmp_path), BF16, find_slice("v5e-8"), 8192)
    assert not plan.fits
    assert (plan.num_pages, plan.largest_context) == (0, 0)
    assert 0 < plan.largest_num_layers < 80
    assert plan.largest_num_parameters < plan.num_parameters
    found = dict(plan.what_would_fit())
    assert list(found) == ["engine.weight_dtype=int8", "plan.topology=v5e-16"]
    assert all(each.fits for each in found.values())
    smaller = replace(plan.model, num_layers=plan.largest_num_layers)
    assert plan_device(smaller, BF16, find_slice("v5e-8"), 8192, plan.temporary_bytes).fits
    larger = replace(plan.model, num_layers=plan.largest_num_layers + 1)
    assert not plan_device(larger, BF16, find_slice("v5e-8"), 8192, plan.temporary_bytes).fits


def test_a_context_too_long_says_which_would_fit(tmp_path: Path) -> None:
    model = model_config("Llama-3.1-8B", tmp_path)
    plan = plan_device(model, replace(BF16, weight_dtype="int8"), find_slice("v5e-1"), 131_072)
    assert not plan.fits
    changes = dict(plan.what_would_fit())
    shorter = changes[f"engine.max_model_len={plan.largest_context}"]
    assert shorter.fits
    assert shorter.max_model_len == plan.largest_context < 131_072


def test_what_does_not_divide_is_filled_up(tmp_path: Path) -> None:
    """SmolLM2 on four chips: three have a KV head and its three query heads each, the fourth has zeros."""
    config = model_config("SmolLM2-135M", tmp_path)
    share = share_of(config, 4, "bfloat16")
    assert (share.num_heads, share.num_kv_heads) == (3, 1)
    assert (share.intermediate_size, share.vocab_size) == (384, 12_288)
    assert share_of(config, 16, "bfloat16").num_heads == 1, "five chips a KV head, with a query head or none"
    assert share_of(config, 16, "int8").intermediate_size == 128, "96 is no whole number of groups of 64"


@pytest.mark.parametrize("name", ["v4-9", "v4", "v3-8", "h100-3", "-8"])
def test_a_topology_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"plan\.topology=.*(choose one of|there are)"):
        find_slice(name)


@pytest.mark.parametrize("chip", [chip for chip in CHIPS.values() if chip.platform == "tpu"])
def test_the_table_agrees_with_what_jax_knows_of_the_chip(chip) -> None:
    from jax.experimental.pallas import tpu as pltpu

    version = pltpu.ChipVersion(chip.name.removeprefix("tpu"))
    cores = version.num_physical_tensor_cores_per_chip
    info = pltpu.get_tpu_info_for_chip(version, 1)  # of one core
    assert chip.bf16_flops == pytest.approx(info.bf16_ops_per_second * cores, rel=0.01)
    # JAX gives v5p 2.46e12, Google's page 2.765e12; the others are the same to rounding.
    assert chip.memory_rate == pytest.approx(info.mem_bw_bytes_per_second * cores, rel=0.13)
    assert chip.memory_bytes == pytest.approx(info.hbm_capacity_bytes * cores, rel=0.02)
    assert chip.usable_bytes <= chip.memory_bytes


def test_links_double_where_an_axis_is_a_ring() -> None:
    assert find_slice("v4-8").exchange_rate == 2 * 50e9
    assert find_slice("v4-32").exchange_rate == 3 * 50e9, "2x2x4 is no cube, so its axis of four is a line"
    assert find_slice("v4-128").exchange_rate == 6 * 50e9
    assert find_slice("v5e-64").exchange_rate == 2 * 50e9
    assert find_slice("v5e-128").exchange_rate == 3 * 50e9
    assert find_slice("h100-8").exchange_rate == 450e9
    assert find_slice("tpu7x-8").num_devices == 8


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "int8", "int4"])
def test_an_abstract_model_has_the_shapes_of_a_packed_one(backend: str, weight_format: str) -> None:
    loaded = varied_model()
    packed = pack_model(loaded.model, weight_format, backend)
    abstract = abstract_model(loaded.config, weight_format, backend, "float32")
    assert jax.tree.structure(abstract) == jax.tree.structure(packed)
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(each)] for each in (abstract, packed)]
    assert shapes[0] == shapes[1]
    assert abstract.num_bytes == packed.num_bytes


def test_a_tied_model_keeps_its_embeddings_only_where_the_head_is_rounded(tmp_path: Path) -> None:
    config = model_config("SmolLM2-135M", tmp_path)
    assert abstract_model(config, "bfloat16", "xla", "bfloat16").embed is None
    assert abstract_model(config, "int8", "xla", "bfloat16").embed is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_shares_add_up_to_the_model(name: str, tmp_path: Path) -> None:
    """Of what is cut, nothing is lost; KV heads are repeated only where there are fewer than shares."""
    config = model_config(name, tmp_path)
    number = 3 if name == "SmolLM2-135M" else 16
    share = share_of(config, number, "bfloat16")
    assert isinstance(abstract_llama(share), Llama)
    assert share.num_heads * number == config.num_heads
    assert share.intermediate_size * number == config.intermediate_size
    assert share.vocab_size * number >= config.vocab_size
    assert share.num_kv_heads * number == max(config.num_kv_heads, number)
