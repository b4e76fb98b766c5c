"""Hugging Face folders: configs old and new, shards, damage, tokenizers and fingerprints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from engine import checkpoints
from engine.checkpoints import encode_text, fingerprint
from engine.errors import ModelError
from tests.engine.refusals import refused
from tests.parity.cases import DATA


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def weights_of(loaded: checkpoints.LoadedModel) -> dict[Any, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(loaded.model))}


def assert_same_weights(found: checkpoints.LoadedModel, expected: checkpoints.LoadedModel) -> None:
    wanted = weights_of(expected)
    for path, values in weights_of(found).items():
        np.testing.assert_array_equal(values, wanted[path], err_msg=str(path))


def shard(folder: Path) -> list[Path]:
    """Split model.safetensors in two, with an index, as large models come."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = []
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = folder / f"model-0000{index + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return files


# Loading.


def test_shards_hold_the_same_model(folder: Path, tiny: checkpoints.LoadedModel) -> None:
    shard(folder)
    assert_same_weights(checkpoints.load(str(folder)), tiny)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
def test_weights_stored_in_another_precision_are_converted(
    folder: Path, tiny: checkpoints.LoadedModel, stored: str
) -> None:
    dtype = np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: values.astype(dtype) for name, values in tensors.items()}, folder / "model.safetensors")
    loaded = checkpoints.load(str(folder))
    assert loaded.model.embed.dtype == np.float32
    np.testing.assert_array_equal(
        np.asarray(loaded.model.embed[...]),
        np.asarray(tiny.model.embed[...]).astype(dtype).astype(np.float32),
    )


def test_what_is_loaded_says_what_it_is(tiny: checkpoints.LoadedModel, tiny_folder: Path) -> None:
    assert (tiny.source, tiny.name) == (str(tiny_folder), "model")
    assert tiny.config == checkpoints.load_config(str(tiny_folder))
    assert (tiny.config.bos_token_id, tiny.config.eos_token_ids) == (1, (2,))
    assert checkpoints.model_fingerprint(str(tiny_folder)) == tiny.fingerprint
    alone = checkpoints.load_tokenizer(str(tiny_folder))
    assert checkpoints.tokenizer_fingerprint(alone) == checkpoints.tokenizer_fingerprint(tiny.tokenizer)


def test_eos_ids_of_the_generation_config_are_added(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2, 5]}))
    assert checkpoints.load_config(str(folder)).eos_token_ids == (2, 0, 5)


def test_a_fused_array_keeps_its_parts_in_order(tiny: checkpoints.LoadedModel, tiny_folder: Path) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    prefix = "model.layers.1.self_attn."
    parts = [tensors[f"{prefix}{name}_proj.weight"] for name in "qkv"]
    found = np.asarray(tiny.model.layers[1].attention.qkv.weight[...])
    np.testing.assert_array_equal(found, np.concatenate(parts))


def test_a_head_stored_beside_a_tied_embedding_is_ignored(
    folder: Path, tiny: checkpoints.LoadedModel
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = np.zeros_like(tensors["model.embed_tokens.weight"])
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    save_file(tensors, folder / "model.safetensors")
    assert_same_weights(checkpoints.load(str(folder)), tiny)


# Configs.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "'mamba' is not implemented: we have llama"),
        ({"model_type": None}, "we have llama"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a number"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": 9999}, "9999"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "positive"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": "linear"}, "object"),
        ({"num_hidden_layers": 3}, "model.layers.2.* is missing"),
        ({"num_hidden_layers": 10**15}, "missing"),
        ({"num_hidden_layers": 1}, "has no place"),
        ({"intermediate_size": 97}, "config says"),
        ({"hidden_size": 10**15, "head_dim": 16}, "config says"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"vocab_size": 200}, "do not belong together|config says"),
    ],
    ids=str,
)
def test_configs_that_cannot_run(changes: dict[str, Any], said: str, folder: Path) -> None:
    change_config(folder, **changes)
    assert re.search(said, refused(folder))


def test_a_bias_the_file_does_not_have_is_zero(folder: Path, tiny: checkpoints.LoadedModel) -> None:
    change_config(folder, attention_bias=True)
    loaded = weights_of(checkpoints.load(str(folder)))
    biases = [values for path, values in loaded.items() if path[-1] == "bias"]
    assert len(biases) == 2 * tiny.config.num_layers
    assert not any(values.any() for values in biases)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN', "[" * 100_000, "\ud800"])
def test_a_config_that_is_not_json(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "config.json" in refused(folder)


# Damage.


def test_a_safetensors_file_cut_anywhere_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 500, 2000, 4000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "model.safetensors" in refused(folder), length


def test_a_hostile_safetensors_header_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    for raw in (
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (64).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[99999999],"data_offsets":[0,4]}}   '
        + bytes(4),
    ):
        path.write_bytes(raw)
        assert "model.safetensors" in refused(folder)


def test_missing_and_foreign_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    lost = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    assert "model.norm.weight is missing" in refused(folder)
    save_file(tensors | {"model.norm.weight": lost[:5]}, folder / "model.safetensors")
    assert "model.norm.weight is (5,)" in refused(folder)
    save_file(tensors | {"model.norm.weight": lost, "model.extra": lost}, folder / "model.safetensors")
    assert "model.extra has no place" in refused(folder)
    save_file(tensors | {"model.norm.weight": lost.astype(np.int32)}, folder / "model.safetensors")
    assert "I32" in refused(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    files = shard(folder)
    files[1].unlink()
    assert files[1].name in refused(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "pytorch_model.bin", ""])
def test_an_index_reads_nothing_but_safetensors_beside_it(name: str, folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "index.json" in refused(folder)


def test_pickles_are_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin is a pickle" in refused(folder)
    assert "pickle" in refused(folder / "pytorch_model.bin")
    assert "pickle" in refused("s3://bucket/model.pt")


def test_a_folder_without_weights_or_tokenizer_says_what_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.dat")
    assert "no safetensors" in refused(folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(folder)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    assert "tokenizer" in refused(folder)


# Tokenizers.


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_the_tokenizer_splits_as_its_file_says_whatever_its_class(name: str, tmp_path: Path) -> None:
    """SmolLM2's folder names GPT2Tokenizer, which transformers 5 rebuilds without the single digits."""
    checkpoints.load_tokenizer(checkpoints.DEFAULT_MODEL).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = checkpoints.load_tokenizer(str(tmp_path))
    lines = (DATA / "smollm2_tokenizer_reference.jsonl").read_text().splitlines()[::4]
    wrong = [line for line in map(json.loads, lines) if encode_text(tokenizer, line["text"]) != line["ids"]]
    assert wrong == []


def test_truncation_and_padding_stored_with_a_tokenizer_are_off(folder: Path) -> None:
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=16)
    stored.save(str(folder / "tokenizer.json"))
    assert len(encode_text(checkpoints.load_tokenizer(str(folder)), "0123456789")) == 10


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "custom.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {
        "tokenizer_class": "T",
        "auto_map": {"AutoTokenizer": ["custom.T", "custom.T"]},
    }
    path.write_text(json.dumps(values))
    change_config(folder, auto_map={"AutoConfig": "custom.T"})
    try:
        checkpoints.load(str(folder))
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome will do)
    assert not marker.exists()


# Fingerprints.


def test_a_fingerprint_is_of_content_and_not_of_place(folder: Path, tiny: checkpoints.LoadedModel) -> None:
    assert checkpoints.model_fingerprint(str(folder)) == tiny.fingerprint
    change_config(folder, rope_theta=20000.0)
    changed = checkpoints.model_fingerprint(str(folder))
    assert changed != tiny.fingerprint
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(raw))
    assert checkpoints.model_fingerprint(str(folder)) not in (changed, tiny.fingerprint)


def test_a_large_file_is_sampled_and_notices_its_ends_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "FULL_HASH_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 16)
    path = tmp_path / "large"
    seen = set()
    for change in (None, 0, 19_999):
        raw = bytearray(20_000)
        if change is not None:
            raw[change] = 1
        path.write_bytes(bytes(raw))
        seen.add(fingerprint.files_fingerprint([path]))
    path.write_bytes(bytes(20_001))
    assert len(seen | {fingerprint.files_fingerprint([path])}) == 4
