"""The native library is built where there is a compiler, missed politely where there is none, and right on
every CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kernels.cpu.native
from engine.backends import Backends
from engine.config import EngineConfig
from engine.errors import ConfigError
from kernels.cpu import isa_name, native_library, why_absent

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "kernels" / "cpu" / "src"


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(kernels.cpu.native, "_load", lambda: "it was not built; install g++")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_it_is_there_where_there_is_a_compiler():
    assert native_library() is not None
    assert why_absent() is None
    assert isa_name() in ("baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")


def test_installing_without_a_compiler_succeeds(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(SOURCES, tmp_path / "kernels" / "cpu" / "src")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"CC": "/absent/cc", "CXX": "/absent/c++"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_it_xla_serves_and_says_so(no_library):
    backends = Backends.choose(EngineConfig(), "cpu")
    assert backends == ("xla", "xla")
    assert not backends.skips_padding
    line = backends.describe()
    assert "XLA" in line
    assert "install g++" in line
    assert "speed" in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["attention_backend", "linear_backend"])
def test_asked_for_by_name_it_is_never_replaced(no_library, name):
    asked: dict[str, Any] = {name: "cpu"}
    with pytest.raises(ConfigError, match=f"engine.{name}=cpu: it was not built; install g\\+\\+"):
        Backends.choose(EngineConfig(**asked), "cpu")


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_an_accelerator_has_kernels_of_its_own(platform):
    backends = Backends.choose(EngineConfig(), platform)
    assert backends == (f"pallas_{platform}", "xla")
    assert platform.upper() in backends.describe()
    asked = EngineConfig(attention_backend=f"pallas_{platform}")
    assert Backends.choose(asked, platform) == backends
    with pytest.raises(ConfigError, match=f"JAX runs on cpu, not on a {platform.upper()}; choose auto"):
        Backends.choose(asked, "cpu")
    with pytest.raises(ConfigError, match="does not run on a CPU"):
        Backends.choose(EngineConfig(attention_backend="cpu"), "gpu")


def test_pages_of_fp8_are_for_accelerators():
    narrow = EngineConfig(kv_dtype="float8_e4m3fn")
    for platform in ("tpu", "gpu"):
        assert Backends.choose(narrow, platform).attention == f"pallas_{platform}"
    with pytest.raises(ConfigError, match=r"engine\.kv_dtype=float8_e4m3fn: only kernels for TPUs and GPUs"):
        Backends.choose(narrow, "cpu")


@pytest.mark.parametrize(
    "isa", ["baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx", "amx-emulated"]
)
def test_every_instruction_set_of_this_cpu_is_right(isa, tmp_path):
    """Random calls, compared with plain loops: `make chaos` has more, with sanitizers."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    binary = _fuzz_binary(compiler, tmp_path.parent)
    done = subprocess.run(
        [binary, "7", "60"],
        env=os.environ | {"TIDEMILL_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used = done.stdout.partition(":")[0]
    if used != isa:
        pytest.skip(f"this CPU has no {isa}")


# Attention over int8 pages of random numbers; prints a digest of what comes out.
_INT8_ATTENTION = """
import hashlib, jax.numpy as jnp, numpy as np
from kernels.cpu import isa_name
from kernels.paged_attention import AttentionOptions, Groups, Rows, attend, page_layout
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((90, heads, 64)), jnp.float32) for heads in (6, 2, 2))
layout = page_layout("cpu", 2, 64, 64, "int8")
rows = Rows(jnp.array([0, 80, 90]), jnp.array([80, 10]), jnp.array([[0, 1], [2, 3]]))
out, _ = attend(q, k, v, layout.empty(4), rows, Groups.none(), AttentionOptions(scale=0.125), layout)
print(isa_name(), hashlib.sha256(np.asarray(out).tobytes()).hexdigest())
"""


def test_products_of_bytes_have_the_bits_of_products_of_floats():
    """The one instruction set multiplies bytes, the other the same whole numbers in float32."""
    names = ("avx512", "avx512vnni")
    printed = [
        subprocess.run(
            [sys.executable, "-c", _INT8_ATTENTION],
            cwd=REPOSITORY,
            env=os.environ | {"TIDEMILL_CPU_ISA": name, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for name in names
    ]
    if [name for name, _ in printed] != list(names):
        pytest.skip("this CPU has not both of them")
    assert printed[0][1] == printed[1][1]


def _fuzz_binary(compiler: str, folder: Path) -> Path:
    """Built once for all instruction sets; with the optimisation of the product, so its very code is
    tested."""
    binary = folder / "fuzz"
    if not binary.exists():
        sources = [str(path) for path in SOURCES.glob("*.cpp") if not path.stem.endswith("_ffi")]
        sources += [str(path) for path in (REPOSITORY / "tests" / "kernels" / "native").glob("*.cpp")]
        options = ["-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        options += ["-pthread"]
        subprocess.run([compiler, *options, f"-I{SOURCES}", "-o", str(binary), *sources], check=True)
    return binary
