"""The decoder's ops in plain XLA, laid out and tiled for CPUs. kernels.py says what each op has to be, in_tiles.py what
each product."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import KV_TILE, ModelConfig
from jaxengine.ops.in_tiles import RotatesInTiles
from jaxengine.ops.linear import dot, split_outputs
from jaxengine.ops.pools import Pools
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.regions import over_tiles, settled
from jaxengine.ops.tiles import ATTENTION_TILE
from pallas_kernels.draw import draw_by
from pallas_kernels.draw_reference import Draw, plain_draw
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import Implementation
from pallas_kernels.paged_attention_cpu import paged_attention
from pallas_kernels.pinned_math import silu
from pallas_kernels.sizes import INTERPRETED
from pallas_kernels.truncation_reference import kept_reference
from sharding.leaves import ALL_HERE, Leaves

GROUPED = Implementation("xla", INTERPRETED)  # dots of 16 rows, whatever a region's tile is


@dataclasses.dataclass(frozen=True)
class XlaProducts:
    """One dot at one shape for each product, whatever its tile is part of."""

    leaves: Leaves = ALL_HERE

    def parts(self) -> dict[str, Any]:
        return {}

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> Float[Array, "t D"]:
        """One slice a token, because a gather would make XLA on CPU widen the whole table first."""
        return self.leaves.looked_up(_rows_widened, table, ids)

    def outputs(self, x: Float[Array, "t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "leaf t N"]:
        return split_outputs(self.leaves.shared(settled(x)), w)

    def gated(self, x: Float[Array, "t K"], w: Float[Array, "leaf F2 K"]) -> Float[Array, "leaf t F"]:
        gate, up = jnp.split(self.outputs(x, w), 2, axis=-1)
        return silu(gate) * up

    def summed(self, x: Float[Array, "leaf t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "t N"]:
        return self.leaves.sum(dot(x, w))

    def scores(self, y: Float[Array, "t D"], router: Float[Array, "E D"]) -> Float[Array, "t E"]:
        return dot(y[None], router[None])[0]

    def grouped(
        self, x: Float[Array, "leaf M K"], w: Float[Array, "leaf E N K"], sizes: Int[Array, " E"], *, gated: bool
    ) -> Float[Array, "leaf M R"]:
        return grouped_matmul(x, w, sizes, gated=gated, implementation=GROUPED)


@dataclasses.dataclass(frozen=True)
class XlaAttention(RotatesInTiles):
    """Keys are stored transposed, `[P, K, h, p]`, values as `[P, K, p, h]`: a score is a plain dot with a row of the
    tile's keys.
    """

    def parts(self) -> dict[str, Any]:
        return {}

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        heads, h = model_config.held_key_value_heads, model_config.head_dim
        dtype = storage_dtype(jnp.dtype(model_config.dtype))
        keys = jax.ShapeDtypeStruct((num_pages, heads, h, page_size), dtype)
        return keys, jax.ShapeDtypeStruct((num_pages, heads, page_size, h), dtype)

    def by_token(self, keys: Any, values: Any) -> tuple[Any, Any]:
        return keys.transpose(0, 3, 1, 2), values.transpose(0, 2, 1, 3)

    def tables(self, tables: Int[Array, "slots n"], blocks: QueryBlocks) -> Int[Array, "B n"]:
        """Each block's own."""
        return tables[blocks.slots]

    def write(
        self,
        pools: Pools,
        k: Float[Array, "B r K h"],
        v: Float[Array, "B r K h"],
        tables: Int[Array, "B n"],
        blocks: QueryBlocks,
    ) -> Pools:
        """Rows after a block's count are written as they are: nothing attends to them before their own token overwrites
        them.
        """
        page_size = pools.values.shape[2]
        k, v = _stored(k.transpose(0, 2, 3, 1)), _stored(v.transpose(0, 2, 1, 3))
        pages = jnp.take_along_axis(tables, (blocks.starts // page_size)[:, None], axis=1)[:, 0]
        pages, offsets = jnp.where(blocks.counts > 0, pages, 0), blocks.starts % page_size

        def step(i, pools):
            page, offset, zero = pages[i], offsets[i], jnp.int32(0)
            new_k, new_v = jax.lax.dynamic_slice_in_dim(k, i, 1), jax.lax.dynamic_slice_in_dim(v, i, 1)
            return (
                jax.lax.dynamic_update_slice(pools[0], new_k, (page, zero, zero, offset)),
                jax.lax.dynamic_update_slice(pools[1], new_v, (page, zero, offset, zero)),
            )

        return Pools(*jax.lax.fori_loop(0, blocks.num_blocks, step, tuple(pools)))

    def attend(
        self,
        model_config: ModelConfig,
        pools: Pools,
        q: Float[Array, "B r H h"],
        tables: Int[Array, "B n"],
        blocks: QueryBlocks,
    ) -> Float[Array, "B*r Hh"]:
        body = functools.partial(attend_tile, model_config)
        rows = q, tables, blocks.starts
        attended = over_tiles(body, ATTENTION_TILE, tuple(pools), rows, blocks.num_blocks)
        return attended.reshape(-1, attended.shape[-1])


@dataclasses.dataclass(frozen=True)
class XlaDraw:
    """All rows of a tile at once."""

    def draw_and_score(
        self, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
    ) -> Draw:
        return draw_by(_given_alone if uniforms is None else plain_draw, logits, given, uniforms)

    def kept(
        self, logits: Float[Array, "t V"], top_k: Int[Array, " t"], top_p: Float[Array, " t"], min_p: Float[Array, " t"]
    ) -> Bool[Array, "t V"]:
        return kept_reference(logits, top_k, top_p, min_p)


def _given_alone(logits: Float[Array, "t V"], _: Array, given: Int[Array, " t"]) -> Draw:
    return plain_draw(logits, None, given)


def storage_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """16-bit floats are kept as uint16 (pallas_kernels/paged_attention_cpu.py, load_pages, says why)."""
    return jnp.dtype(jnp.uint16) if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype)


def _stored(x: Array) -> Array:
    dtype = storage_dtype(x.dtype)
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def _rows_widened(table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> Float[Array, "t D"]:
    flat = table.reshape(-1, table.shape[-1])

    def put(i, out):
        return jax.lax.dynamic_update_slice_in_dim(out, slice_widened(flat, ids[i], 1, 0, i), i, 0)

    return jax.lax.fori_loop(0, ids.shape[0], put, jnp.zeros((ids.shape[0], flat.shape[1]), jnp.float32))


def slice_widened(x: Array, start: Array, size: int, axis: int, step: Array) -> Array:
    """`x[start : start + size]` along axis in float32, inside a loop at iteration `step`.

    XLA on CPU slices 16-bit floats by widening them first, and moves the widening of the whole array out of the loop.
    Depends on `step`, so that XLA cannot move it, and fuses it into the slice.
    """
    x, _ = jax.lax.optimization_barrier((x, step))
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis).astype(jnp.float32)


def attend_tile(
    model_config: ModelConfig, pages: tuple[Array, Array], rows: tuple[Array, Array, Array]
) -> Float[Array, "B r Hh"]:
    """Attention of ATTENTION_TILE blocks over their sequences' pages."""
    q, tables, starts = rows
    out = paged_attention(
        q,
        *pages,
        tables,
        starts,
        scale=model_config.head_dim**-0.5,
        kv_tile=KV_TILE,
        dtype=jnp.dtype(model_config.dtype),
    )
    return out.reshape(*out.shape[:2], -1).astype(model_config.dtype)
