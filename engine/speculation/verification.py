"""Which of a row's drafted tokens are kept: the reference of what speculation may do."""

from __future__ import annotations

from collections.abc import Sequence


def accepted(draft: Sequence[int], draws: Sequence[int]) -> tuple[int, ...]:
    """The draws that are kept behind the first one, which always is.

    Draw i + 1 saw the drafted tokens up to draft i in the place of the draws up to i. So it is what would
    have been drawn without a draft exactly when those are the same.

    Args:
        draft: the drafted tokens.
        draws: what was drawn behind the row's last token, and behind each drafted one: one more.
    """
    num_accepted = 0
    for guess, drawn in zip(draft, draws, strict=False):
        if guess != drawn:
            break
        num_accepted += 1
    return tuple(draws[1 : num_accepted + 1])
