"""The decoder's ops on a mesh: each device runs its own kernels on the leaves that it owns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.ops.in_tiles import ProductsInTiles, RotatesInTiles, TileProducts
from jaxengine.ops.kernels import DrawKernel, Kernels
from jaxengine.ops.pools import Pools
from jaxengine.ops.query_blocks import QueryBlocks
from pallas_kernels.draw_reference import Draw
from sharding.leaves import tree_sum

WHOLE = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Split:
    """Weights are split along the mesh's `axis` by leaves, and with them heads of queries, keys, values and pages."""

    mesh: Mesh
    axis: str

    @property
    def leaves(self) -> PartitionSpec:
        """Of `[leaf, …]`."""
        return PartitionSpec(self.axis)

    @property
    def heads(self) -> PartitionSpec:
        """Of `[B, r, heads, …]`."""
        return PartitionSpec(None, None, self.axis)

    @property
    def pages(self) -> PartitionSpec:
        """Of `[P, K, …]`."""
        return PartitionSpec(None, self.axis)

    def on_each(self, function: Callable, inputs: tuple, outputs: Any) -> Callable:
        """The function on each device's own parts."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    def gathered(self, x: Float[Array, "leaf ..."]) -> Float[Array, "all ..."]:
        """Inside `on_each`: all devices' leaves."""
        return jax.lax.all_gather(x, self.axis, tiled=True)


def sharded(own: Kernels, mesh: Mesh, axis: str) -> Kernels:
    """The kernels `own` on every device of the mesh, with the bits of one device that has all leaves.

    XLA cannot split a kernel that it does not look into, so what each device does is written here; all else every
    device computes whole, at the shapes that one device has. Devices exchange numbers by gathering alone, and a sum
    over leaves is finished in the order of the tree.
    """
    split = Split(mesh, axis)
    assert isinstance(own.products, ProductsInTiles)
    products = ProductsInTiles(ShardedProducts(own.products.of_tile, split))
    attention = ShardedAttention(own.attention, split)
    return dataclasses.replace(own, products=products, attention=attention, draw=ShardedDraw(own.draw, split))


@dataclasses.dataclass(frozen=True)
class ShardedProducts:
    """Each device multiplies by its own leaves' weights."""

    own: TileProducts
    split: Split

    def parts(self) -> dict[str, Any]:
        return self.own.parts()

    def embed(self, table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> Float[Array, "t D"]:
        """Each row from the device that has it; the others' words are 0, so that their sum as integers is the row, bit
        for bit.
        """

        def part(table, ids):
            ids -= jax.lax.axis_index(self.split.axis) * table.shape[0] * table.shape[1]
            here = (ids >= 0) & (ids < table.shape[0] * table.shape[1])
            words = jax.lax.bitcast_convert_type(self.own.embed(table, jnp.where(here, ids, 0)), jnp.uint32)
            return jax.lax.psum(jnp.where(here[:, None], words, 0), self.split.axis)

        words = self.split.on_each(part, (self.split.leaves, WHOLE), WHOLE)(table, ids)
        return jax.lax.bitcast_convert_type(words, jnp.float32)

    def outputs(self, x: Float[Array, "t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "leaf t N"]:
        def part(x, w):
            return self.split.gathered(self.own.outputs(x, w))

        return self.split.on_each(part, (WHOLE, self.split.leaves), WHOLE)(x, w)

    def gated(self, x: Float[Array, "t K"], w: Float[Array, "leaf F2 K"]) -> Float[Array, "leaf t F"]:
        """Each device keeps its own leaves', for the product that follows."""
        return self.split.on_each(self.own.gated, (WHOLE, self.split.leaves), self.split.leaves)(x, w)

    def summed(self, x: Float[Array, "leaf t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "t N"]:
        """A device's leaves are a subtree: it adds those, gathers the others' sums and finishes the tree."""

        def part(x, w):
            return tree_sum(self.split.gathered(self.own.summed(x, w)[None]))

        return self.split.on_each(part, (self.split.leaves, self.split.leaves), WHOLE)(x, w)


@dataclasses.dataclass(frozen=True)
class ShardedAttention(RotatesInTiles):
    """Each device attends with its own heads, over its own part of every page."""

    own: Any  # an Attention with a `write`
    split: Split

    def parts(self) -> dict[str, Any]:
        return self.own.parts()

    def pools(self, model_config: ModelConfig, num_pages: int, page_size: int) -> tuple[Any, Any]:
        keys, values = self.own.pools(model_config, num_pages, page_size)
        sharding = NamedSharding(self.split.mesh, self.split.pages)
        return keys.update(sharding=sharding), values.update(sharding=sharding)

    def by_token(self, keys: Any, values: Any) -> tuple[Any, Any]:
        return self.own.by_token(keys, values)

    def tables(self, tables: Int[Array, "slots n"], blocks: QueryBlocks) -> Array:
        return self.own.tables(tables, blocks)

    def write(
        self, pools: Pools, k: Float[Array, "B r K h"], v: Float[Array, "B r K h"], tables: Array, blocks: QueryBlocks
    ) -> Pools:
        pages, heads = Pools(self.split.pages, self.split.pages), self.split.heads
        return self.split.on_each(self.own.write, (pages, heads, heads, WHOLE, WHOLE), pages)(
            pools, k, v, tables, blocks
        )

    def attend(
        self, model_config: ModelConfig, pools: Pools, q: Float[Array, "B r H h"], tables: Array, blocks: QueryBlocks
    ) -> Float[Array, "B*r Hh"]:
        def part(*arrays):
            return self.own.attend(model_config, *arrays)

        pages, columns = Pools(self.split.pages, self.split.pages), PartitionSpec(None, self.split.axis)
        inputs = pages, self.split.heads, WHOLE, WHOLE
        return self.split.on_each(part, inputs, columns)(pools, q, tables, blocks)


@dataclasses.dataclass(frozen=True)
class ShardedDraw:
    """The same draw on every device."""

    own: DrawKernel
    split: Split

    def draw_and_score(
        self, logits: Float[Array, "t V"], given: Int[Array, " t"], uniforms: Float[Array, "t 2"] | None = None
    ) -> Draw:
        """Each device draws from all logits, which it has, and all come to the same token."""
        return self.split.on_each(self.own.draw_and_score, (WHOLE, WHOLE, WHOLE), WHOLE)(logits, given, uniforms)
