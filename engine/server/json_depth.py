"""How deep JSON nests, told from its bytes as they come: before any parser recurses, in time linear in their
number."""

from __future__ import annotations

import numpy as np

_SLICE = 1 << 18  # bounds the temporary arrays
_STEP = np.zeros(256, np.int8)
_STEP[[ord("["), ord("{")]] = 1
_STEP[[ord("]"), ord("}")]] = -1


class JsonDepth:
    """Watches one JSON text, given in pieces, for brackets nested deeper than `max_depth`, strings left out.

    What is no JSON at all is some depth or other; its parser will say so.
    """

    def __init__(self, max_depth: int):
        self._max_depth = max_depth
        self._depth = 0
        self._in_string = False
        self._held = b""  # a backslash whose pair is in the next piece

    def is_exceeded_by(self, piece: bytes) -> bool:
        """Whether the text is too deep at or before the end of its next `piece`."""
        return any(
            self._is_exceeded_by(piece[start : start + _SLICE]) for start in range(0, len(piece), _SLICE)
        )

    def _is_exceeded_by(self, piece: bytes) -> bool:
        piece = self._held + piece
        num_backslashes = len(piece) - len(piece.rstrip(b"\\"))
        self._held = b"\\" if num_backslashes % 2 else b""
        if self._held:
            piece = piece[:-1]
        # Without pairs of backslashes and escaped quotes, every quote left begins or ends a string.
        plain = np.frombuffer(piece.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
        if not plain.size:
            return False
        num_quotes = np.cumsum(plain == ord('"'), dtype=np.int64) + self._in_string
        depths = self._depth + np.cumsum(np.where(num_quotes % 2, 0, _STEP[plain]), dtype=np.int64)
        self._in_string = bool(num_quotes[-1] % 2)
        self._depth = int(depths[-1])
        return bool(depths.max() > self._max_depth)
