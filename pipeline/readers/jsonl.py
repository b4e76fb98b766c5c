"""JSON Lines, plain or compressed with gzip or zstd, one object a line.

Lines end at LF; a CR before it and spaces around an object do not matter, and a byte order mark at the
start of the file is skipped. Lines of nothing but spaces, tabs and CRs are no rows and take no position,
but they do count as lines. At no time is more held than one read and one line of at most `max_line_bytes`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from engine.errors import InputError
from pipeline.input_files import damaged, errors_named, filesystem, open_file
from pipeline.rows import Reject, SourceRow, excerpt, printable
from pipeline.strict_json import BadJson, loads, lone_surrogate_in, may_hold_surrogates

if TYPE_CHECKING:
    from pipeline.shards import InputSettings, Shard

READ_BYTES = 256 * 1024
_BOM = b"\xef\xbb\xbf"
_SPACES = b" \t\r"
_CODECS = {".gz": "gzip", ".zst": "zstd"}


class _Line(NamedTuple):
    number: int  # from 1
    content: bytes | None  # None: longer than the cap, and skipped
    head: bytes  # how it begins
    is_terminated: bool


def count_rows(shard: Shard) -> int:
    with errors_named(shard.url), _open(shard.url) as read:
        return sum(1 for _ in _lines(read, max_line_bytes=0))


def read_rows(
    shard: Shard, settings: InputSettings, start: int, stop: int | None, columns: Sequence[str] | None
) -> Iterator[SourceRow | Reject]:
    wanted = None if columns is None else frozenset(columns)
    with errors_named(shard.url), _open(shard.url) as read:
        for position, line in enumerate(_lines(read, settings.max_line_bytes)):
            if stop is not None and position >= stop:
                return
            if position >= start:
                yield _row(shard, settings, position, line, wanted)


@contextmanager
def _open(url: str) -> Iterator[Callable[[int], bytes]]:
    """A function that reads up to so many decompressed bytes; b"" only at the true end."""
    fs, path = filesystem(url)
    codec = next((codec for suffix, codec in _CODECS.items() if path.lower().endswith(suffix)), None)
    with open_file(fs, path) as file:
        if codec is None:
            yield file.read
            return
        if not file.read(1):
            raise InputError(damaged(url, EOFError(f"an empty file is not {codec}")))
        file.seek(0)
        # pyarrow's stream, unlike zstandard's, raises when the data ends inside a frame, and each read's
        # output is bounded, however far a few bytes would expand.
        with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), codec) as stream:
            yield stream.read


def _lines(read: Callable[[int], bytes], max_line_bytes: int) -> Iterator[_Line]:
    """The lines that are rows: all but the blank ones."""
    number = 1
    held: list[bytes] = []  # the unfinished line's pieces, emptied once they pass the cap
    held_len = 0
    head = b""
    is_blank = True

    def add(piece: bytes) -> None:
        nonlocal held_len, head, is_blank
        if not piece:
            return
        is_blank = is_blank and not piece.strip(_SPACES)
        held_len += len(piece)
        if len(head) < 800:
            head += piece[:800]
        if held_len <= max_line_bytes:
            held.append(piece)
        else:
            held.clear()

    def finish(is_terminated: bool) -> _Line | None:
        nonlocal held_len, head, is_blank
        content = b"".join(held) if held_len <= max_line_bytes else None
        line = None if is_blank else _Line(number, content, head, is_terminated)
        held.clear()
        held_len, head, is_blank = 0, b"", True
        return line

    start = b""
    while len(start) < len(_BOM) and (more := read(READ_BYTES)):
        start += more
    data = start.removeprefix(_BOM) or read(READ_BYTES)
    while data:
        first, *rest = data.split(b"\n")
        add(first)
        for piece in rest:
            if line := finish(is_terminated=True):
                yield line
            number += 1
            add(piece)
        data = read(READ_BYTES)
    if line := finish(is_terminated=False):
        yield line


def _row(
    shard: Shard, settings: InputSettings, position: int, line: _Line, wanted: Collection[str] | None
) -> SourceRow | Reject:
    def reject(reason: str, message: str) -> Reject:
        return Reject(
            shard_index=shard.index,
            position=position,
            row_id=None,
            reason=reason,
            message=printable(f"{shard.name} line {line.number}: {message}"),
            source=shard.name,
            excerpt=excerpt(line.head),
            line=line.number,
        )

    if line.content is None:
        return reject(
            "line_too_long",
            f"longer than input.max_line_bytes={settings.max_line_bytes}; shorten it or raise that",
        )
    try:
        text = line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        return reject(
            "not_utf8", f"not UTF-8 at byte {error.start + 1}: {error.reason}; save the file as UTF-8"
        )
    try:
        value: Any = loads(text, settings.max_json_depth)
    except BadJson as error:
        torn = (
            "" if line.is_terminated else "; it is the last line and has no line end, so it may be cut short"
        )
        return reject(error.reason, f"{error}{torn}")
    if not isinstance(value, dict):
        return reject("wrong_type", f"a JSON {_kind(value)}; write one object a line")
    columns = value if wanted is None else {key: value[key] for key in value if key in wanted}
    if may_hold_surrogates(text):
        for key, item in columns.items():
            if lone_surrogate_in(key) or lone_surrogate_in(item):
                message = f"column {excerpt(key)!r} holds half of a surrogate pair; mend the escape"
                return reject("lone_surrogate", message)
    return SourceRow(shard.index, position, columns, shard.name, line.number)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "array"
    if isinstance(value, str):
        return "string"
    return "null" if value is None else "boolean" if isinstance(value, bool) else "number"
