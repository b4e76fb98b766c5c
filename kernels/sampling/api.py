"""The one entry to drawing tokens; a backend asked for by name is used or refused, never replaced."""

from __future__ import annotations

import jax

from kernels.cpu import native_library
from kernels.sampling import cpu, xla
from kernels.sampling.layout import Draws

_BACKENDS = {"xla": xla.draw, "cpu": cpu.draw}


def available_backends() -> tuple[str, ...]:
    """Names that `draw` accepts on this machine."""
    return tuple(name for name in _BACKENDS if name != "cpu" or native_library() is not None)


def draw(logits: jax.Array, draws: Draws, num_rows: jax.Array, backend: str) -> jax.Array:
    """One token a row: the argmax, or for rows with a temperature a draw from what the filters leave.

    A draw is the argmax of `logits / temperature` plus standard Gumbel noise whose key is the row's own
    (`jax.random.fold_in(key, position)`), over the tokens that min_p, then top_k, then top_p leave; of equal
    ones the first. A filter keeps every token as likely as the last one it has to keep.

    Args:
        logits: f32[L, V].
        draws: what each row is drawn with.
        num_rows: i32[], how many leading rows are wanted; the others' tokens are unspecified.
        backend: one of `available_backends()`. Backends agree up to the rounding of exp and log, which only
            matters where two tokens are that close.

    Returns:
        i32[L].

    Source: the Gumbel-max trick (Maddison et al. 2014), nucleus sampling (Holtzman et al. 2020).
    """
    if backend not in available_backends():
        raise ValueError(
            f"sampling backend {backend!r} does not exist here: {', '.join(available_backends())}"
        )
    return _BACKENDS[backend](logits, draws, num_rows)
