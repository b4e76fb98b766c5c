"""Kernels for CPUs, in C++, called through XLA's foreign function interface."""

from kernels.cpu.native import isa_name, native_library, why_absent

__all__ = ["isa_name", "native_library", "why_absent"]
