"""What a GPU's compiled program starts, one thing after the other, read from what XLA writes about it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from sharding.gpu_kernels import GpuKernel, kernels_of

LINE = re.compile(r"^( *)\d+: (k\w+) +\[[^]]*\] *(\S*)(?:.* shared_memory: (\d+))?", re.M)
# The last state comes first; where its passes change nothing, XLA writes the earlier one alone.
LISTINGS = "thunk_sequence_after_thunk_passes", "thunk_sequence"
BUFFER, LOOP, CONDITIONAL = "kCommandBuffer", "kWhile", "kConditional"
FRAMES = BUFFER, LOOP, CONDITIONAL, "kAsyncStart", "kAsyncDone"  # around what is launched, or after it


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One thing that is started, and what stands around it, the outermost first."""

    kind: str
    symbol: str  # a kernel's name in the PTX
    inside: tuple[str, ...]
    shared: int  # bytes that a kernel's blocks are given beside what their code declares

    @property
    def name(self) -> str:
        """A kernel's name, or its kind; kernels of one name that differ have numbers in their symbols alone."""
        return re.sub(r"__\d+$", "", self.symbol) or self.kind

    @property
    def is_launch(self) -> bool:
        """Whether it is no frame around others."""
        return self.kind not in FRAMES


@dataclasses.dataclass(frozen=True)
class GpuProgram:
    """A program's thunks, in XLA's order, and each of its kernels once, but for Mosaic's, of which it says nothing."""

    thunks: tuple[Thunk, ...]
    kernels: tuple[GpuKernel, ...] = ()

    @property
    def launches(self) -> int:
        """Kernels, copies and collectives; those of a loop's body once."""
        return sum(thunk.is_launch for thunk in self.thunks)

    @property
    def pieces(self) -> int:
        """What the host starts: 1 where the whole program is one command buffer."""
        return sum(not thunk.inside for thunk in self.thunks)

    @property
    def steered(self) -> int:
        """Loops and conditionals outside command buffers, which the host waits for."""
        return sum(thunk.kind in (LOOP, CONDITIONAL) and BUFFER not in thunk.inside for thunk in self.thunks)

    @property
    def conditionals(self) -> int:
        """Wherever they stand."""
        return sum(thunk.kind == CONDITIONAL for thunk in self.thunks)

    @property
    def straight(self) -> tuple[str, ...]:
        """Names of kernels that run whatever the data: inside no loop and no conditional."""
        kernels = (t for t in self.thunks if t.is_launch and not {LOOP, CONDITIONAL} & set(t.inside))
        return tuple(thunk.name for thunk in kernels)

    def __str__(self) -> str:
        return (
            f"{self.pieces} pieces, {self.steered} steered by the host, {self.conditionals} conditionals, "
            f"{len(self.straight)} kernels in a row; {_in_words(self.kernels)}"
        )


def dumping(folder: str) -> dict[str, Any]:
    """Compiler options that make XLA write about a program into a folder."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def read(folder: str) -> GpuProgram:
    """The program that was compiled with `dumping(folder)`.

    Raises FileNotFoundError where there is none, and as kernels_of does.
    """
    for listing in LISTINGS:
        for file in Path(folder).glob(f"*.{listing}.txt"):
            program, kernels = parse(file.read_text()), kernels_of(sorted(Path(folder).glob("*.ptx")))
            given = {thunk.symbol: thunk.shared for thunk in program.thunks}
            whole = (dataclasses.replace(k, shared=k.shared + given.get(k.symbol, 0)) for k in kernels)
            return dataclasses.replace(program, kernels=tuple(whole))
    raise FileNotFoundError(f"XLA wrote about no GPU program in {folder}")


def parse(text: str) -> GpuProgram:
    """Thunks from XLA's listing: a line each, indented by what they are inside of."""
    thunks, around = [], []
    for indent, kind, symbol, shared in LINE.findall(text):
        while around and around[-1][0] >= len(indent):
            around.pop()
        thunks.append(Thunk(kind, symbol, tuple(outer for _, outer in around), int(shared or 0)))
        around.append((len(indent), kind))
    return GpuProgram(tuple(thunks))


def _in_words(kernels: tuple[GpuKernel, ...]) -> str:
    if not kernels:
        return "XLA wrote no PTX"
    registers, shared = (max(getattr(k, name) for k in kernels) for name in ("registers", "shared"))
    spilled, atomics = sum(k.spilled for k in kernels), sum(k.float_atomics for k in kernels)
    return f"at most {registers} registers and {shared} B shared, {spilled} B spilled, {atomics} float atomics"
