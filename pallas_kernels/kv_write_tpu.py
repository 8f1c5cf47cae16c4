"""The KV write's TPU body: the memory tile that a token lies in is read, the token's row replaced, and the tile written back.

A TPU copies whole memory tiles (8 rows of 32 bits, 16 of 16, 32 of 8). Many are under way at once, so two blocks whose tokens share a tile
must not undo each other: each writes the tokens of all blocks that lie in the tile, hence the same bits, in whatever order.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Int

from pallas_kernels.paged_attention_inputs import PagedBlocks
from pallas_kernels.paged_attention_tpu import SUBLANE_BYTES, check_pool

AT_ONCE = 8  # tiles under way


def kv_write_tpu(
    keys: Array, values: Array, k: Array, v: Array, blocks: PagedBlocks, *, interpret: bool = False
) -> tuple[Array, Array]:
    """Pools `[P, K, p, h]` with the blocks' `[B, r, K, h]` written, in place.

    Raises ValueError for pools that a TPU cannot copy tile by tile (paged_attention_tpu.check_pool).
    """
    _, num_kv_heads, page_size, h = keys.shape
    check_pool(keys, interpret)
    height = SUBLANE_BYTES // keys.dtype.itemsize
    slots, tiles, used = _touched(blocks, k.shape[1], height)
    owners, tokens, new = _tokens_of_tiles(blocks, slots, tiles, height)
    rows = [x[owners, tokens].swapaxes(1, 2) for x in (k, v)]  # [E, K, height, h]
    pages = blocks.tables[slots, jnp.minimum(tiles * height // page_size, blocks.tables.shape[1] - 1)]
    of_tiles = lambda shape: pl.BlockSpec((AT_ONCE, *shape), lambda i, *_: (i,) + (0,) * len(shape))
    buffer = pltpu.VMEM((AT_ONCE, num_kv_heads, height, h), keys.dtype)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    keys, values = pl.pallas_call(
        _kernel,
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (keys, values)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(slots.shape[0] // AT_ONCE,),
            in_specs=[of_tiles((height, 1)), *[of_tiles(rows[0].shape[1:])] * 2, anywhere, anywhere],
            out_specs=[anywhere, anywhere],
            scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={6: 0, 7: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), has_side_effects=True),
        name="kv_write_tpu",
        interpret=interpret,
    )(pages, tiles * height % page_size, used.astype(jnp.int32), new.astype(jnp.int32)[..., None], *rows, keys, values)
    return keys, values


def _touched(blocks: PagedBlocks, r: int, height: int) -> tuple[Int[Array, " E"], Int[Array, " E"], Bool[Array, " E"]]:
    """(slot, tile of its sequence, whether it is one) for every memory tile that a block may touch, padded to a multiple of AT_ONCE."""
    most = (r + height - 2) // height + 1
    tiles = (blocks.starts // height)[:, None] + jnp.arange(most)
    used = (tiles * height < (blocks.starts + blocks.counts)[:, None]) & (blocks.counts > 0)[:, None]
    flat = (jnp.repeat(blocks.slots, most), tiles.reshape(-1), used.reshape(-1))
    return tuple(jnp.pad(x, (0, -x.shape[0] % AT_ONCE)) for x in flat)  # pyright: ignore


def _tokens_of_tiles(
    blocks: PagedBlocks, slots: Array, tiles: Array, height: int
) -> tuple[Array, Array, Bool[Array, "E height"]]:
    """(block, token of the block, whether there is one) for every row of the tiles."""
    positions = (tiles[:, None] * height + jnp.arange(height))[..., None]
    holds = (
        (blocks.slots == slots[:, None, None])
        & (positions >= blocks.starts)
        & (positions < blocks.starts + blocks.counts)
    )
    owners = holds.argmax(-1)
    new = holds.any(-1)
    return owners, jnp.where(new, positions[..., 0] - blocks.starts[owners], 0), new


def _kernel(pages, offsets, used, new, k, v, _keys, _values, keys, values, key_buffer, value_buffer, semaphore) -> None:
    first, height = pl.program_id(0) * AT_ONCE, key_buffer.shape[2]

    def each_used(body):
        def one(e, _):
            pl.when(used[first + e] > 0)(lambda: body(e))
            return 0

        jax.lax.fori_loop(0, AT_ONCE, one, 0)

    def tile(pool, e):
        return pool.at[pages[first + e], :, pl.ds(pl.multiple_of(offsets[first + e], height), height)]

    both = ((keys, key_buffer, k), (values, value_buffer, v))
    reads = lambda e: [pltpu.make_async_copy(tile(pool, e), buffer.at[e], semaphore) for pool, buffer, _ in both]
    writes = lambda e: [pltpu.make_async_copy(buffer.at[e], tile(pool, e), semaphore) for pool, buffer, _ in both]

    def replace(e):
        for _, buffer, x in both:
            buffer[e] = jnp.where(new[e][None] > 0, x[e], buffer[e])

    def start(copies):
        for copy in copies:
            copy.start()

    def wait(copies):
        for copy in copies:
            copy.wait()

    each_used(lambda e: start(reads(e)))
    each_used(lambda e: wait(reads(e)))
    each_used(replace)
    each_used(lambda e: start(writes(e)))
    each_used(lambda e: wait(writes(e)))
