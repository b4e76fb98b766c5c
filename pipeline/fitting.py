"""Cutting a prompt that is too long, without losing what a chat begins and ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

OverLong = Literal["reject", "truncate_left", "truncate_right", "truncate_middle"]


def fit(
    token_ids: Sequence[int], room: int, over_long: OverLong, num_head: int = 0, num_tail: int = 0
) -> tuple[int, ...] | None:
    """At most `room` of the tokens, None when they do not fit and may not be cut.

    The cut keeps the first `num_head` tokens (a BOS) and the last `num_tail` (the opening of the assistant's
    turn), and between them:

        truncate_left    the end
        truncate_right   the beginning
        truncate_middle  the beginning and the end, half of the room each, the odd token to the beginning
    """
    if len(token_ids) <= room:
        return tuple(token_ids)
    space = room - num_head - num_tail
    if over_long == "reject" or space < 1:
        return None
    end = len(token_ids) - num_tail
    first = {"truncate_left": 0, "truncate_right": space, "truncate_middle": (space + 1) // 2}[over_long]
    last = space - first
    return (*token_ids[: num_head + first], *token_ids[end - last :])
