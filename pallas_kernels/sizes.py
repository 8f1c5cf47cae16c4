"""Sizes of the matrix products' tiles, one table: keyed by device, dtype and the weights' geometry, never by batch.

The split along K is part of the result's bits, so it is here and nowhere else. Rows are always taken `rows` at a time,
at any M; how many such tiles share one fetched block of weights depends on M and changes no dot's shape. None of these
figures was measured on its device yet: they are what fits twice into on-chip memory and fills the matrix unit.
"""

import dataclasses

import numpy as np

from pallas_kernels.numbers import ceil_to

INTERPRETED = "interpreter"  # small tiles, so that small shapes in a test have several
LANES = 128  # the unit of a TPU's last axis
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
    columns: int
    depth: int
    shared_tiles: int  # row tiles that may share one fetched block of weights
    split: int  # GPU: inputs that one partial sum covers, a multiple of depth; partial sums are added in order


MATMUL = {
    ("TPU v5e", "bfloat16"): MatmulSizes(128, 512, 512, 4, 0),
    ("TPU v5e", "float32"): MatmulSizes(128, 256, 512, 4, 0),
    ("TPU v5p", "bfloat16"): MatmulSizes(128, 512, 512, 4, 0),
    ("TPU v5p", "float32"): MatmulSizes(128, 256, 512, 4, 0),
    ("TPU v6e", "bfloat16"): MatmulSizes(128, 512, 512, 8, 0),
    ("TPU v6e", "float32"): MatmulSizes(128, 256, 512, 8, 0),
    ("Hopper", "bfloat16"): MatmulSizes(64, 64, 64, 1, 512),
    ("Hopper", "float32"): MatmulSizes(32, 32, 32, 1, 512),
    (INTERPRETED, "bfloat16"): MatmulSizes(16, 128, 128, 2, 0),
    (INTERPRETED, "float32"): MatmulSizes(16, 128, 128, 2, 0),
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


def matmul_sizes(device: str, dtype: np.dtype, outputs: int, inputs: int) -> MatmulSizes:
    """Sizes for weights [outputs, inputs] of a dtype on a device of the table.

    A depth that divides K needs no mask, so the largest such depth is taken if it is at least half of the table's.
    Raises ValueError for a dtype without a row.
    """
    name = np.dtype(dtype).name
    if (device, name) not in MATMUL:
        allowed = " or ".join(dtype for kind, dtype in MATMUL if kind == device)
        raise ValueError(f"a matmul on {device} takes weights in {allowed}, got {name}")
    table = MATMUL[device, name]
    if device == "Hopper":
        return table
    depths = [d for d in range(table.depth, table.depth // 2 - 1, -LANES) if inputs % d == 0]
    depth = depths[0] if depths else min(table.depth, ceil_to(inputs, LANES))
    return dataclasses.replace(table, columns=min(table.columns, ceil_to(outputs, LANES)), depth=depth)
