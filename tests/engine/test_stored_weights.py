"""Weights read where they are needed: a chip's part of an array is that part of the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import checkpoints
from engine.checkpoints.gguf_file import read_gguf_header
from engine.checkpoints.gguf_model import GgufWeights, gguf_config
from engine.checkpoints.huggingface import SafetensorsWeights, hugging_face_config
from engine.checkpoints.weights import StoredWeights
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.llama import weight_plan
from engine.models.tensor_split import TensorSplit
from engine.sampling_params import SamplingParams
from tests.engine.gguf_maker import make_tiny_gguf
from tests.tiny_model import make_tiny_checkpoint


@pytest.fixture(params=["gguf", "safetensors"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[StoredWeights, TensorSplit]:
    if request.param == "gguf":
        file = read_gguf_header(make_tiny_gguf(tmp_path / "model.gguf"))
        config, source = gguf_config(file), GgufWeights(file)
    else:
        folder = Path(make_tiny_checkpoint(tmp_path / "model", attention_bias=True, mlp_bias=True))
        config, source = hugging_face_config(folder), SafetensorsWeights(folder)
    return StoredWeights(config, source), TensorSplit(config, 3, "float32")


def test_a_part_is_that_part_of_the_whole(stored: tuple[StoredWeights, TensorSplit]):
    weights, split = stored
    for target in weight_plan(split.config):
        whole = weights.read(target.path)
        for chip in range(split.num_chips):
            cut = split.cut(target.path, chip)
            if cut is not None:
                part = weights.read_part(target.path, cut)
                assert part.dtype == whole.dtype
                np.testing.assert_array_equal(part, cut.of(whole), err_msg=f"{target.path} of {chip}")


def test_no_more_is_read_than_spans_the_part(tmp_path: Path):
    class Counting(SafetensorsWeights):
        num_values = 0

        def read_into(self, part, target, rows=None, columns=None):
            self.num_values += target.size
            super().read_into(part, target, rows, columns)

    folder = Path(make_tiny_checkpoint(tmp_path / "model", tie_word_embeddings=False))
    source = Counting(folder)
    config = hugging_face_config(folder)
    weights, split = StoredWeights(config, source), TensorSplit(config, 2, "float32")
    matrices = [target for target in weight_plan(config) if len(target.parts[0].shape) == 2]
    for target in matrices:
        cut = split.cut(target.path, 0)
        assert cut is not None
        weights.read_part(target.path, cut)
    sizes = [int(np.prod(part.shape)) for target in matrices for part in target.parts]
    assert source.num_values == sum(sizes) / 2


def test_an_engine_on_one_device_takes_weights_that_are_still_stored(tiny_folder: Path):
    loaded = checkpoints.load(str(tiny_folder), defers_weights=True)
    options: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_model_len": 64,
        "kv_cache_bytes": 1 << 20,
        "min_token_pad": 16,
    }
    config = EngineConfig(max_num_batched_tokens=16, **options)
    greedy = SamplingParams(temperature=0, max_tokens=4)
    outputs = [
        Engine(each, config).generate([[5, 6, 7]], greedy)[0].outputs[0].token_ids
        for each in (loaded, checkpoints.load(str(tiny_folder)))
    ]
    assert outputs[0] == outputs[1]
