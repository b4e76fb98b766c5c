"""What became of the kernels: their PTX as XLA wrote it down, and what `ptxas` made of that."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kernels.paged_attention.gpu.targets import tool


@dataclass(frozen=True, slots=True)
class Assembled:
    """One kernel. Bytes of stack and spills are a thread's."""

    name: str
    threads: int
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    num_products: int
    """Instructions of matrix products, of a warp or of a warp group."""
    has_warp_group_products: bool
    num_async_copies: int
    """Instructions that copy to shared memory while others compute."""


def assemble(folder: Path, architecture: str, prefix: str) -> list[Assembled]:
    """The kernels whose names begin with `prefix` of all PTX files in `folder`, in the order of their names.

    Raises RuntimeError when there is none, or with what `ptxas` says when it fails.
    """
    found = [each for path in sorted(folder.glob("*.ptx")) for each in _assembled(path, architecture, prefix)]
    if not found:
        raise RuntimeError(f"no kernel {prefix}* in the PTX files of {folder}: {sorted(folder.iterdir())[:5]}")
    return sorted(found, key=lambda each: each.name)


def _assembled(path: Path, architecture: str, prefix: str) -> Iterator[Assembled]:
    text = path.read_text()
    bodies = dict(_entries(text))
    if not any(name.startswith(prefix) for name in bodies):
        return
    command = [str(tool("ptxas")), f"-arch={architecture}", "-v", "-o", "/dev/null", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    for report in re.split(r"(?=Compiling entry function)", done.stderr):
        name = re.match(r"Compiling entry function '(\w+)'", report)
        if name is None or not name[1].startswith(prefix):
            continue
        body = bodies[name[1]]
        yield Assembled(
            name=name[1],
            threads=_number(r"\.(?:reqntid|maxntid) (\d+)", body),
            registers=_number(r"Used (\d+) registers", report),
            stack_bytes=_number(r"(\d+) bytes stack frame", report),
            spill_store_bytes=_number(r"(\d+) bytes spill stores", report),
            spill_load_bytes=_number(r"(\d+) bytes spill loads", report),
            num_products=len(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync", body)),
            has_warp_group_products="wgmma.mma_async" in body,
            num_async_copies=len(re.findall(r"\bcp\.async\.(?:ca|cg)\.", body)),
        )


def _entries(text: str) -> Iterator[tuple[str, str]]:
    """Each kernel's name and all that belongs to it."""
    for part in re.split(r"(?=\.entry )", text)[1:]:
        yield part.split("(", 1)[0].removeprefix(".entry").strip(), part


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern!r} is not in what ptxas or XLA wrote: {text[:500]}")
    return int(found[1])
