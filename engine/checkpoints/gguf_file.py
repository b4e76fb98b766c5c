"""The header of a GGUF file, read without trusting it (format: ggml-org/ggml, docs/gguf.md, versions 2 and
3).

Nothing is allocated on the word of the file: every count, length and offset is compared with the bytes that
are there first. The types of the format and the dequantisation of tensors are the `gguf` package's; its own
reader is not used because it trusts the header.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from engine.errors import ModelError

SUPPORTED_TYPES = tuple(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
)

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_MAX_KEY_BYTES = 65535  # The format's own limit.
_MIN_ENTRY_BYTES = 8 + 4 + 1  # A key's length, a value's type, a value.
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # A name's length, the number of dimensions, one of them, type, offset.


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: `shape` in row-major order, `offset` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata and the tensor table of a file, both checked against its size."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `key`, which must be a `kind` (a bool is no number); `default` where it is absent."""
        value = self.metadata.get(key)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise ModelError(f"{self.path}: metadata {key} is a {type(value).__name__}, not {names}")
        return value

    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """As `get`, but an absent key is an error."""
        value = self.get(key, kind)
        if value is None:
            raise ModelError(f"{self.path}: metadata {key} is missing; the file is not a complete model")
        return value


def read_gguf_header(path: str | Path) -> GgufFile:
    """Read and check the header of a GGUF file. No tensor data is read.

    ModelError, on one line, for anything that is not a whole little-endian GGUF file of version 2 or 3.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Header(path, file, path.stat().st_size).read()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path") from error


class _Header:
    """A cursor over the header that knows how many bytes are left."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size, self.position = path, file, size, 0

    def damaged(self, what: str) -> ModelError:
        return ModelError(
            f"{self.path}: damaged or truncated GGUF ({what}; the file has {self.size} bytes); fetch it again"
        )

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise self.damaged(f"{what} needs {count} bytes at {self.position}")
        data = self.file.read(count)
        if len(data) != count:
            raise self.damaged(f"{what} ends early at {self.position}")
        self.position += count
        return data

    def scalar(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, item_bytes: int, what: str) -> int:
        """A u64 count of items of at least `item_bytes` each, if the rest of the file has room for them."""
        count = self.scalar("<Q", f"the number of {what}")
        if count * item_bytes > self.size - self.position:
            raise self.damaged(f"{count} {what} cannot fit")
        return count

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.count(1, f"bytes of {what}")
        if limit is not None and length > limit:
            raise self.damaged(f"{what} is {length} bytes long")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def read(self) -> GgufFile:
        if self.take(min(4, self.size), "the magic") != b"GGUF":
            raise ModelError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF'); check the path")
        version = self.scalar("<I", "the version")
        if version not in (2, 3):
            swapped = struct.unpack(">I", struct.pack("<I", version))[0]
            kind = f"big-endian version {swapped}" if swapped in (2, 3) else f"version {version}"
            raise ModelError(
                f"{self.path}: GGUF {kind} is not supported; convert it to little-endian version 3"
            )
        num_tensors = self.count(_MIN_TENSOR_BYTES, "tensors")
        num_entries = self.count(_MIN_ENTRY_BYTES, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.string("a metadata key", _MAX_KEY_BYTES)
            if key in metadata:
                raise self.damaged(f"metadata {key} appears twice")
            metadata[key] = self.value(key)
        raw_tensors = [self.tensor_entry() for _ in range(num_tensors)]
        return GgufFile(self.path, metadata, self.place(metadata, raw_tensors))

    def value(self, key: str) -> Any:
        kind = self.value_type(key)
        if kind is GGUFValueType.STRING:
            return self.string(f"metadata {key}")
        if kind is not GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind], f"metadata {key}")
        item_kind = self.value_type(key)
        if item_kind is GGUFValueType.ARRAY:
            raise self.damaged(f"metadata {key} is an array of arrays")
        if item_kind is GGUFValueType.STRING:
            return [self.string(f"metadata {key}") for _ in range(self.count(8, f"items of metadata {key}"))]
        form = _SCALARS[item_kind]
        count = self.count(struct.calcsize(form), f"items of metadata {key}")
        data = self.take(count * struct.calcsize(form), f"metadata {key}")
        return np.frombuffer(data, np.dtype(form.replace("<?", "|b1"))).tolist()

    def value_type(self, key: str) -> GGUFValueType:
        number = self.scalar("<I", f"the type of metadata {key}")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.damaged(f"metadata {key} has the unknown type {number}") from error

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor name", _MAX_KEY_BYTES)
        num_dims = self.scalar("<I", f"tensor {name}")
        if not 1 <= num_dims <= 4:
            raise self.damaged(f"tensor {name} has {num_dims} dimensions")
        dims = struct.unpack(f"<{num_dims}Q", self.take(8 * num_dims, f"tensor {name}"))
        kind, offset = struct.unpack("<IQ", self.take(12, f"tensor {name}"))
        return name, tuple(reversed(dims)), kind, offset

    def place(
        self, metadata: dict[str, Any], entries: list[tuple[str, tuple[int, ...], int, int]]
    ) -> dict[str, GgufTensor]:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind_number, offset in entries:
            if name in tensors:
                raise self.damaged(f"tensor {name} appears twice")
            kind = self.tensor_type(name, kind_number)
            block_len, block_bytes = GGML_QUANT_SIZES[kind]
            if min(shape) < 1 or shape[-1] % block_len:
                raise self.damaged(f"tensor {name} of {kind.name} has the shape {shape}")
            num_bytes = math.prod(shape) // block_len * block_bytes
            if offset % alignment or start + offset + num_bytes > self.size:
                raise self.damaged(f"tensor {name} needs {num_bytes} bytes at {start + offset}")
            tensors[name] = GgufTensor(name, shape, kind, start + offset, num_bytes)
        return tensors

    def tensor_type(self, name: str, number: int) -> GGMLQuantizationType:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self.damaged(f"tensor {name} has the unknown type {number}") from None
        if kind not in SUPPORTED_TYPES:
            have = ", ".join(supported.name for supported in SUPPORTED_TYPES)
            raise ModelError(
                f"{self.path}: tensor {name} is {kind.name}, which is not implemented: we have {have}"
            )
        return kind
