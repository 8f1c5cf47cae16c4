"""The decoder's ops by Pallas kernels, on a TPU or a GPU. kernels.py says what each op has to be.

A product runs inside its caller's pinned region, whose element-wise code is still XLA's. Attention and the write take
all blocks at once, because a kernel's bits do not depend on what else it is given; between kernels nothing but copying
and one conversion happens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.ops.in_tiles import RotatesInTiles
from jaxengine.ops.pools import Pools
from jaxengine.ops.query_blocks import QueryBlocks
from pallas_kernels import paged_attention_inputs as inputs
from pallas_kernels.draw import draw_and_score
from pallas_kernels.draw_reference import Draw
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import OF_A_GPU, Implementation
from pallas_kernels.kv_write import kv_write
from pallas_kernels.matmul import matmul
from pallas_kernels.numbers import ceil_to
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.sizes import LANES, MATMUL
from pallas_kernels.sizes_attention import ATTENTION, attention_sizes
from pallas_kernels.truncation import kept
from sharding.leaves import ALL_HERE, Leaves

GPU_WIDTHS = (16, 32, 64, 128, 256)  # of heads in pages: Triton's arrays are powers of two


def check_model(implementation: Implementation, model_config: ModelConfig) -> None:
    """Raises ValueError for a model with a dtype or heads that the kernels do not take."""
    name = implementation.name
    allowed = [dtype for family, dtype in MATMUL if family == implementation.device]
    if model_config.dtype not in allowed:
        raise ValueError(
            f"kernels {name!r} take weights in {' or '.join(allowed)}, got {model_config.dtype}: give another dtype, "
            "or take kernels 'xla'"
        )
    if name in OF_A_GPU and model_config.head_dim > GPU_WIDTHS[-1]:
        raise ValueError(
            f"kernels {name!r} take heads of at most {GPU_WIDTHS[-1]}, got head_dim={model_config.head_dim}: "
            "take kernels 'xla'"
        )


def sizes_of_device(table: dict[tuple[str, str], Any], device: str) -> dict[str, Any]:
    """A device's block sizes by dtype, ready for JSON: those that are part of a sum's bits."""
    return {dtype: sizes.in_bits() for (family, dtype), sizes in table.items() if family == device}


@dataclasses.dataclass(frozen=True)
class PallasProducts:
    """One kernel call for all leaves that are here."""

    implementation: Implementation
    leaves: Leaves = ALL_HERE

    def parts(self) -> dict[str, Any]:
        device = self.implementation.device
        return {"device": device, "matmul": sizes_of_device(MATMUL, device)}

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> Float[Array, "t D"]:
        return self.leaves.looked_up(_rows_gathered, table, ids)

    def outputs(self, x: Float[Array, "t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "leaf t N"]:
        return self._of_leaves(self.leaves.shared(x), w)

    def gated(self, x: Float[Array, "t K"], w: Float[Array, "leaf F2 K"]) -> Float[Array, "leaf t F"]:
        return self._of_leaves(self.leaves.shared(x), w, gated=True)

    def summed(self, x: Float[Array, "leaf t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "t N"]:
        return self.leaves.sum(self._of_leaves(x, w))

    def scores(self, y: Float[Array, "t D"], router: Float[Array, "E D"]) -> Float[Array, "t E"]:
        return matmul(y, router, implementation=self.implementation)

    def grouped(
        self, x: Float[Array, "leaf M K"], w: Float[Array, "leaf E N K"], sizes: Int[Array, " E"], *, gated: bool
    ) -> Float[Array, "leaf M R"]:
        return grouped_matmul(x, w, sizes, gated=gated, implementation=self.implementation)

    def _of_leaves(self, x: Array, w: Array, **how: Any) -> Array:
        """The product of each leaf. x is the leaf's own `[leaf, t, K]`, or all leaves' `[t, K]`."""
        return matmul(x, w, implementation=self.implementation, **how)


def _rows_gathered(table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> Float[Array, "t D"]:
    return table.reshape(-1, table.shape[-1])[ids].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class PallasAttention(RotatesInTiles):
    """Keys and values are laid out alike, `[P, K, p, width]`.

    Where the device wants rows wider than a head, the rest is 0.
    """

    implementation: Implementation

    def parts(self) -> dict[str, Any]:
        device = self.implementation.device
        return {"device": device, "attention": sizes_of_device(ATTENTION, device)}

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        """Raises ValueError for a page size that does not divide the kernel's tile of keys."""
        dtype, heads = jnp.dtype(model_config.dtype), model_config.held_key_value_heads
        width = self._width(model_config.head_dim)
        tile = attention_sizes(self.implementation.device, dtype, width).kv_tile
        if tile % page_size:
            raise ValueError(
                f"kernels {str(self.implementation)!r} take {tile} keys of this model at a time, and whole pages: "
                f"page_size must divide that, got {page_size}"
            )
        pool: Any = jax.ShapeDtypeStruct((num_pages, heads, page_size, width), dtype)
        return pool, pool

    def _width(self, head_dim: int) -> int:
        if self.implementation.name in OF_A_GPU:
            return next(width for width in GPU_WIDTHS if width >= head_dim)
        return ceil_to(head_dim, LANES)

    def by_token(self, keys: Any, values: Any) -> tuple[Any, Any]:
        return keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3)

    def tables(self, tables: Int[Array, "slots n"], blocks: QueryBlocks) -> Int[Array, "slots n"]:
        """All of them: kernels look up a block's own by its slot."""
        return tables

    def write(
        self,
        pools: Pools,
        k: Float[Array, "B r K h"],
        v: Float[Array, "B r K h"],
        tables: Int[Array, "slots n"],
        blocks: QueryBlocks,
    ) -> Pools:
        """Two blocks that hold the same tokens (a probe's) hold the same bits, so the order in which they are written
        does not matter.
        """
        pages = kv_write(inputs.Pages(*pools), k, v, located_blocks(tables, blocks), implementation=self.implementation)
        return Pools(pages.keys, pages.values)

    def attend(
        self,
        model_config: ModelConfig,
        pools: Pools,
        q: Float[Array, "B r H h"],
        tables: Int[Array, "slots n"],
        blocks: QueryBlocks,
    ) -> Float[Array, "B*r Hh"]:
        out = paged_attention(
            q,
            inputs.Pages(*pools),
            located_blocks(tables, blocks),
            scoring=inputs.Scoring(model_config.head_dim**-0.5),
            implementation=self.implementation,
        )
        return out.reshape(out.shape[0] * out.shape[1], -1).astype(model_config.dtype)


def located_blocks(tables: Int[Array, "slots n"], blocks: QueryBlocks) -> inputs.PagedBlocks:
    return inputs.PagedBlocks(tables, blocks.slots, blocks.starts, blocks.counts, blocks.num_blocks)


@dataclasses.dataclass(frozen=True)
class PallasDraw:
    """One kernel call for all rows of a tile."""

    implementation: Implementation

    def draw_and_score(
        self, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
    ) -> Draw:
        return draw_and_score(logits, given, uniforms, implementation=self.implementation)

    def kept(
        self, logits: Float[Array, "t V"], top_k: Int[Array, " t"], top_p: Float[Array, " t"], min_p: Float[Array, " t"]
    ) -> Bool[Array, "t V"]:
        return kept(logits, top_k, top_p, min_p, implementation=self.implementation)
