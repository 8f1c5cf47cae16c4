"""The KV write's TPU body: it reads the memory tile of a token, replaces the token's row, and writes the tile back.

A TPU copies whole memory tiles (8 rows of 32 bits, 16 of 16, 32 of 8). Many copies run at once, and two blocks whose
tokens share a tile must not undo each other. So each of them writes the tokens of all blocks in the tile: the same
bits, in whatever order the copies end.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from pallas_kernels.numbers import cdiv
from pallas_kernels.paged_attention_inputs import PagedBlocks
from pallas_kernels.paged_attention_tpu_pages import SUBLANE_BYTES, check_pool

AT_ONCE = 8  # tiles that one grid step copies


def kv_write_tpu(
    keys: Array, values: Array, k: Array, v: Array, blocks: PagedBlocks, *, interpret: Any = False
) -> tuple[Array, Array]:
    """Pools `[P, K, p, h]` with the blocks' `[B, r, K, h]` written, in place."""
    return write_rows(keys, values, jnp.concatenate([k, v], axis=2), blocks, interpret=interpret)


def write_rows(
    keys: Array, values: Array, new: Array, blocks: PagedBlocks, *, interpret: Any = False
) -> tuple[Array, Array]:
    """Pools `[P, K, p, h]` with the blocks' keys, then their values, `[B, r, 2K, h]` written, in place. There are only
    the grid steps that blocks before `num_blocks` need.

    Raises ValueError for pools that a TPU cannot copy tile by tile (paged_attention_tpu.check_pool).
    """
    _, num_kv_heads, page_size, h = keys.shape
    check_pool(keys, interpret)
    height = SUBLANE_BYTES // keys.dtype.itemsize
    tiles_of_block = cdiv(new.shape[1] - 1, height) + 1
    touched = _touched(blocks, tiles_of_block, height)
    owners, tokens, is_new = _tokens_of_tiles(blocks, touched, height)
    rows = new[owners, tokens].swapaxes(1, 2)  # [E, 2K, height, h]
    columns = jnp.minimum(touched.tiles * height // page_size, blocks.tables.shape[1] - 1)
    pages, offsets = blocks.tables[touched.slots, columns], touched.tiles * height % page_size
    flags = touched.used.astype(jnp.int32), is_new.astype(jnp.int32)[..., None]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    buffer = pltpu.VMEM((AT_ONCE, num_kv_heads, height, h), keys.dtype)
    operands = (pages, offsets, *flags, rows, keys, values)
    keys, values = pl.pallas_call(
        _kernel,
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (keys, values)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cdiv(blocks.num_blocks * tiles_of_block, AT_ONCE),),
            in_specs=[_of_tiles(height, 1), _of_tiles(*rows.shape[1:]), anywhere, anywhere],
            out_specs=[anywhere, anywhere],
            scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={len(operands) - 2: 0, len(operands) - 1: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), has_side_effects=True),
        name="kv_write_tpu",
        interpret=interpret,
    )(*operands)
    return keys, values


def _of_tiles(*shape: int) -> pl.BlockSpec:
    """AT_ONCE arrays of that shape, one a tile, for each grid step."""
    return pl.BlockSpec((AT_ONCE, *shape), lambda i, *_: (i,) + (0,) * len(shape))


class _Touched(NamedTuple):
    """Every memory tile that a block may touch."""

    slots: Int[Array, " E"]
    tiles: Int[Array, " E"]  # of the slot's sequence
    used: Bool[Array, " E"]  # whether the block has a token in it


def _touched(blocks: PagedBlocks, most: int, height: int) -> _Touched:
    """The tiles of all blocks, at `most` so many each, padded to a multiple of AT_ONCE."""
    tiles = (blocks.starts // height)[:, None] + jnp.arange(most)
    used = (tiles * height < (blocks.starts + blocks.counts)[:, None]) & (blocks.counts > 0)[:, None]
    flat = (jnp.repeat(blocks.slots, most), tiles.reshape(-1), used.reshape(-1))
    return _Touched(*(jnp.pad(x, (0, -x.shape[0] % AT_ONCE)) for x in flat))


def _tokens_of_tiles(
    blocks: PagedBlocks, touched: _Touched, height: int
) -> tuple[Array, Array, Bool[Array, "E height"]]:
    """(block, token of the block, whether there is such a token) for every row of the tiles."""
    positions = (touched.tiles[:, None] * height + jnp.arange(height))[..., None]
    same_slot = blocks.slots == touched.slots[:, None, None]
    holds = same_slot & (positions >= blocks.starts) & (positions < blocks.starts + blocks.counts)
    owners = holds.argmax(-1)
    new = holds.any(-1)
    return owners, jnp.where(new, positions[..., 0] - blocks.starts[owners], 0), new


class _Side(NamedTuple):
    """Refs of the keys or of the values."""

    pool: Any
    buffer: Any  # the tiles of this grid step
    first: int  # of its heads among the new rows'


def _kernel(pages, offsets, used, new, rows, _keys, _values, keys, values, key_buffer, value_buffer, semaphore) -> None:
    """`_keys` and `_values` are the same memory as `keys` and `values`."""
    first, (heads, height) = pl.program_id(0) * AT_ONCE, key_buffer.shape[1:3]
    sides = (_Side(keys, key_buffer, 0), _Side(values, value_buffer, heads))

    def each_used(body):
        def one(e, _):
            pl.when(used[first + e] > 0)(functools.partial(body, e))
            return 0

        jax.lax.fori_loop(0, AT_ONCE, one, 0)

    def tile(pool, e):
        return pool.at[pages[first + e], :, pl.ds(pl.multiple_of(offsets[first + e], height), height)]

    def reads(e):
        return [pltpu.make_async_copy(tile(side.pool, e), side.buffer.at[e], semaphore) for side in sides]

    def writes(e):
        return [pltpu.make_async_copy(side.buffer.at[e], tile(side.pool, e), semaphore) for side in sides]

    def start(copies, e):
        for copy in copies(e):
            copy.start()

    def wait(copies, e):
        for copy in copies(e):
            copy.wait()

    def replace(e):
        for side in sides:
            own = rows[e, side.first : side.first + heads]
            side.buffer[e] = jnp.where(new[e][None] > 0, own, side.buffer[e])

    each_used(functools.partial(start, reads))
    each_used(functools.partial(wait, reads))
    each_used(replace)
    each_used(functools.partial(start, writes))
    each_used(functools.partial(wait, writes))
