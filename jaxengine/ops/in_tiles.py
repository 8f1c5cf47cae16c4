"""The chain's ops in tiles: each is one pinned region (ops/regions.py) around an implementation's products of one tile.

Its promise is kept by the region, and so is its gradient. What stands around the products is XLA's.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.ops.experts import ExpertProducts, Experts, Routing, partial_sums
from jaxengine.ops.heads import PackedHeads, rotated_heads
from jaxengine.ops.linear import by_leaf, join_leaves, with_bias
from jaxengine.ops.live import Live
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.pools import Pools
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.regions import over_tiles, settled
from sharding.leaves import ALL_HERE, Leaves


class TileProducts(ExpertProducts, Protocol):
    """Matrix products of the rows of one tile. Weights carry the leaf axis first; sums are float32."""

    def parts(self) -> dict[str, Any]:
        """What the bits depend on, ready for JSON."""
        ...

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> Float[Array, "t D"]:
        """Rows of the embedding in float32."""
        ...

    def outputs(self, x: Float[Array, "t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "leaf t N"]:
        """x @ w.T for every leaf's outputs. x is rounded to the weights' dtype first."""
        ...

    def gated(self, x: Float[Array, "t K"], w: Float[Array, "leaf F2 K"]) -> Float[Array, "leaf t F"]:
        """silu(gate) · up of a leaf's outputs: gates, then ups."""
        ...

    def summed(self, x: Float[Array, "leaf t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "t N"]:
        """Sum over leaves of x @ w.T, in the fixed order of the tree."""
        ...


@dataclasses.dataclass(frozen=True)
class ProductsInTiles:
    """The products of ops/kernels.py."""

    of_tile: TileProducts

    @property
    def leaves(self) -> Leaves:
        return self.of_tile.leaves

    def with_leaves(self, leaves: Leaves) -> "ProductsInTiles":
        of_tile: Any = self.of_tile
        return ProductsInTiles(dataclasses.replace(of_tile, leaves=leaves))

    def parts(self) -> dict[str, Any]:
        return self.of_tile.parts()

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " R"], live: Live) -> Float[Array, "R D"]:
        return over_tiles(self.of_tile.embed, live.tile, table, ids, live.count)

    def project(
        self,
        x: Float[Array, "R D"],
        norm: Float[Array, " D"],
        eps: float,
        w: Float[Array, "leaf N D"],
        bias: Float[Array, "leaf N"] | None,
        live: Live,
    ) -> tuple[Float[Array, "R D"], Float[Array, "R leaf*N"]]:
        body = functools.partial(_project, self.of_tile, eps)
        return x, over_tiles(body, live.tile, (norm, w, bias), x, live.count)

    def gated(
        self, x: Float[Array, "R D"], norm: Float[Array, " D"], eps: float, w: Float[Array, "leaf F2 D"], live: Live
    ) -> tuple[Float[Array, "R D"], Float[Array, "R leaf*F"]]:
        body = functools.partial(_gated, self.of_tile, eps)
        return x, over_tiles(body, live.tile, (norm, w), x, live.count)

    def add(
        self,
        x: Float[Array, "R D"],
        y: Float[Array, "R leaf*K"],
        w: Float[Array, "leaf D K"],
        bias: Float[Array, " D"] | None,
        live: Live,
    ) -> Float[Array, "R D"]:
        return over_tiles(functools.partial(_add, self.of_tile), live.tile, (w, bias), (x, y), live.count)

    def add_experts(
        self,
        x: Float[Array, "R D"],
        norm: Float[Array, " D"],
        eps: float,
        experts: Experts,
        routing: Routing,
        live: Live,
    ) -> Float[Array, "R D"]:
        body = functools.partial(_add_experts, self.of_tile, eps, routing)
        is_there = jnp.arange(x.shape[0]) < live.count
        return over_tiles(body, live.tile, (norm, experts), (x, is_there), live.count)

    def stream(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        return x

    def finish(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        return x

    def logits(
        self,
        x: Float[Array, "t D"],
        norm: Float[Array, " D"],
        eps: float,
        head: Float[Array, "leaf V D"],
        fresh: Bool[Array, " t"] | None = None,
    ) -> Float[Array, "t V"]:
        """For bfloat16 weights the hidden state is cut into three bfloat16 parts with the float32 number as their sum;
        the parts' products with the weights are exact and are added in float32. So the head is read once, as it is
        stored, and never widened.
        """
        y = rms_norm(x, norm, eps)
        if head.dtype == jnp.bfloat16:
            parts = self.of_tile.outputs(jnp.concatenate(_bfloat16_parts(y)), head)
            high, middle, low = jnp.split(parts, 3, axis=1)
            own = join_leaves(high + (middle + low))
        else:
            own = join_leaves(self.of_tile.outputs(y, head.astype(jnp.float32)))
        return settled(self.leaves.columns(own))


def _bfloat16_parts(x: Float[Array, "t D"]) -> list[Array]:
    """Three bfloat16 arrays with x as their exact sum: each takes the next eight bits.

    The remainder stays float32 and is rounded by reduce_precision, because XLA would fold a conversion and its inverse
    away.
    """
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _project(products: TileProducts, eps: float, weights: tuple, x: Float[Array, "t D"]) -> Float[Array, "t leaf*N"]:
    norm, w, bias = weights
    return with_bias(join_leaves(products.outputs(rms_norm(x, norm, eps), w)), bias)


def _gated(products: TileProducts, eps: float, weights: tuple, x: Float[Array, "t D"]) -> Float[Array, "t leaf*F"]:
    norm, w = weights
    return join_leaves(products.gated(rms_norm(x, norm, eps), w))


def _add(products: TileProducts, weights: tuple, rows: tuple[Array, Array]) -> Float[Array, "t D"]:
    (w, bias), (x, y) = weights, rows
    return with_bias(x + products.summed(by_leaf(y, w.shape[0]), w), bias)


def _add_experts(
    products: TileProducts, eps: float, routing: Routing, weights: tuple, rows: tuple[Array, Array]
) -> Float[Array, "t D"]:
    (norm, experts), (x, is_there) = weights, rows
    y = settled(rms_norm(x, norm, eps))
    return x + products.leaves.sum(partial_sums(products, routing, y, experts, is_there))


class RotatesInTiles:
    """`rotate_and_write` of ops/kernels.py for an implementation that has `write`."""

    def write(
        self, pools: Pools, k: Float[Array, "B r K h"], v: Float[Array, "B r K h"], tables: Array, blocks: QueryBlocks
    ) -> Pools:
        """The pools with k and v of each block in the page that its table names. Copies bits, so it needs no
        pinning."""
        raise NotImplementedError

    def rows_of(self, packed: Float[Array, "R N"]) -> Float[Array, "R N"]:
        return packed

    def rotate_and_write(
        self,
        model_config: ModelConfig,
        packed: PackedHeads,
        pools: Pools,
        tables: Array,
        blocks: QueryBlocks,
        tile: int,
    ) -> tuple[Float[Array, "B r H h"], Pools]:
        batch = blocks.starts.shape[0]
        r = packed.rows.shape[0] // batch
        positions = (blocks.starts[:, None] + jnp.arange(r, dtype=jnp.int32)).reshape(-1)
        heads = rotated_heads(model_config, ALL_HERE, packed, positions, Live(tile, blocks.num_blocks * r))
        q, k, v = (x.reshape(batch, r, *x.shape[1:]) for x in heads)
        return q, self.write(pools, k, v, tables, blocks)
