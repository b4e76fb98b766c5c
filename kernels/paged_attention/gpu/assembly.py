"""What became of the kernels: their PTX and launches as XLA wrote them, and what `ptxas` made of that."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kernels.paged_attention.gpu.targets import tool


@dataclass(frozen=True, slots=True)
class Assembled:
    """One kernel. Bytes of spills are a thread's, of shared memory a thread block's."""

    name: str
    threads: int
    registers: int
    spill_bytes: int
    """Stored to the stack and loaded from it, for want of registers."""
    shared_bytes: int
    products: int
    """Instructions of matrix products."""
    has_warp_groups: bool
    """Those are of warp groups (wgmma), and not of warps (mma)."""
    async_copies: int
    """Instructions that copy to shared memory while others compute."""


def assemble(folder: Path, architecture: str, prefix: str) -> list[Assembled]:
    """The kernels whose names begin with `prefix` of the one module that XLA dumped to `folder`, by name.

    Raises RuntimeError when there is none, or with what `ptxas` says when it fails.
    """
    shared = _shared_bytes(folder)
    found = []
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        name = re.search(rf"\.entry ({prefix}\w*)", text)
        if name is not None:
            found.append(_assembled(path, name[1], text, architecture, shared[name[1]]))
    if not found:
        raise RuntimeError(
            f"no kernel {prefix}* in the PTX files of {folder}; was it in a compilation cache?"
        )
    return sorted(found, key=lambda each: each.name)


def _assembled(path: Path, name: str, text: str, architecture: str, shared_bytes: int) -> Assembled:
    """A file has one kernel."""
    command = [str(tool("ptxas")), f"-arch={architecture}", "-v", "-o", "/dev/null", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return Assembled(
        name=name,
        threads=_number(r"\.reqntid (\d+)", text),
        registers=_number(r"Used (\d+) registers", done.stderr),
        spill_bytes=_number(r"(\d+) bytes spill stores", done.stderr)
        + _number(r"(\d+) bytes spill loads", done.stderr),
        shared_bytes=shared_bytes,
        products=len(re.findall(r"\bwgmma\.mma_async\.sync|\bmma\.sync", text)),
        has_warp_groups="wgmma.mma_async" in text,
        async_copies=len(re.findall(r"\bcp\.async\.c[ag]\.", text)),
    )


def _shared_bytes(folder: Path) -> dict[str, int]:
    """By kernel, as launched."""

    def launches() -> Iterator[tuple[str, int]]:
        for path in folder.glob("*.thunk_sequence.txt"):
            for name, size in re.findall(r"(\w+) grid: .*shared_memory: (\d+) bytes", path.read_text()):
                yield name, int(size)

    return dict(launches())


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern!r} is not in what ptxas or XLA wrote: {text[:500]}")
    return int(found[1])
