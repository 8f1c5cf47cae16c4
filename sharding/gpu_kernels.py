"""Kernels of a GPU's compiled program: what NVIDIA's assembler makes of them, and what their PTX says about bits.

Instructions are those of the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

FLOAT = r"(?:f16|bf16|f32|f64)"
BEGIN = r"(?:^|[;{])\s*(?:@!?%\w+\s+)?"  # of an instruction: Triton's assembly has several a line, some with predicates
# An operation that the hardware has no atomic for is written as a loop around `cas`, whatever its type.
ATOMIC = re.compile(rf"{BEGIN}(?:atom|red|multimem\.red|cp\.reduce)\.\S*?(?:\.{FLOAT}|\.cas\.)", re.M)
FUSED = re.compile(rf"{BEGIN}(?:fma|mad)\.\S*?{FLOAT}", re.M)
UNPINNED = re.compile(rf"{BEGIN}(?:add|sub|mul)\.(?:ftz\.|sat\.)*{FLOAT}", re.M)
# What `ptxas -v` says of a kernel, in four lines.
COMPILED = re.compile(r"entry function '(\S+)'.*\n.*\n.*?(\d+) bytes spill stores.*\n.*Used (\d+) registers(.*)")


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """A kernel, Pallas' or XLA's own."""

    symbol: str  # its name in the PTX
    registers: int  # of a thread
    spilled: int  # bytes of a thread that found no register and are written to memory
    shared: int  # bytes of a block
    float_atomics: int  # instructions whose order is the hardware's: float ones, and any compare and swap
    fused: int  # multiplications and additions that are rounded once: libdevice's own, or contracted by LLVM
    unpinned: int  # float additions and multiplications that name no rounding, so that the assembler may fuse them


def kernels_of(files: Iterable[Path]) -> tuple[GpuKernel, ...]:
    """The kernels of PTX files, in the files' order.

    Raises FileNotFoundError where there is no assembler, and ValueError with its words where it refuses a file.
    """
    return tuple(kernel for file in files for kernel in _kernels(file))


def _kernels(file: Path) -> tuple[GpuKernel, ...]:
    """Of one file: several at once would be linked, and constants of XLA's have the same names in many.

    An empty one, which XLA writes where there are no constants, has none.
    """
    ptx = file.read_text()
    if not ptx:
        return ()
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.M)
    command = [assembler(), "-v", f"-arch={target}", "-o", "/dev/null", str(file)]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"ptxas refuses a kernel: {found.stderr}")
    return parse(found.stderr, ptx)


@functools.cache
def assembler() -> str:
    """The path of ptxas, of the CUDA packages that JAX uses or else the machine's.

    Raises FileNotFoundError where there is none.
    """
    packages = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    folders = [f"{folder}/bin" for folder in packages.submodule_search_locations or ()] if packages else []
    found = shutil.which("ptxas", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        raise FileNotFoundError("no ptxas here, which says what registers a kernel takes: pip install 'jax[cuda13]'")
    return found


def parse(said: str, ptx: str) -> tuple[GpuKernel, ...]:
    """Kernels from what `ptxas -v` says of a PTX text, and from that text."""
    _, *entries = re.split(r"^.*\.entry ", ptx, flags=re.M)
    bodies = {entry[: entry.index("(")]: entry for entry in entries}
    return tuple(_kernel(*found, body=bodies[found[0]]) for found in COMPILED.findall(said))


def _kernel(symbol: str, spilled: str, registers: str, rest: str, body: str) -> GpuKernel:
    shared = re.search(r"(\d+) bytes smem", rest)
    counts = (len(kind.findall(body)) for kind in (ATOMIC, FUSED, UNPINNED))
    return GpuKernel(symbol, int(registers), int(spilled), int(shared[1]) if shared else 0, *counts)
