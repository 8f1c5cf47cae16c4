"""What a GPU's compiled program starts, one thing after the other, read from what XLA writes about it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

LINE = re.compile(r"^( *)\d+: (k\w+) +\[[^]]*\] *(\S*)", re.M)
# The last state comes first; where its passes change nothing, XLA writes the earlier one alone.
LISTINGS = "thunk_sequence_after_thunk_passes", "thunk_sequence"
BUFFER, LOOP, CONDITIONAL = "kCommandBuffer", "kWhile", "kConditional"


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One thing that is started, and what stands around it, the outermost first."""

    kind: str
    name: str
    inside: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GpuProgram:
    """A program's thunks, in XLA's order."""

    thunks: tuple[Thunk, ...]

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
        holds = (LOOP, CONDITIONAL)
        kernels = (t for t in self.thunks if t.kind not in (BUFFER, *holds) and not set(holds) & set(t.inside))
        return tuple(thunk.name or thunk.kind for thunk in kernels)

    def __str__(self) -> str:
        return (
            f"{self.pieces} pieces, {self.steered} steered by the host, {self.conditionals} conditionals, "
            f"{len(self.straight)} kernels in a row"
        )


def dumping(folder: str) -> dict[str, Any]:
    """Compiler options that make XLA write about a program into a folder."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def read(folder: str) -> GpuProgram:
    """The program that was compiled with `dumping(folder)`. Raises FileNotFoundError where there is none."""
    for listing in LISTINGS:
        for file in Path(folder).glob(f"*.{listing}.txt"):
            return parse(file.read_text())
    raise FileNotFoundError(f"XLA wrote about no GPU program in {folder}")


def parse(text: str) -> GpuProgram:
    """Thunks from XLA's listing: a line each, indented by what they are inside of."""
    thunks, around = [], []
    for indent, kind, name in LINE.findall(text):
        while around and around[-1][0] >= len(indent):
            around.pop()
        thunks.append(Thunk(kind, re.sub(r"__\d+$", "", name), tuple(outer for _, outer in around)))
        around.append((len(indent), kind))
    return GpuProgram(tuple(thunks))
