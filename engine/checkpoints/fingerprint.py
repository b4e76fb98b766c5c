"""What a model and a tokenizer are, as short stable strings, so that a resumed run notices another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import ModelError

FULL_HASH_BYTES = 512 << 20
"""Files up to this size are hashed whole (about half a second); of larger ones, `NUM_SAMPLES` pieces."""

NUM_SAMPLES = 64
SAMPLE_BYTES = 1 << 20


def files_fingerprint(paths: Iterable[Path]) -> str:
    """sha256 over the names, sizes and content of files, in the order given; independent of where they lie.

    A file past `FULL_HASH_BYTES` counts by its size and by pieces spread evenly over it, both ends among
    them.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                if size <= FULL_HASH_BYTES:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
                    continue
                for index in range(NUM_SAMPLES):
                    file.seek((size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over everything that decides token ids: vocabulary, merges, splitting, special tokens.

    The chat template is left out (`template_fingerprint`).
    """
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    digest.update(repr(special).encode())
    return digest.hexdigest()


def template_fingerprint(tokenizer: Any) -> str | None:
    """sha256 of the model's chat template, or None where it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(repr(template).encode()).hexdigest() if template else None
