"""Paged attention: small cases of awkward shapes for tests, decoders' own for measurements. A case makes its pool."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.numbers import cdiv
from pallas_kernels.paged_attention_inputs import EIGHT_BIT, PagedBlocks, Pages, Scoring


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Sequences of some lengths in pages; the last `chunk` tokens of each, or all if there are fewer, are queries."""

    lengths: tuple[int, ...]
    chunk: int = 1
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    page_width: int | None = None  # where pages are wider than heads
    page_size: int = 16
    dtype: str = "float32"
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    spare_pages: int = 3  # in no table, poisoned

    def __str__(self) -> str:
        geometry = [f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}", f"page{self.page_size}", self.dtype]
        parts = [f"{len(self.lengths)}seq{max(self.lengths)}", f"chunk{self.chunk}", *geometry]
        if self.window is not None:
            parts.append(f"window{self.window}")
        if self.soft_cap is not None:
            parts.append(f"cap{self.soft_cap}")
        if self.has_sinks:
            parts.append("sinks")
        return "-".join(parts)

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.head_dim**-0.5, self.window, self.soft_cap)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Keys and values of every sequence, [S, C, K, h]."""
        return len(self.lengths), max(*self.lengths, 1), self.num_kv_heads, self.head_dim

    def tokens(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(queries [S, C, H, h], keys, values [S, C, K, h]) of every position, float32, for any page size and chunk."""
        slots, context, _, h = self.shape
        shapes = (slots, context, self.num_heads, h), self.shape, self.shape
        generators = (np.random.RandomState(3 * seed + i) for i in range(3))
        q, k, v = (rng.randn(*shape).astype(np.float32) for rng, shape in zip(generators, shapes, strict=True))
        return 2 * q, k, v

    def sinks(self) -> Array | None:
        return jnp.linspace(-1.0, 3.0, self.num_heads, dtype=jnp.float32) if self.has_sinks else None

    def tables(self) -> np.ndarray:
        """Pages of each sequence, scattered over the pool; -1, which is no page, past its context."""
        needed = [cdiv(length, self.page_size) for length in self.lengths]
        ids = np.random.RandomState(1).permutation(sum(needed) + self.spare_pages)
        tables = np.full((len(needed), max(*needed, 1)), -1, np.int32)
        for slot, count in enumerate(needed):
            tables[slot, :count], ids = ids[:count], ids[count:]
        return tables

    def pages(self, keys: np.ndarray, values: np.ndarray) -> tuple[Pages, np.ndarray]:
        """(the pool that holds the contexts, tables). Positions without a token are NaN, or the largest integer."""
        tables, (_, _, heads, h) = self.tables(), self.shape
        size = (tables >= 0).sum() + self.spare_pages
        pool = np.full((2, size, heads, self.page_size, self.page_width or h), np.nan, np.float32)
        for slot, length in enumerate(self.lengths):
            for position in range(length):
                page, offset = tables[slot, position // self.page_size], position % self.page_size
                pool[:, page, :, offset, :h] = np.stack([keys[slot, position], values[slot, position]])
                pool[:, page, :, offset, h:] = 0
        return self._store(pool), tables

    def _store(self, pool: np.ndarray) -> Pages:
        dtype = jnp.dtype(self.dtype)
        if self.dtype not in EIGHT_BIT:
            return Pages(*(jnp.asarray(side).astype(dtype) for side in pool))
        scales = 0.01 + 0.03 * np.random.RandomState(2).rand(*pool.shape[:3]).astype(np.float32)
        scaled = pool / scales[..., None, None]
        scales[:, ~np.isfinite(pool).any((0, 2, 3, 4))] = np.nan
        stored = np.nan_to_num(np.rint(scaled), nan=127).clip(-127, 127) if self.dtype == "int8" else scaled
        return Pages(*(jnp.asarray(side).astype(dtype) for side in stored), *map(jnp.asarray, scales))

    def blocks(self, r: int, slots: tuple[int, ...] | None = None) -> tuple[PagedBlocks, np.ndarray]:
        """The queries of some sequences cut into blocks of r, and each block's (slot, start, count)."""
        cut = []
        for slot in range(len(self.lengths)) if slots is None else slots:
            begin, end = max(self.lengths[slot] - self.chunk, 0), self.lengths[slot]
            cut += [(slot, start, min(r, end - start)) for start in range(begin, end, r)] or [(slot, 0, 0)]
        rows = np.array(cut, np.int32)
        places, starts, counts = (jnp.asarray(column) for column in rows.T)
        return PagedBlocks(jnp.asarray(self.tables()), places, starts, counts, jnp.int32(len(rows))), rows

    def abstract(
        self, r: int, num_pages: int = 4096
    ) -> tuple[jax.ShapeDtypeStruct, Pages, PagedBlocks, jax.ShapeDtypeStruct | None]:
        """(queries, pool, blocks, sinks) of the case cut into blocks of r, as shapes: nothing is allocated."""
        slots, context, heads, h = self.shape
        batch = slots * cdiv(self.chunk, r)
        pool = _shape((num_pages, heads, self.page_size, self.page_width or h), self.dtype)
        scales = [_shape((num_pages, heads))] * 2 if self.dtype in EIGHT_BIT else []
        tables, of_blocks = _shape((slots, cdiv(context, self.page_size)), "int32"), _shape((batch,), "int32")
        blocks = PagedBlocks(tables, of_blocks, of_blocks, of_blocks, _shape((), "int32"))
        sinks = _shape((self.num_heads,)) if self.has_sinks else None
        return _shape((batch, r, self.num_heads, h)), Pages(pool, pool, *scales), blocks, sinks

    def queries(self, tokens: np.ndarray, rows: np.ndarray, r: int) -> Array:
        """The blocks' queries [B, r, H, h]; NaN past a block's count."""
        out = np.full((len(rows), r, *tokens.shape[2:]), np.nan, np.float32)
        for b, (slot, start, count) in enumerate(rows):
            out[b, :count] = tokens[slot, start : start + count]
        return jnp.asarray(out)


def with_padding(q: Array, blocks: PagedBlocks, count: int) -> tuple[Array, PagedBlocks]:
    """Queries and blocks with so many blocks of padding after them, whose queries are NaN."""
    slots, starts, counts = (jnp.pad(x, (0, count)) for x in (blocks.slots, blocks.starts, blocks.counts))
    q = jnp.pad(q, ((0, count), (0, 0), (0, 0), (0, 0)), constant_values=jnp.nan)
    return q, blocks._replace(slots=slots, starts=starts, counts=counts)


def _shape(sizes: tuple[int, ...], dtype: str = "float32") -> Any:
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))


EDGES = (0, 1, 15, 16, 17, 32, 33, 64, 65, 131)  # around a page of 16, a tile of 32 and a split of 64
DECODE = (
    AttentionCase(EDGES),
    AttentionCase(EDGES, dtype="bfloat16", has_sinks=True),
    AttentionCase(EDGES, dtype="float16", soft_cap=5.0),
    AttentionCase(EDGES, window=20, has_sinks=True, soft_cap=30.0),
    AttentionCase((70, 3), page_width=64),
    AttentionCase((70, 3), page_size=32, dtype="int8"),
    AttentionCase((70, 3), page_size=32, dtype="float8_e4m3fn", window=33),
)
PREFILL = (
    AttentionCase((0, 1, 17, 75), chunk=40),
    AttentionCase((70, 33), chunk=70, dtype="bfloat16", window=20),
    AttentionCase((40, 12), chunk=24, page_size=32, dtype="int8", has_sinks=True),
)
GROUPS = tuple(AttentionCase((37,), num_heads=group, num_kv_heads=1, dtype="bfloat16") for group in range(1, 17))

# Decoders' own: Qwen3-0.6B's and an 8B's attention, caches of other dtypes, as many key-value heads as heads, narrow
# heads, and chunks, which are cut into blocks of r = 16.
BIG = AttentionCase((4096,) * 8, num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
DECODER = (
    dataclasses.replace(BIG, lengths=(4096,) * 64, num_heads=16),
    dataclasses.replace(BIG, lengths=(4096,) * 64, page_size=64),
    dataclasses.replace(BIG, dtype="float32"),
    dataclasses.replace(BIG, dtype="int8", page_size=32),
    dataclasses.replace(BIG, dtype="float8_e4m3fn", page_size=32),
    dataclasses.replace(BIG, head_dim=256, num_heads=4, num_kv_heads=4),
    dataclasses.replace(BIG, head_dim=64, page_width=128, num_heads=64, window=128, soft_cap=30.0, has_sinks=True),
    dataclasses.replace(BIG, lengths=(4096,) * 4, chunk=512),
    dataclasses.replace(BIG, lengths=(4096,) * 4, chunk=512, window=1024),
)
