"""Compare with transformers on torch (--live), or store what it computes (--write).

Needs the extra `parity`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from engine import checkpoints
from engine.checkpoints.gguf_file import read_gguf_header
from engine.checkpoints.gguf_model import GgufWeights, gguf_config
from engine.checkpoints.source import find_model
from engine.models import dense_forward
from engine.models.llama import weight_plan
from tests.parity import cases
from tests.parity.compare import Reference, compare, load_references, save_references


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--live", action="store_true", help="compare with torch now; store nothing")
    mode.add_argument("--write", action="store_true", help="store torch's values under tests/data")
    write = parser.parse_args().write
    disable_progress_bar()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_references(Path(folder))
        if write:
            np.savez_compressed(cases.TINY_FILE, **tiny)
        failures += compare_tiny(Path(folder), tiny)
        real = real_references(Path(folder) / "real")
        if write:
            save_references(str(cases.REAL_FILE), real)
        failures += compare_real(real)
    print("parity holds" if not failures else f"parity fails in {failures} places")
    return 1 if failures else 0


def tiny_references(folder: Path) -> dict[str, Any]:
    """transformers' logits f32[T, V] for every tiny case."""
    logits = {}
    for name in cases.TINY_CASES:
        model = LlamaForCausalLM.from_pretrained(cases.make_case(name, folder / name), dtype=torch.float32)
        with torch.no_grad():
            logits[name] = (
                model(torch.tensor(cases.tiny_token_ids()[None], dtype=torch.long)).logits[0].numpy()
            )
    return logits


def compare_tiny(folder: Path, references: dict[str, np.ndarray]) -> int:
    failures = 0
    for name, expected in references.items():
        model = checkpoints.load(str(folder / name)).model
        error = float(np.abs(np.asarray(dense_forward(model, cases.tiny_token_ids())) - expected).max())
        stored = np.load(cases.TINY_FILE)[name] if cases.TINY_FILE.exists() else expected
        drift = float(np.abs(stored - expected).max())
        fails = error >= cases.MAX_LOGIT_ERROR or drift >= cases.MAX_LOGIT_ERROR
        failures += fails
        print(f"{'FAIL' if fails else 'ok  '} {name}: logits within {error:.1e}, stored within {drift:.1e}")
    return failures


def export_hugging_face(folder: Path) -> None:
    """The default model as a Hugging Face folder in float32, with the values our reader dequantises."""
    folder.mkdir()
    file = read_gguf_header(find_model(checkpoints.DEFAULT_MODEL).path)
    config, source = gguf_config(file), GgufWeights(file)
    tensors = {}
    for target in weight_plan(config):
        for part in target.parts:
            tensors[part.name] = np.empty(part.shape, np.float32)
            source.read_into(part, tensors[part.name])
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
    (folder / "config.json").write_text(json.dumps(values))


def real_references(folder: Path) -> list[Reference]:
    """transformers' logits and greedy tokens for every chat, on the real model in float32."""
    export_hugging_face(folder)
    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    model.generation_config.eos_token_id = None  # EOS is ignored: every continuation has its full length.
    tokenizer = checkpoints.load_tokenizer(checkpoints.DEFAULT_MODEL)
    others = np.random.default_rng(11).choice(model.config.vocab_size, cases.NUM_TOP, replace=False)
    return [torch_reference(model, checkpoints.render_chat(tokenizer, chat), others) for chat in cases.CHATS]


def torch_reference(model: LlamaForCausalLM, prompt_ids: list[int], others: np.ndarray) -> Reference:
    prompt = torch.tensor([prompt_ids])
    with torch.no_grad():
        logits = model(prompt).logits[0]
        generated: Any = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            pad_token_id=0,
            do_sample=False,
            max_new_tokens=cases.NUM_NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    top = logits.topk(cases.NUM_TOP).indices.numpy()
    ids = np.concatenate([top, np.broadcast_to(np.sort(others), (len(prompt_ids), len(others)))], axis=1)
    best_two = torch.stack([step[0] for step in generated.logits]).topk(2).values
    return Reference(
        prompt_ids=np.asarray(prompt_ids),
        ids=ids,
        values=np.take_along_axis(logits.numpy(), ids, axis=1),
        output_ids=generated.sequences[0, len(prompt_ids) :].numpy(),
        gaps=(best_two[:, 0] - best_two[:, 1]).numpy(),
    )


def compare_real(references: list[Reference]) -> int:
    model = checkpoints.load(checkpoints.DEFAULT_MODEL).model
    stored = load_references(str(cases.REAL_FILE)) if cases.REAL_FILE.exists() else references
    failures = 0
    for index, (reference, kept) in enumerate(zip(references, stored, strict=True)):
        difference = compare(model, reference)
        same = np.array_equal(kept.prompt_ids, reference.prompt_ids) and bool(
            np.all((kept.output_ids == reference.output_ids) | (reference.gaps < cases.NEAR_TIE))
        )
        holds = difference.is_parity and same
        failures += not holds
        print(
            f"{'ok  ' if holds else 'FAIL'} chat {index}: {len(reference.prompt_ids)} prompt tokens, "
            f"logits within {difference.max_error:.1e}, {difference.wrong_tokens} other greedy tokens, "
            f"{difference.near_ties} at near ties (smallest gap {reference.gaps.min():.1e}), "
            f"stored values {'agree' if same else 'differ'}"
        )
    return failures


if __name__ == "__main__":
    sys.exit(main())
