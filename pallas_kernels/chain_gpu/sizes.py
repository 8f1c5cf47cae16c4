"""What is in the bits of the chain's kernels, and why; and what is free. None was measured on its device yet."""

import dataclasses
from typing import NamedTuple

import numpy as np

from pallas_kernels.numbers import cdiv
from pallas_kernels.sizes import INTERPRETED, PROCESSORS

DECODE_ROWS = 16  # of attention; of a prefill's too in float32, which has no wgmma, so that a dot takes registers
ATTEND_SUMS = 8192  # rows times width: 64 registers of a thread, because there is a split's sum and that of all splits


@dataclasses.dataclass(frozen=True)
class ChainSizes:
    """Lengths along reduced axes, and the columns of a tile, by which `split_of` decides; the rest is free."""

    depth: int  # of one dot along K: a row of 128 bytes, what a wgmma's swizzle takes whole
    split: int  # of K that one partial sum covers, where columns alone do not fill the processors
    kv_tile: int  # keys of one dot: a wgmma's 64 rows
    kv_split: int  # keys of one split: at a context of 8k, 16 programs a head
    columns: int  # of the weights: a wgmma's 64 rows
    warps: int
    stages: int
    attend_rows: int  # most pairs of a token and a head that a program of a prefill's attention takes

    def in_bits(self) -> dict[str, int]:
        """The figures that a result's bits depend on."""
        return {name: getattr(self, name) for name in ("depth", "split", "kv_tile", "kv_split", "columns")}


CHAIN = {
    ("Hopper", "bfloat16"): ChainSizes(64, 1024, 64, 512, 64, 4, 4, 128),
    ("Hopper", "float32"): ChainSizes(32, 1024, 32, 512, 32, 4, 3, DECODE_ROWS),
    (INTERPRETED, "bfloat16"): ChainSizes(64, 128, 32, 64, 64, 4, 2, 128),
    (INTERPRETED, "float32"): ChainSizes(64, 128, 32, 64, 64, 4, 2, 128),
}

SHARED_BYTES = 220 * 1024  # of a program's shared memory, for blocks: it may have 227 KiB, and Triton wants some


def chain_sizes(device: str, dtype: np.dtype) -> ChainSizes:
    """The row of the table. Raises ValueError for a dtype without one."""
    name = np.dtype(dtype).name
    if (device, name) not in CHAIN:
        allowed = " or ".join(dtype for kind, dtype in CHAIN if kind == device)
        raise ValueError(f"the chain of kernels on {device} takes weights in {allowed}, got {name}")
    return CHAIN[device, name]


def split_of(sizes: ChainSizes, outputs: int, inputs: int) -> int:
    """How much of K one partial sum covers, by the weight alone.

    All of it where the columns fill the processors by themselves: a second accumulator would only take registers.
    """
    whole = cdiv(inputs, sizes.depth) * sizes.depth
    fills = cdiv(outputs, sizes.columns) >= PROCESSORS
    return whole if fills or inputs <= sizes.split else sizes.split


def row_tile(num_rows: int) -> int:
    """Rows of one dot: free, because they are the n of a wgmma (16, 64 or 128), not its m."""
    return 16 if num_rows <= 32 else 64 if num_rows <= 64 else 128


class AttendSizes(NamedTuple):
    """What is free in attention."""

    rows: int  # pairs of a token and a head that a program takes
    warps: int
    stages: int


def attend_sizes(sizes: ChainSizes, r: int, group: int, width: int) -> AttendSizes:
    """For blocks of r tokens, and pages of that width.

    A prefill's program takes 128 rows, so that keys are read for many at once, or as many as registers hold the sums
    of. Never fewer for a smaller step: a proof's steps are small, and what it proves has to be what serves.
    """
    if r == 1:
        return AttendSizes(row_tile(group), 4, 2)
    if sizes.attend_rows == DECODE_ROWS:
        return AttendSizes(DECODE_ROWS, 4, 2)
    return AttendSizes(min(sizes.attend_rows, ATTEND_SUMS // width), 8, 5)


def stages_of(sizes: ChainSizes, rows: int, itemsize: int) -> int:
    """Steps along K whose blocks are fetched ahead: free, and as many as shared memory holds.

    `rows` are those of all parts of x. The head's three parts at 128 rows leave room for one less than the table says.
    """
    return min(sizes.stages, SHARED_BYTES // ((rows + sizes.columns) * sizes.depth * itemsize))
