"""Sizes of the matrix products' tiles, one table: keyed by device, dtype and the weights' geometry, never by batch.

How a sum along K is cut is part of its bits, so it is here and nowhere else, and settled: who changes `depth` or
`split` changes every logprob. All other figures are free. None was measured on its device yet.

A TPU's, and why:
- depth 1024, in the bits. Most widths of models (1024, 2048, 3072, 4096, 5120, ...) are multiples of it or of a number
  down to its half, so that nothing is masked; and a longer dot leaves its sum in the matrix unit, where a shorter one
  goes through VMEM more often.
- rows 128, v6e 256 (its matrix unit is 256 wide). Decoding pads to so many, which costs no time as long as their
  arithmetic takes less than the fetch of the weights. That allows 240 rows on v5e, 166 on v5p, 560 on v6e (bfloat16
  flops over bytes a second). Rows are always taken so many at a time, at any M, because nothing proves yet that a
  compiler adds along K alike for other shapes.
- block_bytes 2 MiB, v5p 4 MiB. It takes v5e 2.6 µs to fetch them, v5p 1.5, v6e 1.3; a grid step costs some 0.35 µs by
  itself. A product begins with the fetch of a block that nothing hides, so more would be less for small models.
  float32 on v5p takes 2 MiB too, because its six passes of bfloat16 make the code long to compile.
- columns: as many as make block_bytes, up to 2048 of all parts, for the sums that stay in VMEM.
- shared_tiles 4: 512 rows, v6e 1024, for each weight that is fetched, so that a long prefill is bound by arithmetic.
- vmem: three quarters of VMEM (128, 64 and 128 MiB); the compiler takes the rest.
"""

import dataclasses

import numpy as np

from pallas_kernels.numbers import cdiv, ceil_to

INTERPRETED = "interpreter"  # small tiles, so that small shapes in a test have several
LANES = 128  # the unit of a TPU's last axis
MIB = 2**20
PROCESSORS = 132  # of an H100; a grid of fewer programs leaves some idle
VOCAB_BLOCK = 128  # token ids that a draw takes together; it decides which token a key draws

# What a device calls itself -> (platform, row of the table).
FAMILIES = {
    "TPU v5 lite": ("tpu", "TPU v5e"),
    "TPU v5e": ("tpu", "TPU v5e"),
    "TPU v5": ("tpu", "TPU v5p"),
    "TPU v5p": ("tpu", "TPU v5p"),
    "TPU v6 lite": ("tpu", "TPU v6e"),
    "TPU v6e": ("tpu", "TPU v6e"),
    "NVIDIA H100": ("gpu", "Hopper"),
    "NVIDIA H200": ("gpu", "Hopper"),
    "NVIDIA GH200": ("gpu", "Hopper"),
}


@dataclasses.dataclass(frozen=True)
class MatmulSizes:
    """One dot is [rows, depth] x [columns, depth]; the results of the dots along K are added one after the other."""

    rows: int
    columns: int  # in the table: of all parts (gates and ups) together, at most
    depth: int
    shared_tiles: int  # row tiles that may share one fetched block of weights
    split: int = 0  # GPU: inputs that one partial sum covers, a multiple of depth; partial sums are added in order
    block_bytes: int = 0  # TPU: of the weights that one grid step fetches, at least
    vmem: int = 0  # TPU: bytes that a kernel may take of it

    def in_bits(self) -> dict[str, int]:
        """The figures that a result's bits depend on, or may: nothing proves that rows are free."""
        return {name: getattr(self, name) for name in ("rows", "depth", "split")}


MATMUL = {
    ("TPU v5e", "bfloat16"): MatmulSizes(128, 2048, 1024, 4, block_bytes=2 * MIB, vmem=96 * MIB),
    ("TPU v5e", "float32"): MatmulSizes(128, 2048, 1024, 4, block_bytes=2 * MIB, vmem=96 * MIB),
    ("TPU v5p", "bfloat16"): MatmulSizes(128, 2048, 1024, 4, block_bytes=4 * MIB, vmem=48 * MIB),
    ("TPU v5p", "float32"): MatmulSizes(128, 2048, 1024, 4, block_bytes=2 * MIB, vmem=48 * MIB),
    ("TPU v6e", "bfloat16"): MatmulSizes(256, 2048, 1024, 4, block_bytes=2 * MIB, vmem=96 * MIB),
    ("TPU v6e", "float32"): MatmulSizes(256, 2048, 1024, 4, block_bytes=2 * MIB, vmem=96 * MIB),
    ("Hopper", "bfloat16"): MatmulSizes(64, 64, 64, 1, 512),
    ("Hopper", "float32"): MatmulSizes(32, 32, 32, 1, 512),
    (INTERPRETED, "bfloat16"): MatmulSizes(16, 128, 128, 2, vmem=48 * MIB),
    (INTERPRETED, "float32"): MatmulSizes(16, 128, 128, 2, vmem=48 * MIB),
}


def device_family(kind: str) -> tuple[str, str]:
    """(platform, row of the table) of a device kind. Raises ValueError where the table has no such row."""
    names = [name for name in FAMILIES if kind == name or (name.startswith("NVIDIA") and kind.startswith(f"{name} "))]
    if not names:
        raise ValueError(
            f"no block sizes for device {kind!r}; there are some for {', '.join(FAMILIES)}. Take implementation 'xla', "
            "or add the device to pallas_kernels/sizes.py"
        )
    return FAMILIES[names[0]]


def matmul_sizes(device: str, dtype: np.dtype, outputs: int, inputs: int, parts: int = 1) -> MatmulSizes:
    """Sizes for weights [parts, outputs, inputs] of a dtype on a device of the table.

    A depth that divides K needs no mask, so the largest such depth is taken if it is at least half of the table's, else
    one with as many steps as the table's and the least masked.
    The outputs are cut into blocks of about equal widths, as many as there are with block_bytes or more each. Raises
    ValueError for a dtype without a row.
    """
    name = np.dtype(dtype).name
    if (device, name) not in MATMUL:
        allowed = " or ".join(dtype for kind, dtype in MATMUL if kind == device)
        raise ValueError(f"a matmul on {device} takes weights in {allowed}, got {name}")
    table = MATMUL[device, name]
    if device == "Hopper":
        return table
    depths = [d for d in range(table.depth, table.depth // 2 - 1, -LANES) if inputs % d == 0]
    depth = depths[0] if depths else ceil_to(cdiv(inputs, cdiv(inputs, table.depth)), LANES)
    column_bytes = parts * depth * np.dtype(dtype).itemsize
    num_blocks = max(1, outputs * column_bytes // max(1, table.block_bytes))
    columns = min(ceil_to(cdiv(outputs, num_blocks), LANES), max(LANES, table.columns // parts))
    return dataclasses.replace(table, columns=columns, depth=depth)
