"""Sizes of paged attention's tiles, one table: keyed by device, dtype and head geometry, never by batch.

Tile and split lengths are part of the result's bits. The number of rows of a dot may be too (a GPU takes other
instructions for 16 rows than for 64), so one number serves decoding and prefill.
None of these figures was measured on its device yet: they are what fits twice into on-chip memory.
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

    @property
    def split(self) -> int:
        """Keys of one split."""
        return self.kv_tile * self.split_tiles


ATTENTION = {
    ("TPU v5e", "wide"): AttentionSizes(32, 128, 16),
    ("TPU v5e", "narrow"): AttentionSizes(32, 256, 8),
    ("TPU v5p", "wide"): AttentionSizes(32, 128, 16),
    ("TPU v5p", "narrow"): AttentionSizes(32, 256, 8),
    ("TPU v6e", "wide"): AttentionSizes(32, 128, 16),
    ("TPU v6e", "narrow"): AttentionSizes(32, 256, 8),
    ("Hopper", "wide"): AttentionSizes(64, 32, 32),
    ("Hopper", "narrow"): AttentionSizes(64, 64, 16),
    (INTERPRETED, "wide"): AttentionSizes(16, 32, 2),
    (INTERPRETED, "narrow"): AttentionSizes(16, 32, 2),
}
TPU_KEY_BYTES = 8 * 128 * 2  # of one position's keys, all heads: wider ones take the shorter tile
GPU_KEY_BYTES = 128 * 2  # of one head's key: a GPU's block takes one head


def attention_sizes(device: str, dtype: jnp.dtype, num_kv_heads: int, head_dim: int) -> AttentionSizes:
    """Sizes for a cache of that dtype and geometry on a device of the table."""
    head_bytes = jnp.dtype(dtype).itemsize * head_dim
    is_wide = head_bytes > GPU_KEY_BYTES if device == "Hopper" else head_bytes * num_kv_heads > TPU_KEY_BYTES
    return ATTENTION[device, "wide" if is_wide else "narrow"]
