"""Loads the native library once and registers what it offers with XLA.

The library is built with the package (setup.py). It is absent where there was no C++ compiler; then the XLA
code of each operation serves, at a cost that the engine names.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

import jax

# The handlers of the library, by the name XLA calls them with.
_TARGETS = (
    "tidemill_attention",
    "tidemill_linear",
    "tidemill_sampling",
    "tidemill_uninitialized",
    "tidemill_copy_items",
)


@cache
def _load() -> ctypes.CDLL | str:
    """The library with its handlers registered, or why there is none."""
    spec = find_spec("kernels.cpu._native")
    if spec is None or spec.origin is None:
        return "the package was built without a C++ compiler; install g++ or clang and reinstall tidemill"
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return f"{spec.origin} cannot be loaded ({error}); reinstall tidemill on this machine"
    library.tidemill_isa.restype = ctypes.c_char_p
    for target in _TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return library


def native_library() -> ctypes.CDLL | None:
    """The loaded library, or None where the package has none (`why_absent` tells why)."""
    library = _load()
    return None if isinstance(library, str) else library


def why_absent() -> str | None:
    """Why there is no native library, and what to do about it; None when there is one."""
    library = _load()
    return library if isinstance(library, str) else None


def isa_name() -> str | None:
    """The instruction set in use ("amx", "avx512bf16", "avx512vnni", "avx512", "avx2" or "baseline"); None
    without the library.

    The environment's TIDEMILL_CPU_ISA, read once, asks for a lesser one that this CPU has too, or for
    "amx-emulated", what runs on AMX with its tiles in memory: for tests, and slow.
    """
    library = native_library()
    return None if library is None else library.tidemill_isa().decode()
