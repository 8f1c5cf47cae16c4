"""The KV write's GPU body, in Triton: a program stores one token's key and value of one head."""

import functools

import jax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.gpu_call import call
from pallas_kernels.paged_attention_inputs import PagedBlocks


def kv_write_gpu(
    keys: Array, values: Array, k: Array, v: Array, blocks: PagedBlocks, *, interpret: bool = False
) -> tuple[Array, Array]:
    """Pools `[P, K, p, h]` with the blocks' `[B, r, K, h]` written, in place.

    Raises ValueError for a head width that is no power of two, because Triton's arrays have such sizes only.
    """
    batch, r, num_kv_heads, h = k.shape
    if h & (h - 1):
        raise ValueError(
            f"the GPU's KV write takes head widths that are powers of two, got {h}: take implementation 'xla'"
        )
    operands = (blocks.tables, blocks.slots, blocks.starts, blocks.counts, k, v, keys, values)
    kernel = functools.partial(_kernel, page_size=keys.shape[2])
    out = [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (keys, values)]
    aliases = {len(operands) - 2: 0, len(operands) - 1: 1}
    grid = batch, r, num_kv_heads
    keys, values = call("kv_write_gpu", kernel, grid, out, *operands, interpret=interpret, warps=1, aliases=aliases)
    return keys, values


def _kernel(tables, slots, starts, counts, k, v, _keys, _values, keys, values, *, page_size: int) -> None:
    b, t, head = (pl.program_id(axis) for axis in range(3))

    @pl.when(t < counts[b])
    def _():
        position = starts[b] + t
        page = tables[slots[b], position // page_size]
        for pool, x in ((keys, k), (values, v)):
            pool[page, head, position % page_size] = x[b, t, head]
