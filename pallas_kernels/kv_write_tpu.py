"""The KV write's TPU body: it reads the memory tiles of a block's tokens, replaces their rows, and writes the tiles
back.

A TPU copies whole memory tiles (8 rows of 32 bits, 16 of 16, 32 of 8), and many copies run at once. Two blocks whose
tokens share a tile must not undo each other, so the later one reads it after the earlier one has written it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.numbers import ceil_to
from pallas_kernels.paged_attention_inputs import PagedBlocks
from pallas_kernels.paged_attention_tpu_pages import SUBLANE_BYTES, check_pool
from pallas_kernels.tiles import tiles_of

AT_ONCE = 8  # blocks that one grid step writes


def kv_write_tpu(
    keys: Array, values: Array, k: Array, v: Array, blocks: PagedBlocks, *, interpret: Any = False
) -> tuple[Array, Array]:
    """Pools `[P, K, p, h]` with the blocks' `[B, r, K, h]` written, in place."""
    rows = jnp.concatenate([k, v], axis=2)
    return write_rows(keys, values, rows.reshape(-1, rows.shape[2] * rows.shape[3]), blocks, interpret=interpret)


def write_rows(
    keys: Array, values: Array, rows: Float[Array, "B*r 2K*h"], blocks: PagedBlocks, *, interpret: Any = False
) -> tuple[Array, Array]:
    """Pools `[P, K, p, h]` with the rows' keys, then their values, written, in place. There are only the grid steps
    that blocks before `num_blocks` need.

    A block's start is a multiple of r, a power of two. Raises ValueError for another r, and for pools that a TPU cannot
    copy tile by tile (paged_attention_tpu_pages.check_pool).
    """
    _, heads, page_size, h = keys.shape
    check_pool(keys, interpret)
    batch, height = blocks.starts.shape[0], SUBLANE_BYTES // keys.dtype.itemsize
    r = rows.shape[0] // batch
    if r & (r - 1):
        raise ValueError(f"a TPU writes blocks of a power of two of tokens, got {r}")
    tiles = max(1, r // height)
    buffer = pltpu.VMEM((AT_ONCE * tiles, heads, height, h), keys.dtype)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    places = _places(blocks, page_size, height)
    operands = (*places, rows, keys, values)
    keys, values = pl.pallas_call(
        functools.partial(_kernel, r=r),
        out_shape=[jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in (keys, values)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(places),
            grid=(tiles_of(blocks.num_blocks, AT_ONCE),),
            in_specs=[pl.BlockSpec((AT_ONCE * r, rows.shape[1]), lambda i, *_: (i, 0)), anywhere, anywhere],
            out_specs=[anywhere, anywhere],
            scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={len(operands) - 2: 0, len(operands) - 1: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), has_side_effects=True),
        name="kv_write_tpu",
        interpret=interpret,
    )(*operands)
    return keys, values


class _Places(NamedTuple):
    """Where the blocks' tokens go; padded to a multiple of AT_ONCE blocks, with blocks of no token."""

    pages: Int[Array, " E"]
    cells: Int[Array, " E"]  # of the page, the first of the memory tile that has the block's first token
    inside: Int[Array, " E"]  # the token's row of the tile
    counts: Int[Array, " E"]
    turns: Int[Array, " E"]  # how many blocks of the grid step come before in the same tile
    most_turns: Int[Array, " G"]  # of the blocks of each grid step


def _places(blocks: PagedBlocks, page_size: int, height: int) -> _Places:
    size = blocks.starts.shape[0]
    slots, starts, counts = (jnp.pad(x, (0, ceil_to(size, AT_ONCE) - size)) for x in blocks[1:4])
    tiles = jax.lax.div(starts, height)
    columns = jnp.minimum(jax.lax.div(starts, page_size), blocks.tables.shape[1] - 1)
    pages, cells = blocks.tables[slots, columns], jax.lax.rem(tiles * height, page_size)
    ids = jnp.where(counts > 0, pages * page_size + cells, -1 - jnp.arange(slots.shape[0]))  # of memory tiles
    steps = ids.reshape(-1, AT_ONCE)
    is_before = jnp.arange(AT_ONCE) < jnp.arange(AT_ONCE)[:, None]
    turns = ((steps[:, None] == steps[:, :, None]) & is_before).sum(-1, dtype=jnp.int32)
    return _Places(pages, cells, jax.lax.rem(starts, height), counts, turns.reshape(-1), turns.max(-1))


class _Side(NamedTuple):
    """The keys or the values: refs of the pool and of the grid step's tiles, and their first head among the rows'."""

    pool: Any
    buffer: Any
    first: int


def _kernel(*refs: Any, r: int) -> None:
    """The pools among the operands are the same memory as those among the results."""
    places, (rows, _, _, keys, values, key_buffer, value_buffer, semaphore) = _Places(*refs[:6]), refs[6:]
    step, (_, heads, height, h) = pl.program_id(0), key_buffer.shape
    tiles = key_buffer.shape[0] // AT_ONCE
    sides = (_Side(keys, key_buffer, 0), _Side(values, value_buffer, heads))
    in_tile = jax.lax.broadcasted_iota(jnp.int32, (height, h), 0)

    def turn(number: Array, _: int) -> int:
        def each(body: Callable[[int, int, Array], None]) -> None:
            """`body(block of the grid step, tile of the block, block)` for the tiles with tokens whose turn it is."""
            for e in range(AT_ONCE):
                for t in range(tiles):
                    b = step * AT_ONCE + e
                    is_used = (places.turns[b] == number) & (places.counts[b] > t * height)
                    pl.when(is_used)(functools.partial(body, e, t, b))

        def copies(e: int, t: int, b: Array, is_read: bool) -> list:
            first = pl.multiple_of(places.cells[b] + t * height, height)
            made = []
            for side in sides:
                cells = side.pool.at[places.pages[b], :, pl.ds(first, height)]
                own = side.buffer.at[e * tiles + t]
                source, target = (cells, own) if is_read else (own, cells)
                made.append(pltpu.make_async_copy(source, target, semaphore))
            return made

        def start(is_read: bool, e: int, t: int, b: Array) -> None:
            for copy in copies(e, t, b, is_read):
                copy.start()

        def wait(is_read: bool, e: int, t: int, b: Array) -> None:
            for copy in copies(e, t, b, is_read):
                copy.wait()

        def replace(e: int, t: int, b: Array) -> None:
            token = in_tile - places.inside[b] + t * height  # of the block, that each row of the tile would hold
            is_new = (token >= 0) & (token < places.counts[b])
            for side in sides:
                for head in range(heads):
                    column = (side.first + head) * h
                    first = e * r + t * height
                    new = rows[first : first + min(r, height), column : column + h]
                    if r == 1:
                        new = jnp.broadcast_to(new, is_new.shape)
                    else:  # fewer rows than a tile's are repeated: one of them is in every place that they may take
                        new = jnp.concatenate([new] * (height // new.shape[0]))
                    at = e * tiles + t, head
                    side.buffer[at] = jnp.where(is_new, new, side.buffer[at])

        each(functools.partial(start, True))
        each(functools.partial(wait, True))
        each(replace)
        each(functools.partial(start, False))
        each(functools.partial(wait, False))
        return 0

    jax.lax.fori_loop(0, places.most_turns[step] + 1, turn, 0)
