"""Sizes of paged attention's tiles, one table: keyed by device, dtype and a head's width, never by batch.

Tile and split lengths are part of the result's bits. The number of rows of a dot may be too (a GPU takes other
instructions for 16 rows than for 64), so one number serves decoding and prefill. None of these figures was measured on
its device yet.

A TPU's are the same for all generations, and all are in the bits:
- kv_tile 256: two of the 128 lanes' width, so that the sums and maxima across lanes, which cost the same for each
  tile, are half of what 128 take, while a short context wastes 128 keys on average. It does not depend on the number of
  key-value heads, because a device of a mesh has a part of them and must have the same bits.
- split_tiles 8: 2,048 keys. Sums of that length are added in order, which bounds their rounding; splits could be spread
  over cores.
- rows 32: two packed tiles of bfloat16. Decoding fills few of them, and they cost the matrix unit about the time in
  which it loads the keys; prefill wants more.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.sizes import INTERPRETED


@dataclasses.dataclass(frozen=True)
class AttentionSizes:
    """One dot is [rows, h] x [kv_tile, h]."""

    rows: int  # queries (token and head of a group) of one key-value head, padded to a multiple of this
    kv_tile: int  # keys of one tile, a multiple of the page size
    split_tiles: int  # tiles of one split

    def in_bits(self) -> dict[str, int]:
        """The figures that a result's bits depend on: all."""
        return dataclasses.asdict(self)

    @property
    def split(self) -> int:
        """Keys of one split."""
        return self.kv_tile * self.split_tiles


ATTENTION = {
    ("TPU v5e", "any"): AttentionSizes(32, 256, 8),
    ("TPU v5p", "any"): AttentionSizes(32, 256, 8),
    ("TPU v6e", "any"): AttentionSizes(32, 256, 8),
    ("Hopper", "wide"): AttentionSizes(64, 32, 32),
    ("Hopper", "narrow"): AttentionSizes(64, 64, 16),
    (INTERPRETED, "any"): AttentionSizes(16, 32, 2),
}
GPU_KEY_BYTES = 128 * 2  # of one head's key: a GPU's block takes one head, and wider ones take the shorter tile


def attention_sizes(device: str, dtype: jnp.dtype, head_dim: int) -> AttentionSizes:
    """Sizes for a cache of that dtype and heads of that width on a device of the table."""
    if device != "Hopper":
        return ATTENTION[device, "any"]
    return ATTENTION[device, "wide" if jnp.dtype(dtype).itemsize * head_dim > GPU_KEY_BYTES else "narrow"]
