"""Other weights and other models in an engine that runs: nothing restarts, nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from engine import checkpoints
from engine.compilation import counting_compiles
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, ModelError
from engine.sampling_params import SamplingParams
from tests.engine.engines import tokens_of
from tests.tiny_model import make_tiny_checkpoint

OPTIONS = EngineConfig(
    max_num_seqs=4,
    max_num_batched_tokens=32,
    min_token_pad=32,
    max_model_len=128,
    page_size=16,
    kv_cache_bytes=1 << 20,
)
DRAWN = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
PROMPT = [*range(10, 60)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two checkpoints of one architecture with other weights, and one of other sizes."""
    root = tmp_path_factory.mktemp("models")
    shapes: list[dict[str, Any]] = [{"seed": 0}, {"seed": 1}, {"seed": 2, "num_hidden_layers": 1}]
    return [
        make_tiny_checkpoint(root / f"model-{index}", tie_word_embeddings=False, **shape)
        for index, shape in enumerate(shapes)
    ]


@pytest.fixture
def engine(folders: list[str]) -> Engine:
    return Engine(folders[0], OPTIONS)


def answers(engine: Engine) -> list[Any]:
    return tokens_of(engine.generate([PROMPT, [7, 8, 9]], DRAWN.replace(seed=5)))


def test_new_weights_answer_as_an_engine_made_of_them(engine: Engine, folders: list[str]):
    before, other = answers(engine), checkpoints.load(folders[1])
    expected = answers(Engine(other, OPTIONS))
    assert before != expected
    named = load_file(Path(folders[1]) / "model.safetensors")
    for new in (other, folders[1], named, other.model):
        engine.update_model_weights(folders[0])
        assert answers(engine) == before
        with counting_compiles() as count:
            engine.update_model_weights(new)
            assert answers(engine) == expected, "a cached prefix of the old weights would show here"
        assert count.num_compiled == 0
    engine.check_integrity()


def test_running_requests_go_on_from_their_tokens(engine: Engine, folders: list[str]):
    sampling = DRAWN.replace(seed=5)
    engine.add_request("r", PROMPT, sampling=sampling)
    engine.add_request("waits", prompt_token_ids=[7, 8], sampling=sampling)
    for _ in range(9):
        engine.step()
    drawn = engine.drawn_tokens("r")
    engine.update_model_weights(folders[1])
    assert engine.stats().pages_held == engine.stats().pages_cached == 0
    kept = engine.drawn_tokens("r")
    assert drawn is not None
    assert kept is not None
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
    tokens = outputs["r"].outputs[0].token_ids
    assert len(tokens) == 20
    assert tokens[: len(drawn[0].token_ids)] == drawn[0].token_ids
    # From there on it is what the new weights draw after these tokens.
    fresh = Engine(folders[1], OPTIONS)
    fresh.add_request("r", PROMPT, sampling=sampling, drawn=kept)
    expected = {}
    while fresh.has_unfinished:
        expected |= {output.request_id: output for output in fresh.step()}
    assert tokens == expected["r"].outputs[0].token_ids
    engine.check_integrity()


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_run_on(engine: Engine, folders: list[str]):
    before = answers(engine)
    named = load_file(Path(folders[1]) / "model.safetensors")
    cases: list[tuple[Any, str]] = [
        (folders[2], "num_layers 2 -> 1"),
        (checkpoints.load(folders[1], dtype="bfloat16"), "load them with the same dtype"),
        ({name: array for name, array in named.items() if "norm" not in name}, "norm.weight is missing"),
        (named | {"model.embed_tokens.weight": named["model.embed_tokens.weight"][:-1]}, "embed_tokens"),
        (named | {"more": named["model.norm.weight"]}, "more has no place"),
    ]
    for new, message in cases:
        with pytest.raises(ModelError, match=message):
            engine.update_model_weights(new)
    assert answers(engine) == before


def test_another_model_takes_its_place(engine: Engine, folders: list[str]):
    mixture = Path(folders[0]).parent / "mixture"
    make_tiny_checkpoint(
        mixture,
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    for frees_first, folder in ((False, folders[2]), (True, str(mixture)), (None, folders[0])):
        engine.swap_model(folder, frees_first=frees_first)
        assert engine.model_config == checkpoints.load_config(folder)
        assert answers(engine) == answers(Engine(folder, OPTIONS))
        engine.check_integrity()


def test_a_swap_that_cannot_be_leaves_the_old_model(engine: Engine, folders: list[str], tmp_path: Path):
    before = answers(engine)
    engine.add_request("r", PROMPT, sampling=DRAWN)
    with pytest.raises(ConfigError, match="1 requests are unfinished"):
        engine.swap_model(folders[2])
    engine.abort_request("r")
    with pytest.raises(ModelError):
        engine.swap_model(str(tmp_path / "nothing"))
    short = make_tiny_checkpoint(tmp_path / "short", max_position_embeddings=64)
    with pytest.raises(ConfigError, match="at most 64 tokens"):
        engine.swap_model(short)
    assert answers(engine) == before


def test_an_engine_that_lost_its_model_says_so_until_it_has_another(
    engine: Engine, folders: list[str], tmp_path: Path
):
    short = make_tiny_checkpoint(tmp_path / "short", max_position_embeddings=64)
    with pytest.raises(ConfigError, match="at most 64 tokens"):
        engine.swap_model(short, frees_first=True)
    with pytest.raises(ConfigError, match="call swap_model again"):
        engine.generate([PROMPT], DRAWN)
    engine.swap_model(folders[2])
    assert len(answers(engine)[0][0]) == 20


def test_weights_are_read_as_what_the_model_was_loaded_as(folders: list[str]):
    options = {name: getattr(OPTIONS, name) for name in ("max_num_seqs", "min_token_pad", "kv_cache_bytes")}
    engine = Engine(
        checkpoints.load(folders[0], dtype="bfloat16"),
        max_num_batched_tokens=32,
        max_model_len=128,
        **options,
    )
    assert engine.config.dtype == engine.config.page_dtype == "bfloat16"
    before = answers(engine)
    engine.update_model_weights(folders[1])
    assert answers(engine) != before
    engine.update_model_weights(load_file(Path(folders[0]) / "model.safetensors"))
    assert answers(engine) == before
