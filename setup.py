"""Builds the native CPU kernels; everything else about the package is in pyproject.toml.

The extension is optional: without a C++ compiler the install succeeds, and the engine uses XLA's code and
says so.
"""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup


def native_kernels() -> list[Extension]:
    """One shared library; every instruction set is a source file of its own, chosen when it runs."""
    jaxlib = find_spec("jaxlib")
    if jaxlib is None or jaxlib.origin is None:
        return []  # built without isolation and without jaxlib, whose headers say how a kernel is called
    source = Path("kernels/cpu/src")
    return [
        Extension(
            "kernels.cpu._native",
            sources=sorted(str(path) for path in source.glob("*.cpp")),
            depends=sorted(str(path) for path in source.glob("*.h")),
            include_dirs=[str(source)],
            # Contraction makes each multiply-add one rounding; no other liberty with floating point is taken.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-isystem",
                str(Path(jaxlib.origin).parent / "include"),
            ],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=native_kernels())
