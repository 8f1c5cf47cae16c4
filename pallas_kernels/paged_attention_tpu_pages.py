"""Pages on a TPU: which it can copy, and a block's tiles of keys, copied page by page."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.numbers import cdiv
from pallas_kernels.paged_attention_inputs import Pages
from pallas_kernels.sizes import LANES
from pallas_kernels.sizes_attention import AttentionSizes

SUBLANE_BYTES = 32  # rows of a memory tile times bytes of a number


def check_pool(pool: Array, interpret: Any) -> None:
    """Raises ValueError for pages that are no whole memory tiles: 8 rows of 32 bits, 16 of 16, 32 of 8, and LANES wide.

    XLA keeps narrower pages in another layout, and would copy the whole pool at every call. The interpreter takes them,
    and float16, which the compiled kernels do not read.
    """
    (page_size, h), dtype = pool.shape[2:], pool.dtype
    unit = SUBLANE_BYTES // dtype.itemsize
    if page_size % unit:
        raise ValueError(
            f"on a TPU the page size of a {dtype.name} cache must be a multiple of {unit}, got {page_size}"
        )
    if not interpret and h % LANES:
        raise ValueError(
            f"on a TPU pages must be a multiple of {LANES} wide, got {h}: "
            "allocate them wider than the heads, with zeros"
        )
    if not interpret and dtype == jnp.float16:
        raise ValueError(
            "the TPU's kernels do not read float16 pages: keep the cache in bfloat16 or float32, "
            "or take implementation 'xla'"
        )


def with_scales_of_positions(pages: Pages, tables: Array, page_size: int) -> Pages:
    """The pages, with scales of every position of every sequence, [S, K, C], in the place of those of every page."""
    if pages.key_scales is None or pages.value_scales is None:
        return pages
    spread = (
        jnp.repeat(pool[jnp.maximum(tables, 0)].swapaxes(1, 2), page_size, axis=2)
        for pool in (pages.key_scales, pages.value_scales)
    )
    return Pages(pages.keys, pages.values, *spread)


def buffers_of(pools: Pages, num_kv_heads: int, sizes: AttentionSizes) -> Any:
    """A Pages of room for two tiles of every pool: one is used while the other is copied."""

    def room(pool):
        return pltpu.VMEM((2, num_kv_heads, sizes.kv_tile, *pool.shape[3:]), pool.dtype)

    return jax.tree.map(room, pools)


class Fetch(NamedTuple):
    """A block's tiles of keys, from `begin` to before `stop`, copied page by page from the pools to either buffer."""

    pools: Pages
    buffers: Pages
    semaphores: Any  # one for each of the two
    table: Any
    slot: Array
    first: Array  # of the positions whose keys the block sees
    end: Array
    page_size: int
    kv_tile: int

    @property
    def begin(self) -> Array:
        return self.first // self.kv_tile

    @property
    def stop(self) -> Array:
        """No less than `begin`; equal where the block sees no key."""
        return jnp.where(self.first < self.end, cdiv(self.end, self.kv_tile), self.begin)

    def start_first(self, buffer: Any) -> None:
        """Start the copies of the first tile, if there is one."""

        @pl.when(self.begin < self.stop)
        def _():
            self.start(self.begin, buffer)

    def start(self, i: Array, buffer: Any) -> None:
        """Start the copies of tile i."""
        for wanted, copies in self._copies(i, buffer):

            @pl.when(wanted)
            def _(copies=copies):
                for copy in copies:
                    copy.start()

    def wait(self, i: Array, buffer: Any) -> None:
        """Wait for the copies of tile i."""
        for wanted, copies in self._copies(i, buffer):

            @pl.when(wanted)
            def _(copies=copies):
                for copy in copies:
                    copy.wait()

    def tile(self, buffer: Any) -> Pages:
        """Refs of the keys, values and scales of the tile in that buffer."""
        return Pages(*(None if side is None else side.at[buffer] for side in self.buffers))  # pyright: ignore[reportArgumentType]

    def _copies(self, i: Array, buffer: Any) -> Iterator[tuple[Array, list]]:
        """(whether a query sees any of it, its copies) for each page of tile i, and for the scales of the whole
        tile."""
        pages_per_tile = self.kv_tile // self.page_size
        for j in range(pages_per_tile):
            position = i * self.kv_tile + j * self.page_size
            page, rows = self.table[0, 0, i * pages_per_tile + j], pl.ds(j * self.page_size, self.page_size)
            wanted = (position < self.end) & (position + self.page_size > self.first)
            sides = (self.pools.keys, self.buffers.keys), (self.pools.values, self.buffers.values)
            yield wanted, [self._copy(pool.at[page], room.at[buffer, :, rows], buffer) for pool, room in sides]
        scales = (self.pools.key_scales, self.buffers.key_scales), (self.pools.value_scales, self.buffers.value_scales)
        for pool, room in scales:
            if pool is not None and room is not None:
                wanted = i >= 0  # always
                positions = pl.ds(pl.multiple_of(i * self.kv_tile, self.kv_tile), self.kv_tile)
                yield wanted, [self._copy(pool.at[self.slot, :, positions], room.at[buffer], buffer)]

    def _copy(self, source: Any, target: Any, buffer: Any) -> Any:
        return pltpu.make_async_copy(source, target, self.semaphores.at[buffer])
